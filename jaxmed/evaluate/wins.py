"""Encoders over several tasks: who wins where beyond the interval, instead of a mean of scores of different kinds."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmed.evaluate import tables

_ACROSS = 2  # pairs that stand side by side in text


def wins(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Each pair of features over all tasks, by the headline metric of each task and each method.

  A comparison is won or lost where the 95 % interval of the paired difference does not hold 0; else, or without an
  interval, it is undecided. For a metric of which the lower one is better the signs are turned.

  Args:
    found: {name of the task: what `FeatureProtocol.run` returned}; results without differences are left out.
  Returns:
    [{'features', 'minus', 'won', 'lost', 'undecided', 'comparisons': [{'task', 'label', 'method', 'metric', 'value',
    'low', 'high', 'won': True, False or None}]}], in the order of the differences.
  """
  pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
  for task, result in found.items():
    for d in result.get('differences', ()):
      metric = result.get('headline') or next(iter(d['metrics']))
      cell = {k: d['metrics'][metric][k] for k in ('value', 'low', 'high')}
      low, high = (cell['low'], cell['high']) if metric not in tables.LOWER else _turned(cell)
      won = None if low is None or high is None or low <= 0 <= high else bool(low > 0)
      pairs.setdefault((d['features'], d['minus']), []).append(
        {'task': task, 'label': result['label'], 'method': d['method'], 'metric': metric, 'won': won} | cell)
  count = lambda some, value: sum(c['won'] is value for c in some)
  return [{'features': a, 'minus': b, 'won': count(some, True), 'lost': count(some, False),
           'undecided': count(some, None), 'comparisons': some} for (a, b), some in pairs.items()]


def text(found: Sequence[Mapping[str, Any]]) -> str:
  """What `wins` returned as aligned text: the counts, then each comparison."""
  head, rows = _counts(found)
  lines = ['Wins over tasks, beyond the 95 % interval of the paired difference', *tables.aligned([head, *rows]), '']
  for i in range(0, len(found), _ACROSS):
    lines += [*tables.aligned(_comparisons(found[i:i + _ACROSS])), '']
  return '\n'.join(lines)


def as_html(found: Sequence[Mapping[str, Any]]) -> str:
  """The same as HTML."""
  head, rows = _counts(found)
  out = [tables.html_rows(head, _escaped(rows))]
  for i in range(0, len(found), _ACROSS):
    first, *others = _comparisons(found[i:i + _ACROSS])
    out.append(tables.html_rows(first, _escaped(others)))
  return '\n'.join(out)


def csv_rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  """A row a comparison, under a head."""
  keys = ('task', 'label', 'method', 'metric', 'value', 'low', 'high', 'won')
  cell = lambda v: '' if v is None else f'{v:.6g}' if isinstance(v, float) else str(v)
  return [['features', 'minus', *keys]] + [[f['features'], f['minus'], *(cell(c[k]) for k in keys)]
                                           for f in found for c in f['comparisons']]


def _turned(cell: Mapping[str, Any]) -> tuple[float | None, float | None]:
  return (None, None) if cell['low'] is None else (-cell['high'], -cell['low'])


def _counts(found: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
  return ['pair', 'won', 'lost', 'undecided'], [
    [_pair(f), str(f['won']), str(f['lost']), str(f['undecided'])] for f in found]


def _comparisons(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  """Tasks, labels and methods down, pairs across; + or - marks what is won or lost."""
  keys = ('task', 'label', 'method', 'metric')
  lines = dict.fromkeys(tuple(c[k] for k in keys) for f in found for c in f['comparisons'])
  cells = [{tuple(c[k] for k in keys): c for c in f['comparisons']} for f in found]
  mark = {True: ' +', False: ' -', None: ''}
  shown = lambda c: '-' if c is None else tables.interval(c, sign=True) + mark[c['won']]
  return [[*keys, *map(_pair, found)]] + [
    [*(line[:2]), tables.METHODS.get(line[2], line[2]), tables.NAMES.get(line[3], line[3]),
     *(shown(c.get(line)) for c in cells)] for line in lines]


def _pair(found: Mapping[str, Any]) -> str:
  return f'{tables.short(found["features"])} - {tables.short(found["minus"])}'


def _escaped(rows: Sequence[Sequence[str]]) -> list[list[str]]:
  return [[html.escape(cell) for cell in row] for row in rows]
