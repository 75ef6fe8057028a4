"""Retrieval by label: rankings against a slow loop, chance against shuffled galleries, the protocol and its command."""

import dataclasses
import importlib.util
import json
import types

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jaxmed import cli
from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed import pipeline
from jaxmed.errors import UserError
from jaxmed.evaluate import metrics, protocols, retrieval
from jaxmed.evaluate.protocols import channels, tasks
from jaxmed.evaluate.protocols.retrieve import Retrieve
from jaxmed.evaluate.retrieval import Rule

from . import fakes

GOOD, POOR = fakes.FakeEncoder(), fakes.FakeEncoder(noise=8.0)
NAMES = ('recall_at_1', 'recall_at_5', 'recall_at_10', 'ndcg_at_10', 'map_at_r', 'map')
FAISS = pytest.mark.skipif(importlib.util.find_spec('faiss') is None, reason='faiss is not installed')


@pytest.fixture(autouse=True)
def batches(monkeypatch):
  monkeypatch.setattr(pipeline, 'eval_batches', fakes.eval_batches)


def slow(query_x, query_y, query_subjects, gallery_x, gallery_y, gallery_subjects, ranks=(1, 5, 10), near=None, depth=None):
  """Every query against every image of the gallery, in float64; an image of another class comes first where two tie."""
  out = []
  for x, y, s in zip(np.float64(query_x), query_y, query_subjects, strict=True):
    ranked = []
    for other, its, whose in zip(np.float64(gallery_x), gallery_y, gallery_subjects, strict=True):
      if whose != s:
        like = near(x, other) if near else x @ other / np.linalg.norm(x) / np.linalg.norm(other)
        ranked.append((-round(like, 9), its == y))
    hits = [bool(hit) for _, hit in sorted(ranked)]
    total = sum(hits)
    if not total:
      out.append([np.nan] * (len(ranks) + 3))
      continue
    hits, total = hits[:depth], min(total, depth or total)
    precision = [sum(hits[:k]) / k if hits[k - 1] else 0 for k in range(1, len(hits) + 1)]
    gain = lambda h: sum(v / np.log2(i + 2) for i, v in enumerate(h[:max(ranks)]))
    out.append([float(any(hits[:k])) for k in ranks] + [gain(hits) / gain([1] * total), sum(precision[:total]) / total,
                                                       sum(precision) / total])
  return np.array(out)


def problem(rows, seed, width=4):
  rng = np.random.default_rng(seed)
  return np.float32(rng.normal(size=(rows, width))), rng.integers(0, 4, rows), rng.integers(0, 6, rows).astype(str)


def other_subjects(query_subjects, gallery_subjects):
  """The rule that leaves a query's own subject out."""
  codes = np.unique(np.concatenate([query_subjects, gallery_subjects]), return_inverse=True)[1]
  return Rule(codes[:len(query_subjects)], codes[len(query_subjects):], False)


def ours(query_x, query_y, query_subjects, gallery_x, gallery_y, gallery_subjects, **options):
  """`retrieval` in the arguments of `slow`."""
  return retrieval.retrieval(query_x, query_y, gallery_x, gallery_y, [other_subjects(query_subjects, gallery_subjects)],
                             **options)


def test_rankings_are_those_of_a_slow_loop(monkeypatch):
  """Of another gallery that shares subjects, and of its own rows; in chunks of a few queries."""
  queries, gallery = problem(30, 0), problem(8, 1)
  monkeypatch.setattr(retrieval, '_CHUNK', 64)
  for given in ((*queries, *gallery), (*queries, *queries)):
    have, want = ours(*given), slow(*given)
    np.testing.assert_allclose(have, want, atol=1e-12)
  assert np.isnan(slow(*queries, *gallery)).any() and 0 < np.nanmean(have[:, 0]) < 1
  np.testing.assert_allclose(ours(*queries, *queries, ranks=(1, 2, 4, 8), metric='euclidean'),
                             slow(*queries, *queries, (1, 2, 4, 8), lambda a, b: -np.linalg.norm(a - b)), atol=1e-12)


def test_numbers_of_scikit_learn():
  """nDCG and average precision of a ranking without ties."""
  from sklearn.metrics import average_precision_score, ndcg_score
  x, y, s = problem(40, 3, width=8)
  lone = np.arange(40).astype(str)
  have = ours(x, y, lone, x, y, lone)
  unit = np.float64(x) / np.linalg.norm(np.float64(x), axis=1, keepdims=True)
  for i in range(40):
    others = np.arange(40) != i
    hit, like = (y == y[i])[others], (unit @ unit[i])[others]
    assert have[i, -1] == pytest.approx(average_precision_score(hit, like))
    assert have[i, -3] == pytest.approx(ndcg_score([hit.astype(float)], [like], k=10))


