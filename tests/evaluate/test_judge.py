"""Several tasks, labels and encoders in one call; what is written beside the JSON; the same from Python."""

import csv
import dataclasses
import json
import shutil
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest

import jaxmed
from jaxmed import cli, encoder
from jaxmed.data.corpus.open import open_source
from jaxmed.errors import UserError
from jaxmed.evaluate import judge, protocols
from jaxmed.evaluate.protocols import tasks
from jaxmed.evaluate.protocols.classify import Classify
from jaxmed.evaluate.remembered import Remembered
from jaxmed.evaluate.report import figures

CELL = {'value': 0.5, 'low': 0.25, 'high': None}


class Counted:
  """An encoder of pixel means that counts the records it embeds."""

  image_size, vocabulary, feature, ids = (16, 16), ('B', 'G', 'R'), 'mean', {'B': 0, 'G': 1, 'R': 2}

  def __init__(self, factor=1.0):
    self.factor, self.seen = factor, []

  def embed_source(self, source, batch_size=64, dense=False, levels=()):
    ids = source.table['id'].to_pylist()
    self.seen += ids
    images = [source[i]['image'].astype(np.float32) for i in range(len(source))]
    x = np.array([np.r_[a.mean(axis=(0, 1)), a.std(axis=(0, 1))] for a in images]) * self.factor
    return {'mean': x, 'cls': -x} | ({'map': np.stack([a[:4, :4] for a in images])} if dense else {})

  def untrained(self, seed):
    return Counted(0.0 if seed else -1.0)


