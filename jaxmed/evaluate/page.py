"""report.html: what a run directory holds, as one page that needs nothing else to be read."""

import base64
import html
import json
import math
import os
import pathlib
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from jaxmed.errors import UserError
from jaxmed.evaluate import tables, wins
from jaxmed.evaluate.protocols import PROTOCOLS, classify, tasks
from jaxmed.evaluate.report import figures
from jaxmed.files import read_json, read_json_lines, write_text
from jaxmed.models.layers.channel_embed import told

CAPTIONS = {
  'loss': 'Training curves, one point a logged step.',
  'views': 'Augmented views of the first batch, as the model sees them.',
  'reconstructions': 'Fixed images with their masks, and what the model predicts for the masked patches. '
  'Pale blue: masked.',
  'segmentation': 'Fixed images, their masks and what the model predicts; of a volume the slice with most of the '
  'foreground. Pale blue: not annotated.',
  'patch_pca': 'Patch features of fixed images: three principal components as red, green and blue. '
  'Regions of one colour have similar features.',
  'relevance': 'What the feature of an image comes from, patch by patch and channel by channel (attention times its '
  'slope, over all blocks); below a name its mean share.',
  'channel_similarity': 'How alike the embeddings of channels are.',
}
OF_CHANNELS = ('relevance', 'channel_similarity')  # figures that only a ChannelViT has
OF_METHODS = ('segmentation',)  # figures of some methods


def write_report(run_dir: str | os.PathLike) -> pathlib.Path:
  """Writes `run_dir`/report.html from what the directory holds, and returns its path.

  Read are config.json, data.json, metrics.jsonl, times.json, evaluation.json, evaluation.TASK.json and figures/*.png.
  What is missing or
  damaged is named on the page. figures/loss.png is drawn (again) if metrics.jsonl is newer. The page holds
  its figures and its style, and no script.

  Raises:
    UserError: the directory does not exist, or the page cannot be written.
  """
  place = pathlib.Path(run_dir)
  if not place.is_dir():
    raise UserError(f'{place} is not a directory; expected the directory of a run')
  missing: list[str] = []
  config = _read(place / 'config.json', missing, 'the configuration')
  data = _read(place / 'data.json', missing, 'the summary of the data')
  result = _read(place / 'evaluation.json', missing, 'the evaluation')
  hashed = _read(place / 'channels.json', missing, 'hashed channels') if (place / 'channels.json').exists() else {}
  times = _read(place / 'times.json', missing, 'times') if (place / 'times.json').exists() else {}
  rows, damaged = read_metrics(place / 'metrics.jsonl')
  if not rows:
    missing.append('metrics.jsonl (the training curve)')
  if damaged:
    missing.append(f'{damaged} damaged {"line" if damaged == 1 else "lines"} of metrics.jsonl, skipped '
                   '(a run that was killed leaves a half-written line)')
  _draw_loss(place, rows)
  try:
    evaluation = (
      _evaluation(result) if result else _absent('There is no evaluation.json: nothing was evaluated yet.')
    )
    head = _header(place, config, result) + _tiles(config, rows, result)
  except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
    evaluation = _absent(f'evaluation.json is not the result of an evaluation ({type(e).__name__}: {e}).')
    head = _header(place, config, {}) + _tiles(config, rows, {})
  sections = [
    ('Evaluation', evaluation + _pictures(place, 'classify', missing)),
    *_other_tasks(place, missing),
    *_wins(place, missing),
    ('Figures', _figures(place, missing)),
    *([('Channel embeddings', f'<p>{html.escape(told(hashed["features"], hashed["width"]))}</p>')] if hashed else []),
    *([('Seconds besides the steps', _tree(times))] if times else []),
    ('Data', _tree(data) if data else _absent('There is no data.json: the corpus is not described.')),
    (
      'Configuration',
      _config(config) if config else _absent('There is no config.json: the settings are unknown.'),
    ),
  ]
  body = [head, _missing(missing)]
  body += [f'<section><h2>{title}</h2>{content}</section>' for title, content in sections]
  path = place / 'report.html'
  title = html.escape(f'{_method(config)} · {place.resolve().name}')
  write_text(path, _PAGE.format(title=title, style=_STYLE, body='\n'.join(body)))
  return path