@pytest.mark.parametrize('metric', retrieval.DISTANCES)
@pytest.mark.parametrize('engine', ['numpy', pytest.param('faiss', marks=FAISS)])
def test_ties_are_broken_against_the_model(metric, engine):
  """A constant feature has the images of other classes first: it finds nothing before them."""
  y = np.repeat([0, 1], 20)
  x = np.full((40, 7), 0.3, np.float32) + np.float32(1e-8) * 0
  rules = [Rule(np.arange(40), np.arange(40), False)]
  got = retrieval.retrieval(x, y, x, y, rules, (1, 10, 20), metric, 25, engine)
  np.testing.assert_array_equal(got[:, :3], 0)
  whole = retrieval.retrieval(x, y, x, y, rules, (1, 20, 21), metric)
  np.testing.assert_allclose(whole, np.tile([0, 0, 1, 1 / np.log2(22) / (1 / np.log2(np.arange(2, 21))).sum(), 0,
                                             np.mean(np.arange(1, 20) / np.arange(21, 40))], (40, 1)))


@FAISS
@pytest.mark.parametrize('metric', retrieval.DISTANCES)
def test_faiss_gives_the_same(metric, monkeypatch):
  """With ties, subjects, and rules on other columns; the depth bounds what is looked at."""
  rng = np.random.default_rng(0)
  x, y, s = problem(300, 0, width=3)
  x = np.round(2 * x) / 2  # many images are equally near
  subjects = rng.integers(0, 60, 300)
  organ, scanner = rng.integers(0, 3, 300), rng.integers(-1, 2, 300)
  monkeypatch.setattr(retrieval, '_CHUNK', 4000)
  rules = [Rule(subjects, subjects, False), Rule(organ, organ, True), Rule(scanner, scanner, False)]
  for some in (rules[:1], rules[:2], rules):
    ask = lambda engine, some=some: retrieval.retrieval(x, y, x, y, some, (1, 3), metric, 12, engine)
    np.testing.assert_array_equal(ask('numpy'), ask('faiss'))
  np.testing.assert_allclose(retrieval.retrieval(x, y, x, y, rules[:1], metric='euclidean', depth=12),
                             slow(x, y, subjects, x, y, subjects, near=lambda a, b: -np.linalg.norm(a - b), depth=12),
                             atol=1e-12)
  found = sum(len(rows) for rows, *_ in retrieval._by_faiss(*retrieval._comparable(x, x, metric)[:1], y,
                                                             retrieval._comparable(x, x, metric)[1], y, rules[:1], metric, 12))
  assert 50 < found <= 300  # faiss answers many, and leaves those that may tie


@pytest.mark.parametrize('seed', range(3))
def test_counts_are_those_of_all_pairs(seed):
  rng = np.random.default_rng(seed)
  query_y, gallery_y = rng.integers(0, 3, 20), rng.integers(0, 3, 50)
  codes = lambda low: (rng.integers(low, 4, 20), rng.integers(low, 4, 50))
  rules = [Rule(*codes(0), False), Rule(*codes(-1), True), Rule(*codes(-1), False)]
  for some in ([], rules[:1], rules[1:2], rules[1:], rules):
    there = np.ones((20, 50), bool)
    for r in some:
      there &= ((r.query[:, None] == r.gallery) == r.same) & (r.query[:, None] >= 0) & (r.gallery >= 0)
    alike, size = retrieval.counts(query_y, gallery_y, some)
    np.testing.assert_array_equal(size, there.sum(axis=1))
    np.testing.assert_array_equal(alike, (there & (query_y[:, None] == gallery_y)).sum(axis=1))


def test_a_query_does_not_find_its_own_subject():
  """Copies of each image under the same subject do not help it, under another one they are found at once."""
  x, y, s = problem(24, 2, width=16)
  lone = np.arange(24).astype(str)
  doubled = lambda a: np.concatenate([a, a])
  np.testing.assert_array_equal(ours(x, y, lone, doubled(x), doubled(y), doubled(lone))[:, 0],
                                ours(x, y, lone, x, y, lone)[:, 0])
  assert (ours(x, y, lone, x, y, np.char.add('other', lone))[:, 0] == 1).all()


