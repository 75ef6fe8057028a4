"""Measures of pictures against scikit-image, quality against images made bad, features and clusters against plain NumPy."""

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import normalized_mutual_information, structural_similarity

from jaxmed.data.corpus.open import open_source
from jaxmed.data.curate import (
  balance,
  clusters,
  features,
  greedy,
  measures,
  pictures,
  quality,
  semdedup,
)
from jaxmed.data.curate import (
  curate as run,
)
from jaxmed.data.curate.curate import Request
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError


@pytest.fixture(scope='module')
def real():
  """uint8 [24, 64, 64]: pictures of a retina, some of them overlapping."""
  import skimage
  with Image.open(f'{skimage.__path__[0]}/data/retina.jpg') as image:
    whole = np.asarray(image.convert('L'))
  return np.stack([whole[300 + 8 * i:, 200 + 40 * i:][:64, :64] for i in range(24)])


@pytest.fixture(scope='module')
def groups():
  """float32 [300, 16] of length 1 around 10 directions, of 2 to 92 rows each; and the group of each row."""
  rng = np.random.default_rng(0)
  sizes = [2, 4, 6, 8, 12, 20, 30, 50, 76, 92]
  group = rng.permutation(np.repeat(np.arange(10), sizes))
  centres = np.linalg.qr(rng.normal(size=(16, 16)))[0][:10]
  return features.unit(centres[group] + 0.05 * rng.normal(size=(300, 16))), group


# ---- pictures ------------------------------------------------------------------------------------------------------

def test_ssim_is_that_of_scikit_image(real):
  got = measures.ssim(real[:-1], real[1:])
  want = [structural_similarity(a, b, data_range=255) for a, b in zip(real[:-1], real[1:])]
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)
  np.testing.assert_allclose(measures.ssim(real, real), 1, rtol=1e-12)


