"""Files that belong together, such as the slices of a series, become one item."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

from jaxmed.data import readers
from jaxmed.data.prepare.items import Item, Plan
from jaxmed.errors import UserError


def grouped(plan: Plan, options: readers.Options) -> Plan:
  """The plan with the files of kinds in readers.GROUPED replaced by their groups, which come after the other items.

  A group is named by what its files hold (see readers.Group), for paths of such files often name patients. What a
  table, a pattern or folders say of its files must agree.

  Raises:
    UserError: what was said of two files of a group does not agree.
  """
  kept: list[Item] = []
  members: dict[tuple[str, str], list[Item]] = {}
  for item in plan.items:
    kind = _kind(item)
    if kind in readers.GROUPED:
      members.setdefault((item.input, kind), []).append(item)
    else:
      kept.append(item)
  out = dataclasses.replace(plan, items=kept, rejects=list(plan.rejects), empty=list(plan.empty))
  several = len({i.input for i in plan.items}) > 1
  for (name, kind), items in members.items():
    by_file = {i.file: i for i in items}
    root = os.path.commonpath([str(i.file.parent) for i in items])
    groups, rejects = readers.groups(kind, list(by_file), root, options)
    for group in groups:
      out.items.append(_item(group, [by_file[f] for f in group.files], f'{name}/' if several and name else ''))
    for path, reason in rejects:
      (out.empty if reason.startswith(readers.NO_IMAGE) else out.rejects).append((by_file[path].rel, reason))
  return out


def _kind(item: Item) -> str | None:
  try:
    return readers.kind(item.file)
  except (ValueError, OSError):  # reading it will tell
    return None


def _item(group: readers.Group, items: list[Item], prefix: str) -> Item:
  first = items[0]
  return dataclasses.replace(
    first, rel=f'{prefix}{group.name}', group=group, split=_same(items, 'split', lambda i: i.split),
    source=_same(items, 'source', lambda i: i.source),
    subject=_same(items, 'subject', lambda i: i.subject) or group.subject,
    mask=_same(items, 'mask', lambda i: i.mask), signal=_same(items, 'signal', lambda i: i.signal),
    extra={k: _same(items, k, functools.partial(_extra, k)) for k in first.extra})


def _extra(name: str, item: Item) -> Any:
  return item.extra[name]


def _same(items: list[Item], what: str, value: Callable[[Item], Any]) -> Any:
  """The one value that all files of a group have."""
  first = value(items[0])
  for other in items:
    if value(other) != first:
      raise UserError(f'{items[0].rel} and {other.rel} are of one series, but their {what} is {first} and '
                      f'{value(other)}')
  return first
