"""The records that a run trains on, and the search for those that evaluation sets hold too."""

import hashlib
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from jaxmed import objectives
from jaxmed.data.corpus import selection
from jaxmed.data.corpus.labels import VALUES, Labels
from jaxmed.data.corpus.open import open_source
from jaxmed.data.curate import leakage
from jaxmed.data.curate.features import unit
from jaxmed.data.feed import fields
from jaxmed.data.feed.sampling import parse_values
from jaxmed.errors import UserError, choose
from jaxmed.parallel import process
from jaxmed.train.build import data_spec, resolve, wording
from jaxmed.train.build.rundir import load

ANISOTROPY = 3.0  # nnU-Net's bound on the ratio of spacings (ANISO_THRESHOLD), here of a crop's sides
BESIDE = {'mask': 'files', 'text': 'texts'}  # columns of what a method may require, and what they hold
_HASHING = 24 * 3600.0  # seconds that the others wait while one process hashes a corpus for the first time


def open_records(user: Mapping[str, Any]) -> tuple[Any, Any]:
  """The corpus that a config names, and its rows to train on."""
  if not user.get('data'):
    raise UserError('nothing to train on: give --data CORPUS or data=CORPUS')
  corpus = open_source(str(user['data']))
  return corpus, rows(corpus, user)


def rows(corpus: Any, user: Mapping[str, Any]) -> Any:
  """The rows of an opened corpus that a config trains on."""
  loader = dict(user.get('loader', {}))
  label = _required(corpus, user, str(loader.get('label', '')))
  sources = [name for name in str(loader.get('sources', '')).split(',') if name]
  source = corpus.where(parse_values(str(loader.get('held_out', '')), 'loader.held_out'), but=True)
  source = source.select(split=loader.get('split', 'train'), label=label or None, sources=sources)
  if not len(source):
    of = f' of {", ".join(sources)}' if sources else ''
    have = f' with a {label if label in BESIDE else f"value in {label!r}"}' if label else ''
    raise UserError(f'{user.get("data", corpus.path)} has no records{of}{have} in split '
                    f'{loader.get("split", "train")!r}')
  return subset(source, int(loader.get('records', 0)), int(loader.get('records_seed', 0)))


def _required(corpus: Any, user: Mapping[str, Any], label: str) -> str:
  """The column that a record must say something in to be trained on, '' for none; a UserError where no record does."""
  required = objectives.get(str(user.get('method', 'mae'))).REQUIRED
  own = {'text': wording.columns(user, corpus)[0]} if 'text' in required and _worded(user) else {}
  for name, holds in BESIDE.items():
    if name in required and name not in own and name not in fields.held(corpus):
      raise UserError(f'{user.get("data", corpus.path)} has no record with a {name}: give jaxmed prepare a table with '
                      f'a column {name!r} of {holds}')
  return label if {'label', 'number'} & {*required} else next((own.get(n, n) for n in BESIDE if n in required), '')


def _worded(user: Mapping[str, Any]) -> bool:
  """Whether a config says where texts are to be had from."""
  loader = dict(user.get('loader', {}))
  return bool(loader.get('captions')) or str(loader.get('text', 'text')) != 'text'


def tell_classes(source: Any, labels: Labels) -> None:
  """Says which classes of masks have no pixel in the records to train on, as far as the manifest knows.

  Raises:
    UserError: none of them has one.
  """
  if len(labels) < 2 or VALUES not in source.table.column_names:
    return
  found = set(pc.unique(pc.list_flatten(source.column(VALUES))).to_pylist())
  lost = [f'{name} ({value})' for value, name in zip(labels.values, labels.names) if value and value not in found]
  if len(lost) == sum(value != 0 for value in labels.values):
    raise UserError(f'the masks of the {len(source)} records of {source.path} to train on have no pixel of '
                    f'{", ".join(lost[:10])}')
  if lost and process.is_main():
    print(f'jaxmed: the {len(source)} records to train on have no pixel of {", ".join(lost[:10])}'
          f'{f" and {len(lost) - 10} more" if len(lost) > 10 else ""}: nothing can be learned of that', file=sys.stderr,
          flush=True)


