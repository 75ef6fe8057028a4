"""The folder of a study, and one cell of it: trained or gone on with, judged, its result written whole.

  STUDY/plan.json                  every cell: axes, config, parameters, samples, steps, FLOPs
  STUDY/cells/NAME/run/            the run directory
  STUDY/cells/NAME/result.json     what came of it: scores, or the reason why it failed
  STUDY/cells/NAME/JUDGE.json      what a judge said at length
  STUDY/cells/NAME/finetune/       the run of the judge finetune
  STUDY/cells/NAME/log.txt         its output
"""

import dataclasses
import math
import pathlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed import files, owner
from jaxmed.data.corpus.open import open_source
from jaxmed.errors import Stopped, Unavailable, UserError, choose
from jaxmed.evaluate import protocols
from jaxmed.evaluate.protocols.tasks import TRAINED
from jaxmed.evaluate.remembered import Remembered
from jaxmed.study import grid
from jaxmed.study.cost import Ready
from jaxmed.study.grid import LOSS, Judge, Study
from jaxmed.study.tuned import FINETUNE
from jaxmed.train import loop
from jaxmed.train.build.rundir import load_encoder, load_segmenter
from jaxmed.train.logs import read_rows

PLAN, CELLS, RESULT, LOG = 'plan.json', 'cells', 'result.json', 'log.txt'
DONE, FAILED, WAITING = 'done', 'failed', 'waiting'
Judging = Callable[[Mapping[str, Any], Mapping[str, Any], pathlib.Path], Mapping[str, Any]]
MOST_SCORES = 40  # of a protocol whose results are no table


def write_plan(out: str | pathlib.Path, file: str, study: Study, cells: Sequence[Ready], data: str) -> dict[str, Any]:
  """Writes STUDY/plan.json, see `save_plan`."""
  judges = [j if j == LOSS else dataclasses.asdict(j) for j in study.judges]
  return save_plan(out, {'file': file, 'data': data, 'axes': {k: [*v] for k, v in study.axes.items()}, 'judges': judges,
                         'equal': study.equal}, cells)


def save_plan(out: str | pathlib.Path, head: Mapping[str, Any], cells: Sequence[Ready]) -> dict[str, Any]:
  """Writes `head` and the cells to STUDY/plan.json, unless the same is there; returns them.

  Raises:
    UserError: a cell that has begun with another config than it has now.
  """
  out = pathlib.Path(out)
  plan = _plain({**head, 'cells': [dataclasses.asdict(c) for c in cells]})
  old = {c['name']: c for c in read_plan(out)['cells']} if (out / PLAN).exists() else {}
  for cell in plan['cells']:
    before = old.get(cell['name'], cell)
    if before['config'] != cell['config'] and _begun(out, cell['name']):
      key = _differing(before['config'], cell['config'])
      raise UserError(f'cell {cell["name"]} of {out} began with another {key}: choose another --out, or remove '
                      f'{folder(out, cell["name"])}')
  if not (out / PLAN).exists() or files.read_json(out / PLAN) != plan:
    files.write_json(out / PLAN, plan)
  return plan


def _begun(out: pathlib.Path, name: str) -> bool:
  return (folder(out, name) / 'run' / 'config.json').exists() or (folder(out, name) / RESULT).exists()


def _differing(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = '') -> str:
  """The first key whose values differ."""
  for key in sorted({*a, *b}):
    x, y = a.get(key), b.get(key)
    if isinstance(x, Mapping) and isinstance(y, Mapping) and x != y:
      return _differing(x, y, f'{prefix}{key}.')
    if x != y:
      return f'{prefix}{key} ({x!r}, now {y!r})'
  return 'config'


def _plain(value: Any) -> Any:
  """A value as JSON gives it back."""
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, (tuple, list)):
    return [_plain(v) for v in value]
  return value.item() if isinstance(value, np.generic) else value


