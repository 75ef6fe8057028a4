"""Retrieval between images and texts against slow loops: ties, several texts an image, repeated texts, resamples."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse

from jaxmed.errors import UserError
from jaxmed.evaluate import cross
from jaxmed.evaluate.protocols import PROTOCOLS
from jaxmed.evaluate.protocols.retrieve_text import RetrieveText

from . import fakes
from .test_zero_shot import PairEncoder, unit


def slow(queries, gallery, right):
  """(rank, average precision) of each query; a wrong candidate that ties stands before."""
  ranks, precisions = [], []
  for q, belongs in zip(queries, right, strict=True):
    near = [(round(float(-(q @ g)), 10), bool(b)) for g, b in zip(gallery, belongs, strict=True)]
    hits = [b for _, b in sorted(near)]
    places = [i + 1 for i, b in enumerate(hits) if b]
    ranks.append(places[0] if places else np.nan)
    precisions.append(np.mean([(k + 1) / p for k, p in enumerate(places)]) if places else np.nan)
  return np.array(ranks), np.array(precisions)


def test_ranks_are_those_of_a_loop(monkeypatch):
  rng = np.random.default_rng(0)
  queries, gallery = unit(rng.normal(size=(9, 3))), unit(rng.normal(size=(14, 3)))
  gallery[[3, 5, 8]] = gallery[1]  # ties
  right = rng.random((9, 14)) < 0.2
  right[4] = False
  want = slow(queries, gallery, right)
  for chunk in (2**23, 30):
    monkeypatch.setattr(cross, '_CHUNK', chunk)
    got = cross.ranked(queries, gallery, sparse.csr_array(right.astype(float)))
    for a, b in zip(got, want, strict=True):
      assert np.allclose(a, b, equal_nan=True) and np.isnan(a[4])
  rank, precision = cross.ranked(np.ones((2, 1)), np.ones((5, 1)), sparse.csr_array(np.eye(2, 5)))
  assert rank.tolist() == [5, 5] and precision.tolist() == [0.2, 0.2]  # a constant feature is the worst
  assert cross.best(np.eye(2), np.array([[0, 1], [1, 0], [0.5, 0.5]]), 2).tolist() == [[1, 2], [0, 2]]


def test_medians_of_resamples():
  rng = np.random.default_rng(1)
  values, weights = rng.integers(1, 9, 12).astype(float), rng.integers(0, 4, (40, 12))
  weights[0] = 0
  got = cross.median(values, weights)
  assert np.isnan(got[0])
  assert got[1:].tolist() == [np.median(np.repeat(values, w)) for w in weights[1:]]


def paired_source(texts, rows=60):
  source = fakes.make_source(rows=rows, subjects_per_split=5)
  return dataclasses.replace(source, table=source.table.append_column('text', pa.array(texts, pa.string())))


TEXTS = [None if i % 11 == 0 else json.dumps(['a b', f'{"abcx"[i % 4]} no']) if i % 7 == 0
         else ' '.join('abcx'[j] for j in (i % 4, i // 4 % 4, i // 16 % 4)) for i in range(60)]


@pytest.mark.parametrize('duplicates', ['drop', 'hits', 'keep'])
@pytest.mark.parametrize('by', ['', 'subject'])
def test_both_ways_are_those_of_a_loop(duplicates, by):
  source, encoder = paired_source(TEXTS), PairEncoder()
  protocol = RetrieveText(by=by, duplicates=duplicates, k=(1, 3))
  result = protocol.run(encoder, source, untrained=PairEncoder(noise=9.0), draws=30)
  assert json.loads(json.dumps(result, allow_nan=False)) == result
  test = source.select('test')
  rows = [(i, t) for i, t in enumerate(test.table['text'].to_pylist()) if t]
  images = unit(np.float64(encoder.embed_source(test, 1)['mean']))[[i for i, _ in rows]]
  groups = [test.table[by or 'id'].to_pylist()[i] for i, _ in rows]
  lists = [json.loads(t) if t[0] == '[' else [t] for _, t in rows]
  flat = [(n, t) for n, some in enumerate(lists) for t in some]
  if duplicates == 'drop':
    flat = [(n, t) for k, (n, t) in enumerate(flat) if t not in [u for _, u in flat[:k]]]
  right = np.zeros((len(rows), len(flat)), bool)
  for n in range(len(rows)):
    for j, (owner, t) in enumerate(flat):
      owners = {owner} if duplicates != 'drop' else {m for m, some in enumerate(lists) if t in some}
      right[n, j] = any(groups[n] == groups[m] for m in owners) or (duplicates != 'keep' and t in lists[n])
  words = encoder.pair.texts([t for _, t in flat])
  value = {m: c['value'] for m, c in result['rows'][0]['metrics'].items()}
  for way, (q, g, r) in {'image_to_text': (images, words, right), 'text_to_image': (words, images, right.T)}.items():
    rank, precision = slow(q, g, r)
    want = {'recall_at_1': np.mean(rank <= 1), 'recall_at_3': np.mean(rank <= 3), 'mean_rank': rank.mean(),
            'median_rank': np.median(rank), 'map': precision.mean()}
    for metric, number in want.items():
      assert value[f'{way}_{metric}'] == pytest.approx(number), (way, metric)
    rng, drawn = np.random.default_rng(2), []
    for _ in range(300):
      order = rng.permutation(len(g))
      drawn.append([np.mean([np.flatnonzero(b[order])[0] + 1 for b in r]), np.mean([b[order][0] for b in r])])
    mean, first = np.mean(drawn, axis=0)
    assert result['chance'][f'{way}_mean_rank'] == pytest.approx(mean, rel=0.1)
    assert result['chance'][f'{way}_recall_at_1'] == pytest.approx(first, abs=0.03)
  assert result['texts'] == len(flat) and any('have no text' in n for n in result['notes'])
  assert result['differences'][0]['minus'] == 'untrained'
  assert 'image to text, recall@3' in PROTOCOLS['retrieve_text'].tables(result)
  assert len(protocol.csv_rows(result)) == 1 + 3 * 10 and 'mean rank' in protocol.html(result)


def test_captions_of_a_column_count_before_the_text():
  source = paired_source([t and 'a' for t in TEXTS])
  more = dataclasses.replace(source, table=source.table.append_column('captions', pa.array(
      [None if i % 2 else json.dumps(['a', f'b{i}']) for i in range(60)], pa.string())))
  given = RetrieveText(duplicates='keep').pairs(more)
  assert len(given.texts) == given.right.shape[1] > len(given.source) and given.texts.count('a') == len(given.source)
  joined = RetrieveText(text='text,region').pairs(more)
  rows = joined.source.table
  assert set(joined.texts) == {' '.join(filter(None, (t, r))) for t, r in zip(
      rows['text'].to_pylist(), rows['region'].to_pylist(), strict=True)}


def test_captions_of_a_record():
  for text, want in (('["a", "b", " "]', ['a', 'b']), ('[1]', ['[1]']), ('[normal] chest', ['[normal] chest']),
                     ('a', ['a']), ('', []), (' ', []), ('[]', ['[]'])):
    assert cross.captions_of(text) == want


def test_what_cannot_be_judged_is_one_line():
  source = paired_source(TEXTS)
  for protocol, rows, words in (
      (RetrieveText(), paired_source([None] * 60), 'has no texts: expected the column text'),
      (RetrieveText(), fakes.make_source(rows=60), 'has no texts'),
      (RetrieveText(), paired_source(['a'] * 60), 'all 1 texts of split test belong to all 20 images'),
      (RetrieveText(by='subjetc'), source, "unknown column of retrieve_text.by 'subjetc': did you mean 'subject'"),
      (RetrieveText(split='vla'), source, "did you mean 'val'")):
    with pytest.raises(UserError, match=words):
      protocol.check(rows)
  with pytest.raises(UserError, match='retrieve_text needs a run with a tower of texts'):
    RetrieveText().run(fakes.FakeEncoder(), source)
  with pytest.raises(UserError, match="did you mean 'drop'"):
    RetrieveText(duplicates='dorp')
  with pytest.raises(UserError, match='retrieve_text.k=0: expected a whole number'):
    RetrieveText(k=(0,))
