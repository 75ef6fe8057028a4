"""The texts of a run: which columns, captions and tokenizer a config asks for, kept whole in RUN/data.json."""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmed import objectives
from jaxmed.data.feed import texts as texts_lib
from jaxmed.data.feed import tokenizers
from jaxmed.data.feed.texts import Texts
from jaxmed.data.feed.tokenizers import Tokenizer
from jaxmed.errors import UserError
from jaxmed.parallel import process
from jaxmed.train.build.data_spec import DataSpec

ROWS = 20_000  # records at most whose texts are counted


def asked(user: Mapping[str, Any]) -> bool:
  """Whether the method of a config takes texts."""
  return 'text' in objectives.get(str(user.get('method', 'mae'))).FIELDS


def columns(user: Mapping[str, Any], source: Any) -> tuple[str, ...]:
  """The columns that the texts of a config are in, or made of.

  Raises:
    UserError: a name that is none of the manifest, or as of `texts.captions_of`.
  """
  loader = dict(user.get('loader', {}))
  if loader.get('captions'):
    return (texts_lib.captions_of(str(loader['captions']), source)[0],)
  return texts_lib.columns_of(str(loader.get('text', '')), source)


def described(user: Mapping[str, Any], source: Any) -> dict[str, Any]:
  """What a run keeps of its texts, plain data for `of`; {} where its method takes none.

  Raises:
    UserError: as of `columns` and `tokenizers.of`.
  """
  if not asked(user):
    return {}
  loader = dict(user.get('loader', {}))
  captions = None
  if loader.get('captions'):
    captions = {v: list(c) for v, c in texts_lib.captions_of(str(loader['captions']), source)[1].items()}
  kept = {'columns': list(columns(user, source)), 'draw': str(loader.get('text_draw', 'whole')), 'captions': captions}
  plain = Texts(**kept | {'columns': tuple(kept['columns'])})  # type: ignore[arg-type]
  words = str(loader.get('tokenizer', ''))
  tokenizer = tokenizers.of(words, str(loader.get('text_clean', '')), plain.every(source))
  return kept | {'tokenizer': dataclasses.asdict(tokenizer), 'vocab_size': tokenizer.vocab_size}


def added(spec: DataSpec, user: Mapping[str, Any], source: Any) -> DataSpec:
  """What a run knows of its data with its texts; a vocabulary that was made is that of the main process for all.

  Raises:
    UserError: as of `described`.
  """
  kept = described(user, source)
  if not kept:
    return spec
  kept = process.gather('vocabulary of texts', kept)[0] if kept['tokenizer']['model'] else kept
  holds = (*spec.holds, *({'text'} - {*spec.holds}))
  return dataclasses.replace(spec, texts=kept, holds=holds)


def of(kept: Mapping[str, Any]) -> Texts:
  """The texts of a run from what `described` said."""
  return _made(json.dumps(kept, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _made(kept: str) -> Texts:
  known = json.loads(kept)
  if 'tokenizer' not in known:
    return Texts()
  captions = known['captions'] and {v: tuple(c) for v, c in known['captions'].items()}
  return Texts(tuple(known['columns']), known['draw'], captions, Tokenizer(**known['tokenizer']))


def save(folder: pathlib.Path, kept: Mapping[str, Any]) -> None:
  """Writes RUN/tokenizer.json, which other programs read too; runs whose ids are bytes have none."""
  if of(kept).tokenizer.model:
    of(kept).tokenizer.save(folder)


def tell(kept: Mapping[str, Any], source: Any, length: int) -> None:
  """Says how many texts of the records to train on are cut at so many ids; of many records some are looked at.

  Raises:
    UserError: all of them are.
  """
  texts = of(kept)
  some = source if len(source) <= ROWS else source.keep(np.arange(len(source)) % -(-len(source) // ROWS) == 0)
  sizes = np.array([texts.tokenizer.count(text) for text in texts.every(some)], np.int64)
  cut, longest = int((sizes > length).sum()), int(sizes.max(initial=0))
  if cut and cut == len(sizes):
    raise UserError(f'loader.text_length={length} cuts every text of {source.path}, of {int(sizes.min())} to {longest} '
                    f'ids: set loader.text_length={longest}')
  if cut and process.is_main():
    print(f'jaxmed: loader.text_length={length} cuts {cut} of {len(sizes)} texts, the longest of {longest} ids',
          file=sys.stderr, flush=True)
