"""What the text of a record is: columns of the manifest, one of their sentences, or captions made of a label.

UniMed makes captions of labels by templates (Khattak et al. 2024, arXiv 2412.10372); ConVIRT draws one sentence of a
report at each step (Zhang et al. 2020, arXiv 2010.00747).
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxmed.data.feed.tokenizers import Tokenizer
from jaxmed.errors import UserError, choose

DRAWS = ('whole', 'sentence')
SLOT = '{}'
_END = re.compile(r'(?<=[.!?;])\s+|\s*\n\s*|\s*\d+\.\s+(?=[A-Z])')  # also of numbered lists


@dataclasses.dataclass(frozen=True)
class Texts:
  """How records get their texts.

  Attributes:
    columns: of the manifest, whose texts are joined by a space in this order; with captions the one of the labels.
    draw: 'whole', or 'sentence' for one of the sentences, drawn for each sample. Without a draw it is the first one.
    captions: {value of the column: its captions}, of which one is drawn for each sample; None for texts as they are.
    tokenizer: what makes ids of them.
  """

  columns: tuple[str, ...] = ('text',)
  draw: str = 'whole'
  captions: Mapping[str, tuple[str, ...]] | None = None
  tokenizer: Tokenizer = Tokenizer()

  @property
  def drawn(self) -> bool:
    """Whether chance decides which text a sample has."""
    return self.draw == 'sentence' or self.captions is not None

  def of(self, source: Any, i: int, rng: np.random.Generator | None = None) -> str:
    """The text of row i, '' where it has none; the first of several without `rng`."""
    found = [str(value) for value in (source.column(name)[i].as_py() for name in self.columns) if value is not None]
    if not found:
      return ''
    choices = [' '.join(found)]
    if self.captions is not None:
      choices = [*self.captions[found[0]]]
    elif self.draw == 'sentence':
      choices = [*sentences(choices[0])]
    return choices[0 if rng is None else int(rng.integers(len(choices)))] if choices else ''

  def ids(self, source: Any, i: int, length: int, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
    """{'text', 'words'} of row i, [length] int32 each, see `Tokenizer.encode`."""
    ids, words = self.tokenizer.encode(self.of(source, i, rng), length)
    return {'text': ids, 'words': words}

  def every(self, source: Any) -> Iterator[str]:
    """All texts that samples of these rows may have."""
    if self.captions is not None:
      yield from (caption for captions in self.captions.values() for caption in captions)
      return
    for parts in zip(*(source.column(name) for name in self.columns), strict=True):
      text = ' '.join(str(part) for part in parts if part.is_valid)
      yield from sentences(text) if self.draw == 'sentence' else filter(str.strip, [text])


def sentences(text: str) -> Iterator[str]:
  """The sentences of a report: what ends in . ! ? or ; before a space, lines, and the items of numbered lists."""
  yield from filter(None, (part.strip() for part in _END.split(text)))


def columns_of(words: str, source: Any) -> tuple[str, ...]:
  """The columns that `loader.text` names, 'impression,findings'.

  Raises:
    UserError: a name that is none of the manifest.
  """
  names = tuple(name.strip() for name in words.split(',') if name.strip()) or ('text',)
  return tuple(choose(f'column of {source.path} in loader.text', name, source.table.column_names) for name in names)


def captions_of(file: str, source: Any) -> tuple[str, dict[str, tuple[str, ...]]]:
  """(column, {value: captions}) of a JSON file of captions for the labels of a source.

  {"column": NAME, "captions": {value: [caption, ...]}}, or {"column": NAME, "templates": ["an image of {}.", ...],
  "names": {value: name or [name, ...]}}: each template with each name; without `names` a value is its own name.

  Raises:
    UserError: no such file, another content, a template without slot, or a value of the column without a caption.
  """
  try:
    given = json.loads(pathlib.Path(file).read_text(encoding='utf-8'))
  except (OSError, ValueError) as e:
    raise UserError(f'loader.captions={file}: {e}; expected a JSON file') from e
  if not isinstance(given, dict) or 'column' not in given or ('captions' in given) == ('templates' in given):
    raise UserError(f'loader.captions={file}: expected {{"column": NAME}} with "captions": {{value: [caption, ...]}}, '
                    'or with "templates": ["an image of {}.", ...]')
  column = choose(f'column of {source.path} in {file}', str(given['column']), source.table.column_names)
  values = [str(v) for v in source.distinct(column)[1] if v is not None]
  if 'templates' in given:
    templates = _listed(file, 'templates', given['templates'])
    bare = [t for t in templates if SLOT not in t]
    if bare:
      raise UserError(f'{file}: template {bare[0]!r} has no slot {SLOT} for the name of a class')
    names = {v: _listed(file, f'names of {v!r}', given.get('names', {}).get(v, v)) for v in values}
    return column, {v: tuple(t.replace(SLOT, n) for t in templates for n in names[v]) for v in values}
  lost = [v for v in values if v not in given['captions']]
  if lost:
    raise UserError(f'{file}: no caption for {lost[0]!r} of column {column!r} of {source.path}')
  return column, {v: _listed(file, f'captions of {v!r}', given['captions'][v]) for v in values}


def _listed(file: str, what: str, value: Any) -> tuple[str, ...]:
  """One text or several, as a tuple of some that are not empty."""
  found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
  if not found or not all(isinstance(text, str) and text.strip() for text in found):
    raise UserError(f'{file}: {what} are {value!r}: expected texts that are not empty')
  return found
