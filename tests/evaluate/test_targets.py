"""Kinds of targets of classify: which one a column asks for, what each scores, what is told and what is refused."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
from sklearn import metrics as sk

from jaxmed.data.feed import pipeline
from jaxmed.errors import UserError
from jaxmed.evaluate import operating, page, probes, protocols, tables
from jaxmed.evaluate.protocols import classify, tasks
from jaxmed.evaluate.protocols.classify import Classify, kind_of

from . import fakes

GOOD, POOR = fakes.FakeEncoder(), fakes.FakeEncoder(noise=8.0)


@pytest.fixture(autouse=True)
def batches(monkeypatch):
  monkeypatch.setattr(pipeline, 'eval_batches', fakes.eval_batches)


def with_columns(source, **columns):
  table = source.table
  for name, values in columns.items():
    table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
  return dataclasses.replace(source, table=table)


@pytest.fixture
def source():
  """Three classes by `grade`; an age that follows it, findings in several columns, as lists and as text."""
  found = fakes.make_source()
  rng = np.random.default_rng(0)
  grade = found.table['grade'].to_pylist()
  age = [None if g is None else 30.0 + 12 * g + rng.normal() for g in grade]
  low = [None if g is None else -1 if i % 9 == 0 else int(g == 0) for i, g in enumerate(grade)]
  high = ['' if g is None else str(g == 2) for g in grade]
  never = [0] * len(grade)
  lists = [None if g is None else ['a'] if g == 0 else ['a', 'b'] if g == 1 else [] for g in grade]
  text = [None if v is None else '|'.join(v) for v in lists]
  stage = [None if g is None else ('mild', 'severe', 'none')[g] for g in grade]
  return with_columns(found, age=age, years=[None if a is None else round(2 * a) for a in age], low=low, high=high,
                      never=never, lists=pa.array(lists, pa.list_(pa.string())), text=text, stage=stage,
                      big=[None if g is None else g * 5 + 5 for g in grade])


def test_what_a_column_is_taken_as(source):
  want = {'region': 'classes', 'grade': 'classes', 'age': 'number', 'years': 'number', 'low,high': 'labels',
          'lists': 'labels', 'text': 'labels', 'low': 'classes', 'high': 'classes', 'stage': 'classes', 'nothing': 'classes'}
  assert {label: kind_of(source, label) for label in want} == want
  many = with_columns(source, code=[i % 21 for i in range(240)])
  assert kind_of(many, 'code') == 'number' and kind_of(many, 'code,low') == 'labels'


def test_a_number(source, tmp_path):
  result = Classify().run(GOOD, source, 'age', untrained=POOR, draws=50)
  assert result['target'] == 'number' and json.loads(json.dumps(result, allow_nan=False)) == result
  assert result['headline'] == 'r2' and {r['method'] for r in result['rows']} == {'knn', 'ridge'}
  cells = {(r['features'], r['method']): r['metrics'] for r in result['rows']}
  assert cells['trained', 'ridge']['r2']['value'] > 0.5 > cells['untrained', 'ridge']['r2']['value']
  train, val, test = (source.select(s, 'age') for s in ('train', 'val', 'test'))
  y = [np.array(s.table['age'].to_pylist()) for s in (train, val, test)]
  x = [GOOD.embed_source(s, 1)['mean'] for s in (train, val, test)]
  told = probes.ridge_numbers(x[0], y[0], x[1], y[1], x[2])[0]
  assert cells['trained', 'ridge']['mae']['value'] == pytest.approx(sk.mean_absolute_error(y[2], told))
  assert cells['trained', 'ridge']['r2']['value'] == pytest.approx(sk.r2_score(y[2], told))
  knn = probes.knn_mean(x[0], y[0][:, None], x[2])[:, 0]
  assert cells['trained', 'knn']['mae']['value'] == pytest.approx(sk.mean_absolute_error(y[2], knn))
  assert result['chance']['mae'] == pytest.approx(np.abs(y[2] - y[0].mean()).mean())
  assert any(n.startswith('target number: the column holds 230 different') for n in result['notes'])
  text = Classify().tables(result)
  assert 'a number; rows' in text and 'MAE' in text and max(map(len, text.splitlines())) <= 100
  drawn = Classify().drawings(result, source)
  assert list(drawn) == ['numbers']
  drawn['numbers'](tmp_path / 'n.png')
  assert (tmp_path / 'n.png').stat().st_size > 5000
  # Lower is better: the smallest error is bold, and the verdict knows.
  said = tables.verdict(result)
  assert 'beats the untrained one on every metric' in said
  assert classify.best_row(result, 'mae')['metrics']['mae']['value'] == min(
    r['metrics']['mae']['value'] for r in result['rows'] if r['features'] == 'trained')


def test_labels_in_columns(source):
  result = Classify().run(GOOD, source, 'low,high,never', untrained=POOR, draws=50)
  assert result['target'] == 'labels' and result['classes'] == ['low', 'high', 'never']
  assert json.loads(json.dumps(result, allow_nan=False)) == result
  rows = {(r['features'], r['method']): r for r in result['rows']}
  split, low = (np.array(source.table[c].to_pylist(), object) for c in ('split', 'low'))
  known = np.array([v in (0, 1) for v in low])
  train, val, test = ((split == s) & known for s in ('train', 'val', 'test'))
  x = GOOD.embed_source(source, 1)['mean']
  y = np.where(known, low, -1).astype(int)
  scores = probes.logistic(x[train], y[train], x[val], y[val], x[test], 2)[0][:, 1]
  cells = rows['trained', 'logistic']['labels']['low']
  assert cells['auroc']['value'] == pytest.approx(sk.roc_auc_score(y[test], scores))
  assert cells['ap']['value'] == pytest.approx(sk.average_precision_score(y[test], scores))
  assert (cells['positive'], cells['known']) == ((y[test] == 1).sum(), test.sum())
  knn = probes.knn(x[train], y[train], x[test], 2)[:, 1]
  cells = rows['trained', 'knn']['labels']
  assert cells['low']['auroc']['value'] == pytest.approx(sk.roc_auc_score(y[test], knn), abs=1e-6)
  assert cells['never']['auroc']['value'] is None and cells['never']['known'] == 0
  for m in ('auroc', 'ap'):
    assert rows['trained', 'knn']['metrics'][m]['value'] == pytest.approx(
      np.mean([cells[k][m]['value'] for k in ('low', 'high')]))
  notes = ' '.join(result['notes'])
  lost = [np.sum((split == s) & ~known) + np.sum((split == s) & np.array([v == '' for v in source.table['high'].to_pylist()]))
          for s in ('train', 'val', 'test')]
  assert f'left out: {lost[0]} train, {lost[1]} val, {lost[2]} test, of 3 a row' in notes
  assert 'labels of one value among the training rows, or of none among the validation rows, left out: never' in notes
  assert 'labels that no test row lacks' not in notes
  assert 'By label, trained' in Classify().tables(result) and '<h3>By label, trained</h3>' in Classify().html(result)


def test_labels_of_lists_and_of_text_are_the_same(source):
  results = [Classify().run(GOOD, source, label, draws=5) for label in ('lists', 'text')]
  assert results[0]['classes'] == results[1]['classes'] == ['a', 'b']
  assert results[0]['rows'][0]['labels']['b'] == results[1]['rows'][0]['labels']['b']
  assert results[0]['splits'] == results[1]['splits'] and sum(results[0]['splits'].values()) == 230


def test_ordered_classes(source):
  result = Classify('ordinal').run(GOOD, source, 'big', untrained=POOR, draws=30)
  assert result['classes'] == ['5', '10', '15'] and result['headline'] == 'kappa'
  answers = classify.answers_of(GOOD, source, 'big')  # classes as text: 10, 15, 5
  grade = np.array([1, 2, 0])
  y, told = grade[answers['y']], grade[answers['knn'].argmax(axis=1)]
  cell = result['rows'][0]['metrics']
  assert cell['kappa']['value'] == pytest.approx(sk.cohen_kappa_score(y, told, weights='quadratic'))
  assert cell['mae']['value'] == pytest.approx(np.abs(y - told).mean())
  assert cell['balanced_accuracy']['value'] == pytest.approx(sk.balanced_accuracy_score(y, told))
  assert result['chance']['kappa'] == 0 and 'classes in the order 5 < 10 < 15' in result['notes']
  named = Classify('ordinal', order='none,mild,severe').run(GOOD, source, 'stage', draws=5)
  assert named['classes'] == ['none', 'mild', 'severe']
  with pytest.raises(UserError, match="'mild' is no number.*classify.order=LOW"):
    Classify('ordinal').check(source, 'stage')
  with pytest.raises(UserError, match="class of classify.order 'severe'"):
    Classify('ordinal', order='none,mild').check(source, 'stage')


def test_classes_have_f1_and_calibration(source):
  result = Classify().run(GOOD, source, 'region', draws=30)
  answers = classify.answers_of(GOOD, source, 'region')
  row = result['rows'][0]
  told = answers['knn'].argmax(axis=1)
  assert row['metrics']['macro_f1']['value'] == pytest.approx(sk.f1_score(answers['y'], told, average='macro'))
  truth = np.eye(3)[answers['y']]
  assert row['metrics']['brier']['value'] == pytest.approx(np.square(answers['knn'] - truth).sum(axis=1).mean())
  assert row['confusion'] == sk.confusion_matrix(answers['y'], told).tolist()
  bins = row['reliability']
  assert row['metrics']['ece']['value'] == pytest.approx(
    sum(b['rows'] * abs(b['accuracy'] - b['confidence']) for b in bins) / len(told))
  assert all(row['metrics'][m]['low'] <= row['metrics'][m]['value'] for m in ('macro_f1', 'brier'))
  common = np.bincount(tasks.make_task(source, 'region', 0).train.y).argmax()
  constant = np.full(len(told), common)
  assert result['chance']['macro_f1'] == pytest.approx(sk.f1_score(answers['y'], constant, average='macro'))


def test_the_headline_alone_is_that_of_all_metrics(source):
  task = tasks.make_task(source, 'region', 0)
  values = classify.answers_of(GOOD, source, 'region')['knn']
  for protocol in (classify.Classes(), classify.Ordinal()):
    value, drawn = protocol.headline_outcome(values, task, 40, 3)
    assert value == pytest.approx(protocol.score(values, task)[protocol.headline])
    np.testing.assert_allclose(drawn, protocol.resampled(values, task, 40, 3)[protocol.headline], atol=1e-12)


def test_an_operating_point_is_found_on_validation_rows(source):
  result = Classify(positive='b', sensitivity=0.9).run(GOOD, source, 'region', untrained=POOR, draws=40)
  task = tasks.make_task(source, 'region', 0)
  x = tasks.encoded(GOOD, task, 'mean', 64, 'trained')
  both = np.concatenate([x['val'], x['test']])
  scores = probes.logistic(x['train'], task.train.y, x['val'], task.val.y, both, 3, refit=False)[0][:, 1]
  val, test = scores[:len(x['val'])], scores[len(x['val']):]
  limit = operating.threshold(task.val.y == 1, val, 0.9)
  found = next(r['operating'] for r in result['rows'] if (r['features'], r['method']) == ('trained', 'logistic'))
  assert found['threshold'] == pytest.approx(limit) and found['positive'] == 'b'
  assert found['val']['sensitivity'] >= 0.9
  assert found['metrics'] == operating.at(task.test.y == 1, test, limit, task.test.subjects, draws=40)
  text = Classify().tables(result)
  assert "Operating point of 'b': sensitivity 0.9 on validation rows" in text and 'ppv' in text
  two = with_columns(source, ill=[None if g is None else ('No', 'Yes')[g == 2] for g in source.table['grade'].to_pylist()])
  result = Classify(sensitivity=1).run(GOOD, two, 'ill', draws=5)
  assert result['rows'][0]['operating']['positive'] == 'Yes'
  assert Classify(positive=0).positive == '0' and Classify(positive=True).positive == 'true'  # as the command reads them
  assert Classify('ordinal', order=(False, True)).order == ('false', 'true')
  found = protocols.get('classify', {'classify.positive': 0, 'classify.sensitivity': 1, 'classify.probes': 'knn'})[0]
  assert found.run(GOOD, source, 'grade', draws=5)['rows'][0]['operating']['positive'] == '0'


def test_few_labels(source, tmp_path):
  ask = Classify(fractions='10,50,100', seeds=2)
  result = ask.run(GOOD, source, 'region', untrained=POOR, draws=30, pixels=False)
  few = result['few_labels']
  assert few['metric'] == 'balanced_accuracy' and few['fractions'] == [10, 50, 100]
  assert few['subjects'] == [1, 6, 12] and json.loads(json.dumps(result, allow_nan=False)) == result
  curves = {(c['features'], c['method']): c for c in few['curves']}
  points = curves['trained', 'logistic']['points']
  task = tasks.make_task(source, 'region', 0)
  x = tasks.encoded(GOOD, task, 'mean', 64, 'trained')
  whole = probes.logistic(x['train'], task.train.y, x['val'], task.val.y, x['test'], 3, refit=False)[0]
  assert points[-1]['value'] == pytest.approx(sk.balanced_accuracy_score(task.test.y, whole.argmax(axis=1)))
  assert points[-1]['seeds'][0] == points[-1]['seeds'][1] and points[0]['value'] <= points[-1]['value']
  heights = [p['value'] for p in points]
  assert points[0]['value'] == pytest.approx(np.mean(points[0]['seeds']))
  assert curves['trained', 'logistic']['area']['value'] == pytest.approx(
    np.trapezoid(heights, np.log([10, 50, 100])) / np.log(10))
  gaps = {(d['minus'], d['method']): d for d in few['differences']}
  assert gaps['untrained', 'logistic']['crossing'] is None and gaps['untrained', 'logistic']['area']['low'] > 0
  assert 'Few labels' in ask.tables(result) and '<h3>Few labels' in ask.html(result)
  for name, draw in ask.drawings(result, source).items():
    if name != 'neighbours':  # records of the fake are no real ones
      draw(tmp_path / f'{name}.png')
      assert (tmp_path / f'{name}.png').stat().st_size > 5000
  assert set(ask.drawings(result, source)) == {'roc', 'reliability', 'confusion', 'few_labels', 'features', 'neighbours'}
  again = Classify(fractions=(10, 50, 100), seeds=2).run(GOOD, source, 'region', untrained=POOR, draws=30, pixels=False)
  assert again == result
  number = Classify(fractions=(25, 100), seeds=1).run(GOOD, source, 'age', draws=10, pixels=False)['few_labels']
  assert number['metric'] == 'r2' and len(number['curves'][0]['points']) == 2
  labels = Classify(fractions=(50, 100), seeds=1).run(GOOD, source, 'low,high', draws=10, pixels=False)['few_labels']
  assert labels['metric'] == 'auroc' and labels['curves'][0]['points'][0]['value'] > 0.6


@pytest.mark.parametrize('label, options, words', [
    ('region', {'target': 'clases'}, "classify.target 'clases'.*'classes'"),
    ('region', {'probes': 'knn,logistik'}, "'logistik'.*'logistic'"),
    ('region', {'probes': 'ridge'}, 'classify.probes=ridge does not go with the target classes: expected knn, logistic'),
    ('age', {'probes': 'logistic'}, 'does not go with the target number: expected knn, ridge'),
    ('region', {'fractions': (0, 10)}, 'classify.fractions=0,10: expected percentages'),
    ('region', {'fractions': 'a'}, 'classify.fractions=a: expected percentages'),
    ('region', {'seeds': 0}, 'classify.seeds=0: expected a whole number of 1 or more'),
    ('region', {'sensitivity': 95}, 'classify.sensitivity=95: expected a number up to 1'),
    ('region', {'sensitivity': 0.9}, 'needs classify.positive=CLASS, one of a, b, c'),
    ('region', {'sensitivity': 0.9, 'positive': 'd'}, "classify.positive 'd'"),
    ('region', {'target': 'number'}, "label 'region' holds '.'; expected numbers"),
    ('age', {'target': 'labels'}, 'holds .*; expected 1, 0, or -1'),
    ('low,hihg', {}, "'hihg'.*'high'"),
    ('never,never', {}, 'no label has rows of both values'),
    ('constant', {'target': 'number'}, 'training rows are 7'),
    ('huge', {}, 'holds inf; expected finite numbers'),
])
def test_what_is_refused_before_anything_is_embedded(source, label, options, words):
  source = with_columns(source, constant=[7.0] * 240, huge=[float('inf')] + [0.5 * i for i in range(239)])
  with pytest.raises(UserError, match=words) as e:
    Classify(**options).check(source, label)
  assert '\n' not in str(e.value)


def test_a_class_that_a_part_cannot_hold(source):
  rare = ['b' if s == 'train-3' else 'a' if v else None
          for s, v in zip(source.table['subject'].to_pylist(), source.table['region'].to_pylist(), strict=True)]
  rare = ['b' if i % 4 == 0 and not n.startswith('train') else v
          for i, (v, n) in enumerate(zip(rare, source.table['subject'].to_pylist(), strict=True))]
  made = with_columns(source, rare=rare)
  assert Classify(fractions=(20, 100)).check(made, 'rare') is None
  with pytest.raises(UserError, match=r"5 % of 12 training subjects \(1\) leave no row of class 'a'; .* is"):
    ones = with_columns(made, one=['b' if n == 'train-3' else v if not n.startswith('train') else 'a'
                                   for v, n in zip(rare, source.table['subject'].to_pylist(), strict=True)])
    Classify(fractions=(5, 100)).check(ones, 'one')


class Tokens(fakes.FakeEncoder):
  """Patches of the fake: its pixels."""

  def embed_source(self, source, batch_size, dense=False):
    out = super().embed_source(source, batch_size)
    return out | ({'map': source.images.astype(np.float32) / 64 - 2} if dense else {})


def test_attentive_probes_ask_tokens(source, monkeypatch):
  ask = Classify(probes='knn,capi', attentive_steps=60)
  result = ask.run(Tokens(), source, 'region', untrained=Tokens(noise=1.0), draws=20)
  assert [(r['features'], r['method']) for r in result['rows']] == [
      ('trained', 'knn'), ('trained', 'capi'), ('untrained', 'knn'), ('untrained', 'capi'), ('pixels (PCA)', 'knn')]
  row = result['rows'][1]
  assert row['probe']['settings'] == 30 and row['probe']['steps'] == 60
  assert ('pixels (PCA)', 'capi') not in {(d['minus'], d['method']) for d in result['differences']}
  assert 'CAPI' in ask.tables(result)
  monkeypatch.setattr(protocols.probing, '_TOKEN_BYTES', 1000)
  with pytest.raises(UserError, match='230 rows of 36 patch tokens of width 2 take 0.0 GiB.*without capi'):
    ask.run(Tokens(), source, 'region')
  with pytest.raises(UserError, match='which subsets of channels do not give'):
    task = tasks.make_task(source, 'region', 0)
    ask.resolved(source, 'region').answers('capi', tasks.encoded(GOOD, task, 'mean', 64, 'trained'), task)


def test_the_report_shows_each_kind(source, tmp_path):
  for label, words in (('age', 'Best R2'), ('low,high', 'Best macro AUROC'), ('region', 'Best balanced accuracy')):
    result = Classify().run(GOOD, source, label, untrained=POOR, draws=20)
    (tmp_path / 'evaluation.json').write_text(json.dumps(result))
    text = page.write_report(tmp_path).read_text()
    assert words in text and 'is not the result of an evaluation' not in text
