"""The records that a run trains on, and the search for those that evaluation sets hold too."""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmed.data.corpus import selection
from jaxmed.data.corpus.open import open_source
from jaxmed.data.curate import leakage
from jaxmed.data.curate.features import unit
from jaxmed.data.feed.sampling import parse_values
from jaxmed.errors import UserError, choose
from jaxmed.parallel import process
from jaxmed.train.build import resolve
from jaxmed.train.build.rundir import load

_HASHING = 24 * 3600.0  # seconds that the others wait while one process hashes a corpus for the first time


def open_records(user: Mapping[str, Any]) -> tuple[Any, Any]:
  """The corpus that a config names, and its rows to train on."""
  if not user.get('data'):
    raise UserError('nothing to train on: give --data CORPUS or data=CORPUS')
  loader = dict(user.get('loader', {}))
  corpus = open_source(str(user['data']))
  label = loader.get('label') if user.get('method') == 'supervised' else None
  sources = [name for name in str(loader.get('sources', '')).split(',') if name]
  source = corpus.where(parse_values(str(loader.get('held_out', '')), 'loader.held_out'), but=True)
  source = source.select(split=loader.get('split', 'train'), label=label or None, sources=sources)
  if not len(source):
    of = f' of {", ".join(sources)}' if sources else ''
    raise UserError(f'{user["data"]} has no records{of} in split {loader.get("split", "train")!r}')
  return corpus, source


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
