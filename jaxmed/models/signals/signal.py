"""Signals in time as images of one axis, whose channels are leads; sound as images of frames and frequencies."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.layers.tokens import Features
from jaxmed.models.signals import spectrogram

NORMALIZE = ('lead', 'lead_range', 'record_range', 'none')
_SMALL = 1e-6  # least deviation or range that is divided by: a flat lead stays 0


class SignalEncoder(nn.Module):
  """An encoder of the registry on signals [B, T, K]: image_size (T,), a channel for each lead.

  A ViT so is a transformer over patches of time, a ChannelViT has tokens of each lead (and takes any number of them), a
  ResNet is one of 1D convolutions. With `rate` the first lead is a waveform and the encoder sees its log-mel
  spectrogram, image_size (frames, bands).

  Attributes:
    encoder: what sees them; steps after its image_size are cut off.
    normalize: 'lead' for mean 0 and deviation 1 of each lead over the steps that there are, 'lead_range' for each
      lead's range to [-1, 1] (MoRE), 'record_range' for that of the whole record (Symile-MIMIC), or 'none'.
    rate: Hz of a waveform; 0 for signals without a spectrogram.
  """

  encoder: Any
  normalize: str = 'lead'
  rate: float = 0.0

  @property
  def embed_dim(self) -> int:
    """Width D of the features."""
    return self.encoder.embed_dim

  @property
  def per_channel(self) -> bool:
    """Whether there are tokens of each lead, so that leads may be left out."""
    return self.encoder.per_channel

  @nn.compact
  def __call__(self, signal: jax.Array, signal_mask: jax.Array | None = None, train: bool = False,
               channel_mask: jax.Array | None = None) -> Features:
    """Features of signals [B, T, K] where signal_mask [B, T] is True; leads that channel_mask [B, K] rules out are no
    tokens, or zeros for an encoder without tokens of leads."""
    valid = jnp.ones(signal.shape[:2], bool) if signal_mask is None else signal_mask
    x, count = normalized(signal, valid, self.normalize), valid.sum(axis=1)  # [B, T, K]
    if self.rate:
      x = spectrogram.log_mel(x[..., 0], self.rate, self.encoder.image_size[1])[..., None]  # [B, F, M, 1]
      size, hop = spectrogram.sizes(self.rate)
      count = jnp.maximum(1 + (count - size) // hop, 0)
    steps = self.encoder.image_size[0]
    x, count = x[:, :steps], jnp.minimum(count, steps)
    more = {}
    if self.encoder.supports.sizes:
      patch = self.encoder.patch_size[0]
      own = jnp.maximum(count // patch, 1) * patch
      more['sizes'] = jnp.stack([own] + [jnp.full_like(own, n) for n in self.encoder.image_size[1:]], axis=1)
    return self.encoder(x, channel_mask=channel_mask, train=train, **more)


def normalized(signal: jax.Array, valid: jax.Array, kind: str) -> jax.Array:
  """Signals [B, T, K] by a kind of NORMALIZE, zeros where `valid` [B, T] is False; float32."""
  there = valid[..., None]
  x = jnp.where(there, signal.astype(jnp.float32), 0)
  if kind == 'lead':
    count = jnp.maximum(there.sum(axis=1, keepdims=True), 1)
    x = jnp.where(there, x - x.sum(axis=1, keepdims=True) / count, 0)
    return x / jnp.maximum(jnp.sqrt(jnp.square(x).sum(axis=1, keepdims=True) / count), _SMALL)
  if kind == 'none':
    return x
  axes = (1,) if kind == 'lead_range' else (1, 2)
  low = jnp.where(there, x, jnp.inf).min(axis=axes, keepdims=True)
  high = jnp.where(there, x, -jnp.inf).max(axis=axes, keepdims=True)
  flat = high - low < _SMALL
  return jnp.where(there & ~flat, 2 * (x - low) / jnp.where(flat, 1, high - low) - 1, 0)
