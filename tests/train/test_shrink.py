"""The search over widths of hashed channels: on a known answer, and on a run."""

import json

import numpy as np
import pytest

import jaxmed
from jaxmed import cli
from jaxmed.models.layers.channel_embed import FEATURES
from jaxmed.study import shrink
from jaxmed.train import loop
from tests.conftest import TINY


def test_evolution_finds_what_is_wanted():
  """A bowl over 4 widths of 32: the least loss is found among a million, by a small part of them, and repeatably."""
  want, asked = np.array([3, 17, 30, 9]), []

  def judge(widths):
    asked.append(widths)
    return float(np.square(np.array(widths) - want).sum())

  best, loss = shrink.evolve(judge, 4, 32, 60, seed=0)
  assert loss <= 12 and len(set(asked)) == len(asked) <= 60 * 20
  assert min(judge(tuple(np.random.default_rng(s).integers(1, 33, 4))) for s in range(20)) > loss  # better than chance
  assert shrink.evolve(judge, 4, 32, 60, seed=0) == (best, loss)
  assert shrink.evolve(lambda w: 0.0, 2, 8, 20, seed=0)[0] == (1, 1)  # of equals the narrowest


def test_a_mutation_keeps_most_of_its_parent():
  """A tenth of the widths is drawn anew (OptEmbed's evolution)."""
  rng = np.random.default_rng(0)
  drawn = np.mean([shrink._mutated((0,) * 8, (1,) * 8, rng) for _ in range(2000)])
  assert drawn == pytest.approx(0.1, abs=0.01)


def test_narrowed_matrices_are_those_of_narrow_rows():
  tree = {'encoder': {'channel_hash': {'kernel': np.ones((8, 6, 2)), 'rows': np.ones((4, 3))}, 'kernel': np.ones(3)}}
  out = shrink.narrowed(tree, (3, 1, 2, 3, 3, 3, 3, 3), 3)['encoder']
  np.testing.assert_array_equal(out['channel_hash']['kernel'][1, :, 0], [1, 0, 0, 1, 0, 0])
  np.testing.assert_array_equal(out['channel_hash']['kernel'][2, :, 1], [1, 1, 0, 1, 1, 0])
  assert out['channel_hash']['kernel'].sum() == 2 * (2 + 4 + 6 * 6) and out['channel_hash']['rows'].sum() == 12


def test_a_run_is_shrunk(corpus, trained, tmp_path, capsys):
  """Thresholds move, the file holds an encoder of the widths found, and cutting its table by hand changes nothing."""
  run, out = tmp_path / 'run', tmp_path / 'small.safetensors'
  options = {'channel_embedding': 'hashed', 'hash_rows': 64, 'hash_width': 8, 'hash_prune': 0.1, 'hash_draw': True}
  loop.train(TINY | {'data': str(corpus), 'encoder': options}, run, quiet=True)
  rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  assert any(0 < row.get('penalty', 0) < 0.8 for row in rows)  # eight thresholds that began at zero have risen
  assert cli.main(['shrink', str(run), '--data', str(corpus), '--out', str(out), '--rounds', '2', '--rows', '16',
                   '--json']) == 0
  said = json.loads(capsys.readouterr().out)
  assert said['loss'] <= said['loss_before'] and said['numbers'] <= said['of'] and set(said['features']) == {'name'}
  assert len(said['widths']) == len(FEATURES) and said['widths'][1:] == [8] * 7
  small = jaxmed.load(out)
  assert small.model.hash_widths == tuple(said['widths']) and not small.model.hash_draw
  images = np.random.default_rng(0).integers(0, 255, (2, *small.image_size, 3)).astype(np.uint8)
  before = small.embed(images)['mean']
  params = shrink.narrowed(small.params, said['widths'], 8)
  np.testing.assert_array_equal(before, type(small)(**vars(small) | {'params': params}).embed(images)['mean'])
  assert cli.main(['shrink', str(trained), '--data', str(corpus), '--out', str(out)]) == 2
  assert 'encoder.hash_draw=True' in capsys.readouterr().err