def test_duplicates_and_shuffles():
  """Pairs of duplicates of other subjects are found first, in order; shuffled classes give chance."""
  rng = np.random.default_rng(0)
  x, y, s = np.repeat(rng.normal(size=(60, 12)), 2, axis=0), np.repeat(np.arange(60) % 5, 2), np.arange(120)
  assert (ours(x, y, s, x, y, s)[:, 0] == 1).all()
  mixed = [ours(x, rng.permutation(y), s, x, y, s) for _ in range(30)]
  assert abs(np.nanmean(np.concatenate(mixed)[:, 0]) - 0.2) < 0.03


def test_nmi_is_that_of_scikit_learn():
  from sklearn.metrics import normalized_mutual_info_score
  rng = np.random.default_rng(0)
  for seed in range(5):
    y, groups = rng.integers(0, 4, 50), rng.integers(0, 3 + seed, 50)
    got = retrieval.clustering_score(y, groups)
    assert got == pytest.approx(normalized_mutual_info_score(y, groups))
    assert got == pytest.approx(retrieval.clustering_score(rng.permutation(4)[y], 9 - groups))
  assert retrieval.clustering_score(y, np.zeros(50)) == 0 and retrieval.clustering_score(y, y) == pytest.approx(1)
  assert retrieval.clustering_score(y * 0, y * 0) == 1
  subjects = rng.integers(0, 7, 50)
  drawn = retrieval.resampled_score(y, groups, subjects, draws=6, seed=2)
  for value, counts in zip(drawn, next(metrics.resamples(7, 6, 2)), strict=True):
    rows = np.repeat(np.arange(50), counts[subjects].astype(int))
    assert value == pytest.approx(normalized_mutual_info_score(y[rows], groups[rows]))
  assert np.isnan(retrieval.resampled_score(y, groups, y * 0)).all()


def test_clusters_find_what_is_apart():
  rng = np.random.default_rng(0)
  y = rng.integers(0, 3, 60)
  x = 10 * np.eye(3)[y] + 0.1 * rng.normal(size=(60, 3))
  for metric in retrieval.DISTANCES:
    assert retrieval.clustering_score(y, retrieval.clusters(x, 3, metric)) == pytest.approx(1)
  assert retrieval.clustering_score(y, retrieval.clusters(np.ones((60, 3)), 3)) == 0


@pytest.mark.parametrize('alike, size', [(1, 12), (3, 12), (12, 12), (2, 4), (1, 1)])
def test_chance_is_the_mean_over_shuffled_galleries(alike, size):
  rng = np.random.default_rng(0)
  y = (np.arange(size) < alike).astype(int)
  queries, ones = rng.normal(size=(5000, size)), np.ones(5000, int)  # each ranks the axes by chance
  for depth in (0, 10):
    drawn = retrieval.retrieval(queries, ones, np.eye(size), y, depth=depth).mean(axis=0)
    got = retrieval.chance([alike, 0], [size, size], depth=depth)
    np.testing.assert_allclose(got, [drawn, [np.nan] * 6], atol=0.02)


@pytest.mark.parametrize('gallery', ['train', 'test'])
def test_the_result(gallery):
  """Values of the definition over the rows, intervals of a bootstrap over subjects, chance in the middle of noise."""
  source = fakes.make_source()
  protocol = Retrieve(gallery)
  result = protocol.run(GOOD, source, 'region', untrained=POOR, draws=40, seed=3)
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
  assert list(row['metrics']) == [*NAMES, 'nmi'] and row['metrics']['nmi']['value'] > result['chance']['nmi'] + 0.2
  assert row['metrics']['nmi']['low'] <= row['metrics']['nmi']['value'] <= row['metrics']['nmi']['high']
  assert ['trained', 'cosine', 'map'] in [[r[0], *r[2:4]] for r in protocol.csv_rows(result)]
  text = protocol.tables(result)
  assert 'recall@10' in text and 'mAP' in text and 'Chance: recall@1' in text and max(map(len, text.splitlines())) <= 100


def with_columns(source, **columns):
  """The source with more columns."""
  table = source.table
  for name, values in columns.items():
    table = table.append_column(name, pa.array(values))
  return dataclasses.replace(source, table=table)


