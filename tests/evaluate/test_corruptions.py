"""Corruptions: what each does, by NumPy; the same at each reading; which suit a source."""

import dataclasses
import io

import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

from jaxmed.augment import color, intensity
from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed.pipeline import eval_batches
from jaxmed.data.prepare.prepare import prepare
from jaxmed.data.resize import resize
from jaxmed.errors import UserError
from jaxmed.evaluate import corruptions

RNG = np.random.default_rng(0)
GRAY = RNG.integers(20, 200, (24, 20, 1)).astype(np.uint8)
COLOUR = RNG.integers(20, 230, (24, 20, 3)).astype(np.uint8)
VOLUME = RNG.normal(40, 30, (6, 12, 10, 2)).astype(np.float32)
RGB = ('R', 'G', 'B')


def at(x, kind, severity, names=None, std=None, seed=(0, 1, 2)):
  names = names or [f'c{i}' for i in range(x.shape[-1])]
  return corruptions.corrupt(x, names, np.full(x.shape[-1], 10.0) if std is None else std, kind, severity, seed)


@pytest.mark.parametrize('kind', corruptions.KINDS)
def test_each_keeps_type_and_grows(kind):
  """Deterministic by its seed; a higher severity is farther from the clean image; the clean one stays as it was."""
  images = [(COLOUR, RGB)] if kind == 'stain' else [(GRAY, ('a',)), (COLOUR, RGB)] + (
      [] if kind == 'compression' else [(VOLUME, ('T1', 'T2'))])
  for x, names in images:
    x = np.repeat(np.repeat(x, 4, axis=-3), 4, axis=-2) if kind == 'blur' else x  # of few pixels it is none
    before, far = x.copy(), []
    for severity in corruptions.SEVERITIES:
      got = at(x, kind, severity, names)
      assert got.dtype == x.dtype and got.shape == x.shape
      np.testing.assert_array_equal(got, at(x, kind, severity, names))
      far.append(np.abs(got.astype(float) - x).mean())
    assert far[0] > 0 and far[-1] > far[0]
    assert all(b > 0.95 * a for a, b in zip(far, far[1:], strict=False)), (kind, far)
    np.testing.assert_array_equal(x, before)


def test_noise_and_brightness_are_in_deviations_of_the_channel():
  std = np.array([5.0, 50.0])
  flat = np.zeros((40, 60, 60, 2), np.float32)
  got = at(flat, 'noise', 4, std=std)
  assert got.std(axis=(0, 1, 2)) == pytest.approx(0.5 * std, rel=0.02) and abs(got.mean()) < 0.5
  moved = at(VOLUME, 'brightness', 2, std=std) - VOLUME
  assert np.abs(moved).reshape(-1, 2).mean(axis=0) == pytest.approx(0.5 * std, rel=1e-3)
  assert len(np.unique(np.sign(moved))) == 1


def test_blur_contrast_and_compression_are_those_of_scipy_and_pillow():
  want = ndimage.gaussian_filter(VOLUME[..., 1].astype(float), [0.02 * n for n in (6, 12, 10)], mode='mirror')
  np.testing.assert_allclose(at(VOLUME, 'blur', 3)[..., 1], want, atol=1e-4)
  centred = at(VOLUME, 'contrast', 5) - VOLUME.mean(axis=(0, 1, 2))
  np.testing.assert_allclose(centred, 0.15 * (VOLUME - VOLUME.mean(axis=(0, 1, 2))), atol=1e-4)
  for x, names in ((COLOUR, RGB), (GRAY, ('a',))):
    buffer = io.BytesIO()
    Image.fromarray(x if x.shape[-1] == 3 else x[..., 0]).save(buffer, 'JPEG', quality=35)
    np.testing.assert_array_equal(at(x, 'compression', 2, names), np.asarray(Image.open(buffer)).reshape(x.shape))
  turned = at(COLOUR[..., ::-1], 'compression', 2, ('B', 'G', 'R'))[..., ::-1]
  np.testing.assert_array_equal(turned, at(COLOUR, 'compression', 2, RGB))


def test_ghosts_are_copies_along_an_axis_of_the_plane():
  """A line becomes itself and fainter ones at even distances; the mean stays."""
  x = np.zeros((4, 24, 24, 1), np.float32)
  x[:, 12, 12] = 240
  for seed in range(6):
    got = at(x, 'ghosting', 3, seed=(seed,))
    assert got.mean() == pytest.approx(x.mean(), rel=1e-3)
    moved = np.abs(got - x)[0, ..., 0] > 1
    assert 1 <= np.count_nonzero(moved.any(axis=0)) + np.count_nonzero(moved.any(axis=1)) <= 26
    assert moved.any(axis=0).sum() == 1 or moved.any(axis=1).sum() == 1
    assert 0.3 * 240 < got[0, 12, 12, 0] < 0.9 * 240
    np.testing.assert_allclose(got, got[:1].repeat(4, axis=0), atol=1e-3)  # each plane alike


