"""Waveforms to log-mel spectrograms, so that sound is an image of frames and frequencies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

WINDOW, HOP, MELS, FLOOR = 0.025, 0.010, 128, 1e-10  # seconds, bands and least power: YuanGongND/ast, src/dataloader.py


def frames_of(steps: int, rate: float) -> int:
  """Whole windows in so many steps of a waveform at `rate` Hz."""
  size, hop = sizes(rate)
  return max(1 + (steps - size) // hop, 0)


def sizes(rate: float) -> tuple[int, int]:
  """Steps of a window, and from one to the next."""
  return round(WINDOW * rate), round(HOP * rate)


@functools.lru_cache
def mel_filters(rate: float, size: int, mels: int = MELS) -> np.ndarray:
  """Triangles [size // 2 + 1, mels] float32 between 0 and rate / 2, evenly spaced in mel = 2595 log10(1 + f / 700)."""
  to_mel = lambda f: 2595 * np.log10(1 + f / 700)
  edges = np.linspace(0, to_mel(rate / 2), mels + 2)
  bins = to_mel(np.arange(size // 2 + 1) * rate / size)[:, None]
  rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
  fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
  return np.maximum(np.minimum(rise, fall), 0).astype(np.float32)


def log_mel(wave: jax.Array, rate: float, mels: int = MELS) -> jax.Array:
  """Natural logarithm of the mel power [B, F, mels] float32 of waveforms [B, T].

  Windows of 25 ms (periodic Hann) every 10 ms, without padding; the power |FFT|^2 has no zero padding either. Kaldi's
  features, which AST is trained with, differ: pre-emphasis, a mean of 0 in each window and an FFT of a power of two.
  """
  size, hop = sizes(rate)
  count = frames_of(wave.shape[1], rate)
  hann = jnp.asarray(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size), jnp.float32)
  frames = wave.astype(jnp.float32)[:, np.arange(count)[:, None] * hop + np.arange(size)]  # [B, F, size]
  power = jnp.square(jnp.abs(jnp.fft.rfft(frames * hann)))
  mel = jnp.einsum('bfn,nm->bfm', power, mel_filters(rate, size, mels), precision=jax.lax.Precision.HIGHEST)
  return jnp.log(jnp.maximum(mel, FLOOR))
