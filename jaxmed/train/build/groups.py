"""The groups of an optimizer, from what a method wants and what a config says."""

from collections.abc import Mapping
from typing import Any

from jaxmed.errors import UserError, choose
from jaxmed.train.optimizer import REST, Group

KINDS: dict[str, Any] = {'paths': (str, tuple), 'name': str, 'rate': (int, float), 'every': int, 'options': Mapping}


def of(given: Mapping[str, Any], wanted: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, Group], ...]:
  """The optimizer's groups: what a method wants, then what `optimizer.groups` changes of it or adds.

  Raises:
    UserError: a key that no group has, a value of another type, or a group without paths.
  """
  out: dict[str, dict[str, Any]] = {name: {'paths': paths} for name, paths in wanted.items()}
  for name, values in given.items():
    if not isinstance(values, Mapping):
      raise UserError(f'optimizer.groups.{name} is a section: set its paths, for example '
                      f'optimizer.groups.{name}.paths=head')
    for key, value in values.items():
      if not isinstance(value, KINDS[choose(f'key optimizer.groups.{name}', key, KINDS)]) or isinstance(value, bool):
        raise UserError(f'optimizer.groups.{name}.{key} cannot be {value!r}')
    out[name] = out.get(name, {}) | dict(values)
  for name, values in out.items():
    if not values.get('paths') or name == REST:
      raise UserError(f'optimizer.groups.{name} needs paths of parameters' if name != REST else
                      f'optimizer.groups.{REST} is the group of what no other has: give yours another name')
    values |= {'paths': names(values['paths'])}
    values |= {'options': tuple(sorted(dict(values.get('options', {})).items()))}
  return tuple((name, Group(**values)) for name, values in out.items())


def names(given: str | tuple[str, ...]) -> tuple[str, ...]:
  """Names that a config has as one text with commas, or as several."""
  parts = given.split(',') if isinstance(given, str) else given
  return tuple(part.strip() for part in parts if part.strip())