def test_bias_field_and_stain_are_those_of_augmentation():
  rng = np.random.default_rng((0, 1, 2))
  coefficients = 0.3 * rng.uniform(-1, 1, (1, 1, 20))
  field = np.asarray(intensity.bias_field(jnp.asarray(coefficients, jnp.float32), (6, 12, 10)))[0]
  low = VOLUME.min(axis=(0, 1, 2))
  np.testing.assert_allclose(at(VOLUME, 'bias_field', 3), low + (VOLUME - low) * field, atol=1e-2)
  factor, shift = 0.2 * np.random.default_rng((0, 1, 2)).choice([-1, 1], (2, 1, 3))
  planes = np.moveaxis(COLOUR, -1, 0)[:, None] / 255
  want = np.asarray(color.stain(jnp.asarray(planes, jnp.float32), 1 + factor, shift))[:, 0]
  got = at(COLOUR, 'stain', 4, RGB)
  np.testing.assert_allclose(got, np.moveaxis(want, 0, -1) * 255, atol=0.6)
  np.testing.assert_array_equal(at(COLOUR[..., ::-1], 'stain', 4, ('B', 'G', 'R'))[..., ::-1], got)


def test_integers_are_cut_to_their_range():
  x = np.array([0, 32767, -32768], np.int16).reshape(1, 3, 1)
  got = at(x, 'brightness', 5, std=np.array([1e4]))
  assert got.dtype == np.int16 and {got.min(), got.max()} & {-32768, 32767}
  for kind, severity, words in (('nois', 1, "'noise'"), ('noise', 6, 'one of 1 .. 5')):
    with pytest.raises(UserError, match=words):
      at(x, kind, severity)


def made(place, images):
  """A corpus of arrays, each a file."""
  (place / 'raw').mkdir()
  for i, x in enumerate(images):
    tifffile.imwrite(place / 'raw' / f'{i}.tif', np.moveaxis(x, -1, 0), photometric='minisblack')
  prepare([place / 'raw'], place / 'out', channels=[f'c{i}' for i in range(images[0].shape[-1])], progress=False)
  return open_source(place / 'out')


def test_a_corrupted_source(tmp_path):
  """Batches hold what `corrupt` makes of the resized images, the same at each reading and in any selection."""
  source = made(tmp_path, RNG.integers(0, 255, (5, 16, 16, 2)).astype(np.uint8))
  found = corruptions.corrupted(source, (8, 8), ('noise', 'blur'), (1, 4), seed=3)
  assert list(found) == [('', 0), ('noise', 1), ('noise', 4), ('blur', 1), ('blur', 4)]
  images = {key: np.concatenate([np.asarray(b['image'])[b['index'] >= 0] for b in eval_batches(
      s, batch_size=2, size=(8, 8), vocabulary=('c0', 'c1'))]) for key, s in found.items()}
  clean = np.stack([resize(source[i]['image'], (8, 8)) for i in range(5)])
  np.testing.assert_array_equal(images['', 0], clean)
  std = np.array([source.stats[c]['std'] for c in ('c0', 'c1')])
  np.testing.assert_array_equal(images['blur', 4], [corruptions.corrupt(x, ('c0', 'c1'), std, 'blur', 4, (0,))
                                                    for x in clean])
  apart = [np.abs(a.astype(float) - b).mean() for a, b in zip(images['noise', 4], images['noise', 4][1:], strict=False)]
  assert min(apart) > 0 and images['noise', 4].std() > 0
  some = found['noise', 4].keep(np.array([0, 0, 1, 0, 1], bool))
  np.testing.assert_array_equal(some.record(1)['image'], images['noise', 4][4])
  assert 'image' not in some.record(0, ()) and len(found['noise', 4].held) == 5
  assert found['noise', 4].held is found['', 0].held
  other = corruptions.corrupted(source, (8, 8), ('noise',), (4,), seed=4)['noise', 4].record(0)['image']
  assert not np.array_equal(other, images['noise', 4][0])


def test_which_corruptions_suit(tmp_path, corpus):
  gray = made(tmp_path, RNG.integers(0, 60000, (3, 8, 8, 1)).astype(np.uint16))
  use = lambda source: {kind for kind, why in corruptions.suited(source).items() if not why}
  assert use(gray) == set(corruptions.KINDS) - {'compression', 'stain'}
  assert use(open_source(corpus)) == set(corruptions.KINDS) - {'ghosting', 'bias_field'}
  assert use(dataclasses.replace(gray)) == use(gray)


def test_volumes(tmp_path):
  """Of floating point, in two channels: all that suit, each of a shape that the encoder takes."""
  (tmp_path / 'raw').mkdir()
  for i in range(2):
    np.savez(tmp_path / 'raw' / f'{i}.npz', image=RNG.normal(50, 9, (10, 16, 12, 2)).astype(np.float32),
             channels=('T1', 'T2'))
  prepare([tmp_path / 'raw'], tmp_path / 'out', volumes='whole', progress=False)
  source = open_source(tmp_path / 'out')
  kinds = [kind for kind, why in corruptions.suited(source).items() if not why]
  assert kinds == ['noise', 'blur', 'brightness', 'contrast', 'ghosting', 'bias_field']
  clean = corruptions.corrupted(source, (8, 8, 8), kinds, (5,))
  for (kind, _), one in clean.items():
    image = one.record(1)['image']
    assert image.shape == (8, 8, 8, 2) and image.dtype == np.float32 and np.isfinite(image).all()
    assert np.array_equal(image, clean['', 0].record(1)['image']) == (kind == '')
