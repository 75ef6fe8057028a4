"""One encoder or several by one task or several: what `jaxmed evaluate` and `jaxmed.evaluate` do."""

import dataclasses
import importlib
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed.sampling import parse_values
from jaxmed.errors import UserError, choose
from jaxmed.evaluate import protocols, wins
from jaxmed.evaluate.protocols.tasks import PIXELS, TRAINED, UNTRAINED
from jaxmed.evaluate.remembered import Remembered


@dataclasses.dataclass(frozen=True)
class Judged:
  """What a protocol found for a label; key: NAME, of the second label and later ones NAME.LABEL."""

  key: str
  protocol: Any
  label: str
  result: dict[str, Any]


def evaluate(encoder: Any, source: Any, task: str | Sequence[str] = 'classify', *,
             label: str | Sequence[str] | None = None, where: str = '', beside: Mapping[str, Any] | Sequence[Any] = (),
             feature: str | None = None, batch_size: int = 64, seed: int = 0, **options: Any) -> dict[str, Any]:
  """Judges frozen features by tasks, as `jaxmed evaluate` does; nothing is written.

  Args:
    encoder: an `Encoder`, or the path of a run or of an exported file; for the task segment a `Segmenter` or a run.
    source: an opened corpus, or its path. where: 'COLUMN=A,B', values that a row must have.
    task: names of protocols, 'classify,retrieve' or a list. label: column of labels, or several; 'a,b' are the columns
      of one multi-label task.
    beside: other encoders to compare, {name: encoder or path} or paths.
    feature: 'cls' or 'mean'; by default the vector of the method. batch_size: images in one pass.
    seed: of baselines and bootstrap.
    options: options of the task, `gallery='test'`; of several tasks with the name before, `**{'retrieve.gallery': ..}`.
  Returns:
    What `--json` prints: of one task and label its result, else {'protocols': {NAME or NAME.LABEL: result}, 'wins': as
    of `wins.wins`}.
  Raises:
    UserError: as of the command.
  """
  names = task if isinstance(task, str) else ','.join(task)
  if ',' in names and (bare := [key for key in options if '.' not in key]):
    raise UserError(f'option {bare[0]!r} of several tasks: expected TASK.{bare[0]}, such as '
                    f'{names.split(",")[0].strip()}.{bare[0]}')
  chosen = protocols.get(names, {key if '.' in key else f'{names}.{key}': value for key, value in options.items()})
  source = opened(source).where(parse_values(where, 'where'))
  others = beside if isinstance(beside, Mapping) else named([str(path) for path in beside])
  kind = protocols.judges(chosen)
  found = judged(loaded(encoder, kind), source, chosen, [label] if isinstance(label, str) else list(label or ()),
                 beside={name: loaded(other, kind) for name, other in others.items()}, feature=feature,
                 batch_size=batch_size, seed=seed)
  return together(found)


def judged(encoder: Any, source: Any, chosen: Sequence[Any], labels: Sequence[str] = (), *,
           beside: Mapping[str, Any] = {}, feature: str | None = None, batch_size: int = 64,
           seed: int = 0) -> list[Judged]:
  """What each protocol finds for each label; each record is embedded once.

  Args:
    encoder, beside: `Encoder`s, or `Segmenter`s for protocols of these. chosen: protocols with their options, as of
      `protocols.get`.
    labels: columns; protocols that judge no label (`labelled` is False) take none of them.
  Raises:
    UserError: what a protocol says of the rows, before anything is embedded.
  """
  asked = _asked(chosen, labels, source)
  for protocol, label in asked:
    if beside and not _takes_beside(protocol):
      raise UserError(f'--beside does not go with the task {protocol.name}: it gives no answer a row to compare')
    if hasattr(protocol, 'check'):
      protocol.check(source, label, seed)
  kept: Callable[[Any], Any] = Remembered
  ask: dict[str, Any] = {'batch_size': batch_size, 'seed': seed}
  if protocols.judges(chosen) == protocols.SEGMENTER:
    kept = _as_it_is
  else:
    ask |= {'untrained': Remembered(encoder.untrained(seed)), 'feature': feature or encoder.feature}
  remembered = kept(encoder)
  if beside:
    ask['beside'] = {name: kept(other) for name, other in beside.items()}
  keys = [p.name if label in ('', *labels[:1]) else f'{p.name}.{re.sub(r"[^A-Za-z0-9_-]+", "_", label)}'
          for p, label in asked]
  if len(set(keys)) < len(keys):
    raise UserError(f'labels {", ".join(labels)}: the names of two are written alike')
  return [Judged(key, p, label, p.run(remembered, source, label, **ask))
          for key, (p, label) in zip(keys, asked, strict=True)]


def _as_it_is(network: Any) -> Any:
  return network


def together(found: Sequence[Judged]) -> dict[str, Any]:
  """One result as it is, several by their keys, with the table of wins."""
  if len(found) == 1:
    return found[0].result
  results = {f.key: f.result for f in found}
  table = wins.wins(results)
  return {'protocols': results} | ({'wins': table} if table else {})


def named(paths: Sequence[str]) -> dict[str, str]:
  """Paths by their last parts where these differ from each other and from the baselines, else by themselves."""
  short = [os.path.basename(os.path.normpath(p)) for p in paths]
  names = short if len({*short, TRAINED, UNTRAINED, PIXELS}) == len(short) + 3 else list(paths)
  if len(set(names)) < len(names):
    raise UserError(f'--beside {", ".join(paths)}: each encoder can stand there once')
  return dict(zip(names, paths, strict=True))


def loaded(encoder: Any, kind: str = protocols.ENCODER) -> Any:
  """The encoder or segmenter of a path, or what is one."""
  if not isinstance(encoder, (str, os.PathLike)):
    return encoder
  package = importlib.import_module('jaxmed')  # runs are read by a room above this one
  return package.load_segmenter(encoder) if kind == protocols.SEGMENTER else package.load(encoder)


def opened(source: Any) -> Any:
  """The source of a path, or what is one."""
  return open_source(source) if isinstance(source, (str, os.PathLike)) else source


def _asked(chosen: Sequence[Any], labels: Sequence[str], source: Any) -> list[tuple[Any, str]]:
  """Protocols and labels, '' for a protocol of none."""
  out = []
  for protocol in chosen:
    if not getattr(protocol, 'labelled', True):
      out.append((protocol, ''))
      continue
    if not labels:
      raise UserError(f'the task {protocol.name} needs --label COLUMN; the columns are '
                      + ', '.join(source.table.column_names))
    out += [(protocol, label) for label in labels]
  for label in labels:
    columns_of(label, source)
  return out


def _takes_beside(protocol: Any) -> bool:
  """Whether `run` has a place for other encoders, by name or among its options."""
  asked = inspect.signature(protocol.run).parameters
  return 'beside' in asked or any(p.kind is p.VAR_KEYWORD for p in asked.values())


def columns_of(label: str, source: Any) -> list[str]:
  """The columns of a label: itself, or those of 'a,b'; a UserError names the nearest to an unknown one."""
  names = [label] if label in source.table.column_names else [name.strip() for name in label.split(',')]
  return [choose(f'column of {source.path}', name, source.table.column_names) for name in names]
