"""The data card of a corpus: card.md says what is in it, mosaic.png shows samples. Equal corpora have equal cards."""

import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxmed import files
from jaxmed.data.corpus.source import Source
from jaxmed.data.resize import resize

SAMPLES, TILE, COLUMNS = 36, 96, 6
_BARS, _BINS = 24, 8
_LISTED = 24  # values of a column


def write_card(folder: pathlib.Path, source: Source, rejected: int, carried: Mapping[str, str] | None = None,
               note: str = '') -> None:
  """Writes card.md and mosaic.png into a folder; `carried` is {column: what of it may tell who somebody is}, `note` is
  said first."""
  from PIL import Image

  with files.writing(folder / 'mosaic.png') as part:
    Image.fromarray(mosaic(source)).save(part, format='PNG')
  files.write_text(folder / 'card.md', text(source, rejected, carried or {}, note))


def text(source: Source, rejected: int, carried: Mapping[str, str], note: str = '') -> str:
  """The card as Markdown."""
  table = source.table
  subjects = pc.count_distinct(table['subject']).as_py()
  parts = ['# Corpus', *filter(None, (note,)), f'{len(table):,} records of {subjects:,} subjects; {rejected:,} files '
           'could not be read (rejects.csv).', '## Splits', _splits(table)]
  for title, name in (('Sources', 'source'), ('Modalities', 'modality'), ('Sites', 'site'),
                      ('Intensities', 'intensity')):
    if name in table.column_names and not pa.types.is_nested(table[name].type):
      parts += [f'## {title}', _counts(table[name])]
  parts += ['## Channels', _channels(source), '## Pixels', _counts(table['dtype'])]
  if 'nan_filled' in table.column_names:
    own = table['nan_filled'].drop_null()
    parts.append(f'{pc.sum(own).as_py():,} pixels of {len(own):,} records were NaN or infinite and were filled (column '
                 '`nan_filled`).')
  grid, spacing = _axes(table['shape'], True), _axes(table['spacing'], False)
  parts += ['## Size of the longest side (pixels)', _histogram(grid.max(axis=1) if len(grid) else grid)]
  if len(spacing):
    parts += ['## Finest spacing (mm)', _histogram(spacing.min(axis=1))]
  told = [(k, v) for k, v in carried.items() if k in table.column_names]
  if told:
    parts += ['## What may tell who somebody is', _table(('column', 'what it holds'), told),
              'Nothing else of a header is kept. Text burnt into pixels is not looked for.']
  return '\n\n'.join([*parts, '![samples of the train split](mosaic.png)']) + '\n'


def mosaic(source: Source) -> np.ndarray:
  """SAMPLES records at even distances over train (or all, where train is empty), each scaled to its channels' low and
  high: uint8 [H, W, 3]. Three channels show as red, green, blue; of others the first is shown in grey, of a volume the
  middle plane."""
  train = source.select('train')
  chosen = train if len(train) else source
  places = np.linspace(0, len(chosen) - 1, min(SAMPLES, len(chosen))).round().astype(int)
  rows = -(-len(places) // COLUMNS)
  canvas = np.full((rows * TILE, COLUMNS * TILE, 3), 255, np.uint8)
  for k, i in enumerate(places):
    y, x = divmod(k, COLUMNS)
    canvas[y * TILE:(y + 1) * TILE - 2, x * TILE:(x + 1) * TILE - 2] = _thumbnail(chosen, int(i))
  return canvas


def _thumbnail(source: Source, i: int) -> np.ndarray:
  shape = source.table['shape'][i].as_py()
  at = [0] * (len(shape) - 1)
  size = list(shape[:-1])
  if len(size) == 3:
    at[0], size[0] = size[0] // 2, 1
  image = source.window(i, at, size).reshape(*size[-2:], shape[-1])
  names = source.table['channels'][i].as_py()
  shown = range(3) if len(names) == 3 else (0, 0, 0)
  scaled = []
  for c in shown:
    stats = source.stats[names[c]]
    span = max(stats['high'] - stats['low'], 1e-12)
    scaled.append(np.clip((image[..., c].astype(np.float32) - stats['low']) / span, 0, 1))
  ratio = (TILE - 2) / max(size[-2:])
  fitting = [max(1, round(n * ratio)) for n in size[-2:]]
  small = resize(np.stack(scaled, -1), fitting)
  out = np.zeros((TILE - 2, TILE - 2, 3), np.uint8)
  y, x = ((TILE - 2 - n) // 2 for n in fitting)
  out[y:y + fitting[0], x:x + fitting[1]] = (small * 255).round().clip(0, 255)
  return out


def _splits(table: pa.Table) -> str:
  rows = []
  for name in ('train', 'val', 'test'):
    own = table.filter(pc.equal(table['split'], name))
    if len(own):
      rows.append((name, f'{len(own):,}', f'{pc.count_distinct(own["subject"]).as_py():,}'))
  return _table(('split', 'records', 'subjects'), rows)


def _counts(column: pa.ChunkedArray) -> str:
  counts = Counter(column.to_pylist()).most_common()
  counts.sort(key=lambda pair: (-pair[1], str(pair[0])))
  rows = [('unknown' if name is None else name, f'{n:,}') for name, n in counts[:_LISTED]]
  if len(counts) > _LISTED:
    rows.append((f'{len(counts) - _LISTED:,} more', f'{sum(n for _, n in counts[_LISTED:]):,}'))
  return _table(('value', 'records'), rows)


def _channels(source: Source) -> str:
  used = Counter(pc.list_flatten(source.table['channels']).to_pylist())
  rows = [(name, f'{used[name]:,}', *(f'{source.stats[name][k]:.6g}' for k in ('mean', 'std', 'low', 'high')))
          for name in source.channels]
  return _table(('channel', 'records', 'mean', 'std', 'low (0.5 %)', 'high (99.5 %)'), rows)


def _axes(column: pa.ChunkedArray, drop_last: bool) -> np.ndarray:
  """Lists of numbers as rows, padded by repeating the first; of shapes the channels are left out."""
  lists = [v[:-1] if drop_last else v for v in column.to_pylist() if v]
  longest = max(map(len, lists), default=0)
  return np.array([[*v, *[v[0]] * (longest - len(v))] for v in lists], np.float64).reshape(len(lists), longest)


def _histogram(values: np.ndarray) -> str:
  """Counts as bars of text, in bins of equal width on a scale that is logarithmic where values span a decade."""
  low, high = float(values.min()), float(values.max())
  if low == high:
    return _table(('value', 'records'), [(f'{low:.4g}', f'{len(values):,}')])
  edges = np.geomspace(low, high, _BINS + 1) if low > 0 and high > 10 * low else np.linspace(low, high, _BINS + 1)
  edges[0], edges[-1] = low, high
  counts, _ = np.histogram(values, edges)
  lines = []
  for a, b, n in zip(edges, edges[1:], counts):
    label = f'{a:.4g} to {b:.4g}'
    lines.append(f'{label:>22} {"#" * int(np.ceil(_BARS * n / counts.max())):{_BARS}} {n:,}')
  return '\n'.join(['```', *lines, '```'])


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  line = lambda cells: '| ' + ' | '.join(str(c).replace('|', '\\|') for c in cells) + ' |'
  return '\n'.join([line(head), '|' + '---|' * len(head), *map(line, rows)])
