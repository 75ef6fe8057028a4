"""The result of an evaluation as text and as HTML: methods and metrics down, kinds of features across."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxmed.evaluate.metrics import LABELS

NAMES = LABELS | {'macro_f1': 'macro F1', 'ece': 'ECE, 15 bins', 'brier': 'Brier score', 'kappa': 'quadratic kappa',
                  'ap': 'macro AP', 'r2': 'R2', 'mae': 'MAE', 'recall_at_1': 'recall@1', 'map': 'mAP'}
CALIBRATION = ('ece', 'ece_val', 'brier')
LOWER = ('ece', 'ece_val', 'brier', 'mae', 'gap', 'ari_centre', 'image_to_text_mean_rank', 'image_to_text_median_rank',
         'text_to_image_mean_rank', 'text_to_image_median_rank')  # metrics of which the lower one is the better
METHODS = {'knn': 'kNN', 'logistic': 'logistic', 'ridge': 'ridge', 'capi': 'CAPI', 'vjepa': 'V-JEPA'}
_ACROSS = 3  # kinds of features that stand side by side in text; of differences, which have signs, one less


def text_table(result: Mapping[str, Any], labels: Mapping[str, str] = LABELS,
               methods: Mapping[str, str] = METHODS) -> str:
  """The result of a protocol as aligned text: value [95 % interval] for each kind of features, then the paired
  differences, sizes and notes. At most 100 columns wide.

  Args:
    result: what `FeatureProtocol.run` returned. labels, methods: {name: what the table calls it} of its metrics and
      methods.
  """
  kinds, minus = _kinds(result), _minus(result)
  blocks = []
  for some in _groups(kinds, _ACROSS):
    blocks.append([('method', 'metric', *some)] + [
        (methods.get(name, name), labels[metric], *(interval(cell) for cell in cells))
        for name, metric, cells in _rows(result, some, labels)])
  for some in _groups(minus, _ACROSS - 1):
    blocks.append([('method', 'difference', *(f'{short(kinds[0])} - {short(m)}' for m in some))] + [
        (methods.get(name, name), labels[metric], *(interval(cell, sign=True) for cell in cells))
        for name, metric, cells in _differences(result, some, labels)])
  width = [
    max(len(r[i]) for b in blocks for r in b if i < len(r)) for i in range(max(len(b[0]) for b in blocks))
  ]
  lines = []
  for block in blocks:
    lines += [text_row(block[0], width), text_row(['-' * w for w in width[:len(block[0])]], width)]
    lines += [text_row(_once(block, i), width) for i in range(1, len(block))] + ['']
  return '\n'.join(lines + _wrapped(_caption(result, labels))) + '\n'


def csv_rows(result: Mapping[str, Any]) -> list[list[str]]:
  """A row for each score, and for each difference with the name of what is subtracted, under a head."""
  out = [['features', 'minus', 'method', 'metric', 'value', 'low', 'high']]
  for row in (*result['rows'], *result['differences']):
    for metric, cell in row['metrics'].items():
      numbers = ['' if cell[k] is None else f'{cell[k]:.6g}' for k in ('value', 'low', 'high')]
      out.append([row['features'], row.get('minus', ''), row['method'], metric, *numbers])
  return out


def html_table(result: Mapping[str, Any], labels: Mapping[str, str] = LABELS,
               methods: Mapping[str, str] = METHODS) -> str:
  """The same as HTML tables with a caption; the page that holds them brings the style. The best score is bold."""
  kinds, minus = _kinds(result), _minus(result)
  body = []
  for name, metric, cells in _rows(result, kinds, labels):
    values = [c['value'] for c in cells if c and c['value'] is not None]
    best = (min if metric in LOWER else max)(values, default=None)
    body.append(
      [html.escape(methods.get(name, name)), labels[metric]]
      + [_html_interval(c, best=bool(c) and c['value'] == best) for c in cells]
      + [number(result['chance'].get(metric))]
    )
  out = [html_rows(['method', 'metric', *kinds, 'chance'], body)]
  if minus:
    head = ['method', 'difference', *(f'{short(kinds[0])} − {short(m)}' for m in minus)]
    out.append(html_rows(head, [
        [methods.get(name, name), labels[metric]] + [_html_interval(c, sign=True) for c in cells]
        for name, metric, cells in _differences(result, minus, labels)]))
  return '\n'.join(
    out + [f'<p class="note">{html.escape(line)}</p>' for line in _caption(result, {})]
  )


def verdict(result: Mapping[str, Any]) -> str:
  """A sentence for each baseline: where trained features beat it, or lose to it, beyond the 95 % interval."""
  said = [_against(result, minus, name) for minus, name in (
      ('untrained', 'the untrained one'), ('pixels (PCA)', 'raw pixels'))]
  return (
    ' '.join(s for s in said if s) or 'Without baselines or intervals there is no verdict on the training.'
  )


def _against(result: Mapping[str, Any], minus: str, name: str) -> str:
  found = []
  for d in result['differences']:
    for m, cell in d['metrics'].items() if d['minus'] == minus else ():
      if m not in CALIBRATION:
        low, high = cell['low'], cell['high']
        if m in LOWER and low is not None:
          low, high = -high, -low
        found.append((f'{METHODS.get(d["method"], d["method"])} {NAMES.get(m, m)}', low, high))
  found = [f for f in found if f[1] is not None]
  if not found:
    return ''
  better, worse = [f[0] for f in found if f[1] > 0], [f[0] for f in found if f[2] < 0]
  if len(better) == len(found):
    return f'The trained encoder beats {name} on every metric; no interval of a difference holds 0.'
  if len(worse) == len(found):
    return f'The trained encoder is worse than {name} on every metric; no interval of a difference holds 0.'
  text = f'The trained encoder beats {name} beyond the interval on {", ".join(better) or "no metric"}'
  return text + (f', and is worse beyond it on {", ".join(worse)}.' if worse else '.')


def _kinds(result: Mapping[str, Any]) -> list[str]:
  return list(dict.fromkeys(r['features'] for r in result['rows']))


def _minus(result: Mapping[str, Any]) -> list[str]:
  """What is subtracted from the first kind of features."""
  first = result['rows'][0]['features']
  return list(dict.fromkeys(d['minus'] for d in result['differences'] if d['features'] == first))


def _groups(names: Sequence[str], size: int) -> list[list[str]]:
  return [list(names[i:i + size]) for i in range(0, len(names), size)]


def _rows(result: Mapping[str, Any], kinds: list[str], metrics: Iterable[str]):
  cells = {(r['features'], r['method']): r['metrics'] for r in result['rows']}
  metrics = [m for m in metrics if any(m in row for row in cells.values())]  # a result of an earlier version has fewer
  for method in dict.fromkeys(m for _, m in cells):
    for metric in metrics:
      yield method, metric, [cells.get((k, method), {}).get(metric) for k in kinds]


def _differences(result: Mapping[str, Any], minus: list[str], metrics: Iterable[str]):
  first = result['rows'][0]['features']
  cells = {(d['minus'], d['method']): d['metrics'] for d in result['differences'] if d['features'] == first}
  metrics = [m for m in metrics if any(m in row for row in cells.values())]
  for method in dict.fromkeys(m for _, m in cells):
    for metric in metrics:
      yield method, metric, [cells.get((m, method), {}).get(metric) for m in minus]


def short(kind: str) -> str:
  """A kind of features in one word."""
  return kind.split(' ')[0]


def number(value: float | None, sign: bool = False) -> str:
  """A score, n/a where it does not exist."""
  return 'n/a' if value is None else f'{value:+.3f}' if sign else f'{value:.3f}'


def interval(cell: Mapping[str, Any] | None, sign: bool = False) -> str:
  """Value [low, high]."""
  if cell is None:
    return '-'
  if cell['low'] is None:
    return f'{number(cell["value"], sign)} [n/a]'
  return f'{number(cell["value"], sign)} [{number(cell["low"], sign)}, {number(cell["high"], sign)}]'


def _html_interval(cell: dict[str, Any] | None, sign: bool = False, best: bool = False) -> str:
  if cell is None:
    return '–'
  value = number(cell['value'], sign).replace('-', '−')
  spread = 'n/a' if cell['low'] is None else f'{number(cell["low"], sign)}, {number(cell["high"], sign)}'
  value = f'<b>{value}</b>' if best else value
  return f'{value} <span class="interval">[{spread.replace("-", "−")}]</span>'


def html_rows(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
  """A table; cells are HTML."""
  top = ''.join(f'<th scope="col">{html.escape(h)}</th>' for h in head)
  rows = ''.join('<tr>' + ''.join(f'<td>{cell}</td>' for cell in row) + '</tr>' for row in body)
  return f'<table class="results"><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table>'


def _caption(result: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
  """Label, sizes, what the brackets are, chance for these metrics, and the notes."""
  splits, subjects = result['splits'], result['subjects']
  sizes = ', '.join(f'{splits[s]:,} {s} ({subjects[s]:,} subjects)' for s in splits)
  kind = {'number': 'a number', 'labels': f'{len(result["classes"])} labels'}.get(
    result.get('target', ''), f'{len(result["classes"])} classes')
  what = f'{result["texts"]:,} texts' if result.get('target') == 'pairs' else f'Label {result["label"]!r}, {kind}'
  first = f'{what}; rows: {sizes}.'
  second = f'[..] is the 95 % interval by bootstrap over test subjects ({result["draws"]:,} draws).'
  chance = result['chance']
  levels = ', '.join(f'{label} {number(chance[m])}' for m, label in labels.items() if m in chance)
  more = [f'Chance: {levels}.'] if labels else []
  return [first, second, *more, *(f'Note: {n}.' for n in result['notes'])]


def _wrapped(lines: list[str]) -> list[str]:
  import textwrap
  return [part for line in lines for part in textwrap.wrap(line, 100, subsequent_indent='  ')]


def _once(block: list[tuple[str, ...]], i: int) -> tuple[str, ...]:
  """A method's name is printed in its first row only."""
  row = block[i]
  return ('', *row[1:]) if i > 1 and block[i - 1][0] == row[0] else row


def text_row(cells: Iterable[str], width: Sequence[int]) -> str:
  """Cells of a row of a table as text, each as wide as its column."""
  return '  '.join(c.ljust(w) for c, w in zip(cells, width, strict=False)).rstrip()


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
  """Rows as lines of text, each column as wide as its widest cell."""
  width = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
  return [text_row(row, width) for row in table]
