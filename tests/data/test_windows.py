"""Windows of records: which rows they hold, in what order, and their batches as a function of (seed, step)."""

import itertools

import numpy as np
import pytest

from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed import windows
from jaxmed.data.feed.pipeline import eval_batches, train_batches
from jaxmed.data.feed.sampling import Mixture
from jaxmed.data.feed.sampling import make as sampler
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError

CASES = {'a': 7, 'b': 3, 'c': 1, '': 2}  # records of each case; two are of none


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """Frames whose pixels are their time; files come in another order."""
  root = tmp_path_factory.mktemp('w')
  (root / 'in').mkdir()
  frames = [(case, t) for case, count in CASES.items() for t in range(count)]
  lines = ['path,split,case,seconds,time']
  for name, k in enumerate(np.random.default_rng(0).permutation(len(frames))):
    case, t = frames[k]
    image = np.full((8 + t % 2, 9, 1), 10 + t, np.uint8)
    image[:2] += np.arange(9, dtype=np.uint8)[:, None] * 20
    np.savez(root / 'in' / f'{name:02d}.npz', image=image, channels=['x'])
    lines.append(f'{name:02d}.npz,train,{case},{t / 2},t{t}')
  (root / 't.csv').write_text('\n'.join(lines))
  prepare([root / 'in'], root / 'c', table=root / 't.csv', progress=False)
  return open_source(root / 'c')


def plainly(source, length, stride):
  """Windows of lists, [(case, time), ...]."""
  rows = source.table.to_pylist()
  groups = {}
  for i, row in enumerate(rows):
    groups.setdefault(row['case'] or f'none {i}', []).append((row['seconds'], i))
  out = []
  for group in groups.values():
    order, begin = [i for _, i in sorted(group)], 0
    while begin < len(order):
      out.append((order[begin : begin + length] + [-1] * length)[:length])
      if begin + length >= len(order):
        break
      begin += stride
  return sorted(out)


@pytest.mark.parametrize('length, stride', [(3, 0), (3, 1), (3, 2), (2, 3), (4, 0), (9, 0), (1, 0)])
def test_rows(source, length, stride):
  made = windows.make(source, length, 'case', 'seconds', stride)
  rows = [made.rows(i).tolist() for i in range(len(made))]
  assert sorted(rows) == plainly(source, length, stride or length)
  if (stride or length) <= length:
    assert {i for row in rows for i in row} - {-1} == set(range(len(source)))
  heads = made.heads(source)
  assert heads.table['id'].to_pylist() == [source.table['id'][row[0]].as_py() for row in rows]


def test_without_columns_the_manifest_is_one_sequence(source):
  made = windows.make(source, 4)
  assert [made.rows(i).tolist() for i in range(len(made))] == [[*range(0, 4)], [*range(4, 8)], [*range(8, 12)], [12, -1, -1, -1]]
  assert windows.make(source, 0) is None


def take(source, count, **options):
  made = windows.make(source, 3, 'case', 'seconds')
  options = {'batch_size': 4, 'size': (6, 7), 'vocabulary': ('x',), 'seed': 5, 'label': 'time', 'windows': made} | options
  return list(itertools.islice(train_batches(source, **options), count))


@pytest.mark.parametrize('fit', ['resize', 'crop'])
@pytest.mark.parametrize('mixed', [False, True])
def test_batches_do_not_depend_on_processes_or_start(source, fit, mixed):
  made = windows.make(source, 3, 'case', 'seconds')
  draw = sampler(made.heads(source), Mixture(balance='case', alpha=0.0), 5) if mixed else None
  whole = take(source, 6, fit=fit, sampler=draw, threads=1)
  assert whole[0]['image'].shape == (4, 3, 6, 7, 1) and whole[0]['channels'].shape == whole[0]['channel_mask'].shape == (4, 3, 1)
  parts = [take(source, 3, fit=fit, sampler=draw, start_step=3, process_index=p, process_count=2) for p in range(2)]
  for step in range(3, 6):
    for name, array in whole[step].items():
      assert np.array_equal(array, np.concatenate([part[step - 3][name] for part in parts])), name
  rows = [made.rows(i).tolist() for i in range(len(made))]
  seen = [row.tolist() for batch in whole for row in batch['index']]
  assert all(row in rows for row in seen)
  if mixed:
    cases = [str(source.table['case'][row[0]].as_py()) for row in seen]
    assert {cases.count(case) for case in ('a', 'b', 'c', 'None')} == {6}
  else:
    assert len({tuple(row) for row in seen[:len(made)]}) == len(made)  # an epoch is a permutation


def test_what_a_window_holds(source):
  for fit in ('resize', 'crop'):
    for batch in take(source, 3, fit=fit):
      for image, index, label, mask in zip(batch['image'], batch['index'], batch['label'], batch['channel_mask']):
        there = index >= 0
        assert there[0] and (np.diff(label[there]) == 1).all() and (label[~there] == -1).all()
        assert not image[~there].any() and np.array_equal(mask[:, 0], there)
        if fit == 'crop':  # frames of one size are cut alike: frames of a case differ by their time alone
          first = [k for k in range(3) if there[k] and label[k] % 2 == label[0] % 2]
          for k in first:
            assert (image[k].astype(int) - image[0] == label[k] - label[0]).all()


def test_evaluation_sees_every_window_once(source):
  made = windows.make(source, 3, 'case', 'seconds')
  batches = list(eval_batches(source, batch_size=4, size=(6, 7), vocabulary=('x',), windows=made))
  rows = np.concatenate([b['index'] for b in batches]).tolist()
  assert rows == [made.rows(i).tolist() for i in range(len(made))] + [[-1] * 3] * (4 * len(batches) - len(made))


def test_thin_keeps_whole_groups(source):
  assert windows.thin(source, 20, 'case') is source
  kept = windows.thin(source, 10, 'case').table['case'].to_pylist()
  assert len(kept) <= 10 and all(kept.count(case) in (0, count) for case, count in CASES.items() if case)
  assert len(windows.thin(source, 5)) == 5  # of a single long sequence its beginning


def test_refusals(source):
  with pytest.raises(UserError, match="'cases': did you mean 'case'"):
    windows.make(source, 2, 'cases')
  with pytest.raises(UserError, match="'second': did you mean 'seconds'"):
    windows.make(source, 2, 'case', 'second')
  with pytest.raises(UserError, match='loader.window_order=channels holds list<.*>, which has no order'):
    windows.make(source, 2, 'case', 'channels')
