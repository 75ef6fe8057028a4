"""Mixtures: who is due at a position, in which share, in which order, whoever asks and wherever reading starts."""

import collections
import itertools

import numpy as np
import pytest

from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed import sampling
from jaxmed.data.feed.pipeline import train_batches
from jaxmed.data.feed.sampling import Mixture, make, permuted, stage
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError

# 24 records: site north has 12 of 3 subjects (8, 3, 1 records), south 8 of 2, west 4 of 4.
SUBJECTS = ['n0'] * 8 + ['n1'] * 3 + ['n2'] + ['s0'] * 4 + ['s1'] * 4 + ['w0', 'w1', 'w2', 'w3']
SITES = ['north'] * 12 + ['south'] * 8 + ['west'] * 4


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  root = tmp_path_factory.mktemp('sites')
  rng = np.random.default_rng(0)
  (root / 'in').mkdir()
  lines = ['path,split,subject,site']
  for i in rng.permutation(24):
    np.savez(root / 'in' / f'{i:02d}.npz', image=rng.integers(0, 255, (6, 7, 1)).astype(np.uint8), channels=['CT'])
    lines.append(f'{i:02d}.npz,train,{SUBJECTS[i]},{SITES[i]}')
  (root / 't.csv').write_text('\n'.join(lines))
  prepare([root / 'in'], root / 'c', table=root / 't.csv', progress=False)
  return open_source(root / 'c')


def rows(source, count, mixture, seed=3, **options):
  sampler = make(source, mixture, seed, **options)
  return np.array([sampler(n) for n in range(count)])


def sites(source, indices):
  return np.array(source.table['site'].to_pylist())[indices]


@pytest.mark.parametrize('weights', [(1, 2, 3), (0.5, 0.3, 0.15, 0.04, 0.01), (1,) * 7, (0, 1), (3, 0, 1), (5,),
                                     tuple(2.0**-k for k in range(12)), (1, 1, 1.001, 97)])
def test_shares_are_exact_over_a_stage_and_close_before(weights):
  length = 997
  made = stage(weights, length)
  share = np.array(weights) / np.sum(weights)
  seen, worst = np.zeros(len(weights), int), 0.0
  for m in range(length):
    group, before = made.place(m)
    assert before == seen[group]
    seen[group] += 1
    worst = max(worst, np.abs(seen - share * (m + 1)).max())
  assert np.abs(seen - share * length).max() < 1
  assert worst < 1.7


@pytest.mark.parametrize('seed', range(3))
def test_shares_of_many_groups(seed):
  share = np.random.default_rng(seed).dirichlet(np.full(200, 0.3))
  made = stage(share, 1 << 40)
  seen, worst = np.zeros(200), 0.0
  for m in range(6000):
    seen[made.place(m)[0]] += 1
    worst = max(worst, np.abs(seen - share * (m + 1)).max())
  assert worst < 1.7


@pytest.mark.parametrize('n', [1, 2, 5, 32, 33, 64, 100, 1000, 4097])
def test_a_permutation_hits_everything_once(n):
  whole = [permuted(i, n, (1, 2)) for i in range(n)]
  assert sorted(whole) == list(range(n))
  if n > 5:
    assert whole != [permuted(i, n, (1, 3)) for i in range(n)]


@pytest.mark.parametrize('n', [7, 50])
def test_permutations_are_even(n):
  """Where an element goes is uniform over keys, and so is where its neighbour goes from there (chi-square)."""
  draws = 4000
  first, step = np.zeros(n), np.zeros(n)
  for key in range(draws):
    a, b = permuted(0, n, (key,)), permuted(1, n, (key,))
    first[a] += 1
    step[(b - a) % n] += 1
  assert step[0] == 0
  for counts, cells in ((first, n), (step[1:], n - 1)):
    expected = draws / cells
    chi = ((counts - expected) ** 2 / expected).sum()
    assert chi < cells - 1 + 5 * (2 * (cells - 1)) ** 0.5


