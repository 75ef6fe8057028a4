"""evaluate() on small fakes: what it scores, what it refuses and names; no test row is fitted."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest

from jaxmed.data.feed import pipeline
from jaxmed.errors import UserError
from jaxmed.evaluate import metrics, probes, tables
from jaxmed.evaluate.protocols import classify, tasks

from . import fakes


@pytest.fixture(autouse=True)
def batches(monkeypatch):
  monkeypatch.setattr(pipeline, 'eval_batches', fakes.eval_batches)


GOOD, POOR = fakes.FakeEncoder(), fakes.FakeEncoder(noise=8.0)


def column(source, name, values):
  i = source.table.column_names.index(name)
  return dataclasses.replace(source, table=source.table.set_column(i, name, pa.array(values)))


def test_the_result():
  source = fakes.make_source()
  result = classify.Classify().run(GOOD, source, 'region', untrained=POOR, draws=100)
  assert json.loads(json.dumps(result, allow_nan=False)) == result
  assert result['classes'] == ['a', 'b', 'c'] and result['label'] == 'region'
  assert sum(result['splits'].values()) == 230  # 10 rows lack the label
  assert [(r['features'], r['method']) for r in result['rows']] == [
      (f, m) for f in ('trained', 'untrained', 'pixels (PCA)') for m in ('knn', 'logistic')]
  value = {(r['features'], r['method']): r['metrics'] for r in result['rows']}
  assert value['trained', 'logistic']['accuracy']['value'] > 0.9
  assert value['untrained', 'logistic']['accuracy']['value'] < 0.7
  assert value['pixels (PCA)', 'logistic']['accuracy']['value'] > 0.9
  by_pair = {(d['minus'], d['method']): d['metrics'] for d in result['differences']}
  assert set(by_pair) == {(m, p) for m in ('untrained', 'pixels (PCA)') for p in ('knn', 'logistic')}
  d = by_pair['untrained', 'knn']['accuracy']
  assert d['value'] == pytest.approx(value['trained', 'knn']['accuracy']['value']
                                     - value['untrained', 'knn']['accuracy']['value'])
  assert 0 < d['low'] < d['value'] < d['high']
  # The numbers of one row, from the definitions.
  train, test = (source.select(s, 'region') for s in ('train', 'test'))
  y, names = (['abc'.index(v) for v in test.table['region'].to_pylist()], test.table['subject'].to_pylist())
  scores = probes.knn(
    GOOD.embed_source(train, 1)['mean'],
    ['abc'.index(v) for v in train.table['region'].to_pylist()],
    GOOD.embed_source(test, 1)['mean'],
    3,
  )
  assert value['trained', 'knn'].items() >= metrics.intervals(y, scores, names, draws=100).items()
  counts = np.bincount(['abc'.index(v) for v in train.table['region'].to_pylist()])
  assert result['chance']['accuracy'] == pytest.approx(np.mean(np.array(y) == counts.argmax()))
  assert result['chance']['balanced_accuracy'] == pytest.approx(1 / 3)
  assert result['subjects']['test'] == len(set(names))
  assert classify.best_row(result, 'accuracy')['features'] == 'trained'


def test_answers_are_what_the_metrics_are_of():
  source = fakes.make_source()
  answers, result = classify.answers_of(GOOD, source, 'region'), classify.Classify().run(GOOD, source, 'region', draws=100)
  assert answers['known'] == [0, 1, 2]
  for row in result['rows']:
    if row['features'] == 'trained':
      want = metrics.intervals(answers['y'], answers[row['method']], answers['subjects'], draws=100)
      assert row['metrics'].items() >= want.items()


def test_labels_may_be_numbers_and_the_feature_is_chosen():
  result = classify.Classify().run(GOOD, fakes.make_source(), 'grade', feature='cls', draws=10)
  assert result['classes'] == ['0', '1', '2'] and result['feature'] == 'cls'
  assert any('untrained' in n for n in result['notes'])
  assert {d['minus'] for d in result['differences']} == {'pixels (PCA)'}
  with pytest.raises(UserError, match="did you mean 'mean'"):
    classify.Classify().run(GOOD, fakes.make_source(), 'grade', feature='meen')


def test_no_test_row_is_ever_fitted(monkeypatch):
  source, seen = fakes.make_source(), []
  real = probes.logistic

  def spy(*args, **kw):
    seen.append([np.array(a) for a in args[:4]])
    return real(*args, **kw)
  monkeypatch.setattr(probes, 'logistic', spy)
  classify.Classify().run(GOOD, source, 'region', untrained=POOR, draws=5)
  split, region = (source.table[c].to_pylist() for c in ('split', 'region'))
  images = np.where(
    np.array([s == 'test' for s in split])[:, None, None, None], 255 - source.images, source.images
  )
  shuffled = [
    {'a': 'b', 'b': 'c', 'c': 'a'}.get(r) if s == 'test' else r for s, r in zip(split, region, strict=True)
  ]
  other = dataclasses.replace(column(source, 'region', shuffled), images=images)
  classify.Classify().run(GOOD, other, 'region', untrained=POOR, draws=5)
  assert len(seen) == 6
  for before, after in zip(seen[:3], seen[3:], strict=True):
    for a, b in zip(before, after, strict=True):
      np.testing.assert_array_equal(a, b)
  task = tasks.make_task(source, 'region', 0)
  for _, fitted, _, judged in seen:
    np.testing.assert_array_equal(fitted, task.train.y)
    np.testing.assert_array_equal(judged, task.val.y)


def test_without_a_val_split_it_is_cut_by_subject(monkeypatch):
  source, seen = fakes.make_source(splits=('train', 'test')), []
  real = probes.logistic

  def spy(*args, **kw):
    seen.append((len(args[0]), len(args[2])))
    return real(*args, **kw)
  monkeypatch.setattr(probes, 'logistic', spy)
  result = classify.Classify().run(GOOD, source, 'region', draws=5)
  part = tasks.part_of(source, 'train', 'region', ('a', 'b', 'c'))
  fit = tasks.cut(part, 'region', 0)
  assert len(set(part.subjects[~fit])) == 3 and len(set(part.subjects)) == 12  # a fifth, rounded up
  assert not set(part.subjects[fit]) & set(part.subjects[~fit])
  assert seen[0] == (fit.sum(), (~fit).sum()) and result['splits']['val'] == 0
  assert any('cut by subject' in n for n in result['notes'])
  # A cut keeps the only subject of a class among the fitted ones.
  lone = tasks.Part(None, np.array([0, 1, 1, 0, 2, 2]), np.array(list('aabbcd')))
  for seed in range(20):
    assert set(lone.y[tasks.cut(lone, 'x', seed)]) == {0, 1, 2}


def test_a_test_class_that_train_lacks_counts_as_an_error_and_is_named():
  source = fakes.make_source()
  region = [
    r if s == 'test' or r is None else {'c': 'b'}.get(r, r)
    for r, s in zip(source.table['region'].to_pylist(), source.table['split'].to_pylist(), strict=True)
  ]
  result = classify.Classify().run(GOOD, column(source, 'region', region), 'region', draws=20)
  test = [r for r, s in zip(region, source.table['split'].to_pylist(), strict=True) if s == 'test' and r]
  assert any(f'c ({test.count("c")} rows)' in n for n in result['notes'])
  found = classify.best_row(result, 'accuracy')['metrics']
  assert found['accuracy']['value'] <= 1 - test.count('c') / len(test)
  assert found['balanced_accuracy']['value'] <= 2 / 3 + 1e-9
  assert found['auroc']['value'] > 0.7  # classes a and b only


def test_one_test_subject_has_no_interval():
  source = fakes.make_source()
  names = [
    'only' if s == 'test' else n
    for n, s in zip(*(source.table[c].to_pylist() for c in ('subject', 'split')), strict=True)
  ]
  result = classify.Classify().run(GOOD, column(source, 'subject', names), 'region', untrained=POOR, draws=5)
  assert result['rows'][0]['metrics']['accuracy']['low'] is None
  assert any('no intervals' in n for n in result['notes'])
  assert '[n/a]' in tables.text_table(result) and 'n/a' in tables.html_table(result)


def _split(source, change):
  return column(source, 'split', [change.get(s, s) for s in source.table['split'].to_pylist()])


def _shared(source, first, second):
  """The subjects of one split have the names of those of another."""
  return column(source, 'subject', [s.replace(f'{second}-', f'{first}-') for s in source.table['subject'].to_pylist()])


def _train_all(source, value):
  pairs = zip(source.table['region'].to_pylist(), source.table['split'].to_pylist(), strict=True)
  return column(source, 'region', [value if r and s == 'train' else r for r, s in pairs])


@pytest.mark.parametrize(
  ('change', 'label', 'encoder', 'words'),
  [
    (lambda s: s, 'regoin', GOOD, "did you mean 'region'"),
    (lambda s: s, 'nothing', GOOD, 'empty in every row'),
    (lambda s: s, 'id', GOOD, 'different values'),
    (lambda s: _split(s, {'test': 'train'}), 'region', GOOD, "split 'test'.*train, val"),
    (lambda s: _split(s, {'train': 'other'}), 'region', GOOD, "split 'train'"),
    (lambda s: _train_all(s, 'a'), 'region', GOOD, "training rows are 'a'"),
    (
      lambda s: column(s, 'subject', ['same'] * len(s)),
      'region',
      GOOD,
      "subject 'same' has rows in train and in val",
    ),
    (lambda s: _shared(s, 'train', 'test'), 'region', GOOD, "subject 'train-0' has rows in train and in test"),
    (lambda s: _shared(s, 'val', 'test'), 'region', GOOD, "subject 'val-0' has rows in val and in test"),
    (lambda s: s, 'region', fakes.FakeEncoder(nan_rows=2), 'trained encoder: 2 of .* NaN'),
  ],
)
def test_what_is_refused(change, label, encoder, words):
  with pytest.raises(UserError, match=words) as e:
    classify.Classify().run(encoder, change(fakes.make_source()), label, draws=5)
  assert '\n' not in str(e.value)


def test_one_training_subject_and_no_val_split():
  source = fakes.make_source(splits=('train', 'test'), subjects_per_split=1)
  with pytest.raises(UserError, match='one subject'):
    classify.Classify().run(GOOD, source, 'region')


def test_rows_without_a_subject_stand_for_themselves():
  source = fakes.make_source()
  result = classify.Classify().run(
    GOOD, column(source, 'subject', pa.nulls(len(source), pa.string())), 'region', draws=5
  )
  assert result['subjects'] == result['splits']
