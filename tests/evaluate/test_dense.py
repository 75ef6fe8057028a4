"""Probes of patches as pure functions: against scikit-learn, slow loops and cases whose answer is known."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from jaxmed.errors import UserError
from jaxmed.evaluate import dense
from jaxmed.evaluate.dense import Patches

GRIDS = {(8, 6): (4, 3), (4, 6, 4): (2, 3, 1)}


def stripes(count=6, grid=(4, 4), patch=4, classes=3, seed=0):
  """Masks [n, *size] of whole rows of patches, and features: the class of each patch as a one-hot vector."""
  y = np.random.default_rng(seed).integers(0, classes, (count, grid[0], *[1] * (len(grid) - 1)))
  y = np.broadcast_to(y, (count, *grid))
  pixels = y
  for axis in range(1, len(grid) + 1):
    pixels = np.repeat(pixels, patch, axis=axis)
  return pixels.astype(np.int16), np.eye(classes, dtype=np.float32)[y]


def patches_of(masks, maps):
  grid = maps.shape[1:-1]
  pixels = dense.cut(masks, grid)
  return Patches(maps.reshape(-1, maps.shape[-1]), pixels.reshape(-1, pixels.shape[-1]))


def problem(n, seed, width=6, pixels=5, classes=3):
  """Patches whose pixels mostly have the class that the features tell; some are ignored."""
  rng = np.random.default_rng(seed)
  y = rng.integers(0, classes, n)
  x = np.random.default_rng(9).normal(size=(classes, width))[y] + 0.9 * rng.normal(size=(n, width))
  other = rng.integers(-1, classes, (n, pixels))
  return Patches(np.float32(x), np.where(rng.random((n, pixels)) < 0.7, y[:, None], other).astype(np.int16))


@pytest.mark.parametrize('size', GRIDS)
def test_pixels_of_patches_and_back(size):
  """A patch holds the pixels of its box in C order."""
  grid = GRIDS[size]
  maps = np.random.default_rng(0).integers(0, 99, (2, *size))
  patches, inner = dense.cut(maps, grid), dense.cell(size, grid)
  for place in np.ndindex(grid):
    box = tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, inner, strict=True))
    np.testing.assert_array_equal(patches[(0, *place)], maps[(0, *box)].ravel())
  np.testing.assert_array_equal(dense.joined(patches, size), maps)
  np.testing.assert_array_equal(dense.joined(patches[..., :1], size),
                                dense.joined(np.broadcast_to(patches[..., :1], patches.shape), size))


def test_patches_that_do_not_divide():
  with pytest.raises(UserError, match='map of 3x4 patches does not divide images of 8x8 pixels'):
    dense.cut(np.zeros((1, 8, 8)), (3, 4))


def test_the_commonest_class():
  """The smallest of several; ignored pixels win where they are more than each class."""
  pixels = np.array([[2, 2, 1, 1, 0], [-1, -1, 1, 1, 0], [-1, -1, -1, 1, 1], [0, 1, 2, 2, 2]])
  np.testing.assert_array_equal(dense.commonest(pixels, 3), [1, 1, -1, 2])
  np.testing.assert_array_equal(dense.counted(pixels, 3)[0], [1, 2, 2])


@pytest.mark.parametrize('distance, metric', [('cosine', 'cosine'), ('L2', 'euclidean')])
def test_neighbours_are_those_of_scikit_learn(distance, metric, monkeypatch):
  monkeypatch.setattr(dense, '_CHUNK', 120)
  train, test = problem(40, 0), problem(30, 1)
  found = dense.neighbours(train.x, test.x, 5, distance)
  y = dense.commonest(train.pixels, 3)
  theirs = KNeighborsClassifier(5, metric=metric, algorithm='brute').fit(train.x, y)
  np.testing.assert_array_equal(found, theirs.kneighbors(test.x)[1])
  assert dense.neighbours(train.x[:3], test.x, 5, distance).shape == (30, 3)


def test_votes_are_those_of_a_loop(monkeypatch):
  monkeypatch.setattr(dense, '_CHUNK', 60)
  pixels, found = np.maximum(problem(20, 2).pixels, 0), np.random.default_rng(0).integers(0, 20, (9, 4))
  want = [[np.bincount(pixels[f, i]).argmax() for i in range(pixels.shape[1])] for f in found]
  np.testing.assert_array_equal(dense.votes(pixels, found, 3), want)


def test_knn_is_capis():
  """Chosen on the validation pixels, fitted again on both, ignored pixels out of it: a loop in float64."""
  train, val, test = problem(60, 0), problem(40, 1), problem(20, 2)
  def answers(fit, asked, k, distance):
    y = dense.commonest(fit.pixels, 3)
    pixels = np.where(fit.pixels < 0, y[:, None], fit.pixels)[y >= 0]
    scale = StandardScaler().fit(np.float64(fit.x[y >= 0]))
    stored, out = scale.transform(fit.x[y >= 0]), []
    for x in scale.transform(asked):
      if distance == 'cosine':
        far = 1 - stored @ x / np.linalg.norm(stored, axis=1) / np.linalg.norm(x)
      else:
        far = np.linalg.norm(stored - x, axis=1)
      near = pixels[np.argsort(far)[:k]]
      out.append([np.bincount(column, minlength=3).argmax() for column in near.T])
    return np.array(out)
  known = val.pixels >= 0
  grid = [(k, d) for d in ('cosine', 'L2') for k in (1, 3, 10)]
  scores = [jaccard_score(val.pixels[known], answers(train, val.x, *g)[known], average='macro') for g in grid]
  probe = dense.knn(train, val, 3, grid)
  best = grid[int(np.argmax(scores))]
  assert (probe.info['k'], probe.info['distance']) == best and probe.score == pytest.approx(max(scores))
  both = Patches(np.concatenate([train.x, val.x]), np.concatenate([train.pixels, val.pixels]))
  np.testing.assert_array_equal(probe.predict(test.x.reshape(2, 10, 6), (50,)),
                                answers(both, test.x, *best).reshape(2, 50))


def test_logistic_is_that_of_scikit_learn():
  train, val, test = problem(80, 0), problem(40, 1), problem(30, 2)
  known, grid = val.pixels >= 0, (1e-3, 1e-1, 1e1)
  def fitted(patches, c):
    y = dense.commonest(patches.pixels, 3)
    scale = StandardScaler().fit(patches.x[y >= 0])
    model = LogisticRegression(C=c, max_iter=1000).fit(scale.transform(patches.x[y >= 0]), y[y >= 0])
    return lambda x: model.predict(scale.transform(x))
  guess = lambda c: np.repeat(fitted(train, c)(val.x)[:, None], 5, axis=1)
  scores = [jaccard_score(val.pixels[known], guess(c)[known], average='macro') for c in grid]
  assert len(set(scores)) == 3
  probe = dense.logistic(train, val, 3, grid)
  best = grid[int(np.argmax(scores))]
  assert probe.info['C'] == best and probe.score == pytest.approx(max(scores))
  both = Patches(np.concatenate([train.x, val.x]), np.concatenate([train.pixels, val.pixels]))
  want = np.repeat(fitted(both, best)(test.x), 5).reshape(3, 50)
  assert (probe.predict(test.x.reshape(3, 10, 6), (50,)) == want).mean() > 0.99


@pytest.mark.parametrize('method', ['knn', 'logistic', 'linear'])
@pytest.mark.parametrize('grid', [(4, 3), (3, 2, 2)])
def test_features_that_tell_the_class_give_one(method, grid):
  """One-hot classes of patches as features, masks that end with patches: mIoU 1 on other images, 2D and 3D."""
  (a, x), (b, y), (c, z) = (stripes(grid=grid, seed=s) for s in range(3))
  more = {'steps': 60, 'rates': (1e-1,)} if method == 'linear' else {}
  probe = getattr(dense, method)(patches_of(a, x), patches_of(b, y), 3, **more)
  assert probe.score == 1 and not probe.trouble
  np.testing.assert_array_equal(probe.predict(z, c.shape[1:]), c)


@pytest.mark.parametrize('method', ['knn', 'logistic', 'linear'])
def test_ignored_pixels_say_nothing(method):
  """Patches that are ignored whole may have any features, or be missing."""
  train, val, test = problem(60, 0), problem(30, 1), problem(20, 2)
  lost = np.arange(60) % 4 == 0
  train.pixels[lost] = -1
  more = {'steps': 30, 'rates': (1e-2,)} if method == 'linear' else {}
  fit = lambda p: getattr(dense, method)(p, val, 3, **more).predict(test.x.reshape(2, 10, 6), (50,))
  wild = np.where(lost[:, None], 100 * np.random.default_rng(0).normal(size=train.x.shape), train.x)
  np.testing.assert_array_equal(fit(train), fit(Patches(np.float32(wild), train.pixels)))
  fewer = Patches(train.x[~lost], train.pixels[~lost])
  np.testing.assert_array_equal(fit(train), fit(fewer))


def test_the_linear_head_learns_by_batch_norm():
  """As good as logistic regression on features of very different scales, deterministic by its seed."""
  train, val, test = (problem(400, s, width=8) for s in range(3))
  stretched = lambda p: Patches(p.x * np.float32(10.0 ** np.arange(-3, 5)) + 7, p.pixels)
  train, val, test = map(stretched, (train, val, test))
  known = test.pixels >= 0
  def score(probe):
    got = np.repeat(probe.predict(test.x.reshape(4, 100, 8), (100,)).reshape(-1, 1), 5, axis=1)  # no interpolation
    return jaccard_score(test.pixels[known], got[known], average='macro')
  ask = dict(steps=150, batch=128)
  linear = dense.linear(train, val, 3, **ask)
  assert score(linear) > score(dense.logistic(train, val, 3)) - 0.03
  assert dense.linear(train, val, 3, **ask).score == linear.score
  asked = test.x.reshape(4, 100, 8)
  np.testing.assert_array_equal(dense.linear(train, val, 3, **ask).predict(asked, (500,)), linear.predict(asked, (500,)))


def test_the_folded_head_is_the_batch_norm_with_running_statistics():
  """Without steps to speak of, the head is the first kernel behind a batch norm of the statistics of one batch."""
  import jax
  x = np.float32(np.random.default_rng(0).normal(3, 2, size=(64, 4)))
  count = np.float32(np.eye(3)[np.arange(64) % 3])
  w, b = map(np.asarray, dense._train(x, count, 64, 0.0, jax.random.key(0), 1, 64, 0.0, 0.0))
  first, key = jax.random.split(jax.random.key(0))
  kernel = 0.01 * np.asarray(jax.random.normal(first, (4, 3)))
  index = np.asarray(jax.random.randint(jax.random.split(jax.random.split(key, 1)[0])[0], (64,), 0, 64))
  mean, var = 0.1 * x[index].mean(axis=0), 0.9 + 0.1 * x[index].var(axis=0)
  np.testing.assert_allclose(x @ w + b, (x - mean) / np.sqrt(var + 1e-5) @ kernel, rtol=1e-4, atol=1e-6)


def test_logits_are_interpolated_between_patches():
  """Halfway between two patches the border of their classes lies between their pixels, wherever the masks end."""
  train = patches_of(*stripes(seed=1))
  probe = dense.linear(train, train, 3, steps=60, rates=(1e-1,))
  row = np.eye(3, dtype=np.float32)[[0, 1, 1, 2]].reshape(1, 4, 1, 3)
  np.testing.assert_array_equal(probe.predict(row, (16, 1))[0, :, 0], np.repeat([0, 1, 1, 2], 4))


def test_what_cannot_be_fitted():
  one = Patches(np.zeros((4, 2), np.float32), np.zeros((4, 3), np.int16))
  with pytest.raises(UserError, match='of one class; expected two or more'):
    dense.logistic(one, one, 2)
  with pytest.raises(UserError, match='every training patch is mostly ignored'):
    dense.knn(Patches(one.x, one.pixels - 1), one, 2)
  with pytest.raises(UserError, match='every pixel of the training patches is ignored'):
    dense.linear(Patches(one.x, one.pixels - 1), one, 2)
