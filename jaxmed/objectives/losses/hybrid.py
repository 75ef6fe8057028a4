"""Losses that go with the reconstruction of pixels: of spectra (CA-MAE) and of classes (ChA-MAEViT)."""

import math

import jax
import jax.numpy as jnp


def spectral_error(predicted: jax.Array, target: jax.Array, patch: tuple[int, ...],
                   there: jax.Array | None = None) -> jax.Array:
  """Mean absolute difference of the amplitudes of two tokens' spectra, [B, N] (maes_microscopy, loss.py:FourierLoss).

  A spectrum is the unscaled Fourier transform over the axes of a patch, of each channel. The source cuts a sample's
  tokens, one after the other, into squares of as many numbers as a channel has patches; those are the patches where
  there are as many patches as pixels in each (256 x 256 at patch 16, which it was written for), and what is meant.

  Args:
    predicted, target: [B, N, P], pixels of a patch in (*patch, C) order, C = 1 for channel tokens.
    there: [B, 1, P] bool, see `MAE`; the mean is over the channels that are there.
  """
  cells, axes = math.prod(patch), tuple(range(2, 2 + len(patch)))
  if there is not None:
    predicted, target = (jnp.where(there, x, 0.0) for x in (predicted, target))
  spectrum = lambda x: _amplitude(jnp.fft.fftn(x.reshape(*x.shape[:2], *patch, -1), axes=axes))
  error = jnp.abs(spectrum(predicted) - spectrum(target)).mean(axis=axes)  # [B, N, C]
  if there is None:
    return error.mean(axis=-1)
  channels = there.reshape(there.shape[0], 1, cells, -1)[:, :, 0]  # [B, 1, C]
  return jnp.where(channels, error, 0.0).sum(axis=-1) / jnp.maximum(channels.sum(axis=-1), 1)


def _amplitude(x: jax.Array) -> jax.Array:
  """|x| with the gradient 0 at 0."""
  square = jnp.square(x.real) + jnp.square(x.imag)
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def classified(logits: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
  """{'class_loss', 'accuracy'} of logits [B, K]: means over the samples whose label [B] is known (not -1)."""
  known = (label >= 0).astype(jnp.float32)
  total = jnp.maximum(known.sum(), 1.0)
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(label, 0)[:, None], axis=1)[:, 0]
  right = (logits.argmax(axis=-1) == label) * known
  return {'class_loss': -(picked * known).sum() / total, 'accuracy': right.sum() / total}
