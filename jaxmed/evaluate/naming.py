"""Which class an image is, by the similarity of its vector to those of texts: pure functions on arrays."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxmed.evaluate import metrics

POOLS = {'mean': 'mean of prompts', 'max': 'best prompt'}


def flat(prompts: Mapping[str, Sequence[str]]) -> tuple[list[str], np.ndarray]:
  """All texts in order, and the class [P] of each."""
  texts = [t for some in prompts.values() for t in some]
  return texts, np.repeat(np.arange(len(prompts)), [len(some) for some in prompts.values()])


def similarity(x: np.ndarray, words: np.ndarray, place: np.ndarray, pool: str = 'mean') -> np.ndarray:
  """Cosines [..., K] of images and classes.

  'mean': the unit vectors of a class's texts are averaged, and the mean is brought to length 1 (open_clip,
  src/open_clip/zero_shot_classifier.py). 'max': the most similar text of the class counts (GLoRIA, gloria/gloria.py,
  whose z-scores over the test images are left out: with them an image's answer depends on the others).

  Args:
    x: unit vectors [..., D]. words: unit vectors [P, D] of texts. place: [P], the class of each, ascending from 0.
  """
  x, words = np.asarray(x, np.float64), np.asarray(words, np.float64)
  count = int(place.max()) + 1
  if pool == 'mean':
    mean = np.stack([words[place == k].mean(axis=0) for k in range(count)])
    return x @ (mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)).T
  each = x @ words.T
  return np.stack([each[..., place == k].max(axis=-1) for k in range(count)], axis=-1)


def softmax(logits: np.ndarray) -> np.ndarray:
  """Over the last axis, float64."""
  e = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def top(y: np.ndarray, scores: np.ndarray, k: int) -> np.ndarray:
  """Whether [M] (0 or 1) the class of a row is among the k with the highest scores [M, K]; a tie counts against it."""
  own = np.take_along_axis(np.asarray(scores), np.asarray(y)[:, None], axis=1)
  return ((scores >= own).sum(axis=1) <= k).astype(np.float64)


def precision_at(y: np.ndarray, scores: np.ndarray, ranks: Sequence[int], weights: np.ndarray | None = None
                 ) -> np.ndarray:
  """Of each class, the fraction of its first k images that are of it, as a mean over the classes that have images.

  Each class asks all images, ranked by its column of scores; among equal ones those of other classes come first. Where
  there are fewer than k images all of them count. ConVIRT's measure (arXiv 2010.00747), whose 8 classes have 200 images
  each.

  Args:
    y: [M]. scores: [M, K]. ranks: each k. weights: [R, M], how often each image is there; None: once.
  Returns:
    [R, len(ranks)]; NaN where no class has an image.
  """
  weights = np.ones((1, len(y))) if weights is None else weights
  total, count = np.zeros((len(weights), len(ranks))), np.zeros((len(weights), 1))
  for c in range(scores.shape[1]):
    right = y == c
    order = np.lexsort((right, -scores[:, c]))
    w, hit = weights[:, order], right[order]
    before = np.cumsum(w, axis=1) - w
    there = (w @ hit > 0)[:, None]
    for i, k in enumerate(ranks):
      taken = np.clip(k - before, 0, w)
      got = taken @ hit / np.maximum(taken.sum(axis=1), 1e-12)
      total[:, i] += np.where(there[:, 0], got, 0.0)
    count += there
  return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def resampled_precision(y: np.ndarray, scores: np.ndarray, ranks: Sequence[int], subjects: Sequence | np.ndarray, *,
                        draws: int = 1000, seed: int = 0) -> np.ndarray:
  """The same [draws, len(ranks)] on resampled subjects; NaN [1, len(ranks)] for a single subject."""
  parts = [precision_at(y, scores, ranks, w) for w in metrics.resampled_weights(subjects, draws=draws, seed=seed)]
  return np.concatenate(parts) if parts else np.full((1, len(ranks)), np.nan)
