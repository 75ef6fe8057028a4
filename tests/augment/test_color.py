"""Changes of colour against colorsys, scikit-image and NumPy; which samples and channels they reach."""

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.color import hed_from_rgb, rgb_from_hed

from jaxmed.augment import color
from jaxmed.augment.views import ViewMaker
from jaxmed.errors import UserError

KEY = jax.random.key(0)
LUMA = np.array([0.299, 0.587, 0.114])


def colors(count=4, grid=(5, 6)):
  """Random planes [3, B, *grid] in 0 .. 1, with grays, black, white and pure colours among them."""
  rgb = np.random.default_rng(0).uniform(size=(3, count, *grid)).astype(np.float32)
  rgb[:, 0, 0, 0], rgb[:, 0, 0, 1], rgb[:, 0, 0, 2] = 0.4, 0.0, 1.0
  rgb[:, 0, 0, 3], rgb[:, 0, 1, 0] = (1, 0, 0), (0, 0.5, 0.5)
  return rgb


def test_hue_turns_on_the_circle_of_hsv():
  rgb, shift = colors(), np.array([0.0, 0.1, -0.3, 0.5])
  have = np.asarray(jax.jit(color.turn_hue)(rgb, shift))
  for b, i, j in np.ndindex(rgb.shape[1:]):
    h, s, v = colorsys.rgb_to_hsv(*map(float, rgb[:, b, i, j]))
    np.testing.assert_allclose(have[:, b, i, j], colorsys.hsv_to_rgb((h + shift[b]) % 1, s, v), atol=2e-6)


def test_saturation_blends_with_gray_and_is_cut():
  rgb, factor = colors(), np.array([1.0, 0.0, 0.6, 1.8])
  luma = np.tensordot(LUMA, rgb.astype(np.float64), 1)
  wide = factor[:, None, None]
  np.testing.assert_allclose(color.saturate(rgb, factor), np.clip(rgb * wide + luma * (1 - wide), 0, 1), atol=1e-6)
  np.testing.assert_allclose(color.grayscale(rgb), np.broadcast_to(luma, rgb.shape), atol=1e-6)


def test_stains_are_ruifroks():
  rgb = colors().clip(0.05, 1)
  rng = np.random.default_rng(1)
  factor, shift = rng.uniform(0.9, 1.1, (4, 3)), rng.uniform(-0.1, 0.1, (4, 3))
  density = -np.log10(np.moveaxis(rgb, 0, -1).astype(np.float64))
  amounts = density @ hed_from_rgb * factor[:, None, None] + shift[:, None, None]
  want = np.clip(10 ** -(amounts @ rgb_from_hed), 0, 1)
  have = np.moveaxis(np.asarray(jax.jit(color.stain)(rgb, factor, shift)), 0, -1)
  np.testing.assert_allclose(have, want, atol=5e-6)
  np.testing.assert_allclose(color.stain(rgb, np.ones((4, 3)), np.zeros((4, 3))), rgb, atol=5e-6)


def test_each_stain_of_each_sample_draws_its_own_amount():
  rgb = colors(300).clip(0.3, 0.7)
  amounts = lambda x: -np.log10(np.asarray(x, np.float64))[:, :, 2, 2].T @ hed_from_rgb
  old = amounts(rgb)
  change = amounts(color.jitter_stain(KEY, rgb, 0.05)) - old
  bound = 0.05 * (1 + np.abs(old)) + 1e-4
  assert (np.abs(change) <= bound).all() and np.abs(change / bound).max() > 0.85
  assert np.abs(np.corrcoef(change.T) - np.eye(3)).max() < 0.2  # three separate draws