def test_mutual_information_is_that_of_scikit_image(real):
  got = measures.mutual_information(real[:-1], real[1:])
  want = [normalized_mutual_information(a // 8, b // 8, bins=32) - 1 for a, b in zip(real[:-1], real[1:])]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  np.testing.assert_allclose(measures.mutual_information(real, 255 - real), 1, rtol=1e-12)  # each tells the other
  flat = np.zeros((1, 64, 64), np.uint8)
  assert measures.mutual_information(flat, flat) == 1 and measures.mutual_information(flat, real[:1]) == 0


def test_entropy(real):
  from skimage.measure import shannon_entropy
  np.testing.assert_allclose(measures.entropy(real), [shannon_entropy(x) for x in real], rtol=1e-12)
  known = np.repeat(np.arange(4, dtype=np.uint8), 16).reshape(1, 8, 8)
  assert measures.entropy(known) == [2.0] and measures.entropy(0 * known) == [0.0]


@pytest.mark.parametrize('measure', [measures.ssim, measures.mutual_information])
@pytest.mark.parametrize('scope', ['volume', 'all'])
def test_redundant_is_greedy_over_the_pairs_that_are_compared(real, measure, scope):
  real = real[:10]
  rng = np.random.default_rng(1)
  noisy = np.clip(real.astype(int) + rng.integers(-3, 4, real.shape), 0, 255).astype(np.uint8)
  stack = np.concatenate([real, noisy])[rng.permutation(20)]
  group = rng.integers(0, 3, 20) if scope == 'volume' else None
  each = measure(np.repeat(stack, 20, axis=0), np.tile(stack, (20, 1, 1))).reshape(20, 20)
  threshold = np.quantile(each[np.triu_indices(20, 1)], 0.85)
  like = measures.redundant(stack, measure, threshold, 20, group)
  kept = []
  for i in range(20):
    near = [k for k in kept if each[k, i] >= threshold and (group is None or group[i] == group[k])]
    kept += [i] if not near else []
    assert (like[i] < 0) == (not near) and (not near or like[i] in near)
  assert 5 < len(kept) < 20
  if scope == 'all':  # the 6 that correlate most with each hold the duplicates
    few = measures.redundant(stack, measure, threshold, 6)
    assert (few < 0).sum() >= (like < 0).sum() and set(np.flatnonzero(few >= 0)) >= set(np.flatnonzero(like >= 0)[:3])


def test_slices_are_compared_with_their_neighbours_only():
  earlier, later = measures._along(np.array([1, 0, 1, 1, 0, 1]), 2)
  assert sorted(zip(earlier.tolist(), later.tolist())) == [(0, 2), (0, 3), (1, 4), (2, 3), (2, 5), (3, 5)]
  assert [x.tolist() for x in measures._along(np.array([3]), 4)] == [[], []]


def test_grey_and_small():
  image = np.stack([np.arange(12.0).reshape(3, 4), np.full((3, 4), 5.0)], axis=-1)
  np.testing.assert_allclose(pictures.grey(image), np.arange(12).reshape(3, 4) * 255 / 11 / 2, rtol=1e-6)
  image[0, 0, 0] = np.nan
  assert np.isfinite(pictures.grey(image)).all()
  assert pictures.small(np.arange(64, dtype=np.int16).reshape(8, 8, 1), 4).tolist()[3][3] > 225


def test_along_pairs_is_greedy_in_order():
  # 0-1, 1-2: 1 goes for 0, so 2 stays; 2-3, 0-3: 3 goes for the first that stays.
  like = greedy.along_pairs(4, np.array([2, 1, 0, 0]), np.array([3, 2, 3, 1]))
  assert like.tolist() == [-1, 0, -1, 0]


# ---- quality -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def flawed(tmp_path_factory):
  """Twenty tissue-like images, and one of each flaw."""
  from scipy.ndimage import gaussian_filter
  root = tmp_path_factory.mktemp('flawed')
  (root / 'in').mkdir()
  rng = np.random.default_rng(2)
  tissue = lambda: np.clip(gaussian_filter(rng.normal(size=(48, 48, 2)), (1, 1, 0)) * 300 + 500, 0, 1000)
  images = {f'good{i:02}': tissue() * rng.uniform(0.9, 1.1) for i in range(20)}
  images['blank'] = np.full((48, 48, 2), 490.0)
  images['blank'][3, 3] = 700
  images['blurred'] = 500 + 8 * (gaussian_filter(tissue(), (5, 5, 0)) - 500)
  images['flat'] = 500 + rng.normal(size=(48, 48, 2)) * 0.5
  images['outlier'] = tissue() + 9000
  images['saturated'] = np.where(rng.random((48, 48, 2)) < 0.7, 1000, tissue())
  images['one empty channel'] = tissue() * [1, 0]
  for name, image in images.items():
    np.savez(root / 'in' / f'{name}.npz', image=image.astype(np.float32), channels=['a', 'b'], spacing=[1.0, 1.0])
  prepare([root / 'in'], root / 'c', splits=(1.0, 0.0, 0.0), progress=False)
  return root / 'c'


def test_quality_names_each_flaw(flawed):
  source = open_source(flawed)
  verdict = quality.judge(source, run.DEFAULTS['quality'] | {'flat': 0.002})
  told = {i: r for i, r in zip(source.table['id'].to_pylist(), verdict.reason) if r}
  assert told == {'blank.npz': 'blank', 'blurred.npz': 'blurred', 'flat.npz': 'flat', 'outlier.npz': 'outlier',
                  'saturated.npz': 'saturated', 'one empty channel.npz': 'outlier'}
  assert np.isfinite(verdict.value[~verdict.keep]).all() and np.isnan(verdict.value[verdict.keep]).all()


def test_quality_numbers():
  image = np.zeros((10, 10, 1), np.uint16)
  image[:2] = 100  # 20 pixels
  image[5, 5] = 50
  m = quality.measured(image)
  assert (m['common'], m['top']) == (0.79, 0.2)
  np.testing.assert_allclose([m['mean'][0], m['std'][0]], [image.mean(), image.std()], rtol=1e-6)
  rng = np.random.default_rng(3)
  grey = rng.random((9, 11)).astype(np.float32)
  want = np.var([grey[i - 1, j] + grey[i + 1, j] + grey[i, j - 1] + grey[i, j + 1] - 4 * grey[i, j]
                 for i in range(1, 8) for j in range(1, 10)]) / grey.var()
  np.testing.assert_allclose(quality.sharpness(grey), want, rtol=1e-5)
  np.testing.assert_allclose(quality.sharpness(3 * grey + 2), want, rtol=1e-4)
  assert quality.sharpness(np.ones((5, 5), np.float32)) == 0 == quality.sharpness(np.ones((1, 5), np.float32))


def test_outliers_are_judged_by_their_channel():
  means = [np.array([1.0, 50]), np.array([2.0]), np.array([3.0, 60]), np.array([4.0, 55]), np.array([50.0, 54])]
  names = [['a', 'b'], ['a'], ['a', 'b'], ['a', 'b'], ['a', 'b']]
  z = quality.outlying(means, names)
  a, b = np.array([1, 2, 3, 4, 50.0]), np.array([50, 60, 55, 54.0])
  za, zb = np.abs(a - 3) / 1.4826, np.abs(b - 54.5) / (1.4826 * np.median(np.abs(b - 54.5)))
  np.testing.assert_allclose(z, [max(za[0], zb[0]), za[1], max(za[2], zb[1]), max(za[3], zb[2]), max(za[4], zb[3])])


# ---- features ------------------------------------------------------------------------------------------------------

def test_embedding_keeps_what_comparing_all_would_keep(groups, monkeypatch):
  x, group = groups
  monkeypatch.setattr(greedy, 'BASE', 32)
  threshold = 0.96
  like = features.near_duplicates(x, threshold)
  kept = []
  for i in range(len(x)):
    kept += [i] if not kept or (x[kept] @ x[i]).max() < threshold else []
  assert np.flatnonzero(like < 0).tolist() == kept and 15 < len(kept) < 280
  gone = np.flatnonzero(like >= 0)
  assert (group[gone] == group[like[gone]]).all() and (np.einsum('nd,nd->n', x[gone], x[like[gone]]) >= threshold).all()
  apart = features.near_duplicates(x, threshold, group % 2)
  assert ((apart >= 0) <= (like >= 0)).all()


def test_faiss_finds_the_same_in_all_cells(groups, monkeypatch):
  x, _ = groups
  want = features.near_duplicates(x, 0.96)
  nearest = features.nearest(x, 5)
  monkeypatch.setattr(features, 'EXACT', 0)
  monkeypatch.setattr(features, '_PROBES', 10**6)
  monkeypatch.setattr(greedy, 'BASE', 32)
  np.testing.assert_array_equal(features.near_duplicates(x, 0.96) >= 0, want >= 0)
  np.testing.assert_array_equal(np.sort(features.nearest(x, 5)[0]), np.sort(nearest[0]))
  monkeypatch.setattr(features, '_PROBES', 8)
  assert ((features.near_duplicates(x, 0.96) >= 0) != (want >= 0)).mean() < 0.05


def test_features_are_matched_by_id(tmp_path):
  import pyarrow as pa
  ids = pa.chunked_array([['b', 'a']])
  x = np.array([[3.0, 4], [0, 2], [1, 1]])
  np.testing.assert_allclose(features.of_ids(x, np.array(['a', 'b', 'c']), ids, 'f'), [[0, 1], [0.6, 0.8]], rtol=1e-6)
  with pytest.raises(UserError, match='lacks 1 of 2 records, the first is b'):
    features.of_ids(x, np.array(['a', 'x', 'c']), ids, 'f')
  np.savez(tmp_path / 'f.npz', other=x)
  with pytest.raises(UserError, match='expected a file that `jaxmed embed` writes'):
    features.stored(tmp_path / 'f.npz')


def test_semdedup_keeps_the_farthest_from_the_centre(groups):
  """The definition in plain loops, with the same clusters."""
  x, _ = groups
  epsilon = 0.04
  like = semdedup.semdedup(x, 8, epsilon, seed=1)
  which, cosine = clusters.spherical(x, 8, 1)
  gone = set()
  for c in range(8):
    rows = sorted(np.flatnonzero(which == c), key=lambda i: (cosine[i], i))
    for n, i in enumerate(rows):
      if any(x[i].astype(float) @ x[j] > 1 - epsilon for j in rows[:n]):
        gone.add(i)
  assert set(np.flatnonzero(like >= 0)) == gone and 20 < len(gone) < 290
  for i in gone:
    assert which[like[i]] == which[i] and cosine[like[i]] <= cosine[i] and x[i] @ x[like[i]] > 1 - epsilon
  np.testing.assert_array_equal(semdedup.semdedup(x, 8, epsilon, seed=1), like)


def test_one_duplicate_of_a_pair_stays():
  x = features.unit(np.array([[1, 0.0], [1, 0.01], [0, 1], [0.01, 1], [1, 1]]))
  like = semdedup.semdedup(x, 2, 0.01, seed=0)
  assert (like[:2] >= 0).sum() == 1 and (like[2:4] >= 0).sum() == 1 and like[4] == -1


# ---- balance -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(6))
def test_waterfill_is_one_at_a_time_to_the_poorest(seed):
  rng = np.random.default_rng(seed)
  sizes = rng.integers(0, 30, rng.integers(1, 12))
  for total in {0, 1, int(sizes.sum()) // 3, int(sizes.sum()) - 1, int(sizes.sum()), int(sizes.sum()) + 5}:
    if total < 0:
      continue
    take = balance.waterfill(sizes, total)
    slow = np.zeros_like(sizes)
    for _ in range(min(total, sizes.sum())):
      slow[min(np.flatnonzero(slow < sizes), key=lambda c: slow[c])] += 1
    np.testing.assert_array_equal(take, slow)


def test_balanced_sample_is_even_over_groups_of_uneven_size(groups):
  x, group = groups
  keep = balance.balanced(x, [10], 80, seed=0)
  assert keep.sum() == 80
  counts = np.bincount(group[keep], minlength=10)
  np.testing.assert_array_equal(np.sort(counts), np.sort(balance.waterfill(np.bincount(group), 80)))
  np.testing.assert_array_equal(balance.balanced(x, [10], 80, seed=0), keep)
  assert (balance.balanced(x, [10], 80, seed=3) != keep).any()
  assert balance.balanced(x, [10, 3], 1000, seed=0).all()


def test_shares_go_from_the_top_down():
  """Two parents, one of them with a single large child: each parent gives half, whatever lies below."""
  fine = np.repeat([0, 1, 2, 3], [100, 10, 10, 10])
  rows = balance.sample([fine, np.array([0, 1, 1, 1])], 40, seed=0)
  assert np.bincount(fine[rows]).tolist() == [20, 7, 7, 6]
  assert np.bincount(fine[balance.sample([fine], 40, seed=0)]).tolist() == [10, 10, 10, 10]
  assert np.bincount(fine[balance.sample([fine, np.array([0, 1, 1, 1])], 100, seed=0)]).tolist() == [70, 10, 10, 10]


def test_tree_levels_are_nested(groups):
  x, group = groups
  parents = balance.tree(x, [20, 5], seed=0)
  assert [len(p) for p in parents] == [300, parents[0].max() + 1]
  assert parents[0].max() < 20 and parents[1].max() < 5
  pure = [len(set(group[parents[0] == c])) for c in range(parents[0].max() + 1)]
  assert np.mean(np.array(pure) == 1) > 0.9


def test_assign_is_nearest(groups):
  x, _ = groups
  centres = x[:7] * 1.5
  which, far = clusters.assign(x, centres)
  squared = ((x[:, None].astype(float) - centres) ** 2).sum(axis=2)
  np.testing.assert_array_equal(which, squared.argmin(axis=1))
  np.testing.assert_allclose(far, squared.min(axis=1), atol=1e-5)


# ---- methods on a corpus -------------------------------------------------------------------------------------------

def test_methods_follow_each_other(corpus, tmp_path):
  import shutil
  place = shutil.copytree(corpus, tmp_path / 'c')
  source = open_source(place)
  rng = np.random.default_rng(4)
  x = features.unit(rng.normal(size=(96, 6)))
  given = (x, np.array(source.table['id'].to_pylist()))
  ask = lambda name, *methods, **more: run.curate(Request(str(place), name, methods, features=given, **more))
  every = ask('all', 'quality', 'hash', 'ssim', 'mutual_information', 'entropy', 'embedding', 'semdedup', 'balance',
              options={'embedding': {'threshold': 0.9}, 'semdedup': {'epsilon': 0.2}, 'balance': {'target': 20}})
  steps = every['steps']
  assert [s['before'] for s in steps[1:]] == [s['kept'] for s in steps[:-1]] and steps[0]['before'] == 64
  assert steps[-1]['kept'] == 20 and every['kept'] == 52 == len(open_source(f'{place}@all'))
  ask('balanced', 'balance', options={'balance': {'target': 5, 'levels': (4, 2)}}, split='test')
  assert [len(open_source(f'{place}@balanced').select(s)) for s in ('train', 'val', 'test')] == [64, 16, 5]
  for scope in run.SCOPES:
    about = ask(f'scope-{scope}', 'hash', scope=scope, options={'hash': {'radius': 30}})
    assert (about['steps'][0]['kept'] == 64) == (scope == 'volume')  # each of these records is a file of its own