def tell_crops(source: Any, size: Sequence[int], pad: bool = True) -> None:
  """Says which volumes are smaller than crops of [*size], and how unlike the sides of a crop are in mm.

  Raises:
    UserError: a record is smaller, and must not be padded.
  """
  (codes, shapes), lines, by = source.distinct('shape'), [], 'x'.join
  small = np.array([any(have < want for have, want in zip(shape[:-1], size, strict=True)) for shape in shapes])[codes]
  if small.any() and not pad:
    i = int(np.argmax(small))
    raise UserError(f'{source.path}: {source.table["id"][i].as_py()} is {by(map(str, shapes[codes[i]][:-1]))}, smaller '
                    f'than the crop of {by(map(str, size))}, and loader.pad=false: set loader.load_size to at most '
                    f'{by(str(min(s[k] for s in shapes)) for k in range(len(size)))}, or loader.pad=true')
  if len(size) != 3 or not process.is_main():
    return
  if small.any():
    lines.append(f'{small.sum()} of {len(source)} volumes are smaller than the crop of {by(map(str, size))}: '
                 'zeros lie around them (loader.pad=false refuses them)')
  spacing = data_spec.spacing_of(source)
  sides = [n * step for n, step in zip(size, spacing, strict=False)]
  if sides and max(sides) > ANISOTROPY * min(sides):
    finest = min(spacing)
    even = by(str(max(round(min(sides) / step), 1)) for step in spacing)
    lines.append(f'a crop of {by(map(str, size))} voxels of {by(f"{s:g}" for s in spacing)} mm is '
                 f'{by(f"{s:.0f}" for s in sides)} mm: {even} voxels have equal sides, or prepare with '
                 f'--spacing {finest:g}')
  for line in lines:
    print(f'jaxmed: {line}', file=sys.stderr, flush=True)


def subset(source: Any, count: int, seed: int) -> Any:
  """Whole subjects of a source, in an order that the seed draws, until they have `count` records; 0 for all.

  The order is that of hashes of seed and subject: subsets of one seed are nested, and records of other subjects, added
  or taken away, change no place. A record without a subject stands for itself.

  Raises:
    UserError: the source has fewer records.
  """
  if not count:
    return source
  if count > len(source):
    raise UserError(f'loader.records={count} is more than the {len(source)} records of {source.path} to train on')
  codes, names = source.distinct('subject')
  if None in names:
    pairs = zip(source.column('id').to_pylist(), source.column('subject').to_pylist(), strict=True)
    names, codes = np.unique([f'record {i}' if s is None else s for i, s in pairs], return_inverse=True)
  keys = [hashlib.blake2b(f'{seed}/{name}'.encode('utf-8', 'surrogateescape'), digest_size=16).digest()
          for name in names]
  order = np.array(sorted(range(len(names)), key=keys.__getitem__))
  sizes = np.bincount(codes, minlength=len(names))[order]
  taken = order[:int(np.searchsorted(np.cumsum(sizes), count)) + 1]
  return source.keep(np.isin(codes, taken))


def tell_leaks(user: Mapping[str, Any], source: Any) -> None:
  """Says which records to train on are in the corpora of `evaluation` too; with on_leak=stop raises a UserError."""
  action = choose('on_leak', str(user.get('on_leak', 'warn')), resolve.ON_LEAK)
  against = [name.strip() for name in str(user.get('evaluation', '')).split(',') if name.strip()]
  if not against or action == 'ignore':
    return
  held = [leakage.held_out(name) for name in against]  # by all processes: what is wrong with one, all say
  judge, main = str(user.get('leak_encoder', '')), process.is_main()
  if judge and not pathlib.Path(judge).exists():
    raise UserError(f'leak_encoder={judge} does not exist: expected a run or an exported file')
  given = _embedded(judge, source, held) if judge and main else [None] * len(against)
  found = [leakage.between(source, name, rows, progress=sys.stderr.isatty(), given=pair)
           for name, rows, pair in zip(against, held, given, strict=True)] if main else []
  texts = process.gather('leaks', [leaks.text() for leaks in found if leaks.rows.any()], _HASHING)[0]
  if not texts:
    return
  parts = [part.strip() for part in str(user['data']).split(',')]
  clean = ','.join(f'{selection.split_uri(part)[0]}@clean' for part in parts)
  more = f' --encoder {judge}' if judge else ''
  text = (f'{"; ".join(texts)}: jaxmed curate {parts[0]} --against {",".join(against)}{more} --drop-leaks --out clean '
          f'leaves them out{"" if len(parts) == 1 else " (and so for each corpus)"}, train with data={clean}')
  if action == 'stop':
    raise UserError(text)
  if main:
    print(f'jaxmed: {text}', file=sys.stderr, flush=True)


def _embedded(encoder: str, source: Any, held: Sequence[Any]) -> list[tuple[Any, Any]]:
  """Features of length 1 of the rows to train on and of each evaluation set."""
  loaded = load(encoder)
  features = lambda rows: unit(loaded.embed_source(rows)[loaded.feature])
  mine = features(source)
  return [(mine, features(rows)) for rows in held]