def read_plan(out: str | pathlib.Path) -> dict[str, Any]:
  """What `write_plan` wrote; a UserError where the folder is no study, or damaged."""
  path = pathlib.Path(out) / PLAN
  if not path.exists():
    raise UserError(f'{out} is no study: it has no {PLAN}')
  plan = files.read_json(path)
  if not isinstance(plan, dict) or not isinstance(plan.get('cells'), list):
    raise UserError(f'{path} is damaged: it has no cells')
  return plan


def folder(out: str | pathlib.Path, name: str) -> pathlib.Path:
  """The folder of a cell."""
  return pathlib.Path(out) / CELLS / name


def result(out: str | pathlib.Path, name: str) -> dict[str, Any] | None:
  """What came of a cell; None while it has not ended."""
  path = folder(out, name) / RESULT
  return files.read_json(path) if path.exists() else None


def fail(out: str | pathlib.Path, name: str, reason: str) -> None:
  """Writes down why a cell failed, where its process could not."""
  files.write_json(folder(out, name) / RESULT, {'status': FAILED, 'reason': ' '.join(reason.split())})


def find(plan: Mapping[str, Any], name: str) -> dict[str, Any]:
  """A cell of a plan; a UserError names the nearest to an unknown one."""
  cells = {c['name']: c for c in plan['cells']}
  return cells[choose('cell', name, cells)]


def run(out: str | pathlib.Path, plan: Mapping[str, Any], name: str, again: bool = False,
        judge: Judging | None = None) -> dict[str, Any]:
  """Trains and judges a cell, or goes on with it; one that is done is left as it is.

  Args:
    again: whether one that failed begins anew. judge: gives more of its result, from the plan, the cell and its
      folder; `judged` by default.
  Returns:
    Its result, {'status': 'done', 'loss', 'scores': {column: value}, 'seconds', ...} or {'status': 'failed', 'reason'}.
  Raises:
    UserError: another process has the cell. Stopped, Unavailable: as of `train.loop`; the same call goes on.
  """
  cell, place = find(plan, name), folder(out, name)
  place.mkdir(parents=True, exist_ok=True)
  with owner.of_folder(place):
    found = result(out, name)
    if found and (found['status'] == DONE or not again):
      return found
    if found:
      _renew(place)
    try:
      found = _trained(cell, place) | {'status': DONE}
      found |= (judge or judged)(plan, cell, place)
      if LOSS in plan['judges'] and found['loss'] is None:
        raise UserError('its held-out loss is not finite')
    except (Stopped, Unavailable):
      raise
    except UserError as e:
      found = {'status': FAILED, 'reason': ' '.join(str(e).split())}
    except Exception as e:
      traceback.print_exc()
      found = {'status': FAILED, 'reason': ' '.join(f'{type(e).__name__}: {e}'.split())[:500]}
    files.write_json(place / RESULT, found)
    return found


def _renew(place: pathlib.Path) -> None:
  """Puts the run of a failed cell aside, as run.1, run.2 ..., and forgets its result."""
  if (place / 'run').exists():
    count = 1 + sum(1 for _ in place.glob('run.*'))
    (place / 'run').rename(place / f'run.{count}')
    for tuned in [p for p in place.glob(f'{FINETUNE}*') if p.is_dir()]:
      tuned.rename(place / f'run.{count}' / tuned.name)
  (place / RESULT).unlink()


def _trained(cell: Mapping[str, Any], place: pathlib.Path) -> dict[str, Any]:
  """Trains, or goes on; the losses are the last of the run's own rows, so that no stop loses them."""
  run = place / 'run'
  if (run / 'config.json').exists():
    summary = loop.resume(run, quiet=True)
  else:
    summary = loop.train(cell['config'], run, quiet=True)
  rows = read_rows(run / 'metrics.jsonl')
  last = lambda key: next((r[key] for r in reversed(rows) if isinstance(r.get(key), float)), None)
  paces = [r['images_per_second'] for r in rows if r.get('images_per_second')]
  pace = float(np.median(paces)) if paces else summary['images_per_second']
  loss = last('val_loss')
  return {'loss': loss if loss is not None and math.isfinite(loss) else None, 'train_loss': last('loss'),
          'skipped': summary['skipped'], 'images_per_second': pace, 'seconds': cell['seen'] / pace,
          'memory_bytes': summary['memory_bytes'], 'scores': {}}


