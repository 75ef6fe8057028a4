"""What a transfer benchmark found: the rate of each arm by validation, scores on test, wins by modality and size.

  OUT/cells/NAME/result.json           with the best metric on split val
  OUT/cells/NAME/test.CORPUS.json      answers on the test records of a corpus, of cells whose rate was chosen
  OUT/transfer.json, table.csv, transfer.md
"""

import pathlib
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed import files
from jaxmed.data.corpus.labels import labels_of
from jaxmed.data.corpus.open import open_source
from jaxmed.errors import Stopped, Unavailable, UserError
from jaxmed.evaluate import metrics, tables, wins
from jaxmed.evaluate.protocols.segment import Segment
from jaxmed.evaluate.protocols.tasks import plain, subjects_of
from jaxmed.study import cells as cells_lib
from jaxmed.study.cells import DONE, FAILED, WAITING
from jaxmed.study.compare import cell as shown
from jaxmed.study.table import counted
from jaxmed.train import finetune
from jaxmed.train.build.rundir import load_segmenter
from jaxmed.train.logs import read_rows

HEADLINE = {'segment': 'dice', 'classify': 'balanced_accuracy', 'regress': 'mae'}
DRAWS = 1000
KINDS = ('all', 'modality', 'size')  # what wins are counted by
COLUMNS = ('corpus', 'modality', 'task', 'train_subjects', 'train_records', 'test_subjects', 'fraction', 'arm', 'rate',
           'runs', 'val', 'metric', 'value', 'low', 'high', 'minus', 'difference', 'difference_low', 'difference_high',
           'won', 'status', 'reason')


def validated(plan: Mapping[str, Any], cell: Mapping[str, Any], place: pathlib.Path) -> dict[str, Any]:
  """{'scores': {metric: value}}: the best value on split val that a cell's run wrote down, whose checkpoint it kept.

  Raises:
    UserError: there is no finite one.
  """
  metric, mode = finetune.BEST[_corpora(plan)[cell['axes']['on'][0]]['task']]
  found = [r[metric] for r in read_rows(place / 'run' / 'metrics.jsonl') if isinstance(r.get(metric), (int, float))]
  found = [v for v in found if np.isfinite(v)]
  if not found:
    raise UserError(f'its run has no finite {metric} on split val')
  return {'scores': {metric: (max if mode == 'max' else min)(found)}}


def chosen(plan: Mapping[str, Any], results: Mapping[str, Mapping[str, Any] | None]) -> list[dict[str, Any]]:
  """The rate of each arm, by the mean over seeds of the metric on split val; nothing of split test is looked at.

  A rate counts where all its seeds are done. Of equal ones the first of the file is taken.

  Args:
    results: {cell: what `cells.result` gives}.
  Returns:
    [{'arm', 'on', 'fraction', 'status', 'reason', 'rate', 'val', 'rates': {rate: val, None where it failed}, 'cells'
    of the chosen rate}]; while a cell is waiting, no rate is chosen.
  """
  groups: dict[tuple, list[Mapping[str, Any]]] = {}
  for cell in plan['cells']:
    axes = cell['axes']
    groups.setdefault((axes['arm'], tuple(axes['on']), axes['fraction']), []).append(cell)
  return [_chosen(plan, key, group, results) for key, group in groups.items()]


def _chosen(plan: Mapping[str, Any], key: tuple, group: Sequence[Mapping[str, Any]],
            results: Mapping[str, Any]) -> dict[str, Any]:
  metric, mode = finetune.BEST[_corpora(plan)[key[1][0]]['task']]
  failed = {c['name']: results[c['name']]['reason'] for c in group
            if results[c['name']] and results[c['name']]['status'] == FAILED}
  out: dict[str, Any] = {'arm': key[0], 'on': [*key[1]], 'fraction': key[2], 'rate': None, 'val': None, 'cells': []}
  out |= {'failed': failed, 'reason': '; '.join(f'cell {n} failed: {why}' for n, why in failed.items())}
  if any(results[c['name']] is None for c in group):
    return out | {'status': WAITING, 'rates': {}}
  by_rate: dict[float, list[Mapping[str, Any]]] = {}
  for cell in group:
    by_rate.setdefault(float(cell['config']['learning_rate']), []).append(cell)
  val = {rate: None if any(c['name'] in failed for c in some) else
         float(np.mean([results[c['name']]['scores'][metric] for c in some])) for rate, some in by_rate.items()}
  whole = {rate: v for rate, v in val.items() if v is not None}
  if not whole:
    return out | {'status': FAILED, 'rates': val}
  best = (max if mode == 'max' else min)(whole, key=lambda rate: whole[rate])
  names = [c['name'] for c in by_rate[best]]
  return out | {'status': DONE, 'rates': val, 'rate': best, 'val': whole[best], 'cells': names}


