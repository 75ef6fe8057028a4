"""What tools/channel_claims.py makes of right and wrong answers."""

import importlib.util
import pathlib
import types

import numpy as np
import pytest

from jaxmed.evaluate import metrics

TOOL = pathlib.Path(__file__).parent.parent.parent / 'tools' / 'channel_claims.py'
SUBSETS = [('a',), ('b',), ('c',), ('a', 'b'), ('a', 'c'), ('a', 'b', 'c')]


@pytest.fixture(scope='module')
def tool():
  spec = importlib.util.spec_from_file_location('channel_claims', TOOL)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def study(tool):
  """A study of three channels whose data nobody opened."""
  out = object.__new__(tool.Study)
  subjects = np.repeat([f's{i}' for i in range(20)], 6)
  out.args = types.SimpleNamespace(data='corpus', label='l', seeds=3)
  out.names, out.subsets, out.notes, out.shares, out.lacking = ('a', 'b', 'c'), SUBSETS, [], ('0.5',), ('c',)
  source = types.SimpleNamespace(distinct=lambda name: (np.zeros(120), ['synthetic']))
  out.task = types.SimpleNamespace(test=types.SimpleNamespace(
    subjects=subjects, y=np.arange(120) % 4, source=source))
  return out


def test_difference_is_that_of_the_metrics(tool):
  """Of answers that are right or wrong, it is metrics.difference_over_runs of accuracy, to the last resample."""
  rng = np.random.default_rng(0)
  y = rng.integers(0, 3, 150)
  subjects = rng.integers(0, 25, 150).astype(str)
  pairs = [(rng.random((150, 3)) + 0.6 * np.eye(3)[y], rng.random((150, 3))) for _ in range(3)]
  want = metrics.difference_over_runs(y, pairs, subjects, draws=tool.DRAWS)['accuracy']
  a, b = (np.stack([(p[k].argmax(axis=1) == y).astype(float) for p in pairs]) for k in (0, 1))
  got = tool.compared(a, b, subjects)
  assert [got[k] for k in ('value', 'low', 'high')] == pytest.approx([want[k] for k in ('value', 'low', 'high')], abs=1e-12)
  assert (got['reproduced'], got['above'], got['seeds']) == ('yes', 3, 3)
  assert tool.compared(b, a, subjects)['reproduced'] == 'no'
  assert tool.compared(a, a, subjects)['reproduced'] == 'undecided'


def test_fewer_is_the_mean_over_numbers_not_subsets(study):
  right = np.zeros((len(SUBSETS), 2), bool)
  right[0] = True, False  # one of three single channels
  right[3] = right[4] = True, True  # both pairs
  assert study.shown(right, 1) == pytest.approx([1 / 3, 0])
  assert study.shown(right, 2) == pytest.approx([1, 1])
  assert study.shown(right, 'fewer') == pytest.approx([2 / 3, 0.5])
  assert study.shown(right, 'all') == pytest.approx([0, 0])


def test_judges_every_claim(tool, study, tmp_path):
  rng = np.random.default_rng(0)
  # Accuracy by arm and number of channels: sampling helps where there are fewer, ChannelViT does where all are there.
  level = {'ChannelViT': (0.3, 0.4, 0.8), 'ViT': (0.3, 0.4, 0.5), 'ChannelViT, HCS': (0.6, 0.7, 0.8),
           'ViT, HCS': (0.3, 0.4, 0.5), 'ChannelViT, HCS, 0.5 lack': (0.5, 0.5, 0.3), 'ViT, HCS, 0.5 lack': (0.5, 0.5, 0.7)}
  assert list(level) == list(study.arms())
  right = {arm: [rng.random((len(SUBSETS), 120)) < np.array([at[len(s) - 1] for s in SUBSETS])[:, None] for _ in range(3)]
           for arm, at in level.items()}
  found = tool.judge(study, right)
  verdict = {(d['claim'], d['what']): d['reproduced'] for d in found}
  assert verdict[1, 'all channels, with HCS'] == verdict[1, 'all channels, without'] == 'yes'
  assert verdict[2, 'fewer channels, ChannelViT'] == verdict[2, '1 of 3, ChannelViT'] == 'yes'
  assert verdict[2, 'fewer channels, ViT'] == 'undecided'
  assert verdict[3, '0.5 lack c'] == 'no'
  accuracy = tool.table(study, right)
  for arm, at in level.items():
    assert [accuracy[arm][str(n)]['value'] for n in (1, 2, 3)] == pytest.approx(at, abs=0.06)
  told = tool.text(study, accuracy, found)
  assert 'synthetic, no real image' in told
  assert 'Claim 3 (0.5 lack c), reproduced: no, -0.' in told
  tool.draw(study, accuracy, tmp_path / 'claims.png')
  assert (tmp_path / 'claims.png').stat().st_size > 5000


def test_arms_are_recipes_with_the_corpus_s_own_channels(tool, study):
  from jaxmed import config

  study.args = types.SimpleNamespace(data='corpus', label='l', size='laptop', steps=5, model_size='tiny', words=['seed=9'])
  user = study.user('ViT, HCS, 0.5 lack', 1)
  assert user['loader'] == {'label': 'l', 'missing': 'c=0.5'}
  assert (user['model'], user['steps'], user['seed']) == ('vit_tiny/16', 5, 9)
  assert user['augment']['channel_sampling'] == 'hcs'
  assert study.user('ChannelViT', 1)['augment']['channel_sampling'] == 'none'
  for recipe in ('all_channels', 'fewer_channels', 'missing_channels'):
    assert set(config.variants(f'{tool.ROOT}/experiments/channel_vit/{recipe}.py')) == {
      'published', 'published_vit', 'laptop', 'laptop_vit'}
