"""Any protocol with fewer channels: every subset of them, as in the tables of ChannelViT (arXiv 2309.16108).

A protocol is fitted once, on training rows with all their channels, and asked of test rows that show a subset.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.errors import UserError
from jaxmed.evaluate import metrics
from jaxmed.evaluate.protocols.classify import Classify
from jaxmed.evaluate.protocols.protocol import FeatureProtocol
from jaxmed.evaluate.protocols.tasks import TRAINED, Task, plain
from jaxmed.evaluate.tables import aligned

SUBSETS = 255  # all of eight channels
_BYTES = 1 << 28  # features of subsets that a probe is asked of at once


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What one probe says of one subset: value and interval of each metric, and the resamples [R] behind them."""

  subset: tuple[str, ...]
  intervals: dict[str, dict[str, float]]
  drawn: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ByChannels:
  """A protocol whose scores are against the channels that test images show.

  Attributes:
    protocol: what is asked. subsets: how many are tried at most: all of them where there are no more, else each channel
      alone, all together, and a random sample of the others, as many of each size as there is room for.
  """

  protocol: FeatureProtocol = Classify()
  subsets: int = SUBSETS

  @property
  def name(self) -> str:
    """That of the protocol, and that channels are left out."""
    return f'{self.protocol.name} by channels'

  @property
  def task(self) -> str:
    """That of the protocol."""
    return self.protocol.task

  def run(self, encoder: Any, source: Any, label: str, *, feature: str = 'mean', batch_size: int = 64, seed: int = 0,
          draws: int = 1000) -> dict[str, Any]:
    """Scores of frozen features for each subset.

    Args:
      encoder: has `embed_subsets(source, subsets, batch_size, feature)` too, see `Encoder`; the rest as of
        `FeatureProtocol.run`.
    Returns:
      A dict ready for JSON: label, feature, channels, subsets {'tried', 'of'}, rows, chance, notes, and for each method
      in `methods`: subsets [{channels, metrics}], counts [{channels: n, subsets, metrics, worst and best subset with
      their first metric}], shapley {channel: {metric: {value, low, high}}}. A count's metric is the mean over its
      subsets. Intervals are 95 % by bootstrap over test subjects, the same resamples for all subsets.
    Raises:
      UserError: as of `FeatureProtocol.run`; fewer than two channels; no test row that has all of them.
    """
    protocol = self.protocol.resolved(source, label)
    if protocol is not self.protocol:
      return dataclasses.replace(self, protocol=protocol).run(encoder, source, label, feature=feature,
                                                              batch_size=batch_size, seed=seed, draws=draws)
    task = protocol.task_of(source, label, seed)
    notes = [*task.notes, *protocol.notes(task)]
    held = getattr(encoder, 'held', None)  # an encoder of several modalities: these are meant
    task, names, more = common_rows(task, held(task.test.source) if held else ())
    notes += more
    tried = chosen_subsets(names, self.subsets, np.random.default_rng(seed))
    whole = 2 ** len(names) - 1
    if len(tried) < whole:
      notes.append(f'{len(tried)} of {whole} subsets were tried: each channel alone, all, and a random sample')
    train, shown = protocol.shown(encoder, task, tried, feature, batch_size)  # [S, M, D]
    chance = protocol.chance(task)
    found = {}
    for method in protocol.methods:
      values = self._asked(method, train, shown, task)
      outcomes = []
      for subset, answers in zip(tried, values, strict=True):
        value, drawn = protocol.outcome(answers, task, draws, seed)
        outcomes.append(Outcome(subset, metrics.summarised(value, drawn), drawn))
      found[method] = _summary(outcomes, names, chance, tuple(protocol.metrics))
    return {'label': label, 'feature': feature, 'channels': list(names), 'subsets': {'tried': len(tried), 'of': whole},
            'rows': len(task.test.y), 'chance': chance, 'methods': found, 'notes': notes, 'draws': draws, 'seed': seed}

  def _asked(self, method: str, train: dict[str, np.ndarray], shown: np.ndarray, task: Task) -> np.ndarray:
    """Answers [S, M, K] of a method that is fitted once for as many subsets as memory allows together."""
    step = max(1, _BYTES // (shown[0].size * 4))
    parts = [shown[i : i + step] for i in range(0, len(shown), step)]
    return np.concatenate([self.protocol.answers(method, train | {'test': part}, task).values for part in parts])

  def tables(self, result: Mapping[str, Any]) -> str:
    """What `run` returned as aligned text."""
    return self.compared({TRAINED: result})

  def compared(self, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The same of several encoders side by side, {name: what `run` returned}."""
    return text_table(results, self.protocol.metrics)


def shapley(names: Sequence[str], values: Mapping[tuple[str, ...], np.ndarray],
            nothing: float) -> dict[str, np.ndarray]:
  """Shapley value of each channel, from the values of all subsets (arrays of one shape) and of the empty one.

  The weighted least squares of Lundberg and Lee (arXiv 1705.07874, theorem 2): Shapley's own values where every subset
  is there, an estimate where there is a sample. They add up to the value of all channels less `nothing`.
  """
  count = len(names)
  proper = [s for s in values if 0 < len(s) < count]
  total = np.asarray(values[tuple(names)], np.float64) - nothing
  if count == 1 or not proper:
    return {name: total / count for name in names}
  member = np.array([[name in s for name in names] for s in proper], np.float64)  # [S, C]
  weight = np.array([(count - 1) / (math.comb(count, len(s)) * len(s) * (count - len(s))) for s in proper])
  gain = np.stack([np.asarray(values[s], np.float64) - nothing for s in proper])  # [S, ...]
  # The last channel takes what is left of the total, which frees the others.
  a = member[:, :-1] - member[:, -1:]
  b = gain - member[:, -1].reshape(-1, *[1] * total.ndim) * total
  root = np.sqrt(weight)
  first = np.linalg.lstsq(a * root[:, None], (b.reshape(len(b), -1) * root[:, None]), rcond=None)[0]
  first = first.reshape(count - 1, *total.shape)
  return dict(zip(names, [*first, total - first.sum(axis=0)], strict=True))


def common_rows(task: Task, rows: Sequence[Sequence[str]] = ()) -> tuple[Task, tuple[str, ...], list[str]]:
  """The task with the test rows that have every channel of any test row, those channels, and notes on the others.

  rows: names that each test row has; by default its channels.
  """
  source = task.test.source
  rows = rows or source.table.column('channels').to_pylist()
  names = tuple(dict.fromkeys(name for row in rows for name in row))
  keep = np.array([len(set(row)) == len(names) for row in rows])
  if len(names) < 2:
    raise UserError(f'the test rows have the channel {", ".join(names)} alone: there are no subsets to compare')
  if not keep.any():
    raise UserError(f'no test row has all of the channels {", ".join(names)}: subsets can only be compared on the same '
                    'rows')
  notes = []
  if not keep.all():
    notes.append(f'{np.count_nonzero(~keep)} of {len(keep)} test rows lack some of the channels and are left out')
    part = dataclasses.replace(task.test, source=source.keep(keep), y=task.test.y[keep],
                               subjects=task.test.subjects[keep])
    task = dataclasses.replace(task, test=part)
  return task, names, notes


def chosen_subsets(names: Sequence[str], most: int, rng: np.random.Generator) -> list[tuple[str, ...]]:
  """Subsets in order of size; all, or singles, the whole and a sample that takes turns among the sizes between."""
  count = len(names)
  if 2**count - 1 <= most:
    return [s for k in range(1, count + 1) for s in itertools.combinations(names, k)]
  if most < count + 1:
    raise UserError(f'--subsets {most} is too few: each of {count} channels alone and all together are {count + 1}')
  chosen = {s for k in (1, count) for s in itertools.combinations(range(count), k)}
  sizes = itertools.cycle(range(2, count))
  full: set[int] = set()
  while len(chosen) < most and len(full) < count - 2:
    k = next(sizes)
    if sum(len(s) == k for s in chosen) >= math.comb(count, k):
      full.add(k)
      continue
    fresh = tuple(sorted(rng.choice(count, k, replace=False).tolist()))
    while fresh in chosen:
      fresh = tuple(sorted(rng.choice(count, k, replace=False).tolist()))
    chosen.add(fresh)
  return [tuple(names[i] for i in s) for s in sorted(chosen, key=lambda s: (len(s), s))]


def _summary(outcomes: list[Outcome], names: tuple[str, ...], chance: dict[str, float],
             scores: tuple[str, ...]) -> dict[str, Any]:
  """One method's results, see `ByChannels.run`; subsets of a size are ranked by the first of the metrics."""
  counts, first = [], scores[0]
  for n in range(1, len(names) + 1):
    of = [o for o in outcomes if len(o.subset) == n]
    if not of:
      continue
    mean = {m: float(np.mean([o.intervals[m]['value'] for o in of])) for m in scores}
    drawn = {m: np.mean([o.drawn[m] for o in of], axis=0) for m in scores}
    ranked = sorted(of, key=lambda o: o.intervals[first]['value'])
    counts.append({'channels': n, 'subsets': len(of), 'metrics': plain(metrics.summarised(mean, drawn)),
                   'worst': list(ranked[0].subset), 'best': list(ranked[-1].subset),
                   f'worst_{first}': ranked[0].intervals[first]['value'],
                   f'best_{first}': ranked[-1].intervals[first]['value']})
  shares: dict[str, dict[str, Any]] = {name: {} for name in names}
  for m in scores:
    value = shapley(names, {o.subset: np.asarray(o.intervals[m]['value']) for o in outcomes}, chance[m])
    drawn = shapley(names, {o.subset: o.drawn[m] for o in outcomes}, chance[m])
    for name in names:
      shares[name] |= plain(metrics.summarised({m: float(value[name])}, {m: drawn[name]}))
  subsets = [{'channels': list(o.subset), 'metrics': plain(o.intervals)} for o in outcomes]
  return {'subsets': subsets, 'counts': counts, 'shapley': shares}


def csv_rows(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
  """A row for each encoder, method, subset and metric."""
  out = [['encoder', 'method', 'count', 'channels', 'metric', 'value', 'low', 'high']]
  for encoder, result in results.items():
    for method, found in result['methods'].items():
      for row in found['subsets']:
        for metric, cell in row['metrics'].items():
          numbers = ['' if cell[k] is None else f'{cell[k]:.6g}' for k in ('value', 'low', 'high')]
          out.append([encoder, method, str(len(row['channels'])), '+'.join(row['channels']), metric, *numbers])
  return out


def text_table(results: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str] = metrics.LABELS) -> str:
  """Encoders side by side: the first metric of `labels` against the number of channels, the worst and best subset, the
  contributions."""
  metric = next(iter(labels))
  first = next(iter(results.values()))
  cell = lambda c: f'{c["value"]:.3f}' + ('' if c['low'] is None else f' [{c["low"]:.3f}, {c["high"]:.3f}]')
  lines = []
  for method in first['methods']:
    many = {name: r['methods'][method] for name, r in results.items()}
    table = [['channels', 'subsets', *many]]
    for i, count in enumerate(first['methods'][method]['counts']):
      table.append([str(count['channels']), str(count['subsets']),
                    *(cell(f['counts'][i]['metrics'][metric]) for f in many.values())])
    lines += [f'{method}, {labels[metric]} (mean over subsets)', *aligned(table), '']
    for name, found in many.items():
      worst = min(found['subsets'], key=lambda s: s['metrics'][metric]['value'])
      best = max(found['subsets'], key=lambda s: s['metrics'][metric]['value'])
      told = '; '.join(f'{word} {"+".join(s["channels"])} {s["metrics"][metric]["value"]:.3f}'
                       for word, s in (('worst', worst), ('best', best)))
      lines.append(f'{name}: {told}')
    table = [['contribution', *many]]
    table += [[c, *(cell(f['shapley'][c][metric]) for f in many.values())] for c in first['channels']]
    lines += ['', *aligned(table), '']
  tried = first['subsets']
  lines.append(f'Label {first["label"]!r}, {first["rows"]} test rows, {tried["tried"]} of {tried["of"]} subsets; '
               f'chance {first["chance"][metric]:.3f}. Probes were fitted on training rows with all their channels. A '
               "channel's contribution is its Shapley value.")
  lines += [f'Note: {note}.' for note in dict.fromkeys(n for r in results.values() for n in r['notes'])]
  return '\n'.join(lines)