def read_metrics(path: str | os.PathLike) -> tuple[list[dict[str, Any]], int]:
  """Rows of a metrics.jsonl in order of step, and the number of damaged lines, which are skipped.

  Lines of the same step are merged, the later one winning: a resumed run repeats steps. A missing file has
  no rows.
  """
  found, damaged = read_json_lines(path)
  by_step: dict[float, dict[str, Any]] = {}
  for row in found:
    step = row.get('step') if isinstance(row, dict) else None
    if isinstance(row, dict) and isinstance(step, (int, float)) and math.isfinite(step):
      by_step.setdefault(step, {}).update(row)
    else:
      damaged += 1
  return [by_step[s] for s in sorted(by_step)], damaged


def _read(path: pathlib.Path, missing: list[str], what: str) -> dict[str, Any]:
  if not path.exists():
    missing.append(f'{path.name} ({what})')
    return {}
  try:
    value = read_json(path)
  except UserError:
    value = None
  if not isinstance(value, dict):
    missing.append(f'{path.name} ({what}) is damaged: not a JSON object')
    return {}
  return value


def _draw_loss(place: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  picture, source = place / 'figures' / 'loss.png', place / 'metrics.jsonl'
  fresh = picture.exists() and picture.stat().st_mtime >= (source.stat().st_mtime if rows else 0)
  if rows and not fresh and any(k != 'step' for r in rows for k in r):
    try:
      figures.loss_curves(rows, picture)
    except UserError:
      return  # rows without numbers: nothing to draw, and _figures says that the picture is missing


def _header(place: pathlib.Path, config: Mapping[str, Any], result: Mapping[str, Any]) -> str:
  said = tables.verdict(dict(result)) if result else 'Not evaluated yet.'
  return (
    f'<header><p class="eyebrow">jaxmed run</p><h1>{html.escape(_method(config))}</h1>'
    f'<p class="path">{html.escape(place.resolve().name)}</p>'
    f'<p class="verdict">{html.escape(said)}</p></header>'
  )


def _method(config: Mapping[str, Any]) -> str:
  parts = [_name(find(config, key)) for key in ('method', 'model')]
  return ' · '.join(p for p in parts if p) or 'Run of unknown configuration'


def _name(value: Any) -> str:
  if isinstance(value, Mapping):
    value = value.get('name', '')
  return '' if value is None else str(value)


def find(config: Mapping[str, Any], key: str) -> Any:
  """The value of `key`, the outermost one if several levels of a nested config have it; None if none has."""
  level: list[Mapping[str, Any]] = [config]
  while level:
    for part in level:
      if key in part:
        return part[key]
    level = [v for part in level for v in part.values() if isinstance(v, Mapping)]
  return None


def _tiles(config: Mapping[str, Any], rows: list[dict[str, Any]], result: Mapping[str, Any]) -> str:
  step, planned, batch = (
    (int(rows[-1]['step']) if rows else None),
    find(config, 'steps'),
    find(config, 'batch_size'),
  )
  seen = next((r['images_seen'] for r in reversed(rows) if _is_number(r.get('images_seen'))), None)
  if seen is None and step is not None and _is_number(batch):
    seen = step * batch
  speed = [r['images_per_second'] for r in rows if _is_number(r.get('images_per_second'))]
  loss = [r['loss'] for r in rows if _is_number(r.get('loss'))]
  tiles = [
    ('Method', _name(find(config, 'method')), ''),
    ('Model', _name(find(config, 'model')), ''),
    ('Steps', _count(step), f'of {_count(planned)}' if _is_number(planned) and planned != step else ''),
    ('Images seen', _count(seen), ''),
    ('Images / s', _count(statistics.median(speed)) if speed else '', 'median' if speed else ''),
    ('Last loss', f'{loss[-1]:.4g}' if loss else '', f'first {loss[0]:.4g}' if loss else ''),
  ]
  tiles += _score_tiles(result)
  return '<div class="tiles">' + ''.join(
      f'<div class="tile"><div class="label">{html.escape(label)}</div>'
      f'<div class="value{" long" if len(value) > 14 else ""}">{html.escape(value) or "–"}</div>'
      f'<div class="small">{html.escape(small)}</div></div>' for label, value, small in tiles) + '</div>'


def _score_tiles(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
  """The best probe's headline metric, and how far that probe is above its untrained baseline."""
  best = classify.best_row(dict(result)) if result else None
  if not best:
    return [('Best metric', '', 'not evaluated'), ('Trained − untrained', '', 'not evaluated')]
  metric, name = result.get('headline', 'balanced_accuracy'), tables.METHODS.get(best['method'], best['method'])
  tiles = [(f'Best {tables.NAMES[metric]}', *_cell(best['metrics'][metric], '.3f', name))]
  pair = [d for d in result['differences'] if d['minus'] == tasks.UNTRAINED and d['method'] == best['method']]
  cell = pair[0]['metrics'][metric] if pair else dict(value=None, low=None, high=None)
  return [*tiles, ('Trained − untrained', *_cell(cell, '+.3f', name if pair else 'no untrained encoder'))]


def _cell(cell: Mapping[str, Any], form: str, name: str) -> tuple[str, str]:
  value = 'n/a' if cell['value'] is None else format(cell['value'], form)
  spread = '' if cell['low'] is None else f' [{cell["low"]:{form}}, {cell["high"]:{form}}]'
  return value.replace('-', '−'), name + spread.replace('-', '−')


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> str:
  if not _is_number(value):
    return ''
  return f'{value:,.0f}' if abs(value) >= 100 or float(value).is_integer() else f'{value:.3g}'


def _missing(missing: list[str]) -> str:
  if not missing:
    return ''
  items = ''.join(f'<li>{html.escape(m)}</li>' for m in missing)
  return f'<section class="missing"><h2>Missing or damaged</h2><ul>{items}</ul></section>'


def _absent(text: str) -> str:
  return f'<p class="absent">{html.escape(text)}</p>'


def _evaluation(result: Mapping[str, Any]) -> str:
  return (f'<p>Frozen features ({html.escape(str(result["feature"]))}), probed for '
          f'<b>{html.escape(str(result["label"]))}</b>, on the same rows as the baselines.</p>'
          + _told(PROTOCOLS['classify'], result))


def _other_tasks(place: pathlib.Path, missing: list[str]) -> list[tuple[str, str]]:
  """A section for each evaluation.TASK.json and evaluation.TASK.LABEL.json."""
  out = []
  for path in sorted(place.glob('evaluation.*.json')):
    key = path.name.removeprefix('evaluation.').removesuffix('.json')
    protocol = PROTOCOLS.get(key.partition('.')[0])
    result = _read(path, missing, 'an evaluation') if protocol else {}
    if not result:
      continue
    try:
      text = _told(protocol, result)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
      text = _absent(f'{path.name} is not the result of an evaluation ({type(e).__name__}: {e}).')
    out.append((f'Evaluation: {html.escape(key)}', text + _pictures(place, key, missing)))
  return out


def _wins(place: pathlib.Path, missing: list[str]) -> list[tuple[str, str]]:
  """A section for evaluation.wins.json."""
  path = place / 'evaluation.wins.json'
  found = _read(path, missing, 'wins over tasks') if path.exists() else {}
  try:
    return [('Wins over tasks', f'<div class="scroll">{wins.as_html(found["wins"])}</div>')] if found else []
  except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
    return [('Wins over tasks', _absent(f'{path.name} is not a table of wins ({type(e).__name__}: {e}).'))]


def _told(protocol: Any, result: Mapping[str, Any]) -> str:
  """A result as its protocol tells it."""
  told = protocol.html(result) if hasattr(protocol, 'html') else f'<pre>{html.escape(protocol.tables(result))}</pre>'
  return f'<div class="scroll">{told}</div>'


def _pictures(place: pathlib.Path, key: str, missing: list[str]) -> str:
  """The drawings of a task, figures/evaluation.KEY.NAME.png."""
  found = sorted((place / 'figures').glob(f'evaluation.{key}.*.png'))
  names = [p.name.removeprefix(f'evaluation.{key}.').removesuffix('.png') for p in found]
  return '\n'.join(_figure(path, name.replace('_', ' '), missing) for path, name in zip(found, names, strict=True)
                   if '.' not in name)  # else it is of KEY.LABEL


def _figure(path: pathlib.Path, caption: str, missing: list[str]) -> str:
  content = path.read_bytes()
  if not content.startswith(b'\x89PNG\r\n\x1a\n'):
    missing.append(f'figures/{path.name} is damaged: not a PNG')
    return ''
  data, caption = base64.b64encode(content).decode(), html.escape(caption)
  return (f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
          f'<figcaption>{caption}</figcaption></figure>')


def _figures(place: pathlib.Path, missing: list[str]) -> str:
  found = {p.stem: p for p in sorted((place / 'figures').glob('*.png'))
           if not p.name.startswith(('.', 'evaluation.'))}
  lacking = [k for k in CAPTIONS if k not in found and k not in (*OF_CHANNELS, *OF_METHODS)]
  out = []
  for name in [*(k for k in CAPTIONS if k in found), *(k for k in found if k not in CAPTIONS)]:
    out.append(_figure(found[name], CAPTIONS.get(name, name.replace('_', ' ')), missing))
  if lacking:
    out.append(_absent('Not drawn for this run: ' + ', '.join(f'figures/{k}.png' for k in lacking) + '.'))
  return '\n'.join(out)


def _config(config: Mapping[str, Any]) -> str:
  flat = list(_flat(config))
  rows = ''.join(f'<tr><td><code>{html.escape(k)}</code></td><td>{_value(v)}</td></tr>' for k, v in flat)
  return (f'<details><summary>{len(flat)} settings, as resolved</summary>'
          f'<div class="scroll"><table class="pairs">{rows}</table></div></details>')


def _flat(config: Mapping[str, Any], prefix: str = '') -> Iterable[tuple[str, Any]]:
  for key, value in config.items():
    if isinstance(value, Mapping) and value:
      yield from _flat(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _tree(value: Mapping[str, Any]) -> str:
  """A nested dict: plain values as pairs, dicts of like dicts as one table, the rest under headings."""
  value = {k: _named(v) for k, v in value.items()}
  plain = {k: v for k, v in value.items() if not isinstance(v, Mapping)}
  out = []
  if plain:
    rows = ''.join(
      f'<tr><td>{html.escape(_title(k))}</td><td>{_value(v)}</td></tr>' for k, v in plain.items()
    )
    out.append(f'<div class="scroll"><table class="pairs">{rows}</table></div>')
  for key, part in value.items():
    if isinstance(part, Mapping):
      inside = _matrix(part) or _tree(part) or _absent('empty')
      out.append(f'<h3>{html.escape(_title(key))}</h3>{inside}')
  return '\n'.join(out)


def _named(value: Any) -> Any:
  """A list of dicts as a dict of them, by their names where they have any; anything else as it is."""
  if not (isinstance(value, (list, tuple)) and value and all(isinstance(v, Mapping) for v in value)):
    return value
  keys = [str(v.get('name', i + 1)) for i, v in enumerate(value)]
  keys = keys if len(set(keys)) == len(keys) else [str(i + 1) for i in range(len(keys))]
  return {k: {n: x for n, x in v.items() if n != 'name' or x != k} for k, v in zip(keys, value, strict=True)}


def _matrix(part: Mapping[str, Any]) -> str:
  """A dict of dicts of plain values as a table with a line for each outer key; '' if it is not one."""
  lines = list(part.values())
  if not lines or not all(isinstance(v, Mapping) and v for v in lines):
    return ''
  keys = list(dict.fromkeys(k for v in lines for k in v))
  if any(isinstance(x, Mapping) for v in lines for x in v.values()) or len(keys) > 8:
    return ''
  head = '<th></th>' + ''.join(f'<th scope="col">{html.escape(_title(k))}</th>' for k in keys)
  body = ''.join(
    f'<tr><td>{html.escape(str(name))}</td>'
    + ''.join(f'<td>{_value(v.get(k, ""))}</td>' for k in keys)
    + '</tr>'
    for name, v in part.items()
  )
  return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _title(key: Any) -> str:
  return str(key).replace('_', ' ')


def _value(value: Any) -> str:
  if isinstance(value, bool) or value is None:
    text = {True: 'yes', False: 'no', None: 'none'}[value]
  elif isinstance(value, float):
    text = f'{value:.6g}'
  elif isinstance(value, (list, tuple)):
    shown = [_value(v) for v in value[:40]]
    return ', '.join(shown) + (f', … ({len(value):,} in all)' if len(value) > 40 else '') or '[]'
  elif isinstance(value, Mapping):
    text = json.dumps(value)
  else:
    text = f'{value:,}' if isinstance(value, int) and abs(value) >= 10000 else str(value)
  return html.escape(text)


_PAGE = '''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
'''

_STYLE = """
:root { --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --quiet: #5b6570; --line: #dfe3e8;
  --accent: #0b5cad; --warn: #fff6e0; --warn-line: #e0b95a; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --card: #1d2125; --ink: #e8eaed; --quiet: #a0a9b3; --line: #343a41;
    --accent: #7ab8f5; --warn: #2e2818; --warn-line: #8a7233; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
header { margin-bottom: 20px; }
.eyebrow { margin: 0; color: var(--accent); font-size: 12px; font-weight: 600; letter-spacing: .08em;
  text-transform: uppercase; }
h1 { margin: 2px 0 0; font-size: 30px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 19px; }
h3 { margin: 20px 0 8px; font-size: 15px; }
.path { margin: 2px 0 8px; color: var(--quiet); overflow-wrap: anywhere; }
.verdict { margin: 0; font-size: 16px; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin-bottom: 20px; }
@media (max-width: 760px) { .tiles { grid-template-columns: repeat(2, 1fr); } }
.tile, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 14px; }
.tile .label, .tile .small { color: var(--quiet); font-size: 12px; }
.tile .value { font-size: 22px; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.tile .value.long { font-size: 16px; line-height: 1.8; }
section { padding: 20px 22px; margin-bottom: 20px; }
section.missing { background: var(--warn); border-color: var(--warn-line); }
.missing ul { margin: 0; padding-left: 20px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-bottom: 10px; }
table.results, section > .scroll > table:not(.pairs) { width: 100%; }
th, td { padding: 6px 14px 6px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-size: 13px; font-weight: 600; }
.results td { white-space: nowrap; }
.pairs td:first-child { color: var(--quiet); white-space: nowrap; padding-right: 24px; }
.pairs td { overflow-wrap: anywhere; }
.interval, .note { color: var(--quiet); font-size: 13px; }
.note { margin: 4px 0; }
.absent { color: var(--quiet); font-style: italic; margin: 8px 0; }
figure { margin: 0 0 24px; }
figure img { display: block; max-width: 100%; height: auto; background: #ffffff;
  border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
figcaption { margin-top: 6px; color: var(--quiet); font-size: 13px; }
summary { cursor: pointer; color: var(--accent); }
details table { margin-top: 12px; }
code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media print { body { background: none; } section, .tile { break-inside: avoid; } }
"""
