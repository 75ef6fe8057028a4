"""Retrieval by label: rankings against a slow loop, chance against shuffled galleries, the protocol and its command."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest

from jaxmed import cli
from jaxmed.data.feed import pipeline
from jaxmed.errors import UserError
from jaxmed.evaluate import metrics, protocols, retrieval
from jaxmed.evaluate.protocols import channels, tasks
from jaxmed.evaluate.protocols.retrieve import Retrieve

from . import fakes

GOOD, POOR = fakes.FakeEncoder(), fakes.FakeEncoder(noise=8.0)
NAMES = ('recall_at_1', 'recall_at_5', 'recall_at_10', 'map')


@pytest.fixture(autouse=True)
def batches(monkeypatch):
  monkeypatch.setattr(pipeline, 'eval_batches', fakes.eval_batches)


def slow(query_x, query_y, query_subjects, gallery_x, gallery_y, gallery_subjects):
  """Every query against every image of the gallery, in float64."""
  out = []
  for x, y, s in zip(np.float64(query_x), query_y, query_subjects, strict=True):
    ranked = []
    for i, (other, its, whose) in enumerate(zip(np.float64(gallery_x), gallery_y, gallery_subjects, strict=True)):
      if whose != s:
        ranked.append((-(x @ other) / np.linalg.norm(x) / np.linalg.norm(other), i, its == y))
    hits = [hit for _, _, hit in sorted(ranked)]
    if not any(hits):
      out.append([np.nan] * 4)
      continue
    precisions = [sum(hits[:k]) / k for k in range(1, len(hits) + 1) if hits[k - 1]]
    out.append([float(any(hits[:k])) for k in (1, 5, 10)] + [np.mean(precisions)])
  return np.array(out)


def problem(rows, seed, width=4):
  rng = np.random.default_rng(seed)
  return np.float32(rng.normal(size=(rows, width))), rng.integers(0, 4, rows), rng.integers(0, 6, rows).astype(str)


def test_rankings_are_those_of_a_slow_loop(monkeypatch):
  """Of another gallery that shares subjects, and of its own rows; in chunks of a few queries."""
  queries, gallery = problem(30, 0), problem(8, 1)
  monkeypatch.setattr(retrieval, '_CHUNK', 64)
  for given in ((*queries, *gallery), (*queries, *queries)):
    have, want = retrieval.retrieval(*given), slow(*given)
    np.testing.assert_allclose(have, want, atol=1e-12)
  assert np.isnan(slow(*queries, *gallery)).any() and 0 < np.nanmean(have[:, 0]) < 1


def test_a_query_does_not_find_its_own_subject():
  """Copies of each image under the same subject do not help it, under another one they are found at once."""
  x, y, s = problem(24, 2, width=16)
  lone = np.arange(24).astype(str)
  doubled = lambda a: np.concatenate([a, a])
  np.testing.assert_array_equal(retrieval.retrieval(x, y, lone, doubled(x), doubled(y), doubled(lone))[:, 0],
                                retrieval.retrieval(x, y, lone, x, y, lone)[:, 0])
  assert (retrieval.retrieval(x, y, lone, x, y, np.char.add('other', lone))[:, 0] == 1).all()


@pytest.mark.parametrize('alike, size', [(1, 12), (3, 12), (12, 12), (2, 4), (1, 1)])
def test_chance_is_the_mean_over_shuffled_galleries(alike, size):
  rng = np.random.default_rng(0)
  y = (np.arange(size) < alike).astype(int)
  one = lambda: retrieval.retrieval(np.ones((1, 1)), [1], ['q'], np.ones((size, 1)), rng.permutation(y),
                                    np.full(size, 'g'))[0]
  drawn = np.mean([one() for _ in range(3000)], axis=0)
  np.testing.assert_allclose(retrieval.chance([alike, 0], [size, size]), [drawn, [np.nan] * 4], atol=0.03)


@pytest.mark.parametrize('gallery', ['train', 'test'])
def test_the_result(gallery):
  """Values of the definition over the rows, intervals of a bootstrap over subjects, chance in the middle of noise."""
  source = fakes.make_source()
  result = Retrieve(gallery).run(GOOD, source, 'region', untrained=POOR, draws=40, seed=3)
  assert json.loads(json.dumps(result, allow_nan=False)) == result
  assert (result['gallery'], result['notes']) == (gallery, [])
  test, other = (source.select(s, 'region') for s in ('test', gallery))
  columns = lambda part: (GOOD.embed_source(part, 1)['mean'], part.table['region'].to_pylist(),
                          part.table['subject'].to_pylist())
  want = slow(*columns(test), *columns(other))
  row = result['rows'][0]
  assert (row['features'], row['method']) == ('trained', 'cosine')
  assert [row['metrics'][m]['value'] for m in NAMES] == pytest.approx(want.mean(axis=0))
  names = np.unique(columns(test)[2])
  each = [want[np.array(columns(test)[2]) == n] for n in names]
  drawn = []
  for counts in next(metrics.resamples(len(names), 40, 3)):
    rows = np.concatenate([np.repeat(e, int(n), axis=0) for n, e in zip(counts, each, strict=True)])
    drawn.append(rows.mean(axis=0))
  low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
  assert [row['metrics'][m]['low'] for m in NAMES] == pytest.approx(low)
  assert [row['metrics'][m]['high'] for m in NAMES] == pytest.approx(high)
  value = {r['features']: r['metrics']['map']['value'] for r in result['rows']}
  assert value['trained'] > value['untrained'] + 0.2 and abs(value['untrained'] - result['chance']['map']) < 0.1
  against = {d['minus']: d['metrics']['map'] for d in result['differences']}
  assert against['untrained']['value'] == pytest.approx(value['trained'] - value['untrained'])
  assert 0 < against['untrained']['low'] < against['untrained']['high']
  text = Retrieve(gallery).tables(result)
  assert 'recall@10' in text and 'mAP' in text and 'Chance: recall@1' in text and max(map(len, text.splitlines())) <= 100


def test_queries_without_an_answer_are_left_out_and_named():
  source = fakes.make_source()
  region, split = (source.table[c].to_pylist() for c in ('region', 'split'))
  some = [('new' if s == 'test' and i % 4 == 0 else r) if r else None for i, (r, s) in enumerate(zip(region, split, strict=True))]
  change = lambda values: dataclasses.replace(source, table=source.table.set_column(
      source.table.column_names.index('region'), 'region', pa.array(values)))
  result = Retrieve().run(GOOD, change(some), 'region', draws=5, pixels=False)
  lost = sum(r == 'new' for r in some)
  assert any(f'{lost} of {result["splits"]["test"]} test rows have no row of their class' in n for n in result['notes'])
  task = tasks.make_task(change(some), 'region', 0)
  values = Retrieve().answers('cosine', tasks.encoded(GOOD, task, 'mean', 64, 'trained'), task).values
  assert np.isnan(values).all(axis=1).sum() == lost
  assert result['rows'][0]['metrics']['map']['value'] == pytest.approx(np.nanmean(values[:, 3]))
  with pytest.raises(UserError, match='no test row has a row of its class'):
    Retrieve().run(GOOD, change(['new' if s == 'test' else r for r, s in zip(region, split, strict=True)]), 'region')


def test_protocols_by_name():
  assert {'classify', 'retrieve'} <= set(protocols.PROTOCOLS)
  assert protocols.get('retrieve, classify', {'retrieve.gallery': 'test'}) == [
      Retrieve('test'), protocols.PROTOCOLS['classify']]
  for words, names, options in (("'retreive'.*'retrieve'", 'retreive', {}), ('each can stand there once', 'classify,classify', {}),
                                ("'retrieve.galery'.*'retrieve.gallery'", 'retrieve', {'retrieve.galery': 'test'}),
                                ("'retrieve.gallery': choose one of classify", 'classify', {'retrieve.gallery': 'test'}),
                                ("'tset'.*'test'", 'retrieve', {'retrieve.gallery': 'tset'})):
    with pytest.raises(UserError, match=words):
      protocols.get(names, options)


class Shown(fakes.FakeEncoder):
  """Channels that are not shown are black."""

  def embed_subsets(self, source, subsets, batch_size, feature):
    dark = lambda names: np.where([c in names for c in source.channels], source.images, 0)
    return np.stack([self.embed_source(dataclasses.replace(source, images=dark(s)), batch_size)[feature] for s in subsets])


@pytest.mark.parametrize('gallery', ['train', 'test'])
def test_subsets_of_channels_wrap_it(gallery):
  """All channels give what the protocol gives; a subset is asked on images that show it."""
  source = fakes.make_source()
  source = dataclasses.replace(source, table=source.table.append_column('channels', pa.array([['T1', 'GM']] * len(source))))
  protocol = Retrieve(gallery)
  result = channels.ByChannels(protocol).run(Shown(), source, 'region', draws=20)
  found = {tuple(s['channels']): s['metrics'] for s in result['methods']['cosine']['subsets']}
  whole = protocol.run(Shown(), source, 'region', draws=20, pixels=False)
  assert found['T1', 'GM'] == whole['rows'][0]['metrics'] and result['chance'] == whole['chance']
  test, other = (source.select(s, 'region') for s in ('test', gallery))
  columns = lambda part, names: (Shown().embed_subsets(part, [names], 1, 'mean')[0], part.table['region'].to_pylist(),
                                 part.table['subject'].to_pylist())
  want = slow(*columns(test, ('T1',)), *columns(other, ('T1',) if gallery == 'test' else ('T1', 'GM')))
  assert [found['T1',][m]['value'] for m in NAMES] == pytest.approx(want.mean(axis=0))
  count = result['methods']['cosine']['counts'][0]
  assert count['best_recall_at_1'] >= count['worst_recall_at_1']
  shares = [result['methods']['cosine']['shapley'][c]['map']['value'] for c in ('T1', 'GM')]
  assert sum(shares) == pytest.approx(found['T1', 'GM']['map']['value'] - result['chance']['map'])
  assert 'recall@1 (mean over subsets)' in channels.ByChannels(protocol).tables(result)


def test_the_command(trained, corpus, tmp_path, capsys, monkeypatch):
  """Several protocols in one object; each also beside the run, and by subsets of channels."""
  import shutil
  monkeypatch.undo()
  run = shutil.copytree(trained, tmp_path / 'run')
  words = ['evaluate', str(run), '--data', str(corpus), '--label', 'tissue', '--protocol', 'classify,retrieve']
  assert cli.main([*words, '--option', 'retrieve.gallery=test', '--out', str(tmp_path / 'e.json'), '--json']) == 0
  said = json.loads(capsys.readouterr().out)
  assert said == json.loads((tmp_path / 'e.json').read_text()) and list(said['protocols']) == ['classify', 'retrieve']
  for name, file in (('classify', 'evaluation.json'), ('retrieve', 'evaluation.retrieve.json')):
    assert json.loads((run / file).read_text()) == said['protocols'][name]
  assert said['protocols']['retrieve']['gallery'] == 'test'
  assert cli.main([*words, '--channels', 'all', '--out', str(tmp_path / 'c.json')]) == 0
  text = capsys.readouterr().out
  assert 'classify:' in text and 'retrieve:' in text and 'recall@1 (mean over subsets)' in text
  assert list(json.loads((tmp_path / 'c.json').read_text())['protocols']) == ['classify', 'retrieve']
  assert (tmp_path / 'c.retrieve.png').exists() and (tmp_path / 'c.retrieve.csv').exists()
  assert cli.main([*words, '--option', 'retrieve.galery=test']) == 2
  assert cli.main(['list', 'protocols', 'retrieve']) == 0
  assert 'retrieve.*:' in (text := capsys.readouterr().out) and 'gallery=train' in text
