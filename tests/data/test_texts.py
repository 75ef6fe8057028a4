"""Texts of records: columns, sentences, captions, and draws that depend on seed and step alone."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pytest

from jaxmed.data.feed import fields, texts
from jaxmed.data.feed.pipeline import eval_batches, train_batches
from jaxmed.data.feed.texts import Texts
from jaxmed.errors import UserError
from tests.data.test_fields import opened, write

REPORT = 'Heart is large. Lungs clear; no effusion.\n1. Cardiomegaly. 2. No acute disease.'


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  return opened(write(tmp_path_factory.mktemp('texts'), [(9, 9)] * 12))


class Rows:
  """Rows of a manifest."""

  path = 'corpus'

  def __init__(self, **columns):
    self.table = pa.table(columns)

  def __len__(self):
    return len(self.table)

  def column(self, name):
    return self.table[name]

  def distinct(self, name):
    return None, self.table[name].unique().to_pylist()


ROWS = Rows(findings=[REPORT, None, 'Clear.'], impression=['Large heart.', None, None], organ=['lung', 'heart', None])


def test_sentences_of_a_report():
  assert [*texts.sentences(REPORT)] == ['Heart is large.', 'Lungs clear;', 'no effusion.', 'Cardiomegaly.', 'No acute disease.']
  assert [*texts.sentences(' ')] == []
  assert [*texts.sentences('A mass of 3.5 cm.')] == ['A mass of 3.5 cm.']


def test_columns_are_joined_in_their_order():
  both = Texts(texts.columns_of('impression,findings', ROWS))
  assert [both.of(ROWS, i) for i in range(3)] == [f'Large heart. {REPORT}', '', 'Clear.']
  assert [*both.every(ROWS)] == [f'Large heart. {REPORT}', 'Clear.']
  with pytest.raises(UserError, match="unknown column of corpus in loader.text 'finding': did you mean 'findings'"):
    texts.columns_of('finding', ROWS)


def test_one_sentence_is_drawn_evenly():
  one = Texts(('findings',), 'sentence')
  rng = np.random.default_rng(0)
  found = [one.of(ROWS, 0, rng) for _ in range(500)]
  counts = {s: found.count(s) for s in texts.sentences(REPORT)}
  assert sum(counts.values()) == 500 and all(70 < n < 130 for n in counts.values())
  assert one.of(ROWS, 0) == 'Heart is large.' and one.of(ROWS, 1, rng) == '' and [*one.every(ROWS)][-1] == 'Clear.'


def test_captions_of_a_label(tmp_path):
  file = tmp_path / 'c.json'
  file.write_text(json.dumps({'column': 'organ', 'templates': ['an image of {}', 'the {}.'], 'names': {'lung': ['lung', 'a lung']}}))
  column, captions = texts.captions_of(str(file), ROWS)
  assert column == 'organ' and captions == {
      'lung': ('an image of lung', 'an image of a lung', 'the lung.', 'the a lung.'), 'heart': ('an image of heart', 'the heart.')}
  made = Texts((column,), captions=captions)
  assert {made.of(ROWS, 0, np.random.default_rng(i)) for i in range(40)} == {*captions['lung']}
  assert made.of(ROWS, 1) == 'an image of heart' and made.of(ROWS, 2) == ''
  for content, told in (({'column': 'organ', 'templates': ['an image']}, "'an image' has no slot {}"),
                        ({'column': 'organ', 'captions': {'lung': 'x'}}, "no caption for 'heart'"),
                        ({'column': 'organ', 'captions': {'lung': '', 'heart': 'x'}}, 'expected texts that are not empty'),
                        ({'column': 'organs', 'captions': {}}, "did you mean 'organ'"), ({}, 'expected {"column": NAME}')):
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=told.replace('{', r'\{').replace('}', r'\}')):
      texts.captions_of(str(file), ROWS)


@pytest.mark.parametrize('fit', ['resize', 'crop'])
def test_draws_are_of_seed_and_step(source, fit):
  captions = {str(v): tuple(f'{v} {k}' for k in 'abcdef') for v in source.distinct('kind')[1]}
  drawn = Texts(('kind',), captions=captions)
  wanted = fields.of_source(source, (8, 8), ('image', 'text', 'words'), text_length=12)
  take = lambda n, start=0, **more: [*itertools.islice(train_batches(
      source, batch_size=4, size=(8, 8), vocabulary=('x',), seed=3, fields=wanted, texts=drawn, fit=fit, start_step=start,
      **more), n)]
  whole = take(6)
  for step in (2, 5):
    for name, array in take(1, step)[0].items():
      np.testing.assert_array_equal(array, whole[step][name], err_msg=name)
  halves = [take(1, 4, process_index=p, process_count=2)[0] for p in range(2)]
  np.testing.assert_array_equal(whole[4]['text'], np.concatenate([h['text'] for h in halves]))
  said = lambda row: bytes(row[row > 0].astype(np.uint8) - 1).decode()
  seen = [said(row) for batch in whole for row in batch['text']]
  assert len({s[-1] for s in seen}) >= 5  # one of six for each sample
  kinds = source.column('kind').to_pylist()
  assert all(said(row).startswith(str(kinds[i])) for b in whole for row, i in zip(b['text'], b['index']))
  assert all(row.max() == 2 for b in whole for row in b['words'])
  first = next(iter(eval_batches(source, batch_size=4, size=(8, 8), vocabulary=('x',), fields=wanted, texts=drawn, fit=fit)))
  assert all(said(row).endswith(' a') for row in first['text'])  # nothing is drawn of what is held out
