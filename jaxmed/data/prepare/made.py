"""Corpora that a word stands for: they come with the package or inside others, or a generator makes them.

  demo, synthetic                        see jaxmed.data.prepare.demo and .synthetic
  phantoms, surgery, one_image           see .phantoms, .surgery and .one_image
  tissue, regions, nuclei, nuclei3d      see .real_masks
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from jaxmed.data.prepare import demo, one_image, phantoms, real_masks, surgery, synthetic
from jaxmed.errors import UserError

_GENERATORS: dict[str, Any] = {'phantoms': phantoms, 'surgery': surgery, 'one_image': one_image}
WORDS = ('demo', 'synthetic', *_GENERATORS, *real_masks.WORDS)
# Options of generators, and the word of each.
OPTIONS = {f.name: tuple(w for w, g in _GENERATORS.items() if f.name in g.Wanted.__dataclass_fields__)
           for generator in _GENERATORS.values() for f in dataclasses.fields(generator.Wanted) if f.name != 'seed'}

Cut = tuple[dict[str, Any], str, str, str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Made:
  """A corpus that is made.

  Attributes:
    word: one of WORDS.
    wanted: what of it may be chosen; its seed is that of `synthetic`, too.
    volumes: whether volumes of real_masks are cut into 'slices'.
  """

  word: str
  wanted: Any = dataclasses.field(default_factory=phantoms.Wanted)
  volumes: str = 'slices'

  @property
  def types(self) -> dict[str, pa.DataType]:
    """The manifest's other columns."""
    own = {'demo': {'region', 'text'}, 'tissue': {'region', 'mask'}, 'synthetic': {'relation'}}.get(self.word, {'mask'})
    if self.word in _GENERATORS:
      return dict(_GENERATORS[self.word].TYPES)
    return dict.fromkeys(sorted(own, reverse=True), pa.string())

  @property
  def labels(self) -> dict[int, str]:
    """{value of masks: name}."""
    if self.word == 'surgery':
      return surgery.names(self.wanted)
    if self.word in _GENERATORS:
      return dict(enumerate(_GENERATORS[self.word].CLASSES))
    return real_masks.names(self.word) if self.word in real_masks.WORDS else {}

  @property
  def note(self) -> str:
    """What the card must say of it."""
    if self.word == 'synthetic':
      return synthetic.told(self.wanted.seed)
    return _GENERATORS[self.word].told(self.wanted) if self.word in _GENERATORS else ''

  def records(self) -> Iterator[Cut]:
    """Yields (record, split, path, sha256, extra columns) of all records, in a fixed order."""
    if self.word == 'demo':
      return demo.records()
    if self.word == 'synthetic':
      return synthetic.records(self.wanted.seed)
    generator = _GENERATORS.get(self.word)
    return generator.records(self.wanted) if generator else real_masks.records(self.word, self.volumes)

  def pairs(self) -> list[tuple[str, Any]]:
    """(split, subject) of each record."""
    if self.word == 'synthetic':
      return list(synthetic.subjects())
    if self.word in _GENERATORS:
      return list(_GENERATORS[self.word].subjects(self.wanted))
    return [(split, record['subject']) for record, split, *_ in self.records()]

  def identity(self) -> list[Any]:
    """All that its content follows from."""
    if self.word == 'demo':
      return []
    return [self.word, self.volumes, *dataclasses.astuple(self.wanted)] if self.word != 'synthetic' else [
      self.word, self.wanted.seed]


def of(word: str, seed: int, volumes: str, given: Mapping[str, Any], others: Sequence[str]) -> Made | None:
  """The corpus that a word stands for, None for '' (folders and files).

  Args:
    word: one of WORDS or ''.
    seed: of what is drawn.
    volumes: see `Made`.
    given: those of OPTIONS that the user gave.
    others: options for files that the user gave.

  Raises:
    UserError: an option that this corpus has no use for, or a value that it cannot take.
  """
  if word and others:
    raise UserError(f'the {word} corpus takes no {others[0]}: {word!r} stands alone')
  for name in given:
    if word not in OPTIONS[name]:
      words = OPTIONS[name]
      raise UserError(f'--{name} is of {", ".join(words)}: jaxmed prepare {words[0]} --out CORPUS')
  generator = _GENERATORS.get(word, phantoms)
  return Made(word, generator.Wanted(seed, **given), volumes) if word else None
