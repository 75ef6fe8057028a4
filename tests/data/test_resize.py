"""Resizing equals Pillow's and a float64 reference of any rank."""

import numpy as np
import pytest
from PIL import Image

from jaxmed.data.resize import resize, weights


@pytest.mark.parametrize('grid, size', [((64, 48), (20, 31)), ((33, 70), (32, 32)), ((10, 12), (25, 13)),
                                        ((200, 17), (7, 40)), ((9, 9), (9, 4))])
def test_equals_pillow(grid, size):
  image = np.random.default_rng(0).random((*grid, 2)).astype(np.float32)
  got = resize(image, size)
  assert got.dtype == np.float32
  assert got.shape == (*size, 2)
  for c in range(2):
    pillow = Image.fromarray(image[..., c]).resize(size[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_allclose(got[..., c], np.asarray(pillow), atol=1e-5)


def test_volume_equals_a_sum_written_out():
  image = np.random.default_rng(1).integers(-1000, 3000, (7, 6, 5, 2)).astype(np.int16)
  size = (3, 9, 5)
  def axis(n, m):
    w = np.zeros((m, n))
    for i in range(m):
      centre, width = (i + 0.5) * n / m, max(n / m, 1)
      for j in range(n):
        w[i, j] = max(0, 1 - abs(j + 0.5 - centre) / width)
      w[i] /= w[i].sum()
    return w
  expected = np.einsum('az,by,cx,zyxk->abck', *(axis(n, m) for n, m in zip(image.shape, size)),
                       image.astype(np.float64))
  got = resize(image, size)
  assert got.dtype == np.int16
  assert np.abs(got - expected).max() <= 0.501


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.int32])
def test_constant_stays_constant_at_the_limits(dtype):
  for value in (np.iinfo(dtype).min, np.iinfo(dtype).max):
    got = resize(np.full((9, 7, 1), value, dtype), (4, 5))
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(np.float64), value, rtol=0 if dtype != np.int32 else 1e-6)


def test_same_size_is_the_same_object_and_rank_is_checked():
  image = np.zeros((4, 4, 1), np.uint8)
  assert resize(image, (4, 4)) is image
  with pytest.raises(ValueError, match='rank'):
    resize(image, (4, 4, 4))
  assert weights(5, 3).sum(axis=1) == pytest.approx(1)