def test_jitter_of_saturation_and_hue_is_each_samples_own_and_only_where_chosen():
  rgb = np.broadcast_to(np.array([0.6, 0.4, 0.3], np.float32).reshape(3, 1, 1, 1), (3, 400, 2, 2))
  where = np.arange(400) % 4 > 0
  have = np.asarray(color.jitter(KEY, rgb, 0.2, 0.1, where))
  np.testing.assert_array_equal(have[:, ~where], rgb[:, ~where])
  np.testing.assert_array_equal(have[..., 0, 0], have[..., 1, 1])
  hue = np.array([colorsys.rgb_to_hsv(*map(float, p))[0] for p in have[:, where, 0, 0].T])
  turn = (hue - colorsys.rgb_to_hsv(0.6, 0.4, 0.3)[0] + 0.5) % 1 - 0.5
  assert np.abs(turn).max() < 0.1001 and np.abs(turn).max() > 0.095 and abs(turn.mean()) < 0.01
  chroma = np.ptp(have[:, where, 0, 0], axis=0) / 0.3
  assert chroma.min() > 0.799 and chroma.max() < 1.201 and np.ptp(chroma) > 0.38
  assert abs(np.corrcoef(turn, chroma)[0, 1]) < 0.15


# In images of any channels

RGB = (4, 1, 0)  # ids of red, green and blue in a vocabulary of six
MEAN, STD = (90.0, 100, 7, 8, 120, 9), (50.0, 60, 2, 3, 70, 4)
IDS = np.array([[4, 1, 0, 2], [2, 0, 4, 1], [4, 1, 2, 3], [4, 1, 0, 2], [1, 1, 4, 0]], np.int32)
THERE = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]], bool)
SAMPLES = (0, 1, 4)  # with the three colours


def test_slots_of_the_three_colours():
  have = np.asarray(color.rgb_slots(IDS, THERE, RGB))
  want = np.zeros((5, 3, 4), bool)
  for b, places in zip(SAMPLES, ((0, 1, 2), (2, 3, 1), (2, 1, 3)), strict=True):
    want[b, (0, 1, 2), places] = True
  np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize('grid', [(4, 5), (2, 3, 4)])
def test_only_the_colours_change_and_by_their_stored_values(grid):
  stored = np.random.default_rng(0).uniform(0, 1, (5, *grid, 4)).astype(np.float32)
  scale, offset = np.asarray(STD)[IDS] / 255, np.asarray(MEAN)[IDS] / 255
  wide = lambda x: x.reshape(5, *[1] * len(grid), 4)
  image = ((stored - wide(offset)) / wide(scale)).astype(np.float32)
  image[4, ..., 0] = np.nan  # what is not there may be anything
  slots = color.rgb_slots(IDS, THERE, RGB)
  have = np.asarray(color.change_rgb(image, slots, jnp.asarray(scale), jnp.asarray(offset), color.grayscale))
  want = image.copy()
  for b, places in zip(SAMPLES, ([0, 1, 2], [2, 3, 1], [2, 1, 3]), strict=True):
    luma = (stored[b][..., places] @ LUMA)[..., None]
    want[b][..., places] = (luma - offset[b, places]) / scale[b, places]
  np.testing.assert_allclose(have, want, atol=1e-5)


@pytest.mark.parametrize('names, want', [
    (['R', 'G', 'B'], (0, 1, 2)), (['blue', 'dapi', 'Red', 'GREEN'], (2, 3, 0)), (['gray'], ()), (['R', 'G'], ()),
    (['fundus:R', 'skin:B', 'fundus:G', 'skin:G', 'skin:R', 'fundus:B'], (0, 2, 5, 4, 3, 1)),
    (['a:R', 'G', 'b/B', 'bar'], ()), (['', 'CT'], ())])
def test_colours_are_found_by_name(names, want):
  assert color.rgb_ids(names) == want


@functools.partial(jax.jit, static_argnums=0)
def made(view, key, batch):
  return view(key, batch)


def maker(**options):
  return ViewMaker((6, 6), MEAN, STD, scale=(1.0, 1.0), flip=(0.0, 0.0), **options)


