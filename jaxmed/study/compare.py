"""Methods side by side: the same model, data, number of samples and seeds for each; one table and one figure."""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed import config as config_lib
from jaxmed import files, objectives
from jaxmed.data.corpus.open import open_source
from jaxmed.errors import UserError, choose
from jaxmed.evaluate.protocols.classify import Classify
from jaxmed.evaluate.protocols.tasks import PIXELS, TRAINED
from jaxmed.evaluate.report import figures
from jaxmed.train import loop
from jaxmed.train.build.rundir import load_encoder
from jaxmed.train.logs import read_rows

# Two-sided 95 % points of Student's t, by degrees of freedom.
_T = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
SCORES = (('knn', 'accuracy'), ('logistic', 'accuracy'), ('logistic', 'auroc'))
CURVES = ('knn', 'ridge')


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a comparison is made of.

  Attributes:
    data: a corpus with splits and a label. methods: names. model, label: as in the config. samples: images that each
      run sees. seeds: runs a method. user: config values for all. own: {method: config values for it}.
  """

  data: str
  methods: tuple[str, ...]
  model: str
  label: str
  samples: int
  seeds: int = 3
  user: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  own: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

  def config(self, method: str, seed: int) -> dict[str, Any]:
    """The config of one run."""
    batch = int(config_lib.given(self.user, 'batch_size') or 64)
    fixed = {'method': method, 'model': self.model, 'seed': seed, 'batch_size': batch, 'data': self.data,
             'steps': max(1, math.ceil(self.samples / batch)), 'loader': {'label': self.label}}
    return config_lib.merge(fixed, self.user, self.own.get(method, {}))


def compare(plan: Plan, out: str | pathlib.Path) -> dict[str, Any]:
  """Trains and evaluates the missing runs, then writes OUT/compare.json, compare.md and compare.png.

  A comparison that was stopped goes on where it was. A run that fails (a loss that is not finite, a collapse that it is
  to stop on) is a row that says so.

  Returns:
    {'rows': [{'method', 'seeds', 'scores': {'knn accuracy': {'value', 'low', 'high'}}, 'untrained': {the same},
    'seconds', 'images_per_second', 'memory_mb', 'failed'}], 'baselines': [...]}; `untrained` is of each run's encoder
    before training, which is as good as its options make it (initial weights, positions, scales, which vector).
    Intervals are Student's t over the seeds, those of baselines by bootstrap.
  Raises:
    UserError: an unknown method, column or config key, or a corpus without test rows of the label.
  """
  out = pathlib.Path(out)
  for method in (*plan.methods, *plan.own):
    choose('method', method, objectives.METHODS)
  for values in (plan.user, *plan.own.values()):
    if 'method' in values:
      raise UserError(f'method={values["method"]} would take the place of a method of --methods '
                      f'{",".join(plan.methods)}: leave it out, or name it there')
  source = open_source(plan.data)
  choose(f'column of {plan.data}', plan.label, source.table.column_names)
  results = [_run(plan, source, method, seed, out / method / str(seed))
             for seed in range(plan.seeds) for method in plan.methods]
  rows = [_row(method, [r for r in results if r['method'] == method]) for method in plan.methods]
  whole = {'model': plan.model, 'data': plan.data, 'label': plan.label, 'samples': plan.samples, 'seeds': plan.seeds,
           'rows': rows, 'baselines': _baselines(plan, source, results, out)}
  files.write_json(out / 'compare.json', whole)
  files.write_text(out / 'compare.md', markdown(whole))
  _draw(plan, results, out)
  return whole


def _run(plan: Plan, source: Any, method: str, seed: int, folder: pathlib.Path) -> dict[str, Any]:
  """One run and its scores; read from its folder when it was finished before."""
  place = folder / 'result.json'
  if place.exists():
    return files.read_json(place)
  print(f'{method}, seed {seed}: {folder}', file=sys.stderr, flush=True)
  result: dict[str, Any] = {'method': method, 'seed': seed, 'run': str(folder)}
  try:
    started = (folder / 'config.json').exists()
    summary = loop.resume(folder, quiet=True) if started else loop.train(plan.config(method, seed), folder, quiet=True)
    encoder = load_encoder(folder)
    result |= {'scores': judged(encoder, source, plan.label, seed),
               'untrained': judged(encoder.untrained(seed), source, plan.label, seed), 'summary': summary}
  except UserError as e:
    if not (folder / 'config.json').exists():
      raise  # a mistake in what was asked for, not a run that went wrong
    result['failed'] = str(e)
    print(f'{method}, seed {seed} failed: {e}', file=sys.stderr, flush=True)
  files.write_json(place, result)
  return result


def judged(encoder: Any, source: Any, label: str, seed: int) -> dict[str, Any]:
  """Scores of a frozen encoder: {'knn accuracy': {'value', 'low', 'high'}, ...}, see SCORES."""
  found = Classify().run(encoder, source, label, feature=encoder.feature, seed=seed, pixels=False, draws=200)
  return _scores(found, TRAINED)


def _scores(evaluation: Mapping[str, Any], features: str) -> dict[str, Any]:
  found = {r['method']: r['metrics'] for r in evaluation['rows'] if r['features'] == features}
  return {f'{probe} {metric}': found[probe][metric] for probe, metric in SCORES}


def _baselines(plan: Plan, source: Any, results: list[dict[str, Any]], out: pathlib.Path) -> list[dict[str, Any]]:
  """Raw pixels, once."""
  good = [r for r in results if 'failed' not in r]
  if not good:
    return []
  place = out / 'baselines.json'
  if not place.exists():
    encoder = load_encoder(good[0]['run'])
    evaluation = Classify().run(encoder, source, plan.label, feature=encoder.feature)
    files.write_json(place, [{'method': PIXELS, 'scores': _scores(evaluation, PIXELS)}])
  return files.read_json(place)


def _row(method: str, results: list[dict[str, Any]]) -> dict[str, Any]:
  """The seeds of a method as one row."""
  good = [r for r in results if 'failed' not in r]
  row: dict[str, Any] = {'method': method, 'seeds': len(good)}
  failed = [r['failed'] for r in results if 'failed' in r]
  if failed:
    row['failed'] = failed
  if not good:
    return row
  middle = lambda key: float(np.median([r['summary'][key] for r in good]))
  row |= {'seconds': middle('seconds'), 'images_per_second': middle('images_per_second'),
          'memory_mb': middle('memory_bytes') / 1e6}
  for which in ('scores', 'untrained'):
    row[which] = {name: interval([r[which][name]['value'] for r in good]) for name in good[0][which]}
  return row


def interval(values: Sequence[float]) -> dict[str, float | None]:
  """Mean with a 95 % interval by Student's t over runs; a single run has none."""
  value, count = float(np.mean(values)), len(values)
  if count < 2:
    return {'value': value, 'low': None, 'high': None}
  half = _T.get(count - 1, 1.96) * float(np.std(values, ddof=1)) / math.sqrt(count)
  return {'value': value, 'low': value - half, 'high': value + half}