def test_across_and_within_columns():
  """Against a loop whose subjects stand for what a rule leaves out; unknown values are named."""
  source = fakes.make_source()
  rng = np.random.default_rng(99)
  scanner, organ = rng.choice(['A', 'B', 'C'], len(source)).tolist(), rng.choice(['x', 'y'], len(source)).tolist()
  source = with_columns(source, scanner=scanner, organ=organ)
  test, train = source.select('test', 'region'), source.select('train', 'region')
  columns = lambda part, name: (GOOD.embed_source(part, 1)['mean'], part.table['region'].to_pylist(),
                                part.table[name].to_pylist())
  got = Retrieve(across='scanner', nmi=False).run(GOOD, source, 'region', draws=2, pixels=False)
  want = slow(*columns(test, 'scanner'), *columns(train, 'scanner'))
  assert [got['rows'][0]['metrics'][m]['value'] for m in NAMES] == pytest.approx(want.mean(axis=0))
  assert any('across scanner: a query has the images of another scanner alone' in n for n in got['notes'])
  got = Retrieve(within='organ', nmi=False).run(GOOD, source, 'region', draws=2, pixels=False)
  parts = [slow(*columns(t, 'subject'), *columns(g, 'subject')) for o in 'xy' for t, g in [[
      dataclasses.replace(p, table=p.table.filter(pa.array(keep)), images=p.images[keep])
      for p in (test, train) for keep in [np.array([v == o for v in p.table['organ'].to_pylist()])]]]]
  assert [got['rows'][0]['metrics'][m]['value'] for m in NAMES] == pytest.approx(np.concatenate(parts).mean(axis=0))
  gaps = with_columns(fakes.make_source(), scanner=[None if i % 10 == 2 else s for i, s in enumerate(scanner)])
  got = Retrieve(across='scanner').run(GOOD, gaps, 'region', draws=2, pixels=False)
  lost = sum(v is None for v in gaps.select('test', 'region').table['scanner'].to_pylist())
  assert got['queries'] == {'asked': got['splits']['test'] - lost, 'left_out': lost} and lost
  assert any('without one have no gallery' in n for n in got['notes'])


def test_the_same_subject():
  """Included, copies under the same subject are found at once; the query itself never is."""
  source = fakes.make_source()
  subjects, split = source.table['subject'].to_pylist(), source.table['split'].to_pylist()
  images = source.images.copy()
  for name in {s for s, p in zip(subjects, split, strict=True) if p == 'test'}:
    rows = [i for i, s in enumerate(subjects) if s == name]
    images[rows] = images[rows[0]]
  region = [subjects[i][-1] for i in range(len(source))]
  source = dataclasses.replace(with_columns(source, person=region), images=images)
  run = lambda how: Retrieve('test', same_subject=how).run(GOOD, source, 'person', draws=2, pixels=False)
  inside, outside = run('include'), run('exclude')
  assert inside['rows'][0]['metrics']['recall_at_1']['value'] == 1 > outside['rows'][0]['metrics']['recall_at_1']['value']
  assert all(f['id'] != e['query'] for r in (inside, outside) for e in r['examples'] for f in e['found'])


def test_examples_are_what_was_found(tmp_path):
  """Of each class in turn, nearest first; as a picture of the records of a real source."""
  source = fakes.make_source()
  result = Retrieve().run(GOOD, source, 'region', draws=2, pixels=False, seed=5)
  test, train = source.select('test', 'region'), source.select('train', 'region')
  assert {e['label'] for e in result['examples']} == set(result['classes']) and len(result['examples']) == 8
  x, g = (GOOD.embed_source(p, 1)['mean'].astype(np.float64) for p in (test, train))
  x, g = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, g))
  for example in result['examples']:
    i = test.table['id'].to_pylist().index(example['query'])
    order = np.argsort(-(g @ x[i]))[:6]
    assert [f['id'] for f in example['found']] == [train.table['id'].to_pylist()[k] for k in order]
    assert [f['right'] for f in example['found']] == [f['label'] == example['label'] for f in example['found']]


def test_queries_without_an_answer_are_left_out_and_named():
  source = fakes.make_source()
  region, split = (source.table[c].to_pylist() for c in ('region', 'split'))
  some = [('new' if s == 'test' and i % 4 == 0 else r) if r else None for i, (r, s) in enumerate(zip(region, split, strict=True))]
  change = lambda values: dataclasses.replace(source, table=source.table.set_column(
      source.table.column_names.index('region'), 'region', pa.array(values)))
  result = Retrieve().run(GOOD, change(some), 'region', draws=5, pixels=False)
  lost = sum(r == 'new' for r in some)
  assert any(f'{lost} of {result["splits"]["test"]} test rows have no row of their class in their gallery' in n for n in result['notes'])
  task = tasks.make_task(change(some), 'region', 0)
  values = Retrieve().answers('cosine', tasks.encoded(GOOD, task, 'mean', 64, 'trained'), task).values
  assert np.isnan(values[:, :6]).all(axis=1).sum() == lost == result['queries']['left_out']
  assert result['rows'][0]['metrics']['map']['value'] == pytest.approx(np.nanmean(values[:, 5]))
  with pytest.raises(UserError, match='no test row has a row of its class'):
    Retrieve().run(GOOD, change(['new' if s == 'test' else r for r, s in zip(region, split, strict=True)]), 'region')


