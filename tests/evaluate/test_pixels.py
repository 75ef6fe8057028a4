"""The pixel baseline against a full SVD, and reading it from padded batches."""

import numpy as np
import pytest

from jaxmed.data.feed import pipeline
from jaxmed.errors import UserError
from jaxmed.evaluate import pixels

from . import fakes


@pytest.fixture
def batches(monkeypatch):
  monkeypatch.setattr(pipeline, 'eval_batches', fakes.eval_batches)


def test_pca_equals_a_full_svd():
  rng = np.random.default_rng(0)
  train = rng.normal(size=(40, 3, 4, 2)) * np.linspace(1, 5, 24).reshape(3, 4, 2) + 9
  other = rng.normal(size=(7, 3, 4, 2))
  flat = train.reshape(40, -1)
  z = (flat - flat.mean(axis=0)) / flat.std(axis=0)
  axes = np.linalg.svd(z, full_matrices=False)[2][:5].T
  want = z @ axes, (other.reshape(7, -1) - flat.mean(axis=0)) / flat.std(axis=0) @ axes
  got = pixels.pca_features(train, other, components=5)
  for g, w in zip(got, want, strict=True):
    sign = np.sign((got[0] * want[0]).sum(axis=0))
    np.testing.assert_allclose(g * sign, w, rtol=2e-2, atol=2e-2)  # randomised: close, not equal
  again = pixels.pca_features(train, other * 100, components=5)
  np.testing.assert_array_equal(again[0], got[0])  # the others do not touch the fit


def test_pca_of_few_or_constant_or_broken_images():
  assert pixels.pca_features(np.arange(24.).reshape(3, 2, 4), components=64)[0].shape == (3, 2)
  images = np.random.default_rng(0).normal(size=(9, 4))
  images[:, 1] = 0.1
  first, second = pixels.pca_features(images, images + 1e6 * np.array([0, 0, 0, 0]))
  assert np.isfinite(first).all()
  np.testing.assert_array_equal(first, second)
  with pytest.raises(UserError, match='NaN'):
    pixels.pca_features(np.full((3, 4), np.nan))
  with pytest.raises(UserError, match='at least two'):
    pixels.pca_features(np.ones((1, 4)))
  with pytest.raises(UserError, match='expected 4'):
    pixels.pca_features(images, np.ones((2, 5)))


def test_sources_are_read_without_padding_and_with_channels_in_place(batches):
  source = fakes.make_source(rows=47)
  train, test = source.select('train'), source.select('test')
  got = pixels.source_features(fakes.FakeEncoder(), train, test, batch_size=8, components=4)
  want = pixels.pca_features(train.images, test.images, components=4)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, atol=1e-4)


def test_a_large_source_is_fitted_on_a_part_and_projected_whole(batches, monkeypatch):
  train = fakes.make_source(rows=90).select('train')
  monkeypatch.setattr(pixels, '_FIT_BYTES', 4 * 72 * 11)
  got, = pixels.source_features(fakes.FakeEncoder(), train, batch_size=8, components=3)
  keep = np.linspace(0, len(train) - 1, 11).round().astype(int)
  want = pixels.pca_features(train.images[keep], train.images, components=3)[1]
  np.testing.assert_allclose(got, want, atol=1e-4)
