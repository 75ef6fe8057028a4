"""Segmentation of instruments by prompts: one point or one box an instance, in images and along videos.

The protocol of a published study of SAM 2 in robotic surgery (arXiv 2408.04593): zero-shot; a point or a box an
instrument in each image, or a point in the first frame of a video and no more. How the point is chosen is not
published there and was not read: here it is the pixel farthest from the border of its instance, or one drawn from it.
Boxes are tight, and instances are the connected parts of a class.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from jaxmed.errors import UserError, choose
from jaxmed.evaluate import lesions

PROMPTS = ('point', 'box')
POINTS = ('center', 'random')
Predict = Callable[[np.ndarray, 'Prompt'], np.ndarray]
Propagate = Callable[[Sequence[np.ndarray], 'Prompt'], Sequence[np.ndarray]]


class Prompt(NamedTuple):
  """What a model is told of an instance: `values` is a pixel [2], or a box [4] start and end (after the last pixel)."""

  kind: str
  values: np.ndarray


def instances(labels: np.ndarray, least: int = 1) -> list[tuple[int, np.ndarray]]:
  """Class and mask [H, W] bool of each connected part (8 neighbours) of each class but 0 with `least` pixels or more.

  Classes in rising order, the parts of a class by their first pixel in raster order.
  """
  out = []
  for c in np.unique(labels[labels > 0]):
    parts, count = lesions.components(labels == c)
    out += [(int(c), parts == i) for i in range(1, count + 1) if np.count_nonzero(parts == i) >= least]
  return out


def point(mask: np.ndarray, rule: str = 'center', seed: int = 0) -> np.ndarray:
  """A pixel [2] inside of a mask [H, W] bool.

  Args:
    rule: 'center', the first of those farthest from the outside (beyond the image is outside), or 'random', drawn by
      `seed`.
  Raises:
    UserError: an empty mask.
  """
  choose('rule of points', rule, POINTS)
  inside = np.argwhere(mask)
  if not len(inside):
    raise UserError('prompted: a mask without a pixel has no point')
  if rule == 'random':
    return inside[np.random.default_rng(seed).integers(len(inside))]
  far = ndimage.distance_transform_edt(np.pad(np.asarray(mask, bool), 1))[1:-1, 1:-1]
  return np.asarray(np.unravel_index(int(far.argmax()), far.shape))


def box(mask: np.ndarray) -> np.ndarray:
  """The tight box [4] of a mask [H, W] bool: start, and end after the last pixel, of both axes.

  Raises:
    UserError: an empty mask.
  """
  inside = np.argwhere(mask)
  if not len(inside):
    raise UserError('prompted: a mask without a pixel has no box')
  return np.concatenate([inside.min(axis=0), inside.max(axis=0) + 1])


def prompt(mask: np.ndarray, kind: str, rule: str = 'center', seed: int = 0) -> Prompt:
  """The prompt of a mask [H, W] bool: `kind` of PROMPTS."""
  choose('prompt', kind, PROMPTS)
  return Prompt(kind, point(mask, rule, seed) if kind == 'point' else box(mask))


def image(predict: Predict, pixels: np.ndarray, truth: np.ndarray, kind: str = 'point', rule: str = 'center',
          seed: int = 0) -> np.ndarray:
  """Classes [H, W] of one image: a prompt for each instance of the truth [H, W], smaller answers over larger ones.

  Args:
    predict: (pixels [H, W, C], Prompt) -> mask [H, W] bool.
  """
  answers = [(c, np.asarray(predict(pixels, prompt(mask, kind, rule, seed + i)), bool))
             for i, (c, mask) in enumerate(instances(np.asarray(truth)))]
  return _painted(answers, np.shape(truth))


def video(propagate: Propagate, frames: Sequence[np.ndarray], truth: np.ndarray, kind: str = 'point',
          rule: str = 'center', seed: int = 0) -> list[np.ndarray]:
  """Classes [H, W] of each frame, by prompts for the instances in the truth [H, W] of the first frame alone.

  Args:
    propagate: (frames, Prompt in the first one) -> mask [H, W] bool of each frame. An instrument that enters later is
      missed, as in the study.
  """
  found = [(c, [np.asarray(m, bool) for m in propagate(frames, prompt(mask, kind, rule, seed + i))])
           for i, (c, mask) in enumerate(instances(np.asarray(truth)))]
  return [_painted([(c, masks[t]) for c, masks in found], np.shape(truth)) for t in range(len(frames))]


def _painted(answers: Sequence[tuple[int, np.ndarray]], size: tuple[int, ...]) -> np.ndarray:
  """Masks as one map of classes: where they overlap, the smallest one, of equal ones the last."""
  out = np.zeros(size, np.int64)
  for c, mask in sorted(answers, key=lambda a: -int(a[1].sum())):
    out[mask] = c
  return out