@pytest.fixture
def source(corpus):
  """The corpus with a second label, which some rows lack."""
  found = open_source(corpus)
  values = [None if i % 7 == 0 else 'ab'[i // 2 % 2] for i in range(len(found))]
  return dataclasses.replace(found, table=found.table.append_column('stain', pa.array(values)))


def test_each_record_is_embedded_once(source):
  one = Counted()
  found = judge.judged(one, source, protocols.get('classify,retrieve'), ['stain', 'tissue'])
  assert [f.key for f in found] == ['classify', 'classify.tissue', 'retrieve', 'retrieve.tissue']
  whole = judge.together(found)
  assert set(whole) == {'protocols', 'wins'} and [f['minus'] for f in whole['wins']] == ['untrained', 'pixels (PCA)']
  assert len(whole['wins'][0]['comparisons']) == 2 * 2 + 2 * 1  # labels, methods of each task
  assert sorted(one.seen) == sorted(source.table['id'].to_pylist())
  for f in found:  # the same as without a memory
    want = f.protocol.run(Counted(), source, f.label, untrained=Counted(-1.0))
    assert f.result == want


def test_remembered_features_are_those_of_the_encoder(source):
  parts = [source.select(split='test'), source, source.select(label='stain'), source.select(split='test')]
  for most in (1 << 30, 1000, 0):
    plain, memory = Counted(), Counted()
    remembered = Remembered(memory, most)
    for part in parts:
      for dense in (False, True):
        got, want = remembered.embed_source(part, 8, dense=dense), plain.embed_source(part, 8, dense)
        assert set(got) == set(want)
        for name in want:
          np.testing.assert_array_equal(got[name], want[name])
    assert (len(memory.seen) < len(plain.seen)) == (most > 0)
  assert remembered.image_size == (16, 16) and remembered.factor == 1.0
  with pytest.raises(AttributeError):
    _ = remembered.nothing


def test_what_is_kept_stays_in_its_bounds(source):
  remembered, made = Remembered(Counted(), 100), []  # one that does not fit puts nothing out
  make = lambda n: (made.append(n), np.zeros(n, np.uint8))[1]
  for n in (60, 30, 60, 50, 60, 30, 200, 60, 200):
    assert len(remembered.once(n, lambda n=n: make(n))) == n
  assert made == [60, 30, 50, 60, 30, 200, 200]


def test_pixels_are_read_once(source, monkeypatch):
  calls, real = [], tasks.pixels.source_features
  monkeypatch.setattr(tasks.pixels, 'source_features', lambda *a, **k: calls.append(1) or real(*a, **k))
  judge.judged(Counted(), source, protocols.get('classify,retrieve'), ['tissue'])
  assert len(calls) == 1
  judge.judged(Counted(), source, protocols.get('retrieve,classify'), ['tissue', 'stain'])  # of other rows
  assert len(calls) == 3


def test_encoders_beside_each_other(source):
  others = {'other': Counted(2.0), 'third': Counted(-1.0)}
  result = judge.judged(Counted(), source, protocols.get('classify'), ['tissue'], beside=others)[0].result
  assert list(dict.fromkeys(r['features'] for r in result['rows'])) == [
      'trained', 'untrained', 'pixels (PCA)', 'other', 'third']
  pairs = {(d['features'], d['minus']): d['metrics'] for d in result['differences'] if d['method'] == 'knn'}
  assert set(pairs) == {('trained', m) for m in ('untrained', 'pixels (PCA)', 'other', 'third')} | {('other', 'third')}
  assert all(c['value'] == c['low'] == c['high'] == 0 for c in pairs['trained', 'other'].values())
  text = Classify().tables(result)
  assert max(map(len, text.splitlines())) <= 100 and 'trained - third' in text and 'third - other' not in text
  with pytest.raises(UserError, match="two encoders are called 'untrained'"):
    judge.judged(Counted(), source, protocols.get('classify'), ['tissue'], beside={'untrained': Counted()})
  with pytest.raises(UserError, match='each encoder can stand there once'):
    judge.named(['a/run', 'a/run'])
  assert judge.named(['a/run', 'b/run/']) == {'a/run': 'a/run', 'b/run/': 'b/run/'}
  assert judge.named(['a/one', 'b/two/']) == {'one': 'a/one', 'two': 'b/two/'}


@dataclasses.dataclass(frozen=True)
class Blank:
  """A protocol of no label that gives a table and a picture."""

  colour: float = 0.5
  name: ClassVar[str] = 'blank'
  task: ClassVar[str] = 'nothing'
  labelled: ClassVar[bool] = False

  def run(self, encoder, source, label, *, untrained=None, feature='mean', batch_size=64, seed=0):
    assert label == ''
    return {'rows': len(source), 'colour': self.colour}

  def tables(self, result):
    return f'{result["rows"]} <records>'

  def csv_rows(self, result):
    return [['rows'], [str(result['rows'])]]

  def drawings(self, result, source):
    image = np.full((1, 4, 4, 1), result['colour'])
    return {'grid': lambda path: figures.image_grid(image, ['x'], path)}


@pytest.fixture
def blank(monkeypatch):
  monkeypatch.setitem(protocols.PROTOCOLS, 'blank', Blank())


def test_the_command_writes_tables_and_pictures(trained, corpus, tmp_path, blank, capsys):
  run = shutil.copytree(trained, tmp_path / 'run')
  (run / 'figures').mkdir(exist_ok=True)
  figures.image_grid(np.zeros((1, 4, 4, 1)), ['x'], run / 'figures' / 'evaluation.blank.old.png')
  words = ['evaluate', str(run), '--data', str(corpus), '--label', 'tissue', '--beside', str(trained)]
  out = tmp_path / 'e.json'
  assert cli.main([*words, '--task', 'classify', '--out', str(out)]) == 0
  assert (run / 'evaluation.csv').read_bytes() == out.with_suffix('.csv').read_bytes()
  rows = list(csv.DictReader((run / 'evaluation.csv').open(encoding='utf-8')))
  found = json.loads(out.read_text())
  cell = found['rows'][0]['metrics']['accuracy']
  assert [rows[0][k] for k in ('features', 'minus', 'method', 'metric')] == ['trained', '', 'knn', 'accuracy']
  assert float(rows[0]['value']) == pytest.approx(cell['value'], abs=1e-5)
  assert {r['minus'] for r in rows} == {'', 'untrained', 'pixels (PCA)', str(trained)}
  assert all(c['value'] == 0 for d in found['differences'] if d['minus'] == str(trained) for c in d['metrics'].values())
  capsys.readouterr()
  assert cli.main([*words[:4], '--task', 'blank', '--out', str(out), '--option', 'blank.colour=0.25', '--json']) == 0
  assert json.loads(capsys.readouterr().out) == {'rows': 96, 'colour': 0.25}
  assert out.with_suffix('.csv').read_text().split() == ['rows', '96']
  names = sorted(p.name for p in (run / 'figures').glob('evaluation.blank.*.png'))
  assert names == ['evaluation.blank.grid.png'] and (tmp_path / 'e.blank.grid.png').exists()
  page = (run / 'report.html').read_text()
  assert 'Evaluation: blank' in page and '96 &lt;records&gt;' in page and 'alt="grid"' in page


def test_from_python_it_is_the_same(trained, corpus, tmp_path, capsys, monkeypatch):
  words = ['evaluate', str(trained), '--data', str(corpus), '--label', 'tissue', '--protocol', 'retrieve']
  run = shutil.copytree(trained, tmp_path / 'run')
  words[1] = str(run)
  assert cli.main([*words, '--option', 'retrieve.gallery=test', '--json']) == 0
  want = json.loads(capsys.readouterr().out)
  assert jaxmed.evaluate(run, corpus, 'retrieve', label='tissue', gallery='test') == want
  assert jaxmed.evaluate(jaxmed.load(run), open_source(corpus), ['retrieve'], label='tissue', gallery='test') == want
  monkeypatch.setattr(encoder.Encoder, 'embed_source', lambda *a, **k: pytest.fail('computed first'))
  for words, options in (("'tisue'.*'tissue'", {'label': 'tisue'}), ('needs --label COLUMN; the columns are id', {}),
                         ('TASK.gallery', {'task': 'classify,retrieve', 'label': 'tissue', 'gallery': 'test'}),
                         ("'retrieve.galery'", {'label': 'tissue', 'galery': 'test'}),
                         ("'classfy'.*'classify'", {'task': 'classfy', 'label': 'tissue'}),
                         ('label .id.: 64 different values', {'task': 'classify', 'label': ['tissue', 'id']})):
    with pytest.raises(UserError, match=words) as e:
      jaxmed.evaluate(run, corpus, **({'task': 'retrieve'} | options))
    assert '\n' not in str(e.value)


def test_a_task_without_answers_a_row_has_nothing_beside_it(source, blank):
  with pytest.raises(UserError, match='--beside does not go with the task blank'):
    judge.judged(Counted(), source, protocols.get('blank'), [], beside={'other': Counted()})
