"""What cells take before they run: subsets, lengths, FLOPs, rules; what cannot fit is one line that names the cell."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from jaxmed.config import merge
from jaxmed.data.corpus.open import open_source
from jaxmed.errors import UserError
from jaxmed.parallel import chips
from jaxmed.study import cost, forecast
from jaxmed.study.grid import Judge, Study
from jaxmed.train.build import records
from tests.conftest import TINY


@pytest.fixture(scope='module')
def known(corpus):
  return cost.Corpus(str(corpus))


def ready(known, axes, **fields):
  return cost.ready(Study(**(dict(base=TINY, axes=axes) | fields)), known)


def subjects(source, count, seed):
  return set(records.subset(source, count, seed).column('subject').to_pylist())


def test_subsets_are_nested_whole_subjects(corpus):
  source = open_source(corpus).select(split='train')
  sizes = source.column('subject').to_pylist()
  for seed in range(5):
    before = set()
    for count in (1, 2, 5, 16, 31, 64):
      part = records.subset(source, count, seed)
      names = set(part.column('subject').to_pylist())
      assert before <= names
      assert len(part) == sum(sizes.count(n) for n in names) >= count
      assert len(part) - min(sizes.count(n) for n in names) < count  # one subject fewer would not be enough
      before = names
    assert before == set(sizes)
  assert subjects(source, 16, 0) == subjects(source, 16, 0)
  assert len({frozenset(subjects(source, 16, s)) for s in range(8)}) > 4
  assert records.subset(source, 0, 3) is source
  with pytest.raises(UserError, match='loader.records=65 is more than the 64 records'):
    records.subset(source, 65, 0)


def test_a_subset_does_not_depend_on_others(corpus):
  """Leaving a subject out that is not among the first changes nothing."""
  source = open_source(corpus).select(split='train')
  mine = subjects(source, 16, 0)
  other = next(s for s in source.column('subject').to_pylist() if s not in mine)
  rest = source.keep(np.array([s != other for s in source.column('subject').to_pylist()]))
  assert subjects(rest, 16, 0) == mine


def test_records_without_a_subject_stand_for_themselves():
  import pyarrow as pa
  table = pa.table({'id': ['a', 'b', 'c', 'd'], 'subject': ['s', None, None, 's']})

  class Rows:
    path = 'corpus'
    def __len__(self):
      return 4
    def distinct(self, name):
      return np.array([0, 1, 1, 0]), ['s', None]
    def column(self, name):
      return table[name]
    def keep(self, rows):
      return tuple(np.flatnonzero(rows))

  found = {records.subset(Rows(), 1, seed) for seed in range(30)}
  assert found == {(0, 3), (1,), (2,)}


def test_lengths(known):
  seen = lambda equal, axis='batch_size', values=(8, 16): [
      (c.steps, c.seen) for c in ready(known, {axis: list(values)}, equal=equal)]
  assert seen('') == seen('steps') == [(20, 160), (20, 320)]
  assert seen('samples') == [(20, 160), (10, 160)]
  subsets = ready(known, {'samples': [16, 'all']}, equal='epochs')
  assert [(c.samples, c.steps, c.epochs) for c in subsets] == [(16, 5, 2.5), (64, 20, 2.5)]
  assert [c.steps for c in ready(known, {'steps': [7, 9]})] == [7, 9]
  assert [c.steps for c in ready(known, {'epochs': [1.0, 3.0]})] == [8, 24]


def test_equal_flops_and_budgets(known):
  wide, narrow = ready(known, {'encoder.embed_dim': [32, 16]}, equal='flops')
  assert wide.steps == 20 and narrow.steps > 20
  assert narrow.flops == pytest.approx(wide.flops, rel=0.5 / narrow.steps)
  budgets = ready(known, {'budget': [wide.flops, 2 * wide.flops]})
  assert [c.steps for c in budgets] == [20, 40] and budgets[0].params == wide.params > narrow.params
  with pytest.raises(UserError, match=r'cell budget=1000.0: 1000 FLOPs are fewer than the .* of one step'):
    ready(known, {'budget': [1e3]})


def test_flops_are_those_of_the_plan(known):
  from jaxmed.train.build import resolve
  from jaxmed.train.utilization import model_flops
  cell, = ready(known, {'seed': [0]})
  user = merge(TINY, {'data': known.data})
  spec = known.spec(user)
  assert cell.flops == 20 * model_flops(resolve.resolve(user, spec), spec)


def test_what_a_start_would_choose_is_fixed(known):
  cell, = ready(known, {'seed': [3]}, base={k: v for k, v in TINY.items() if k not in ('batch_size', 'learning_rate')})
  assert cell.config['batch_size'] == cell.batch_size == 64 and cell.config['learning_rate'] > 0
  assert cell.config['image_size'] == [16, 16] and cell.config['data'] == known.data and cell.config['seed'] == 3


def test_rules_follow_the_cell(known):
  rate = lambda cell: {'learning_rate': cell['base']['learning_rate'] * cell['samples'] / 64}
  batch = lambda cell: {'batch_size': 8 if cell['samples'] < 64 else 16}
  length = lambda cell: {'steps': cell['seen'] // 10}
  small, whole = ready(known, {'samples': [32, 'all']}, rules=[rate, batch, length], equal='samples')
  assert (small.config['learning_rate'], whole.config['learning_rate']) == (5e-4, 1e-3)
  assert (small.steps, whole.steps) == (16, 16)  # both see 160, whatever the batch
  epochs = lambda cell: {'epochs': 1.0, 'optimizer.b2': 0.95}
  cell, = ready(known, {'seed': [0]}, rules=[epochs])
  assert cell.steps == 8 and cell.config['optimizer'] == {'b2': 0.95}
  own = lambda c: {'seed': c['params'] % 7 + len(c['size']) + c['width']}  # an axis by its label, numbers by theirs
  cell, = ready(known, {'size': {'abc': {}}}, rules=[own])
  assert cell.config['seed'] == cell.params % 7 + 3 + 32


def test_rules_that_fail_are_named(known):
  def wrong(cell):
    return cell['widht']

  def broken(cell):
    return 1 / 0

  for rule, said in ((wrong, "'widht': did you mean 'width'"), (broken, 'rule broken: ZeroDivisionError'),
                     (lambda c: 5, 'gives 5')):
    with pytest.raises(UserError, match=f'cell seed=0: .*{said}'):
      ready(known, {'seed': [0]}, rules=[rule])


@pytest.mark.parametrize('axes, fields, said', [
    ({'samples': [4]}, {}, 'cell samples=4: batch_size 8 is larger than the 4 training records'),
    ({'samples': [1000]}, {}, 'cell samples=1000: loader.records=1000 is more than the 64 records'),
    ({'batch_size': [8, 128]}, {}, 'cell batch_size=128: batch_size 128 is larger than the 64'),
    ({'encoder.dpth': [1]}, {}, "cell dpth=1: .*'encoder.dpth': did you mean 'encoder.depth'"),
    ({'learning_rate': ['fast']}, {}, 'cell learning_rate=fast: learning_rate takes a number'),
    ({'method': ['mea']}, {}, "cell method=mea: .*did you mean 'mae'"),
    ({'channels': [4]}, {}, 'cell channels=4: .*from 1 to 3'),
    ({'sources': ['moon']}, {}, "cell sources=moon: .*'moon'"),
    ({'seed': [0]}, {'base': TINY | {'stepz': 3}}, "base of the study: .*'stepz'"),
    ({'seed': [0]}, {'judges': [Judge('classify', 'tisue')]}, "'tisue': did you mean 'tissue'"),
    ({'seed': [0]}, {'judges': [Judge('classify')]}, 'judge classify has no label'),
    ({'seed': [0]}, {'judges': [Judge('finetune', 'tissue')]}, '--task segment learns the column mask'),
])
def test_what_cannot_run(known, axes, fields, said):
  with pytest.raises(UserError, match=said) as e:
    ready(known, axes, **fields)
  assert '\n' not in str(e.value)


def test_channels_are_hidden_in_training(known):
  one, both, every = ready(known, {'channels': [1, known.channels[0] + ',' + known.channels[2], 'all']})
  assert one.config['loader']['missing'] == ','.join(known.channels[1:]) + '=1'
  assert both.config['loader']['missing'] == f'{known.channels[1]}=1' and 'missing' not in every.config['loader']


def test_memory(known, monkeypatch):
  cells = ready(known, {'encoder.embed_dim': [16, 32]})
  assert cost.check_memory(cells, 1) == []
  assert cells[1].memory > cells[1].state > 4 * 4 * cells[1].params - 1  # weights, gradients, two moments in float32
  monkeypatch.setattr(cost.psutil, 'virtual_memory', lambda: types.SimpleNamespace(total=cells[1].memory - 1))
  warning, = cost.check_memory(cells, 1)
  assert '1 cells may not fit' in warning and 'embed_dim=32' in warning
  monkeypatch.setattr(cost.psutil, 'virtual_memory', lambda: types.SimpleNamespace(total=2 * cells[1].state - 1))
  with pytest.raises(UserError, match='cell embed_dim=32: its weights, moments and gradients take .* GB, 2 at once'):
    cost.check_memory(cells, 2)


def test_a_forecast_adds_up(known):
  study = Study(TINY, {'seed': [0, 1], 'encoder.embed_dim': [16, 32]})
  cells = cost.ready(study, known)
  found = forecast.here(cells, 1e9, 'a guess', 1)
  assert found['hours'] == pytest.approx(sum(c.flops for c in cells) / 1e9 / 3600)
  text = forecast.text(found, len(study.judges))
  assert text.count('\n') == 4 + 2 and '4 cells' in text and 'at a guess' in text
  assert cost.measured_rate(0.01) > 1e8
  assert forecast.rate(None, 5e9) == (5e9, '5 GFLOP/s, as --rate says')


def test_a_plan_without_a_corpus():
  base = {k: v for k, v in TINY.items() if k != 'loader'} | {'batch_size': 8}
  corpus = cost.Corpus(rows=1000, channels=5)
  study = Study(base, {'samples': [100, 'all'], 'encoder.embed_dim': [16, 32]}, equal='epochs')
  cells = cost.ready(study, corpus)
  assert [c.samples for c in cells] == [100, 100, 1000, 1000]
  assert cells[3].steps == pytest.approx(10 * cells[1].steps, abs=10)
  found = forecast.there(cells, corpus, chips.parse('h100:1'))
  assert found['hours'] == found['chip_hours'] > 0 and all(r['fits'] for r in found['cells'])
  assert found['cells'][1]['hours'] / found['cells'][1]['steps'] == pytest.approx(
      found['cells'][3]['hours'] / found['cells'][3]['steps'])
  assert 'analytic' in forecast.text(found, len(study.judges))
  with pytest.raises(UserError, match='loader.records=2000 is more than the 1000'):
    cost.ready(Study(base, {'samples': [2000]}), corpus)
  with pytest.raises(UserError, match='must name a model'):
    cost.ready(Study({'steps': 2}, {'seed': [0]}), corpus)


def test_shapes_are_traced_once(known, monkeypatch):
  calls = []
  real = cost.plan.trace
  monkeypatch.setattr(cost.plan, 'trace', lambda *a: calls.append(1) or real(*a))
  monkeypatch.setattr(cost, 'Sizes', type(cost.Sizes()))
  ready(known, {'seed': [0, 1], 'samples': [16, 32], 'learning_rate': [1e-3, 2e-3], 'steps': [5, 6]})
  assert len(calls) == 1
  assert jax.process_count() == 1


@pytest.mark.parametrize('method, weight, traces', [('mae', 0.0, 1), ('mae', 0.5, 2), ('dino', None, 1)])
def test_classes_and_records_of_a_subset_are_no_shapes(known, monkeypatch, method, weight, traces):
  """Unless a method trains on the classes."""
  calls, sizes = [], type(cost.Sizes())()
  monkeypatch.setattr(cost.plan, 'trace', lambda config, spec: calls.append(spec))
  for classes, rows in ((('a', 'b'), 100), (('a', 'b', 'c'), 200)):
    base = {k: v for k, v in TINY.items() if k != 'objective'}
    config, spec = cost._resolved(merge(base, {'method': method, 'data': known.data}), known)
    if weight is not None:
      config.objective.class_weight, config.objective.num_classes = weight, len(classes)
    sizes.of(config, dataclasses.replace(spec, classes=classes, rows=rows))
  assert len(calls) == traces