def markdown(whole: Mapping[str, Any]) -> str:
  """The comparison as a Markdown table, methods by falling accuracy of the linear probe; untrained in brackets."""
  names = [f'{probe} {metric}' for probe, metric in SCORES]
  key = lambda row: -row['scores']['logistic accuracy']['value'] if 'scores' in row else 1.0
  lines = ['| method | ' + ' | '.join(f'{n} (untrained)' for n in names) + ' | s | images/s | step MB |',
           '|---' * (len(names) + 4) + '|']
  for row in (*sorted(whole['rows'], key=key), *whole['baselines']):
    if 'scores' not in row:
      lines.append(f'| {row["method"]} | failed: {row["failed"][0]} |' + ' |' * (len(names) + 2))
      continue
    before = [f' ({row["untrained"][n]["value"]:.3f})' if 'untrained' in row else '' for n in names]
    cells = [cell(row['scores'][n]) + old for n, old in zip(names, before, strict=True)]
    cost = [f'{row[k]:.0f}' if k in row else '' for k in ('seconds', 'images_per_second', 'memory_mb')]
    lines.append(f'| {row["method"]} | ' + ' | '.join(cells + cost) + ' |')
  return '\n'.join(lines) + '\n'


def cell(score: Mapping[str, Any]) -> str:
  """A score as text, with its interval where there is one."""
  if score['low'] is None:
    return f'{score["value"]:.3f}'
  return f'{score["value"]:.3f} [{score["low"]:.3f}, {score["high"]:.3f}]'


def _draw(plan: Plan, results: list[dict[str, Any]], out: pathlib.Path) -> None:
  """Probes during training against images seen: mean, least and most of the seeds."""
  curves: dict[str, dict[str, list]] = {name: {} for name in CURVES}
  for method in plan.methods:
    runs = [r for r in results if r['method'] == method and 'failed' not in r]
    rows = [read_rows(pathlib.Path(r['run']) / 'metrics.jsonl') for r in runs]
    for name in CURVES:
      batch = plan.config(method, 0)['batch_size']
      points = [{row['step'] * batch: row[name] for row in run if name in row} for run in rows]
      shared = sorted(set.intersection(*map(set, points))) if points else []
      if shared:
        curves[name][method] = [(x, [p[x] for p in points]) for x in shared]
  if any(curves.values()):
    figures.method_curves({k: v for k, v in curves.items() if v}, out / 'compare.png')