def batch():
  image = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 4)).astype(np.uint8)
  return {'image': image, 'channels': IDS, 'channel_mask': THERE}


def stored(view, out):
  """Back to 0 .. 1, [B, *grid, C]."""
  x = np.asarray(out['image'])
  if view.normalize == 'full':
    return (x + 1) / 2
  return (x * np.asarray(STD)[IDS][:, None, None] + np.asarray(MEAN)[IDS][:, None, None]) / 255


@pytest.mark.parametrize('normalize', ['corpus', 'full'])
def test_grayscale_of_a_view(normalize):
  view, given = maker(normalize=normalize, grayscale=(1.0,), rgb=RGB), batch()
  have = stored(view, made(view, KEY, given))
  want = given['image'] / 255
  for b, places in zip(SAMPLES, ([0, 1, 2], [2, 3, 1], [2, 1, 3]), strict=True):
    want[b][..., places] = (want[b][..., places] @ LUMA)[..., None]
  np.testing.assert_allclose(have, want, atol=1e-5)


def test_gray_stays_gray_after_a_jitter_of_each_channel():
  view = maker(grayscale=1.0, color=(0.2, 0.1), brightness=0.4, contrast=0.4, jitter_probability=0.8, rgb=RGB, gamma=0.3,
               blur=1.0, stain=0.05)
  have = stored(view, made(view, KEY, batch()))[0, ..., :3]
  np.testing.assert_allclose(have, np.broadcast_to(have.mean(axis=-1, keepdims=True), have.shape), atol=1e-5)


def test_a_vocabulary_with_several_triples():
  ids = np.array([[0, 1, 2], [5, 4, 3], [0, 1, 5]], np.int32)
  image = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3)).astype(np.uint8)
  view = maker(grayscale=1.0, rgb=(0, 1, 2, 3, 4, 5), normalize='full')
  have = (np.asarray(made(view, KEY, {'image': image, 'channels': ids})['image']) + 1) / 2
  np.testing.assert_allclose(have[0], np.tile(image[0] / 255 @ LUMA[:, None], 3), atol=1e-5)
  np.testing.assert_allclose(have[1], np.tile(image[1] / 255 @ LUMA[::-1, None], 3), atol=1e-5)
  np.testing.assert_allclose(have[2], image[2] / 255, atol=1e-6)


@pytest.mark.parametrize('options', [dict(color=(0.3,), jitter_probability=1.0), dict(stain=0.1)])
def test_samples_without_the_three_colours_stay(options):
  given = batch()
  still, have = np.asarray(made(maker(), KEY, given)['image']), np.asarray(made(maker(rgb=RGB, **options), KEY, given)['image'])
  np.testing.assert_array_equal(have[2:4], still[2:4])
  assert (np.abs(have - still)[list(SAMPLES)].max(axis=(1, 2)) > 0.01).sum(axis=1).tolist() == [3, 3, 3]
  np.testing.assert_array_equal(made(maker(**options), KEY, given)['image'], still)  # a vocabulary without colours


@pytest.mark.parametrize('options, word', [
    (dict(color=0.2, normalize='image'), "augment.color.*'image'"), (dict(stain=0.1, normalize='none'), 'augment.stain'),
    (dict(grayscale=0.2, normalize='window:0:1'), 'augment.grayscale'), (dict(color=(0.1, 0.6)), 'augment.color'),
    (dict(color=(0.1, 0.2, 0.3)), 'augment.color'), (dict(color=1.2), 'augment.color')])
def test_bad_options_are_named(options, word):
  with pytest.raises(UserError, match=word):
    maker(rgb=RGB, **options)


def test_one_number_of_color_is_saturation_with_half_of_it_for_hue():
  given = batch()
  one, two = (np.asarray(made(maker(rgb=RGB, color=c), KEY, given)['image']) for c in (0.2, (0.2, 0.1)))
  np.testing.assert_array_equal(one, two)
