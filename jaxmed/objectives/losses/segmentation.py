"""Losses of labels of pixels, as functions of arrays in float32: cross-entropy, soft Dice, focal, and what they share.

Shapes: B samples, `size` the grid of an image (2 or 3 axes), K classes. A sum over the batch is one over the global
batch: the numbers are the same on any number of devices.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch

OUT = -1e30  # log probability of what cannot be: finite, so that its gradient is 0 and not NaN


class Truth(NamedTuple):
  """The labels of a batch.

  Attributes:
    classes: [B, *size] int32 in 0..K-1. known: [B, *size] bool, pixels whose label is known; the others count nowhere.
    annotated: [B, K] bool, classes that somebody looked for in a sample; None for all.
    background: the class that what nobody looked for belongs to, -1 for none.
  """

  classes: jax.Array
  known: jax.Array
  annotated: jax.Array | None = None
  background: int = 0


def truth_of(mask: jax.Array, values: Sequence[int], annotated: jax.Array | None = None) -> Truth:
  """The labels of masks [B, *size] of stored values, of which `values` [K], rising, are the classes; 0: background.

  Every other value, -1 among them, is an unknown label. A pixel of a class that is not annotated in its sample belongs
  to the background there; without a background its label is unknown.
  """
  table = jnp.asarray(values, mask.dtype)
  place = jnp.searchsorted(table, mask).clip(0, len(values) - 1).astype(jnp.int32)
  known = table[place] == mask
  background = list(values).index(0) if 0 in values else -1
  if annotated is not None:
    annotated = annotated | (jnp.arange(len(values)) == background)
    told = _of_class(jnp.expand_dims(annotated, tuple(range(1, mask.ndim))), place)
    place, known = (jnp.where(told, place, background), known) if background >= 0 else (place, known & told)
  return Truth(place, known, annotated, background)


def of_batch(batch: Batch, values: Sequence[int], stored: Sequence[int] = ()) -> Truth:
  """The labels of a batch with masks; its `annotated`, if any, goes by the values `stored`, () for `values`."""
  annotated, stored = batch.get('annotated'), list(stored or values)
  if annotated is not None:
    annotated = annotated[:, jnp.asarray([stored.index(v) for v in values])]
  return truth_of(batch['mask'], values, annotated)


def log_probabilities(logits: jax.Array, truth: Truth) -> jax.Array:
  """Log probabilities [B, *size, K] of logits: a softmax over all classes, then the marginal loss's sum.

  In each sample the classes that are not annotated are merged into the background: its probability is the sum of
  theirs and its own, and theirs is 0 (Shi et al. 2021, Marginal loss and exclusion loss for partially supervised
  multi-organ segmentation, Medical Image Analysis 70). A pixel of the background may thus be one of a class that
  nobody looked for. Without a background the softmax is left as it is.
  """
  logp = jax.nn.log_softmax(logits.astype(jnp.float32))
  if truth.annotated is None or truth.background < 0:
    return logp
  absent = ~jnp.expand_dims(truth.annotated, tuple(range(1, logits.ndim - 1)))
  background = jnp.arange(logits.shape[-1]) == truth.background
  merged = jax.nn.logsumexp(jnp.where(absent | background, logp, OUT), axis=-1, keepdims=True)
  return jnp.where(background, merged, jnp.where(absent, OUT, logp))


def cross_entropy(logp: jax.Array, truth: Truth) -> jax.Array:
  """Mean of -log p of the true class over the known pixels of the batch; 0 without any."""
  return _mean(-_of_class(logp, truth.classes), truth.known)


def focal(logp: jax.Array, truth: Truth, gamma: float = 2.0) -> jax.Array:
  """The same of -(1 - p)^gamma log p (Lin et al. 2017, eq. 4, without class weights); gamma 0 is the cross-entropy."""
  logp = _of_class(logp, truth.classes)
  return _mean(-((-jnp.expm1(jnp.minimum(logp, -1e-7))) ** gamma) * logp, truth.known)


def soft_dice(logp: jax.Array, truth: Truth, batch: bool = False, smooth: float = 1e-5,
              squared: bool = False) -> jax.Array:
  """Mean soft Dice of the classes but the background (MIC-DKFZ/nnUNet, MemoryEfficientSoftDiceLoss, do_bg False).

  (2 sum p t + smooth) / max(sum p + sum t + smooth, 1e-8) over the known pixels of a sample, then the mean over samples
  and classes; with `batch` over those of all samples, then over classes. With `squared` the sums below are of squares
  (Milletari et al. 2016). A class that a sample has not and that is not predicted scores 1. Classes that are not
  annotated in a sample are left out of its sums and of the mean.
  """
  p, t = jnp.exp(logp) * truth.known[..., None], one_hot(truth, logp.shape[-1])
  axes = tuple(range(1, logp.ndim - 1))
  both, total = (p * t).sum(axis=axes), ((p * p if squared else p) + t).sum(axis=axes)  # [B, K]
  counts = wanted(truth, *both.shape)
  if batch:
    both, total = (jnp.where(counts, x, 0).sum(axis=0) for x in (both, total))
    counts = counts.any(axis=0)
  return _mean((2 * both + smooth) / jnp.maximum(total + smooth, 1e-8), counts)


def hard_dice(logits: jax.Array, truth: Truth) -> jax.Array:
  """Dice of the most probable classes, pooled over the batch, mean over foreground classes in truth or prediction.

  1 where there is none of them in either: nothing was there to find. In a sample only classes that are annotated there
  are predicted.
  """
  both, total = overlap(logits, truth)
  counts = total.sum(axis=0) > 0
  score = 2 * both.sum(axis=0) / jnp.maximum(total.sum(axis=0), 1)
  return jnp.where(counts.any(), _mean(score, counts), 1.0)


def overlap(logits: jax.Array, truth: Truth) -> tuple[jax.Array, jax.Array]:
  """(pixels in truth and prediction, pixels in the one plus pixels in the other), both [B, K] float32.

  0 for the background and for classes that are not annotated in a sample.
  """
  classes = logits.shape[-1]
  found = log_probabilities(logits, truth).argmax(axis=-1)
  p, t = one_hot(truth._replace(classes=found), classes), one_hot(truth, classes)
  axes, counts = tuple(range(1, logits.ndim - 1)), wanted(truth, logits.shape[0], classes)
  return jnp.where(counts, (p * t).sum(axis=axes), 0), jnp.where(counts, (p + t).sum(axis=axes), 0)


def one_hot(truth: Truth, classes: int) -> jax.Array:
  """[B, *size, K] float32: 1 for the class of each known pixel."""
  return ((truth.classes[..., None] == jnp.arange(classes)) & truth.known[..., None]).astype(jnp.float32)


def wanted(truth: Truth, count: int, classes: int) -> jax.Array:
  """[B, K] bool: the foreground classes that are annotated in each sample."""
  foreground = jnp.broadcast_to(jnp.arange(classes) != truth.background, (count, classes))
  return foreground if truth.annotated is None else foreground & truth.annotated


def coarser(truth: Truth, size: tuple[int, ...]) -> Truth:
  """The labels on a coarser grid: those of the pixel at the centre of each cell ('nearest-exact', as nnU-Net's)."""
  classes, known = truth.classes, truth.known
  for axis, (n, have) in enumerate(zip(size, classes.shape[1:], strict=True), 1):
    index = ((2 * jnp.arange(n) + 1) * have) // (2 * n)
    classes, known = jnp.take(classes, index, axis=axis), jnp.take(known, index, axis=axis)
  return truth._replace(classes=classes, known=known)


def output_weights(count: int) -> tuple[float, ...]:
  """Weights of outputs, the finest first: 1, 1/2, 1/4 ..., the coarsest 0, with a sum of 1 (nnUNetTrainer, v2)."""
  if count == 1:
    return (1.0,)
  weights = [0.5**i for i in range(count - 1)]
  return (*(w / math.fsum(weights) for w in weights), 0.0)


def _of_class(values: jax.Array, classes: jax.Array) -> jax.Array:
  """[..., K] at classes [...]: [...]. A sum over K, which fuses with what comes before it, as a gather does not."""
  here = classes[..., None] == jnp.arange(values.shape[-1])
  if values.dtype == bool:
    return (values & here).any(axis=-1)
  return jnp.where(here, values, 0).sum(axis=-1)


def _mean(values: jax.Array, counts: jax.Array) -> jax.Array:
  """The mean of the values that count; 0 of none."""
  return jnp.where(counts, values, 0).sum() / jnp.maximum(counts.sum(dtype=jnp.float32), 1)
