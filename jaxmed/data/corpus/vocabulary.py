"""A file that says what channels are: other names for them, and what else is known.

JSON: {"DNA": {"aliases": ["DAPI", "Hoechst"], "stain": "Hoechst", "modality": "fluorescence"}, "T1": {"aliases":
["T1w"]}}. What else may be known of a channel stands in `models.channel_embed.FEATURES`.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxmed import files
from jaxmed.errors import UserError


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """names: {alias or name: name}. features: {name: 'DNA|modality=fluorescence|stain=Hoechst'}, sorted by feature."""

  names: dict[str, str] = dataclasses.field(default_factory=dict)
  features: dict[str, str] = dataclasses.field(default_factory=dict)

  def name(self, channel: str) -> str:
    """The canonical name of a channel; unknown names stay as they are."""
    return self.names.get(channel, channel)

  def aliases(self, name: str) -> list[str]:
    """Other names of a channel."""
    return [alias for alias, own in self.names.items() if own == name and alias != name]

  def unknown(self, channels: Iterable[str]) -> list[str]:
    """Those of the channels that the file does not name."""
    return [c for c in channels if self.names and c not in self.names]


def ids_of(channels: Sequence[Mapping[str, Any]]) -> dict[str, int]:
  """The id of each channel by its name and aliases, of entries {'name', maybe 'aliases'} in the order of their ids."""
  return {name: i for i, c in enumerate(channels) for name in (c['name'], *c.get('aliases', ()))}


def described(channels: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
  """Names with what else is known of the channels (`features`), by id, as `models.channel_embed` reads them."""
  return tuple(c.get('features', c['name']) for c in channels)


def read(path: str | os.PathLike) -> Vocabulary:
  """Reads a vocabulary file.

  Raises:
    UserError: no such file, no such form, a name that stands for two channels.
  """
  content = files.read_json(path)
  form = f'{path} must be JSON of the form {{"DNA": {{"aliases": ["DAPI"], "stain": "Hoechst"}}, ...}}'
  if not isinstance(content, dict) or not content:
    raise UserError(form)
  names: dict[str, str] = {}
  features: dict[str, str] = {}
  for name, about in content.items():
    if not isinstance(about, dict) or not isinstance(about.get('aliases', []), list):
      raise UserError(f'{form}; {name!r} has {about!r}')
    for alias in (name, *map(str, about.get('aliases', []))):
      if names.setdefault(alias, name) != name:
        raise UserError(f'{path}: {alias!r} stands for {names[alias]!r} and for {name!r}: expected one channel a name')
    features[name] = '|'.join([name, *(f'{k}={v}' for k, v in sorted(about.items()) if k != 'aliases')])
  return Vocabulary(names, features)
