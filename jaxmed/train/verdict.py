"""What a run says at its end: are its features worth more than those it began with, and than the pixels themselves?

With labels (loader.label) the probes of the evaluators judge the same records by the untrained encoder and by pixels
(PCA). Without, the health of the features is compared with that before the first step.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmed.evaluate import metrics, pixels, probes, tables

UNTRAINED, PIXELS = 'untrained', 'pixels'
PIXEL_BYTES = 2**28  # of float32 pixels that PCA's axes are fitted on, so that it costs seconds
DRAWS = 400  # resamples of an interval
PROBES: dict[str, Any] = {'knn': probes.knn, 'ridge': probes.ridge}


def beside(snapshot: Any, names: tuple[str, ...]) -> dict[str, float]:
  """What the untrained encoder and pixels reach by the probes among `names`, on the records that these look at.

  Returns:
    By probe 'knn': 'knn_untrained', 'knn_pixels' (accuracies), and 'knn_over_untrained_low', 'knn_over_untrained_high'
    and so for pixels: the ends of the 95 % interval of the trained encoder's accuracy minus theirs, by a paired
    bootstrap over subjects; NaN for a single subject. {} without a probe among the names.
  """
  found: dict[str, float] = {}
  wanted = [name for name in PROBES if name in names]
  if not wanted:
    return found
  own, parts = snapshot.labelled, snapshot.probe.labelled
  subjects = np.asarray(parts[1].column('subject').to_pylist())
  untrained = snapshot.encoder.untrained(snapshot.probe.config.seed)
  others = {UNTRAINED: [untrained.embed_source(part)[untrained.feature] for part in parts],
            PIXELS: pixels.source_features(snapshot.encoder, *parts, room=PIXEL_BYTES)}
  for name in wanted:
    scores = lambda train, val, name=name: PROBES[name](train, own.train_y, val, own.classes)
    trained = scores(own.train_x, own.val_x)
    for other, features in others.items():
      given = scores(*features)
      found[f'{name}_{other}'] = float((given.argmax(axis=1) == own.val_y).mean())
      over = metrics.paired_difference(own.val_y, trained, given, subjects, draws=DRAWS)['accuracy']
      found |= {f'{name}_over_{other}_{end}': over[end] for end in ('low', 'high')}
  return found


@dataclasses.dataclass(frozen=True)
class Length:
  """What a run was and how long, from which follows what to try next (docs/results/defaults.md, methods.md)."""

  method: str
  model: str
  epochs: float

  @property
  def advice(self) -> str:
    """Options to try."""
    method = 'mocov3' if self.method == 'simclr' else 'simclr'
    model = 'model=resnet_micro, ' if '_micro' in self.model and self.model != 'resnet_micro' else ''
    return f'epochs={4 * self.epochs:.3g} (four times as long), {model}method={method}, or more records'


def lines(values: Mapping[str, float], start: Mapping[str, float], length: Length) -> list[str]:
  """One or two lines for people.

  Args:
    values: the last metrics of the run, with those of `beside`. start: health before the first step.
  """
  known = [name for name in PROBES if f'{name}_{UNTRAINED}' in values and name in values]
  return _labelled(values, known, length) if known else _healthy(values, start, length)


def _labelled(values: Mapping[str, float], known: list[str], length: Length) -> list[str]:
  told = '; '.join(f'{tables.METHODS[name]} {values[name]:.3f} (untrained {values[f"{name}_{UNTRAINED}"]:.3f}, '
                   f'pixels {values[f"{name}_{PIXELS}"]:.3f})' for name in known)
  out, short = [f'accuracy on held-out records: {told}'], []
  behind = [name for name in known if not values.get(f'{name}_over_{UNTRAINED}_low', np.nan) > 0]
  if behind:
    short.append(f'not beyond its untrained encoder by {_named(values, behind, UNTRAINED)}')
  if all(values.get(f'{name}_over_{PIXELS}_high', np.nan) < 0 for name in known):
    short.append(f'below raw pixels by {_named(values, known, PIXELS)}')
  if short:
    out.append(f'this run is {" and ".join(short)}: try {length.advice}')
  return out


def _named(values: Mapping[str, float], names: list[str], other: str) -> str:
  """'kNN (-0.020 [-0.031, -0.009])' of each probe."""
  parts = []
  for name in names:
    low, high = (values.get(f'{name}_over_{other}_{end}') for end in ('low', 'high'))
    cell = {'value': values[name] - values[f'{name}_{other}'], 'low': low, 'high': high}
    parts.append(f'{tables.METHODS[name]} ({tables.interval(cell, sign=True)})')
  return ' and '.join(parts)


def _healthy(values: Mapping[str, float], start: Mapping[str, float], length: Length) -> list[str]:
  if 'rankme' not in values or 'rankme' not in start:
    return []
  told = (f'effective rank of the features {values["rankme"]:.1f} (untrained {start["rankme"]:.1f}), LiDAR '
          f'{values["lidar"]:.1f} ({start["lidar"]:.1f})')
  out = [f'{told}; give loader.label=COLUMN to know what they are worth']
  if values['lidar'] <= start['lidar']:
    out.append(f'this run tells images apart no better than its untrained encoder: try {length.advice}')
  return out