def test_every_group_walks_through_its_rows_in_epochs(source):
  got = rows(source, 240, Mixture(balance='site', weights='north=1,south=1,west=2'))
  where = sites(source, got)
  assert collections.Counter(where) == {'north': 60, 'south': 60, 'west': 120}
  for site, size in (('north', 12), ('south', 8), ('west', 4)):
    own = got[where == site]
    epochs = own[:len(own) // size * size].reshape(-1, size)
    assert (np.sort(epochs) == np.flatnonzero(sites(source, np.arange(24)) == site)).all()
    assert len({tuple(e) for e in epochs}) >= 5  # orders of their own: 24 of four rows, 40320 of eight
  other = rows(source, 240, Mixture(balance='site', weights='north=1,south=1,west=2'), seed=4)
  assert (sites(source, other) == where).all()
  assert (other != got).mean() > 0.5


def test_alpha(source):
  for alpha in (0.0, 0.3, 1.0):
    counts = collections.Counter(sites(source, rows(source, 1200, Mixture(balance='site', alpha=alpha))))
    wanted = np.array([12.0, 8.0, 4.0]) ** alpha
    wanted *= 1200 / wanted.sum()
    assert np.abs(np.array([counts[s] for s in ('north', 'south', 'west')]) - wanted).max() < 1.7


def test_balanced_subjects(source):
  names = np.array(source.table['subject'].to_pylist())
  got = rows(source, 900, Mixture(subjects='balanced'))
  assert set(collections.Counter(names[got]).values()) == {100}
  for turn in got.reshape(-1, 9):
    assert len(set(names[turn])) == 9
  own = got[names[got] == 'n0'][:96].reshape(-1, 8)
  assert (np.sort(own) == np.flatnonzero(names == 'n0')).all()
  mixed = rows(source, 900, Mixture(balance='site', alpha=0.0, subjects='balanced'))
  counts = collections.Counter(names[mixed])
  assert [counts[n] for n in ('n0', 'n1', 'n2', 's0', 's1', 'w0', 'w3')] == [100] * 3 + [150] * 2 + [75] * 2


def test_schedule_in_steps(source):
  mixture = Mixture(balance='site', weights='0:north=1,south=1,west=0;0.5:north=1,*=0;0.75:west=3,north=1,*=0')
  got = sites(source, rows(source, 8 * 20, mixture, batch_size=8, steps=20)).reshape(20, 8)
  count = lambda part: dict(collections.Counter(part.ravel()))
  assert count(got[:10]) == {'north': 40, 'south': 40}
  assert count(got[10:15]) == {'north': 40}
  assert count(got[15:]) == {'north': 10, 'west': 30}
  # Groups go on where they were: every 12 visits of north are all its rows.
  numbers = rows(source, 8 * 20, mixture, batch_size=8, steps=20)
  own = numbers[sites(source, numbers) == 'north'][:84].reshape(-1, 12)
  assert (np.sort(own) == np.flatnonzero(sites(source, np.arange(24)) == 'north')).all()


def test_linear_schedule(source):
  mixture = Mixture(balance='site', weights='0:north=1,*=0;0.5:west=1,*=0', schedule='linear')
  sampler = make(source, mixture, 0, batch_size=8, steps=200)
  assert len(sampler.stages) <= sampling.LINEAR_STAGES
  got = sites(source, np.array([sampler(n) for n in range(1600)])).reshape(200, 8)
  share = (got == 'west').mean(axis=1).reshape(-1, 20).mean(axis=1)
  wanted = np.array([0.1, 0.3, 0.5, 0.7, 0.9, 1, 1, 1, 1, 1])
  assert np.abs(share - wanted).max() < 0.02
  assert not (got == 'south').any()


def batches(source, count, mixture, start=0, process=0, processes=1, fit='crop'):
  sampler = make(source, mixture, 3, 8, 30)
  found = train_batches(source, batch_size=8, size=(4, 5), vocabulary=('CT',), seed=3, start_step=start, fit=fit,
                        process_index=process, process_count=processes, threads=2, sampler=sampler)
  return list(itertools.islice(found, count))


@pytest.mark.parametrize('mixture', [
  Mixture(balance='site', alpha=0.3), Mixture(subjects='balanced'),
  Mixture(balance='site', weights='0:north=1,*=1;0.2:west=3,*=1', schedule='linear', subjects='balanced')])
@pytest.mark.parametrize('processes', [1, 2, 4])
def test_batches_do_not_depend_on_processes_or_start(source, mixture, processes):
  whole = batches(source, 7, mixture)
  for start in (0, 3):
    parts = [batches(source, 7 - start, mixture, start, p, processes) for p in range(processes)]
    for step in range(start, 7):
      local = [part[step - start] for part in parts]
      for key, value in whole[step].items():
        assert np.array_equal(value, np.concatenate([b[key] for b in local])), key
  assert len({b['image'].tobytes() for b in whole}) == 7


def test_without_a_mixture_the_order_is_grains(source):
  import grain.python as grain

  assert make(source, Mixture(), 0) is None
  found = train_batches(source, batch_size=8, size=(4, 5), vocabulary=('CT',), seed=3)
  rows = np.concatenate([b['index'] for b in itertools.islice(found, 12)])  # four epochs
  wanted = grain.MapDataset.range(24).seed(3).shuffle().repeat()
  assert rows.tolist() == [wanted[n] for n in range(96)]


def test_held_out(source):
  rest = source.where({'site': ('north', 'west')}, but=True)
  assert set(rest.table['site'].to_pylist()) == {'south'}
  either = source.where({'site': ('north',), 'subject': ('w2', 'n1')}, but=True)
  assert set(either.table['subject'].to_pylist()) == {'s0', 's1', 'w0', 'w1', 'w3'}
  assert [rest[i]['subject'] for i in range(len(rest))] == rest.table['subject'].to_pylist()
  only = source.where(sampling.parse_values('site=north, west; subject=n1,w2,s0', 'x'))
  assert sorted(set(only.table['subject'].to_pylist())) == ['n1', 'w2']
  with pytest.raises(UserError, match="'nort': did you mean 'north'"):
    source.where({'site': ('nort',)})
  with pytest.raises(UserError, match="'sit': did you mean 'site'"):
    source.where({'sit': ('north',)})
  with pytest.raises(UserError, match="held_out has 'site': expected COLUMN=VALUE"):
    sampling.parse_values('site', 'held_out')


def test_refusals(source):
  for options, match in (
    ({'balance': 'sit'}, "'sit': did you mean 'site'"),
    ({'balance': 'site', 'weights': 'nort=1,*=1'}, "'nort': did you mean 'north'"),
    ({'balance': 'site', 'weights': 'north=1'}, "says nothing of 'south'"),
    ({'balance': 'site', 'weights': 'north,*=1'}, "'north': expected VALUE=WEIGHT"),
    ({'balance': 'site', 'weights': 'north=-1,*=1'}, 'at least 0'),
    ({'balance': 'site', 'weights': 'north=1,north=2,*=1'}, 'twice'),
    ({'balance': 'site', 'weights': '*=0'}, 'nothing to draw from'),
    ({'balance': 'site', 'weights': '0.5:*=1'}, 'rise from 0'),
    ({'balance': 'site', 'weights': '0:*=1;0:*=1'}, 'rise from 0'),
    ({'balance': 'site', 'weights': '0:*=1;1:*=1'}, 'below 1'),
    ({'balance': 'site', 'weights': '*=1', 'alpha': 0.5}, 'exclude each other'),
    ({'weights': '*=1'}, 'loader.balance'),
    ({'alpha': 0.5}, 'loader.balance'),
    ({'balance': 'site', 'alpha': 2.0}, 'loader.alpha must be'),
    ({'balance': 'site', 'schedule': 'linaer'}, "did you mean 'linear'"),
    ({'subjects': 'balance'}, "did you mean 'balanced'"),
  ):
    with pytest.raises(UserError, match=match) as e:
      make(source, Mixture(**options), 0, 8, 10)
    assert '\n' not in str(e.value)
