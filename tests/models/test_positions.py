import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.layers import positions

from .common import normal


def cubic_at(values, x, a, stretch, drop_outside):
  """Bicubic interpolation of a 1D list at one place, written as the sum that it is."""
  total = weight_sum = 0.0
  for tap in range(math.floor(x - 2 * stretch) - 1, math.ceil(x + 2 * stretch) + 2):
    t = abs(tap - x) / stretch
    if t <= 1:
      w = (a + 2) * t**3 - (a + 3) * t**2 + 1
    elif t < 2:
      w = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    else:
      continue
    inside = 0 <= tap < len(values)
    if drop_outside and not inside:
      continue
    total += w * values[min(max(tap, 0), len(values) - 1)]
    weight_sum += w
  return total / weight_sum if drop_outside else total


@pytest.mark.parametrize('n,m', [(4, 7), (7, 4), (14, 3), (5, 5), (2, 9), (1, 3)])
def test_resample_in_one_dimension(n, m):
  values = np.asarray(normal((n, 1)), np.float64)
  got = {
    mode: np.asarray(positions.resample(jnp.asarray(values, jnp.float32), (n,), (m,), mode))[:, 0]
    for mode in ('antialias', 'offset')
  }
  scale = n / (m + 0.1)
  want = [cubic_at(values[:, 0], (i + 0.5) * scale - 0.5, -0.75, 1.0, False) for i in range(m)]
  np.testing.assert_allclose(got['offset'], want, atol=2e-6)
  want = [cubic_at(values[:, 0], (i + 0.5) * n / m - 0.5, -0.5, max(n / m, 1.0), True) for i in range(m)]
  np.testing.assert_allclose(got['antialias'], want, atol=2e-6)


@pytest.mark.parametrize('mode', ['antialias', 'offset'])
def test_resample_is_separable_and_keeps_constants(mode):
  rows, cols, deep = (np.asarray(normal((n,), n)) for n in (3, 4, 5))
  table = np.einsum('a,b,c->abc', rows, cols, deep).reshape(-1, 1)
  got = positions.resample(jnp.asarray(table), (3, 4, 5), (6, 2, 7), mode)
  one = [
    np.asarray(positions.resample(jnp.asarray(v[:, None]), (len(v),), (m,), mode))[:, 0]
    for v, m in zip((rows, cols, deep), (6, 2, 7), strict=True)
  ]
  np.testing.assert_allclose(got[:, 0], np.einsum('a,b,c->abc', *one).ravel(), atol=1e-5)
  ones = positions.resample(jnp.ones((60, 2)), (3, 4, 5), (6, 2, 7), mode)
  np.testing.assert_allclose(ones, 1.0, atol=1e-6)


def test_native_size():
  table = normal((16, 3))
  assert positions.resample(table, (4, 4), (4, 4), 'antialias') is table
  shift = np.abs(positions.resample(table, (4, 4), (4, 4), 'offset') - table).max()
  assert 1e-3 < shift < 0.3
  with pytest.raises(ValueError, match='unknown resampling mode'):
    positions.resample(table, (4, 4), (5, 4), 'linear')


def test_sincos_entry_by_entry():
  table = positions.sincos((3, 4), 16)
  for y, x in ((0, 0), (2, 1), (1, 3)):
    for i in range(4):
      w = 10000 ** -(i / 4)
      want = [math.sin(x * w), math.cos(x * w), math.sin(y * w), math.cos(y * w)]
      np.testing.assert_allclose(table[y * 4 + x, i::4], want, atol=1e-6)
  volume = positions.sincos((2, 3, 4), 20)  # 3 axes of 6 features, 2 left over
  assert volume.shape == (24, 20) and not volume[:, 18:].any()
  np.testing.assert_allclose(volume[-1, [0, 6, 12]], np.sin([3.0, 2.0, 1.0]), atol=1e-6)
  assert len(np.unique(volume.round(5), axis=0)) == 24


def test_rotary_attention_depends_on_differences_only():
  """q . k after rotation is the same for equal offsets, its size unchanged, and differs for other offsets."""
  position = jnp.asarray([[[-0.5, -0.25], [-0.25, 0.25], [0.25, 0.0], [0.5, 0.5]]])  # 0->1 equals 2->3
  angles = positions.rotary_angles(position, 16, 100.0)
  assert angles.shape == (1, 4, 8)
  q, k = (jnp.broadcast_to(normal((16,), s), (1, 4, 2, 16)) for s in (1, 2))
  rq, rk = positions.rotate(q, angles), positions.rotate(k, angles)
  np.testing.assert_allclose(jnp.linalg.norm(rq, axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-5)
  dot = np.asarray(jnp.einsum('bnhd,bmhd->nm', rq, rk))
  np.testing.assert_allclose(dot[0, 1], dot[2, 3], rtol=1e-4)
  assert abs(dot[0, 1] - dot[0, 2]) > 1e-2
  np.testing.assert_allclose(angles[0, 0, :4], 2 * np.pi * -0.5 / 100.0 ** (np.arange(4) / 4), rtol=1e-6)


def test_coordinates_are_cell_centres():
  np.testing.assert_allclose(positions.coordinates((2, 4))[[0, 5]], [[-0.5, -0.75], [0.5, -0.25]])
