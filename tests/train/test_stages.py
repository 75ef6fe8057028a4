"""Stages of DINOv2 and DINOv3, each from the run before it: their recipes with everything made small."""

import pathlib

import jax
import numpy as np
import pytest

from jaxmed import config as config_lib
from jaxmed.config import merge
from jaxmed.errors import Stopped, UserError
from jaxmed.models.encoders.vit import at_size
from jaxmed.train import loop
from jaxmed.train.build import assemble, rundir
from jaxmed.train.logs import read_rows
from jaxmed.train.step import drawn
from tests.common import record_indices, same, saved_state, start

EXPERIMENTS = pathlib.Path(__file__).parents[2] / 'experiments'
SMALL = {
    'model': 'vit_micro/8', 'image_size': 16, 'batch_size': 4, 'steps': 3, 'learning_rate': 1e-3, 'log_every': 1,
    'checkpoint_every': 3, 'eval_every': 3, 'checkpoint': {'keep': 9}, 'loader': {'threads': 1},
    'encoder': {'embed_dim': 32, 'depth': 1, 'num_heads': 2, 'dtype': 'float32', 'remat': 'none'},
    'objective': {'out_dim': 16, 'hidden_dim': 16, 'bottleneck_dim': 8, 'patch_out_dim': 16, 'patch_bottleneck_dim': 8,
                  'koleo_group': 0},
    'augment': {'local_views': 2, 'local_size': 8, 'jitter_probability': (0.0,), 'color': (), 'grayscale': (0.0,),
                'blur': 0.0, 'solarize': (0.0,)},  # of which the program is half
}


def small(recipe, *changes):
  """A recipe's variant with the sizes of SMALL."""
  return merge(config_lib.load_file(str(EXPERIMENTS / recipe)), SMALL, *changes)


def differs(a, b):
  return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)


def one_step_on(run, params, target):
  """The target after a first step, whose rate is 0."""
  keep = float(assemble.build(*rundir.load_config(run)).objective.momentum(0))
  assert 0.99 < keep < 1
  return jax.tree.map(lambda t, p: keep * t + (1 - keep) * p, target, params)


def losses(run):
  return [r['loss'] for r in read_rows(run / 'metrics.jsonl') if 'loss' in r]


@pytest.fixture(scope='module', autouse=True)
def no_probes():
  """What they measure is tested elsewhere, and they cost a compilation a run."""
  with pytest.MonkeyPatch.context() as m:
    m.setattr(loop, '_probe', lambda *_: {})
    yield


@pytest.fixture(scope='module')
def dinov2(corpus, tmp_path_factory):
  out = tmp_path_factory.mktemp('dinov2') / 'run'
  start(corpus, out, small('dinov2.py:long'))
  return out


def test_dinov2_goes_on_at_high_resolution(dinov2, corpus, tmp_path):
  """Positions are resampled; heads, teacher and centres are those that the first stage ended with."""
  run = tmp_path / 'run'
  large = {'image_size': 32, 'checkpoint_every': 1, 'augment': {'local_size': 16}, 'optimizer': {'warmup_steps': 2}}
  user = small('dinov2.py:high_res', large)
  start(corpus, run, user, init=str(dinov2))
  old, first, last = saved_state(dinov2), saved_state(run, 1), saved_state(run)  # the first step has a rate of 0
  model = assemble.build(*rundir.load_config(dinov2)).objective.encoder
  params, target = (x | {'encoder': at_size(model, x['encoder'], (32, 32))} for x in (old.params, old.target))
  assert params['encoder']['pos_embed'].shape[0] == 1 + 16 and old.params['encoder']['pos_embed'].shape[0] == 1 + 4
  close(first.params, params)
  close(first.target, one_step_on(run, params, target))
  assert differs(old.params, old.target) and differs(first.params, last.params)
  assert len(losses(run)) == 3 and np.isfinite(losses(run)).all()
  wide = merge(user, {'objective': {'hidden_dim': 24}, 'init': str(dinov2)})
  with pytest.raises(UserError, match=r'other heads: params/head/bottleneck/kernel is \(16, 8\) there and \(24, 8\) here'):
    start(corpus, tmp_path / 'wide', wide)
  assert not (tmp_path / 'wide').exists()
  with pytest.raises(UserError, match='init_parts=all takes heads and more from a run, but init=.*config.json is none'):
    start(corpus, tmp_path / 'wide', merge(wide, {'init': str(dinov2 / 'config.json')}))


def test_dinov3_goes_on_from_the_gram_stage_with_all_sizes(corpus, tmp_path, monkeypatch):
  """The student starts from the teacher; stopped and resumed, the run sees the sizes that seed and steps say."""
  gram, high = tmp_path / 'gram', tmp_path / 'high'
  start(corpus, gram, small('dinov3.py:gram', {
      'augment': {'gram_size': 32}, 'objective': {'gram_warmup': 3, 'local_warmup': 3}}))
  rows = [r for r in read_rows(gram / 'metrics.jsonl') if 'loss' in r]
  np.testing.assert_allclose([r['gram_weight'] for r in rows], [0, 1, 2], atol=1e-6)
  assert rows[2]['gram_loss'] > 0
  user = small('dinov3.py:high_res', {
      'augment': {'gram_size': 32, 'sizes': (16, 24), 'local_sizes': (8, 16), 'gram_sizes': (24, 32), 'size_shares': ()},
      'steps': 4, 'checkpoint_every': 1})
  with monkeypatch.context() as m:
    record_indices(m, stop_at=2)
    with pytest.raises(Stopped):
      start(corpus, high, user, init=str(gram))
  old, begun = saved_state(gram), saved_state(high, 1)
  assert differs(old.params, old.target)
  same((begun.params, begun.extra['gram']), (old.target, old.target['encoder']))
  close(begun.target, old.target)
  loop.resume(high, quiet=True)
  keys = [jax.random.fold_in(jax.random.key(0), n) for n in range(4)]
  want = [(16, 24)[int(drawn(key, (0.5, 0.5)))] for key in keys]
  rows = [r for r in read_rows(high / 'metrics.jsonl') if 'loss' in r]
  assert [r['view_size'] for r in rows] == want and {*want[:2]} == {*want[2:]} == {16, 24}
  assert np.isfinite([r['loss'] for r in rows]).all() and differs(old.target, saved_state(high).params)
