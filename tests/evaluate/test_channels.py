"""Evaluation by subsets of channels: contributions against the definition, subsets against images that lack channels."""

import itertools
import math

import numpy as np
import pytest

from jaxmed import cli
from jaxmed.errors import UserError
from jaxmed.evaluate.protocols import channels


def shapley_by_definition(names, value):
  out = {}
  for name in names:
    rest = [n for n in names if n != name]
    out[name] = sum(
        math.factorial(k) * math.factorial(len(rest) - k) / math.factorial(len(names))
        * (value[frozenset((*s, name))] - value[frozenset(s)])
        for k in range(len(names)) for s in itertools.combinations(rest, k))
  return out


@pytest.mark.parametrize('count', [1, 2, 3, 5])
def test_contributions_are_shapleys(count):
  names = [f'c{i}' for i in range(count)]
  rng = np.random.default_rng(count)
  value = {frozenset(s): float(rng.normal()) for k in range(count + 1) for s in itertools.combinations(names, k)}
  have = channels.shapley(names, {s: np.asarray(value[frozenset(s)]) for k in range(1, count + 1)
                                  for s in itertools.combinations(names, k)}, value[frozenset()])
  want = shapley_by_definition(names, value)
  for name in names:
    assert have[name] == pytest.approx(want[name], abs=1e-9)
  assert sum(have.values()) == pytest.approx(value[frozenset(names)] - value[frozenset()])


def test_contributions_of_a_sample_are_near_and_add_up():
  """Of a sum of channels' own values every sample tells the whole truth."""
  names, own = [f'c{i}' for i in range(9)], np.arange(9.0)
  tried = channels.chosen_subsets(names, 60, np.random.default_rng(0))
  assert len(tried) == len(set(tried)) == 60
  assert {len(s) for s in tried} == set(range(1, 10)) and sum(len(s) == 1 for s in tried) == 9
  have = channels.shapley(names, {s: np.asarray(sum(own[names.index(n)] for n in s)) for s in tried}, 0.0)
  np.testing.assert_allclose([have[n] for n in names], own, atol=1e-9)


def test_subsets():
  assert channels.chosen_subsets('abc', 7, None) == [('a',), ('b',), ('c',), ('a', 'b'), ('a', 'c'), ('b', 'c'),
                                               ('a', 'b', 'c')]
  with pytest.raises(UserError, match='--subsets 5 is too few: each of 8 channels'):
    channels.chosen_subsets('abcdefgh', 5, None)


def test_a_subset_is_an_image_without_the_others(trained, corpus):
  """Features of subsets equal those of images that have these channels alone; all of them are `embed_source`'s."""
  import jaxmed
  from jaxmed.data.corpus.open import open_source
  from jaxmed.data.resize import resize
  encoder = jaxmed.load(trained)
  source = open_source(corpus).select(split='test')
  subsets = [('R',), ('G', 'B'), ('R', 'G', 'B')]
  have = encoder.embed_subsets(source, subsets, batch_size=5)
  np.testing.assert_allclose(have[2], encoder.embed_source(source)['mean'], atol=1e-5)
  images = np.stack([resize(source[i]['image'], encoder.image_size) for i in range(len(source))])
  for place, names in zip(((0,), (1, 2)), subsets[:2], strict=True):
    want = encoder.embed(images[..., place], channels=names)['mean']
    np.testing.assert_allclose(have[subsets.index(names)], want, atol=1e-5)


def test_a_row_without_the_channel_disturbs_no_other(trained, mixed_corpus):
  """Gray records have no R, G or B; beside them the others' features are what they are alone."""
  import jaxmed
  from jaxmed.data.corpus.open import open_source
  encoder = jaxmed.load(trained)
  source = open_source(mixed_corpus).select(split='test')
  colour = np.array([len(c) == 3 for c in source.table['channels'].to_pylist()])
  lone = source.keep(colour)
  assert 0 < len(lone) < len(source)
  want = encoder.embed_subsets(lone, [('G',)])[0]
  import dataclasses
  wide = dataclasses.replace(encoder, channels=(*encoder.channels, {'name': 'gray', 'mean': 0.0, 'std': 1.0}))
  have = wide.embed_subsets(source, [('G',)])[0]
  np.testing.assert_allclose(have[colour], want, atol=1e-5)
  assert np.isfinite(have).all()


def test_the_command(trained, corpus, tmp_path, capsys):
  words = ['evaluate', str(trained), '--data', str(corpus), '--label', 'tissue', '--channels', 'all', '--beside',
           str(trained), '--out', str(tmp_path / 'by.json')]
  assert cli.main(words) == 0
  text = capsys.readouterr().out
  assert '7 of 7 subsets' in text and 'contribution' in text
  assert (tmp_path / 'by.png').stat().st_size > 1000
  lines = (tmp_path / 'by.csv').read_text().splitlines()
  assert len(lines) == 1 + 2 * 7 * 6  # methods, subsets, metrics: both encoders are the same run
  import json
  found = json.loads((tmp_path / 'by.json').read_text())[str(trained)]['methods']['logistic']
  assert [c['subsets'] for c in found['counts']] == [3, 3, 1]
  whole = found['counts'][2]['metrics']['accuracy']['value']
  mean = np.mean([s['metrics']['accuracy']['value'] for s in found['subsets'] if len(s['channels']) == 2])
  assert found['counts'][1]['metrics']['accuracy']['value'] == pytest.approx(mean)
  shares = [found['shapley'][c]['accuracy']['value'] for c in 'RGB']
  assert sum(shares) == pytest.approx(whole - 0.5)  # two classes, as many rows of each
  assert cli.main([*words[:-4], '--subsets', '2']) == 2
  assert cli.main([*words[:6], '--channels', 'R']) == 2


def test_maps_are_means_over_channels(trained, mixed_corpus, corpus, tmp_path):
  """[H, W, D] of a ChannelViT, also where some records lack channels; the command writes them."""
  import dataclasses

  import jaxmed
  from jaxmed.data.corpus.open import open_source
  encoder = jaxmed.load(trained)
  image = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)
  found = encoder.embed(image)
  assert found['map'].shape == (2, 2, 2, 32)
  np.testing.assert_allclose(found['map'], found['patches'].mean(axis=1), atol=1e-6)
  np.testing.assert_allclose(found['map'].mean(axis=(1, 2)), found['mean'], atol=1e-5)
  wide = dataclasses.replace(encoder, channels=(*encoder.channels, {'name': 'gray', 'mean': 0.0, 'std': 1.0}))
  source = open_source(mixed_corpus).select(split='test')
  found = wide.embed_source(source, dense=True)
  np.testing.assert_allclose(found['map'].mean(axis=(1, 2)), found['mean'], atol=1e-5)
  words = ['embed', str(trained), '--data', str(corpus), '--split', 'test', '--feature', 'map', '--out']
  assert cli.main([*words, str(tmp_path / 'a.npz')]) == 0
  assert np.load(tmp_path / 'a.npz')['features'].shape == (16, 2, 2, 32)