def test_protocols_by_name():
  assert {'classify', 'dense', 'retrieve'} <= set(protocols.PROTOCOLS)
  assert protocols.get('retrieve, classify', {'retrieve.gallery': 'test'}) == [
      Retrieve('test'), protocols.PROTOCOLS['classify']]
  for words, names, options in (("'retreive'.*'retrieve'", 'retreive', {}), ('each can stand there once', 'classify,classify', {}),
                                ("'retrieve.galery'.*'retrieve.gallery'", 'retrieve', {'retrieve.galery': 'test'}),
                                ("'retrieve.gallery': choose one of classify", 'classify', {'retrieve.gallery': 'test'}),
                                ("'tset'.*'test'", 'retrieve', {'retrieve.gallery': 'tset'}),
                                ("'cosin'.*'cosine'", 'retrieve', {'retrieve.metric': 'cosin'}),
                                ('retrieve.k is 0', 'retrieve', {'retrieve.k': 0}),
                                ("'no'.*choose one of", 'retrieve', {'retrieve.same_subject': 'no'}),
                                ('retrieve.depth is 5: expected 0 for all ranks, or at least the largest k, 10', 'retrieve',
                                 {'retrieve.depth': 5}),
                                ("are both 'a'", 'retrieve', {'retrieve.across': 'a', 'retrieve.within': 'a'})):
    with pytest.raises(UserError, match=words):
      protocols.get(names, options)


def test_columns_that_do_not_serve():
  source = with_columns(fakes.make_source(), scanner=['A'] * 240)
  for words, options in (("'scaner'.*'scanner'", {'across': 'scaner'}), ("'scanner' has a single value", {'across': 'scanner'}),
                         ("'nothing' has a single value, or none", {'within': 'nothing'}),
                         ('no test row has a row of its class and of another subject, across region', {'across': 'region'})):
    with pytest.raises(UserError, match=words):
      Retrieve(**options).run(GOOD, source, 'region')


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
  source = open_source(corpus)
  for name, draw in Retrieve().drawings(said['protocols']['retrieve'], source).items():
    draw(tmp_path / f'{name}.png')
    with Image.open(tmp_path / f'{name}.png') as picture:
      assert np.asarray(picture.convert('RGB')).std() > 10
  assert cli.main([*words, '--channels', 'all', '--out', str(tmp_path / 'c.json')]) == 0
  text = capsys.readouterr().out
  assert 'classify:' in text and 'retrieve:' in text and 'recall@1 (mean over subsets)' in text
  assert list(json.loads((tmp_path / 'c.json').read_text())['protocols']) == ['classify', 'retrieve']
  assert (tmp_path / 'c.retrieve.png').exists() and (tmp_path / 'c.retrieve.csv').exists()
  assert cli.main([*words, '--option', 'retrieve.galery=test']) == 2
  assert cli.main(['list', 'protocols', 'retrieve']) == 0
  assert 'retrieve.*:' in (text := capsys.readouterr().out) and 'gallery=train' in text


def test_resamples_of_nmi_lie_around_its_value():
  """Of rows without any relation resampled subjects have a higher one, which is no evidence."""
  rng, protocol = np.random.default_rng(0), Retrieve()
  y, groups = rng.integers(0, 6, 60), rng.integers(0, 6, 60)
  subjects = np.array([f's{i // 3}' for i in range(60)])
  part = types.SimpleNamespace(y=y, subjects=subjects)
  values = np.column_stack([np.zeros((60, len(protocol.k) + 3)), groups])
  task = types.SimpleNamespace(test=part)
  assert retrieval.resampled_score(y, groups, subjects, draws=400).mean() > protocol.score(values, task)['nmi'] + 0.05
  drawn = protocol.resampled(values, task, 400, 0)['nmi']
  assert drawn.mean() == pytest.approx(protocol.score(values, task)['nmi']) and drawn.std() > 0.01
