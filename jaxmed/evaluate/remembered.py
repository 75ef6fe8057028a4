"""Features that several tasks ask for, computed once."""

import hashlib
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from jaxmed.data.corpus.manifest import DATASET
from jaxmed.data.corpus.source import Source

MOST_BYTES = 1 << 30  # of features kept of one encoder


class Remembered:
  """An encoder whose vectors of records, once computed, are kept, and with them what else is derived of a source.

  Vectors are kept by record, so that sources that share records share them too. Maps, levels and what `once` makes are
  kept by source, the least lately used going first. Nothing is kept beyond `most_bytes`, and nothing of a source that
  is no plain `Source` and may change its records. All else is the encoder's own.
  """

  def __init__(self, encoder: Any, most_bytes: int = MOST_BYTES):
    self.encoder, self._room = encoder, most_bytes
    self._rows: dict[str, dict[str, np.ndarray]] = {}
    self._made: dict[Hashable, Any] = {}

  def __getattr__(self, name: str) -> Any:
    if name.startswith('__') or 'encoder' not in self.__dict__:
      raise AttributeError(name)
    return getattr(self.encoder, name)

  def embed_source(self, source: Any, batch_size: int = 64, dense: bool = False, levels: Any = ()) -> dict[str, Any]:
    """As of the encoder."""
    if type(source) is not Source:
      return self._embed(source, batch_size, dense, levels)
    if dense or levels:
      key = 'dense', dense, tuple(levels), digest(source)
      return self.once(key, lambda: self._embed(source, batch_size, dense, levels))
    ids = record_ids(source)
    if len(set(ids)) < len(ids):
      return self.encoder.embed_source(source, batch_size)
    fresh = np.array([i not in self._rows for i in ids], bool)
    found = self.encoder.embed_source(source.keep(fresh), batch_size) if fresh.any() or not len(ids) else {}
    if fresh.all() and not self._keep(found, ids):
      return found
    here = dict(zip(np.asarray(ids)[fresh].tolist(), range(len(ids)), strict=False))
    rows = [self._rows[i] if i not in here else {k: x[here[i]] for k, x in found.items()} for i in ids]
    if not fresh.all() and found:
      self._keep(found, list(here))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} if rows else found

  def _embed(self, source: Any, batch_size: int, dense: bool, levels: Any) -> dict[str, Any]:
    more = {'dense': dense, 'levels': levels} if dense or levels else {}
    return self.encoder.embed_source(source, batch_size, **more)

  def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` returns, which is called once a key as long as there is room."""
    if key in self._made:
      self._made[key] = self._made.pop(key)  # the latest is the last
      return self._made[key]
    value = make()
    size = _bytes(value)
    if size > self._room + _bytes(self._made):
      return value
    while size > self._room:
      self._room += _bytes(self._made.pop(next(iter(self._made))))
    self._made[key], self._room = value, self._room - size
    return value

  def _keep(self, found: dict[str, np.ndarray], ids: list[str]) -> bool:
    """Keeps rows if there is room for them."""
    size = _bytes(found)
    if size > self._room:
      return False
    self._room -= size
    for k, i in enumerate(ids):
      self._rows[i] = {name: x[k] for name, x in found.items()}
    return True


def record_ids(source: Any) -> list[str]:
  """What tells records apart: the corpus, of several its name too, and their ids."""
  ids = source.table['id'].to_pylist()
  names = source.table[DATASET].to_pylist() if DATASET in source.table.column_names else [''] * len(ids)
  return [f'{source.path}/{name}/{i}' for name, i in zip(names, ids, strict=True)]


def digest(source: Any) -> str:
  """What tells sources apart: the records and their order."""
  return hashlib.sha256('\n'.join(record_ids(source)).encode()).hexdigest()


def _bytes(value: Any) -> int:
  """Of all arrays in nested dicts and sequences."""
  if isinstance(value, dict):
    return sum(map(_bytes, value.values()))
  if isinstance(value, (list, tuple)):
    return sum(map(_bytes, value))
  return int(getattr(value, 'nbytes', 0))
