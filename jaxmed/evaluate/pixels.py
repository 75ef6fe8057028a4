"""Raw pixels as features: what the simplest method reaches without any network."""

import contextlib
import dataclasses
from typing import Any

import numpy as np

from jaxmed.data.feed import pipeline
from jaxmed.errors import UserError
from jaxmed.evaluate import probes

_SMALL = 2**26  # pixels below which one thread fits the components
_FIT_BYTES = 2**30  # most float32 pixels held to fit the components


@dataclasses.dataclass(frozen=True)
class PixelPCA:
  """Standardisation and principal axes of flattened pixels: mean, scale [P], axes [P, components] float32."""

  mean: np.ndarray
  scale: np.ndarray
  axes: np.ndarray

  def project(self, images: np.ndarray) -> np.ndarray:
    """images [N, ...] with P values each -> [N, components] float32."""
    flat = np.asarray(images).reshape(len(images), -1).astype(np.float32)
    if flat.shape[1] != len(self.mean):
      raise UserError(
        f'pixels: {flat.shape[1]} values an image; expected {len(self.mean)}, as in the fitted images'
      )
    return ((flat - self.mean) / self.scale) @ self.axes


def fit_pca(images: np.ndarray, components: int = 64) -> PixelPCA:
  """Fits at most `components` principal axes (randomised SVD, fixed seed) of standardised pixels [N, ...].

  Raises:
    UserError: fewer than two images, or a pixel is not finite.
  """
  from sklearn.decomposition import PCA
  from threadpoolctl import threadpool_limits

  if len(images) < 2:
    raise UserError(f'pixels: {len(images)} training images; expected at least two to find components')
  flat = np.asarray(images).reshape(len(images), -1).astype(np.float32)  # [N, P]
  if not np.isfinite(flat).all():
    raise UserError('pixels: a training image holds NaN or infinite values; expected finite pixels')
  mean, scale = probes.standardiser(flat)
  flat = (flat - mean) / scale
  pca = PCA(min(components, len(flat) - 1, flat.shape[1]), svd_solver='randomized', random_state=0)
  # With few pixels the threads mostly wait for each other, the more so on a busy machine.
  with threadpool_limits(1) if flat.size < _SMALL else contextlib.nullcontext():
    pca.fit(flat)
  # Standardised columns have mean 0 up to rounding, so PCA's own centring is left out of project().
  return PixelPCA(mean, scale, np.ascontiguousarray(pca.components_.T, dtype=np.float32))


def pca_features(
  train_images: np.ndarray, *others: np.ndarray, components: int = 64
) -> tuple[np.ndarray, ...]:
  """Flattened pixels -> standardised -> PCA, fitted on the first array only.

  Args:
    train_images: [N, ...]. others: [M, ...] each, of the same image shape.

  Returns:
    One [n, components] float32 array for each argument (fewer components for tiny inputs), in order.
  """
  pca = fit_pca(train_images, components)
  return tuple(pca.project(x) for x in (train_images, *others))


def source_features(encoder: Any, train: Any, *others: Any, batch_size: int = 64, components: int = 64,
                    room: int = 0) -> tuple[np.ndarray, ...]:
  """`pca_features` of whole sources, read at the encoder's image size in batches.

  When the training pixels exceed `room` bytes (0: _FIT_BYTES) as float32, the axes are fitted on evenly spaced training
  rows that fit in it; all rows are projected.

  Args:
    encoder: has `image_size` and `vocabulary`. train, others: sources (jaxmed.data.corpus.source.Source).

  Returns:
    One [len(source), components] float32 array for each source.
  """
  names = tuple(dict.fromkeys(c for s in (train, *others) for c in s.channels))
  pixels = int(np.prod(encoder.image_size)) * len(names)
  rows = max(2, (room or _FIT_BYTES) // (4 * pixels))
  keep = np.unique(np.linspace(0, len(train) - 1, min(rows, len(train))).round().astype(int))
  sample = [x[np.isin(index, keep)] for x, index in batches(encoder, train, names, batch_size)]
  pca = fit_pca(np.concatenate(sample), components)
  if len(keep) == len(train):
    first = pca.project(np.concatenate(sample))
  else:
    first = _project(pca, encoder, train, names, batch_size)
  return (first, *(_project(pca, encoder, s, names, batch_size) for s in others))


def _project(pca: PixelPCA, encoder: Any, source: Any, names: tuple[str, ...], batch_size: int) -> np.ndarray:
  parts = [pca.project(x) for x, _ in batches(encoder, source, names, batch_size)]
  return np.concatenate(parts) if parts else np.zeros((0, pca.axes.shape[1]), np.float32)


def batches(encoder: Any, source: Any, names: tuple[str, ...], batch_size: int):
  """Yields (images [b, *size, len(names)] at the encoder's size, row index [b]); a channel that a record lacks is 0."""
  place = np.full(len(encoder.vocabulary), -1)
  for i, name in enumerate(names):
    if name in encoder.vocabulary:
      place[encoder.vocabulary.index(name)] = i
  found = pipeline.eval_batches(source, batch_size=batch_size, size=tuple(encoder.image_size),
                                  vocabulary=tuple(encoder.vocabulary))
  for batch in found:
    index = np.asarray(batch['index'])
    real = np.flatnonzero(index >= 0)
    image, mask = np.asarray(batch['image'])[real], np.asarray(batch['channel_mask'])[real]
    channels = np.asarray(batch['channels'])[real]
    out = np.zeros((*image.shape[:-1], len(names)), image.dtype)
    row, slot = np.nonzero(mask)
    # Rows whose channels come in another order still meet in the same columns.
    np.moveaxis(out, -1, 1)[row, place[channels[row, slot]]] = np.moveaxis(image, -1, 1)[row, slot]
    yield out, index[real]