def judged(plan: Mapping[str, Any], cell: Mapping[str, Any], place: pathlib.Path) -> dict[str, Any]:
  """{'scores': {column: value}} by the judges that are protocols; what each said at length is in a file."""
  judges = [Judge(**j) for j in plan['judges'] if j != LOSS]
  if not judges:
    return {}
  source, seed = open_source(plan['data']), int(cell['config'].get('seed', 0))
  encoder = Remembered(load_encoder(place / 'run'))  # judges share what they embed
  untrained = Remembered(encoder.untrained(seed))
  scores: dict[str, float | None] = {}
  for number, judge in enumerate(judges):
    twice = sum(j.task == judge.task for j in judges) > 1
    name = f'{judge.task}.{number}' if twice else judge.task
    protocol = grid.made(judge)
    if judge.task == FINETUNE:
      said = protocol.run(place / 'run', plan['data'], judge.label, seed, place / name)
    elif protocols.judges([protocol]) == protocols.SEGMENTER:
      said = protocol.run(load_segmenter(place / 'run'), source, judge.label, seed=seed)
    else:
      said = protocol.run(encoder, source, judge.label, untrained=untrained, feature=judge.feature or encoder.feature,
                          seed=seed)
    files.write_json(place / f'{name}.json', said)
    prefix = f'{judge.task} {judge.label}' if twice else judge.task
    scores |= {f'{prefix} {key}': value for key, value in scores_of(said).items()}
  return {'scores': scores}


def scores_of(said: Mapping[str, Any]) -> dict[str, float | None]:
  """{'knn accuracy': value} of the trained encoder, from the rows of a protocol; of another result every 'value'."""
  rows = said.get('rows')
  if isinstance(rows, list) and all(isinstance(r, Mapping) and 'metrics' in r and 'method' in r for r in rows):
    return {f'{r["method"]} {metric}': v['value'] if isinstance(v, Mapping) else v
            for r in rows if r.get('features', TRAINED) == TRAINED for metric, v in r['metrics'].items()}
  return dict([*_values(said, ())][:MOST_SCORES])


def _values(value: Any, path: tuple[str, ...]) -> Any:
  """(path, number) of everything that has a 'value'."""
  if isinstance(value, Mapping) and isinstance(value.get('value'), (int, float)):
    yield ' '.join(path), float(value['value'])
  elif isinstance(value, Mapping):
    for key, inner in value.items():
      yield from _values(inner, (*path, str(key)))


def state(out: str | pathlib.Path, cell: Mapping[str, Any]) -> dict[str, Any]:
  """How a cell is: {'status', 'step', 'loss', 'reason'}; 'running' where a living process has it, 'stopped' where none
  has and it has begun."""
  name = cell['name']
  found = result(out, name)
  if found:
    step = cell['steps'] if found['status'] == DONE else _step(out, name)[0]
    return {'status': found['status'], 'step': step, 'loss': found.get('loss'), 'reason': found.get('reason', '')}
  step, loss = _step(out, name)
  running = owner.alive(folder(out, name) / owner.NAME)
  begun = (folder(out, name) / 'run' / 'config.json').exists()
  return {'status': 'running' if running else 'stopped' if begun else WAITING, 'step': step, 'loss': loss, 'reason': ''}


def _step(out: str | pathlib.Path, name: str) -> tuple[int, float | None]:
  """The last step that a run wrote down, and its training loss."""
  rows = [r for r in read_rows(folder(out, name) / 'run' / 'metrics.jsonl') if 'loss' in r]
  return (int(rows[-1]['step']), rows[-1]['loss']) if rows else (0, None)
