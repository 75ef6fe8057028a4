"""Tiles of whole images: nnU-Net's starts and weights, and networks of which the whole result is known."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxmed import tiles
from jaxmed.errors import UserError


def noise(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(('length', 'tile', 'wanted'), [
  (110, 64, (0, 23, 46)), (64, 64, (0,)), (200, 128, (0, 36, 72)), (40, 64, (0,)), (65, 64, (0, 1))])
def test_starts_of_nnunet(length, tile, wanted):
  assert tiles.starts(length, tile) == wanted


@pytest.mark.parametrize('step', [0.25, 0.5, 1.0])
def test_starts_cover_the_axis(step):
  for length in range(8, 60):
    at = tiles.starts(length, 8, step)
    assert at[0] == 0 and at[-1] == length - 8 and max(np.diff(at), default=0) <= 8 * step + 0.5


def test_weights_of_nnunet():
  got = tiles.gaussian((8, 8))
  wanted = [0.00335, 0.11109, 1.35335, 6.06531, 10, 6.06531, 1.35335, 0.11109]
  assert got[4] == pytest.approx(wanted, abs=5e-6)
  delta = np.zeros((12, 7, 5))
  delta[6, 3, 2] = 1
  full = ndimage.gaussian_filter(delta, (1.5, 7 / 8, 5 / 8), mode='constant')
  full *= 10 / full.max()
  full[full == 0] = full[full > 0].min()
  np.testing.assert_allclose(tiles.gaussian((12, 7, 5)), full, rtol=1e-5)
  assert tiles.gaussian((31, 30)).min() > 0


@pytest.mark.parametrize('size', [(19, 23), (5, 23), (8, 8), (21, 9, 17), (3, 20, 5), (16, 8, 8)])
@pytest.mark.parametrize('batch_size', [1, 3])
def test_a_network_that_changes_nothing(size, batch_size):
  """What comes out is what went in, also of an image that is smaller than a tile."""
  image = noise(*size, 2)
  got = tiles.predict_tiles(lambda x: x, image, (8,) * len(size), batch_size=batch_size)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, image, rtol=2e-6, atol=1e-7)


def test_a_constant_stays_constant():
  got = tiles.predict_tiles(lambda x: jnp.full((*x.shape[:-1], 3), 0.7), noise(30, 17, 1), (8, 8), step=0.3)
  np.testing.assert_allclose(got, 0.7, rtol=1e-6)


def slow(network, image, tile, step, flips):
  """Whole sums in float64, tile after tile, without any ring of slices."""
  total = np.zeros((*image.shape[:-1], 1))
  count = np.zeros((*image.shape[:-1], 1))
  weight = tiles.gaussian(tile)[..., None].astype(np.float64)
  for place in np.ndindex(*(len(tiles.starts(n, t, step)) for n, t in zip(image.shape, tile))):
    at = tuple(slice(s := tiles.starts(n, t, step)[i], s + t) for i, n, t in zip(place, image.shape, tile))
    each = []
    for turned in np.ndindex(*(2,) * len(flips)):
      axes = [a for a, on in zip(flips, turned) if on]
      each.append(np.flip(np.asarray(network(np.flip(image[at], axes)[None]))[0], axes))
    total[at] += weight * np.mean(each, axis=0)
    count[at] += weight
  return total / count


@pytest.mark.parametrize('flips', [(), (0, 2)])
def test_a_network_that_looks_at_places(flips):
  """Logits depend on the place within the tile, so that weights, steps and mirroring show."""
  image, tile = noise(13, 9, 11, 1), (6, 4, 5)
  field = jnp.asarray(noise(*tile, 1, seed=1))
  network = lambda x: x * field + jnp.cumsum(x, axis=1)
  wanted = slow(network, image, tile, 0.5, flips)
  for budget in (tiles.BUDGET, 0):  # in memory, in a file
    got = tiles.predict_tiles(network, image, tile, flips=flips, batch_size=4, budget=budget)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_mirrored_axes_make_a_result_mirror():
  """With all axes mirrored the logits of a mirrored image are the mirrored logits, where tiles lie symmetrically."""
  image, field = noise(13, 13, 1), jnp.asarray(noise(5, 7, 1, seed=1))
  run = lambda x, flips: tiles.predict_tiles(lambda t: t * field, x, (5, 7), flips=flips, step=0.4)
  for axis in (0, 1):
    turned = lambda flips, axis=axis: np.abs(np.flip(run(np.flip(image, axis), flips), axis) - run(image, flips)).max()
    assert turned((0, 1)) < 1e-5 < turned(())


DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jaxmed import tiles
assert len(jax.devices()) == 8
image = np.random.default_rng(0).normal(size=(17, 12, 1)).astype(np.float32)
network = jax.jit(lambda x: jnp.tanh(x) * jnp.arange(5)[None, None, :, None])
one = tiles.predict_tiles(network, image, (6, 5), devices=jax.devices()[:1], batch_size=2)
np.testing.assert_allclose(tiles.predict_tiles(network, image, (6, 5), flips=(0,)),
                           tiles.predict_tiles(network, image, (6, 5), flips=(0,), devices=jax.devices()[:1]), atol=1e-6)
np.testing.assert_allclose(tiles.predict_tiles(network, image, (6, 5)), one, atol=1e-6)
np.testing.assert_allclose(tiles.predict_tiles(lambda x: x, image, (6, 5)), image, rtol=2e-6, atol=1e-7)
from tests.segmenters import segmenter, stored
s, scan = segmenter(tile=(8, 8)), stored(19, 23, 2)
one, eight = (np.stack(list(s.logits(scan, devices=d))) for d in (jax.devices()[:1], None))
np.testing.assert_allclose(eight, one, atol=1e-4)
assert np.array_equal(s.predict(scan), s.decided(iter(one)))
"""


def test_devices_share_the_tiles():
  """One device with two tiles at a time, and eight with one each: known functions, and a network of random weights."""
  flags = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
  done = subprocess.run([sys.executable, '-c', DEVICES], env=os.environ | {'XLA_FLAGS': flags}, capture_output=True,
                        text=True, check=False)
  assert done.returncode == 0, done.stderr


def test_what_lies_around_a_small_image():
  """Around its middle, one pixel more behind than before, as nnU-Net pads."""
  got = []
  tiles.predict_tiles(lambda x: (got.append(np.asarray(x)), x)[1], np.ones((3, 8, 1)), (8, 8), fill=-1.0, devices=jax.devices()[:1])
  assert got[0][0, :, 0, 0].tolist() == [-1, -1, 1, 1, 1, -1, -1, -1]


@pytest.mark.parametrize(('size', 'options', 'words'), [
  ((8, 8, 8, 1), {}, 'takes tiles of 4x4'), ((8, 8, 1), {'step': 0.0}, 'above 0'), ((8, 8, 1), {'flips': (2,)}, '0 to 1')])
def test_bad_input(size, options, words):
  with pytest.raises(UserError, match=words):
    tiles.predict_tiles(lambda x: x, np.zeros(size), (4, 4), **options)
