"""Evaluators by name: which look at a run and when, what they share, and what a run cannot serve."""

import dataclasses
import pathlib
import re
import types

import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.train import evaluators, loop
from jaxmed.train.logs import read_rows
from jaxmed.train.probe import Snapshot
from tests.common import start
from tests.conftest import TINY

ALL = ('health', 'loss', 'knn', 'ridge')


def probe_of(val=4, train=4, label=True, feature='mean', rows=8):
  return types.SimpleNamespace(feature=feature, health_rows=rows, val=range(val),
                               labelled=(range(train), range(val)) if label else ((), ()), predicts='', told=())


def names(text, **has):
  return tuple(evaluators.evaluation(text, 10, 100, probe_of(**has)).evaluators)


@pytest.mark.parametrize('has, found', [
    ({}, ALL), ({'label': False}, ('health', 'loss')), ({'val': 0}, ('health',)), ({'train': 0}, ('health', 'loss')),
    ({'feature': ''}, ('loss',)), ({'val': 0, 'rows': 1}, ())])
def test_by_default_those_that_a_run_can_serve(has, found):
  assert names('', **has) == found


@pytest.mark.parametrize('text, has, words', [
    ('loss,kn', {}, "'kn'.*'knn'"), ('loss,loss', {}, 'evaluators=loss,loss has loss twice'),
    ('knn:often', {}, "'knn:often'.*knn:500"), ('knn:0', {}, 'expected a number of steps'),
    ('knn', {'label': False}, 'evaluators=knn cannot look at this run: it needs .*loader.label'),
    ('loss,ridge', {'val': 0}, 'evaluators=loss .*records of split val'),
    ('health', {'feature': ''}, 'evaluators=health .*a method with features')])
def test_what_is_refused(text, has, words):
  with pytest.raises(UserError, match=words) as e:
    names(text, **has)
  assert '\n' not in str(e.value)


def test_each_looks_at_its_own_steps_and_all_at_the_last():
  made = evaluators.evaluation('ridge, knn:15,loss', 10, 47, probe_of())
  due = {n: made.due(n) for n in range(1, 48) if made.due(n)}
  assert due == {10: ('ridge', 'loss'), 15: ('knn',), 20: ('ridge', 'loss'), 30: ('ridge', 'knn', 'loss'),
                 40: ('ridge', 'loss'), 45: ('knn',), 47: ('ridge', 'knn', 'loss')}


def test_collapse_is_looked_for_where_health_is_fresh():
  both, without = (evaluators.evaluation(text, 10, 100, probe_of()) for text in ('health,knn:5', 'knn:5'))
  assert both.tells_collapse(('health', 'knn')) and not both.tells_collapse(('knn',))
  assert without.tells_collapse(('knn',))  # entropies of a teacher tell it too


def test_records_are_embedded_once_for_all(trained, corpus, monkeypatch):
  """The default list on a real run: kNN, the linear probe and the page's own evaluator read the same features."""
  from jaxmed.data.corpus.open import open_source
  from jaxmed.encoder import Encoder
  from jaxmed.parallel import mesh as mesh_lib
  from jaxmed.train.build.rundir import load_state
  from jaxmed.train.probe import Probe
  trainer, config, spec, state = load_state(trained)
  config.loader.label = 'tissue'
  probe = Probe(trainer, config, spec, open_source(corpus), mesh_lib.make_mesh({'data': 0}), lambda: None)
  sizes, embed = [], Encoder.embed_source
  monkeypatch.setattr(Encoder, 'embed_source', lambda self, part: sizes.append(len(part)) or embed(self, part))
  page = pathlib.Path(__file__).parents[2] / 'docs' / 'develop' / 'add-an-evaluator.md'
  monkeypatch.setattr(evaluators, 'EVALUATORS', dict(evaluators.EVALUATORS))
  exec(re.search(r'```python\n(.*?)```', page.read_text(encoding='utf-8'), re.DOTALL)[1], {'__name__': 'page'})
  evaluation = evaluators.evaluation('', 10, 40, probe)
  assert tuple(evaluation.evaluators) == (*ALL, 'spread')
  found = evaluation(state, ('knn', 'ridge', 'spread'))
  assert sizes == [64, 16]
  snapshot = Snapshot(probe, state)
  train_x, train_y, val_x, val_y, classes = snapshot.labelled
  assert classes == 2 and train_x.shape == (64, 32) and val_y.shape == (16,)
  scores = evaluators.probes.knn(train_x, train_y, val_x, classes)
  assert found['knn'] == np.mean(scores.argmax(axis=1) == val_y) and set(found) == {'knn', 'ridge', 'spread'}
  assert found['spread'] == pytest.approx(train_x.std(), rel=1e-5)


@dataclasses.dataclass(frozen=True)
class Norm:
  """One of a user's own, with an option."""

  every: int
  power: float = 2.0

  needs = 'nothing'

  def wants(self, probe):
    return probe.feature != ''

  def __call__(self, snapshot):
    return {'bias': float((np.abs(np.asarray(snapshot.encoder.params['norm']['bias'])) ** self.power).sum())}


def test_a_run_with_its_own_list(corpus, tmp_path, monkeypatch):
  """An own evaluator every 5 steps beside the loss; health is there at step 0 alone, without labels there is no kNN."""
  monkeypatch.setitem(evaluators.EVALUATORS, 'norm', Norm)
  with pytest.raises(UserError, match='evaluators=knn cannot look at this run'):
    start(corpus, tmp_path / 'bad', TINY, evaluators='loss,knn')
  assert not (tmp_path / 'bad').exists()
  start(corpus, tmp_path / 'run', TINY, evaluators='loss,norm:5')
  rows = read_rows(tmp_path / 'run' / 'metrics.jsonl')
  at = lambda key: [r['step'] for r in rows if key in r]
  assert (at('rankme'), at('val_loss'), at('bias')) == ([0], [10, 20], [5, 10, 15, 20])
  summary = loop.resume(tmp_path / 'run', {'evaluators': 'health'}, quiet=True)  # it is at its end
  assert summary['steps'] == 20