def _corpora(plan: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  return {c['name']: c for c in plan['corpora']}


def _results(out: str | pathlib.Path, plan: Mapping[str, Any]) -> dict[str, Any]:
  return {c['name']: cells_lib.result(out, c['name']) for c in plan['cells']}


def judged_on(plan: Mapping[str, Any], arm: str, on: Sequence[str]) -> list[str]:
  """The corpora whose test records an arm is judged on."""
  return [*_corpora(plan)] if next(a for a in plan['arms'] if a['name'] == arm)['train'] else [*on]


def pending(out: str | pathlib.Path, plan: Mapping[str, Any], again: bool = False) -> list[tuple[str, str]]:
  """(cell, corpus) of chosen cells that are not judged yet; with `again` those too whose judging failed."""
  return [(name, corpus) for pick in chosen(plan, _results(out, plan)) for name in pick['cells']
          for corpus in judged_on(plan, pick['arm'], pick['on'])
          if (said := _said(out, name, corpus)) is None or (again and 'failed' in said)]


def _place(out: str | pathlib.Path, name: str, corpus: str) -> pathlib.Path:
  return cells_lib.folder(out, name) / f'test.{corpus}.json'


def _said(out: str | pathlib.Path, name: str, corpus: str) -> dict[str, Any] | None:
  path = _place(out, name, corpus)
  return files.read_json(path) if path.exists() else None


def settle(out: str | pathlib.Path, plan: Mapping[str, Any], again: bool = False) -> None:
  """Judges what is `pending` on test records. A judgement that fails is written down with its reason."""
  for name, corpus in pending(out, plan, again):
    try:
      said = tested(cells_lib.folder(out, name) / 'run', _corpora(plan)[corpus])
    except (Stopped, Unavailable):
      raise
    except Exception as e:
      if not isinstance(e, UserError):
        traceback.print_exc()
      said = {'failed': ' '.join(f'judging cell {name} on {corpus}: {e}'.split())[:500]}
    files.write_json(_place(out, name, corpus), said)


def tested(run: pathlib.Path, corpus: Mapping[str, Any]) -> dict[str, Any]:
  """What the best checkpoint of a run says of the test records of a corpus.

  Of masks the Dice of whole images on their own grids, {'ids', 'subjects', 'classes', 'dice': [N][K], None where a case
  says nothing}, of the classes but the background that the corpus has; else {'ids', 'subjects', 'answers', 'truth'}.
  """
  if corpus['task'] != 'segment':
    _, answers, truth, rows = finetune.answered(run)
    return {'ids': [*map(str, rows.table['id'].to_pylist())], 'subjects': subjects_of(rows).tolist(),
            'answers': answers.tolist(), 'truth': truth.tolist()}
  source = open_source(corpus['data'])
  found = Segment(surface='none').run(load_segmenter(run, 'best'), source, draws=1)
  known = labels_of(source).values
  kept = [i for i, c in enumerate(found['classes']) if c['value'] in known]
  cases = found['rows'][0]['cases']
  return {'ids': [c['id'] for c in cases], 'subjects': [c['subject'] for c in cases],
          'classes': [found['classes'][i]['name'] for i in kept],
          'dice': [[c['classes'][i]['dice'] for i in kept] for c in cases]}


def scored(task: str, runs: Sequence[Mapping[str, Any]], draws: int = DRAWS,
           seed: int = 0) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """({metric: mean over runs}, {metric: [draws] on resampled runs and subjects}) of what `tested` gave of some seeds.

  A resample draws subjects, the same ones for all runs and arms, and runs, as `metrics.difference_over_runs` does.
  """
  found = [_scored(task, said, draws, seed) for said in runs]
  value = {m: float(np.mean([v[m] for v, _ in found])) for m in found[0][0]}
  drawn = {m: np.stack([d[m] for _, d in found], axis=1) for m in found[0][1]}  # [draws, runs]
  of_runs = next(metrics.resamples(len(runs), draws, seed + 1)) / len(runs)
  return value, {m: (d * of_runs[:len(d)]).sum(axis=1) for m, d in drawn.items()}


def _scored(task: str, said: Mapping[str, Any], draws: int,
            seed: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  subjects = np.array(said['subjects'])
  if task == 'segment':
    return finetune.dice_of(np.array(said['dice'], np.float64), subjects, draws, seed)
  kind = 'number' if task == 'regress' else 'label'
  return finetune.scored(kind, np.array(said['answers']), np.array(said['truth']), subjects, draws, seed)


def report(out: str | pathlib.Path, draws: int = DRAWS) -> dict[str, Any]:
  """{'rows': [one for each corpus, fraction and arm, see COLUMNS], 'wins': [see `tally`], 'against', 'cells'}."""
  plan = cells_lib.read_plan(out)
  results, names = _results(out, plan), [a['name'] for a in plan['arms']]
  picks = {(p['arm'], p['fraction'], corpus): p for p in chosen(plan, results)
           for corpus in judged_on(plan, p['arm'], p['on'])}
  rows, compared = [], {}
  for fraction in plan['fractions']:
    found = {}
    for corpus in plan['corpora']:
      some, differences = _of_corpus(out, plan, corpus, {n: picks[n, fraction, corpus['name']] for n in names}, draws)
      rows += some
      found[corpus['name']] = {'label': corpus['label'], 'headline': HEADLINE[corpus['task']],
                                'differences': differences}
    compared[fraction] = wins.wins(found)
  for row in rows:
    row['won'] = next((c['won'] for w in compared[row['fraction']] for c in w['comparisons']
                       if (w['features'], c['task']) == (row['arm'], row['corpus'])), None)
  counts = [{'fraction': fraction, **line} for fraction, some in compared.items() for w in some
            for line in tally(w, plan['corpora'], plan['sizes'], draws)]
  states = [{'status': (results[c['name']] or {}).get('status', WAITING)} for c in plan['cells']]
  return {'file': plan['file'], 'against': plan['against'], 'seeds': plan['seeds'], 'rows': rows, 'wins': counts,
          'cells': counted(states)}


def _of_corpus(out: str | pathlib.Path, plan: Mapping[str, Any], corpus: Mapping[str, Any],
               picks: Mapping[str, Mapping[str, Any]], draws: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """The rows of a corpus at one fraction, and the differences from the arm that is compared with."""
  task, metric = corpus['task'], HEADLINE[corpus['task']]
  said = {arm: [_said(out, name, corpus['name']) for name in pick['cells']] for arm, pick in picks.items()}
  broken = {arm: s['failed'] for arm, some in said.items() for s in some if s and 'failed' in s}
  judged = {arm: [s for s in some if s] for arm, some in said.items() if some and all(some) and arm not in broken}
  _check_records(corpus['name'], judged)
  whole = {arm: scored(task, some, draws) for arm, some in judged.items()}
  rows, differences, base = [], [], plan['against']
  for arm, pick in picks.items():
    row = dict.fromkeys(COLUMNS) | {
        'corpus': corpus['name'], 'modality': corpus['modality'], 'task': task, 'train_subjects': corpus['subjects'],
        'train_records': corpus['records'], 'test_subjects': corpus['test_subjects'], 'arm': arm, 'metric': metric,
        'runs': len(pick['cells']), 'reason': broken.get(arm, pick['reason'])}
    row |= {k: pick[k] for k in ('fraction', 'rate', 'val', 'status')} | {'rates': _texts(pick['rates'])}
    if arm in whole:
      row |= plain(metrics.summarised(*whole[arm]))[metric]
    elif pick['status'] == DONE:
      row['status'] = FAILED if arm in broken else WAITING
    if arm in whole and base in whole and arm != base:
      found = plain(metrics.difference(*whole[arm], *whole[base]))
      row |= {'minus': base, 'difference': found[metric]['value'], 'difference_low': found[metric]['low'],
              'difference_high': found[metric]['high']}
      differences.append({'features': arm, 'minus': base, 'method': task, 'metrics': found})
    rows.append(row)
  return rows, differences


def _texts(rates: Mapping[float, Any]) -> dict[str, Any]:
  return {f'{rate:g}': value for rate, value in rates.items()}


def _check_records(corpus: str, said: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
  """A UserError where arms were judged on other records: the corpus changed in between."""
  found = {(*s['ids'],) for some in said.values() for s in some}
  if len(found) > 1:
    raise UserError(f'corpus {corpus}: its test records changed between the cells: choose another --out')


def tally(found: Mapping[str, Any], corpora: Sequence[Mapping[str, Any]], sizes: Sequence[int],
          draws: int = DRAWS) -> list[dict[str, Any]]:
  """Wins of an arm in total, by modality and by size of the training set.

  Args:
    found: of one pair, see `evaluate.wins.wins`. corpora: with 'name', 'modality', 'subjects'. sizes: borders.
  Returns:
    [{'arm', 'minus', 'by', 'group', 'corpora', 'won', 'tied', 'lost' beyond the paired interval, 'higher': corpora on
    which the value is better at all, 'share': {'value', 'low', 'high'} of wins, ties as halves, with a 95 % bootstrap
    over corpora}].
  """
  known = {c['name']: c for c in corpora}
  groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
  for one in found['comparisons']:
    corpus = known[one['task']]
    for key in zip(KINDS, ('', corpus['modality'] or 'not said', size_of(corpus['subjects'], sizes))):
      groups.setdefault(key, []).append(one)
  out = []
  for by, group in sorted(groups, key=lambda key: (KINDS.index(key[0]), _order(key, known, sizes))):
    some = groups[by, group]
    points = np.array([[0.5 if c['won'] is None else float(c['won'])] for c in some])
    drawn = metrics.resampled_means(points, [c['task'] for c in some], draws=draws)[:, 0]
    share = metrics.summarised({'share': float(points.mean())}, {'share': drawn})
    better = [(c['value'] or 0) * (-1 if c['metric'] in tables.LOWER else 1) > 0 for c in some]
    out.append({'arm': found['features'], 'minus': found['minus'], 'by': by, 'group': group, 'corpora': len(some),
                'won': sum(c['won'] is True for c in some), 'tied': sum(c['won'] is None for c in some),
                'lost': sum(c['won'] is False for c in some), 'higher': sum(better), **plain(share)})
  return out


def _order(key: tuple[str, str], corpora: Mapping[str, Mapping[str, Any]], sizes: Sequence[int]) -> Any:
  """Sizes rise, modalities are in the order of their names."""
  if key[0] != 'size':
    return (0, key[1])
  return (min(c['subjects'] for c in corpora.values() if size_of(c['subjects'], sizes) == key[1]), '')


def size_of(subjects: int, borders: Sequence[int]) -> str:
  """The class of size that so many training subjects are in: '< 30', '30-99', '>= 100'."""
  edges = sorted(borders)
  if not edges or subjects >= edges[-1]:
    return f'>= {edges[-1]}' if edges else 'any'
  place = next(i for i, edge in enumerate(edges) if subjects < edge)
  return f'< {edges[0]}' if place == 0 else f'{edges[place - 1]}-{edges[place] - 1}'


def write(out: str | pathlib.Path) -> dict[str, Any]:
  """Writes transfer.json, table.csv and transfer.md; returns `report`.

  Several processes may finish cells at once: each looks again after it wrote, so that the last files have all.
  """
  out = pathlib.Path(out)
  found = report(out)
  while True:
    cells = (['' if r[c] is None else r[c] for c in COLUMNS] for r in found['rows'])
    files.write_csv(out / 'table.csv', [COLUMNS, *cells])
    files.write_json(out / 'transfer.json', found)
    files.write_text(out / 'transfer.md', markdown(found))
    fresh = report(out)
    if fresh == found:
      return found
    found = fresh


def markdown(found: Mapping[str, Any]) -> str:
  """The wins, then each corpus by arm, then rates and failures, as Markdown."""
  several = len({r['fraction'] for r in found['rows']}) > 1
  lines = [f'# {found["file"]}', '', f'{found["cells"]}.', '', *_wins(found, several), *_scores(found, several)]
  tuned = [r for r in found['rows'] if len(r['rates']) > 1]
  if tuned:
    lines += ['Rates, chosen by the metric on split val (in brackets):', '']
    lines += [f'- {_of(r, several)}: {r["rate"]:g} of ' + ', '.join(
        f'{rate} ({"failed" if v is None else f"{v:.4g}"})' for rate, v in r['rates'].items())
              for r in tuned if r['rate'] is not None]
    lines += ['']
  failed = [r for r in found['rows'] if r['reason']]
  lines += [*(f'- {_of(r, several)}: {r["reason"]}' for r in failed), ''] if failed else []
  return '\n'.join(lines)


def _of(row: Mapping[str, Any], several: bool) -> str:
  return f'{row["arm"]} on {row["corpus"]}' + (f' at {row["fraction"]:g}' if several else '')


def _wins(found: Mapping[str, Any], several: bool) -> list[str]:
  if not found['wins']:
    return ['No arm can be compared yet.', '']
  head = ['arm', *(['fraction'] if several else []), 'corpora', 'of', 'won', 'tied', 'lost', 'higher', 'share of wins']
  lines = [f'Against {found["against"]}:', '', f'| {" | ".join(head)} |', '|---' * len(head) + '|']
  for w in found['wins']:
    group = {'all': 'all', 'modality': w['group'], 'size': f'{w["group"]} training subjects'}[w['by']]
    words = [w['arm'], *([f'{w["fraction"]:g}'] if several else []), group,
             *(w[k] for k in ('corpora', 'won', 'tied', 'lost', 'higher')), shown(w['share'])]
    lines.append(f'| {" | ".join(map(str, words))} |')
  return [*lines, '', 'A corpus is won or lost where the 95 % interval of the paired difference over test subjects '
          '(and seeds) leaves out 0; higher: where the score is better at all. A tie is half a win of the share, whose '
          'interval is over corpora.', '']


def _scores(found: Mapping[str, Any], several: bool) -> list[str]:
  arms = list(dict.fromkeys(r['arm'] for r in found['rows']))
  others = [a for a in arms if a != found['against']]
  head = ['corpus', 'modality', 'subjects: train, test', *(['fraction'] if several else []), 'metric', *arms,
          *(f'{a} - {found["against"]}' for a in others)]
  lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
  for name, fraction in dict.fromkeys((r['corpus'], r['fraction']) for r in found['rows']):
    own = {r['arm']: r for r in found['rows'] if (r['corpus'], r['fraction']) == (name, fraction)}
    one = own[arms[0]]
    score = lambda r: r['status'] if r['value'] is None else shown(r)
    words = [name, one['modality'], f'{one["train_subjects"]}, {one["test_subjects"]}',
             *([f'{fraction:g}'] if several else []), tables.NAMES.get(one['metric'], one['metric']),
             *(score(own[a]) for a in arms), *(_difference(own[a]) for a in others)]
    lines.append(f'| {" | ".join(words)} |')
  return [*lines, '', '95 % intervals over test subjects'
          + (' and seeds' if len(found['seeds']) > 1 else '') + '; + or - marks what is won or lost.', '']


def _difference(row: Mapping[str, Any]) -> str:
  if row['difference'] is None:
    return ''
  mark = {True: ' +', False: ' -', None: ''}[row['won']]
  return tables.interval({'value': row['difference'], 'low': row['difference_low'], 'high': row['difference_high']},
                         sign=True) + mark
