"""Pictures of single records of a result: masks and predictions over images, queries and what they found."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.data.resize import nearest, resize
from jaxmed.errors import UserError
from jaxmed.evaluate.report.figures import COLOURS, _limits, _mosaic, _shown, _sliced, figure_of, save_figure

_RIGHT, _WRONG, _ASKED = (0.0, 0.62, 0.45), (0.84, 0.37, 0.0), (0.4, 0.4, 0.4)
_IGNORED = (0.80, 0.87, 0.95)
SIDE = 256  # pixels of the longest side of a case, beyond which all are drawn smaller


def masks(result: Mapping[str, Any], source: Any, path: str | os.PathLike) -> None:
  """Test records beside their mask and their prediction, the worst first; of a volume one slice.

  Args:
    result: what `protocols.dense.Dense.run` returned. source: holds its records.
  Raises:
    UserError: a record is not in the source.
  """
  cases, size = result['examples']['cases'], tuple(result['size'])
  rows = rows_of(source, [c['id'] for c in cases])
  values = [int(name) for name in result['classes']]
  lines = []
  for case, row in zip(cases, rows, strict=True):
    record = source.record(row)
    image, truth = resize(record['image'], size), nearest(record['mask'], size)
    if case['slice'] is not None:
      image, truth = image[case['slice']], truth[case['slice']]
    predicted = np.repeat(case['values'], case['lengths']).reshape(case['shape'])
    base = _picture(image, record['channels'])
    lines.append([base, _painted(base, truth, values), _painted(base, predicted, values)])
  title = f'Lowest Dice of test records: {cases[0]["dice"]:.2f} to {cases[-1]["dice"]:.2f}'
  _mosaic(lines, ['image', 'mask', 'predicted'], path, title, group=3)


def segmentation(images: np.ndarray, truth: np.ndarray, predicted: np.ndarray, channels: Sequence[str],
                 values: Sequence[int], names: Sequence[str], path: str | os.PathLike) -> None:
  """A line for each image: the image, its mask and the prediction; of a volume the slice with most of the foreground.

  Args:
    images: [N, *size, C]. truth, predicted: [N, *size] of `values`; -1 in the truth for what is not known.
    channels: names of the C. values, names: of the classes; 0 has no colour.
  """
  lines = []
  for image, mask, found in zip(images, truth, predicted, strict=True):
    if mask.ndim == 3:
      at = int((mask > 0).sum(axis=(1, 2)).argmax())
      image, mask, found = image[at], mask[at], found[at]
    base = _picture(image, channels)
    lines.append([base, _painted(base, mask, values), _painted(base, found, values)])
  shown = ', '.join(name for value, name in zip(values, names, strict=True) if value)
  _mosaic(lines, ['image', 'mask', 'predicted'], path, f'Masks and predictions: {shown}'[:80], group=3)


def cases(result: Mapping[str, Any], source: Any, path: str | os.PathLike) -> None:
  """Test records of any size beside their mask and their prediction, the worst first; of a volume one slice.

  Args:
    result: what `protocols.segment.Segment.run` returned. source: holds its records.
  Raises:
    UserError: a record is not in the source.
  """
  worst = result['examples']['cases']
  values = [0, *(c['value'] for c in result['classes'])]
  sizes = [case['shape'] for case in worst]
  share = min(1.0, SIDE / max(max(n) for n in sizes))
  frame = tuple(max(1, round(share * max(n))) for n in zip(*sizes))
  lines = []
  for case, row in zip(worst, rows_of(source, [c['id'] for c in worst]), strict=True):
    record = source.record(row)
    at = case['slice'] if case['slice'] is not None else slice(None)
    image, truth = record['image'][at], record['mask'][at]
    predicted = np.repeat(case['values'], case['lengths']).reshape(case['shape'])
    size = tuple(max(1, round(share * n)) for n in truth.shape)
    base = _picture(resize(image, size), record['channels'])
    tiles = [base, _painted(base, nearest(truth, size), values), _painted(base, nearest(predicted, size), values)]
    pad = [(0, f - n) for f, n in zip(frame, size)] + [(0, 0)]
    lines.append([np.pad(tile, pad, constant_values=1.0) for tile in tiles])
  title = f'Lowest Dice of test records: {worst[0]["dice"]:.2f} to {worst[-1]["dice"]:.2f}'
  _mosaic(lines, ['image', 'mask', 'predicted'], path, title, group=3)


def retrieved(examples: Sequence[Mapping[str, Any]], source: Any, path: str | os.PathLike) -> None:
  """A line for each query: its image (grey frame), then the images that it found, nearest first, framed green where
  they are of its class, else red.

  Args:
    examples: [{'query': id, 'found': [{'id', 'right'}]}]. source: holds their records.
  Raises:
    UserError: a record is not in the source.
  """
  wanted = [[e['query'], *(f['id'] for f in e['found'])] for e in examples]
  rows = dict(zip(flat := [i for line in wanted for i in line], rows_of(source, flat), strict=True))
  records = {i: source.record(row, ('image',)) for i, row in rows.items()}
  side = tuple(max(n) for n in zip(*(_plane(r['image']).shape[:2] for r in records.values()), strict=True))
  side = tuple(min(n, 160) for n in side)
  shown = {i: _picture(resize(_plane(r['image']), side), r['channels']) for i, r in records.items()}
  lines = [[_framed(shown[e['query']], _ASKED),
            *(_framed(shown[f['id']], _RIGHT if f['right'] else _WRONG) for f in e['found'])] for e in examples]
  labels = ['query', *(str(n) for n in range(1, max(map(len, lines))))]
  _mosaic(lines, labels, path, 'Nearest images, green where they have the label of the query', group=1)


def captioned(examples: Sequence[Mapping[str, Any]], source: Any, path: str | os.PathLike) -> None:
  """A line for each image: the picture, what it is where that is known, and the texts most similar to it, best first,
  green where they are right, else red.

  Args:
    examples: [{'query': id, 'label': text or '', 'found': [{'text', 'right'}]}]. source: holds the records.
  Raises:
    UserError: a record is not in the source.
  """
  rows = rows_of(source, [e['query'] for e in examples])
  figure = figure_of(9, 1.3 * len(examples) + 0.1, layout=None)
  for i, (example, row) in enumerate(zip(examples, rows, strict=True)):
    record, height = source.record(row, ('image',)), 1 / len(examples)
    bottom = 1 - (i + 1) * height
    ax = figure.add_axes((0.01, bottom + 0.05 * height, 0.13, 0.9 * height))
    plane = _plane(record['image'])
    ax.imshow(_picture(resize(plane, tuple(min(n, 160) for n in plane.shape[:2])), record['channels']))
    ax.set_axis_off()
    lines = ([(example['label'], _ASKED)] if example['label'] else [])
    lines += [(f['text'], _RIGHT if f['right'] else _WRONG) for f in example['found']]
    for k, (text, colour) in enumerate(lines):
      text = ' '.join(text.split()).replace('$', r'\$')
      place = bottom + height * (0.86 - 0.8 * k / len(lines))
      figure.text(0.16, place, textwrap.shorten(text, 135), fontsize=8, color=colour, va='top')
  save_figure(figure, path)


def rows_of(source: Any, ids: Sequence[str]) -> list[int]:
  """The row of each id; a UserError where the source does not have one."""
  place = {str(name): i for i, name in enumerate(source.table['id'].to_pylist())}
  lost = [i for i in ids if i not in place]
  if lost:
    raise UserError(f'{source.path} has no record {lost[0]!r}: expected the corpus that was evaluated')
  return [place[i] for i in ids]


def _plane(image: np.ndarray) -> np.ndarray:
  """[H, W, C]: of a volume the middle slice."""
  return image if image.ndim == 3 else image[len(image) // 2]


def _picture(image: np.ndarray, names: Sequence[str]) -> np.ndarray:
  """[H, W, 3] in 0..1: the colours, or the mean of the channels, each stretched."""
  images = _sliced('images', image[None], names)
  return _shown(images, names, _limits(images, names))[0].mean(axis=0)


def _painted(base: np.ndarray, mask: np.ndarray, values: Sequence[int]) -> np.ndarray:
  """The picture under its mask: no colour for 0, pale for what is no class."""
  out = base.copy()
  for value in np.unique(mask):
    if value == 0 and value in values:
      continue
    colour = _rgb(COLOURS[values.index(value) % len(COLOURS)]) if value in values else np.array(_IGNORED)
    some = mask == value
    out[some] = 0.45 * base[some] + 0.55 * colour
  return out


def _framed(tile: np.ndarray, colour: Sequence[float]) -> np.ndarray:
  width = max(1, round(0.05 * min(tile.shape[:2])))
  out = np.broadcast_to(np.array(colour), tile.shape).copy()
  out[width:-width, width:-width] = tile[width:-width, width:-width]
  return out


def _rgb(code: str) -> np.ndarray:
  return np.array([int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)])
