"""Transfer benchmarks: what a file declares, the choice of rates by validation, wins with intervals, a tiny real one."""

import csv
import itertools
import json
import pathlib

import numpy as np
import pytest

from jaxmed import cli, config, files
from jaxmed.errors import UserError
from jaxmed.evaluate import metrics, wins
from jaxmed.study import cells, transfer, transfer_table
from jaxmed.train.logs import read_rows
from tests.masks import tiles_with_masks
from tests.train.test_finetune import FEW

ROOT = pathlib.Path(__file__).parents[2]
SHIPPED = sorted((ROOT / config.TRANSFERS).glob('*.py'))
CORPORA = {'a': {'data': 'A', 'modality': 'CT'}, 'b': {'task': 'classify', 'label': 'half', 'modality': 'MR'}}
ARMS = {'pretrained': {}, 'scratch': {'rates': (1e-2, 1e-3)}, 'linear': {}}


def written(folder, **fields):
  path = pathlib.Path(folder) / 'bench.py'
  path.write_text(f'def get_transfer():\n  return {dict(corpora=CORPORA, arms=ARMS) | fields!r}\n')
  return str(path)


def plan_of(arms, corpora=('a',), seeds=(0, 1), task='segment', fractions=(1.0,), against='scratch', subjects=(10, 50, 200)):
  """A plan as `transfer.write_plan` has it; arms: {name: rates}."""
  made = [{'name': f'{c}-{arm}-{rate}-{f}-{s}', 'config': {'learning_rate': rate},
           'axes': {'arm': arm, 'on': [c], 'rate': rate, 'fraction': f, 'seed': s}}
          for arm, rates in arms.items() for c, f, rate, s in itertools.product(corpora, fractions, rates, seeds)]
  return {'file': 'bench.py', 'against': against, 'sizes': [30, 100], 'fractions': [*fractions], 'seeds': [*seeds],
          'arms': [{'name': arm, 'train': []} for arm in arms], 'cells': made,
          'corpora': [{'name': c, 'task': task, 'label': 'mask', 'modality': 'CT' if i % 2 else 'MR', 'records': 9,
                       'subjects': subjects[i % 3], 'test_subjects': 6} for i, c in enumerate(corpora)]}


def done(value, metric='dice'):
  return {'status': 'done', 'loss': None, 'scores': {metric: value}}


def test_cells_are_corpora_x_arms_x_rates_x_seeds(tmp_path):
  file = written(tmp_path, seeds=(0, 1), fractions=(0.5, 1.0))
  whole = transfer.read(file, ['b=B'], ['runs/x', 'linear=runs/y'], {'steps': 3})
  assert {n: (c.data, c.label) for n, c in whole.corpora.items()} == {
      'a': (str(pathlib.Path('A').resolve()), 'mask'), 'b': (str(pathlib.Path('B').resolve()), 'half')}
  assert [pathlib.Path(a.encoder).name for a in whole.arms.values()] == ['x', 'x', 'y']
  assert [a.kind for a in whole.arms.values()] == [*ARMS] and whole.base == {'steps': 3}
  wanted = [*transfer._wanted(whole)]
  assert len(wanted) == 2 * 2 * 2 * (1 + 2 + 1) == len({transfer._cell(whole, w).name for w in wanted})
  groups = {transfer._cell(whole, w).group for w in wanted}
  assert len(groups) == 16 and 'corpus=a_arm=scratch_rate=0.01_fraction=0.5' in groups


def test_an_arm_may_train_on_several_and_any_corpus_may_be_named(tmp_path):
  arms = {'scratch': {'train': ['ct']}, 'joint': {'kind': 'scratch', 'train': ('ct', 'mr')}}
  file = written(tmp_path, corpora={'*': {}}, arms=arms, base={'model': 'resenc_micro'})
  whole = transfer.read(file, ['ct:CT=x', 'mr:MR=y'])
  assert [(w.arm, w.on) for w in transfer._wanted(whole)] == [('scratch', ('ct',)), ('joint', ('ct', 'mr'))]
  assert [c.modality for c in whole.corpora.values()] == ['CT', 'MR']
  plan = {'corpora': [{'name': n} for n in whole.corpora], 'arms': [{'name': n, 'train': a.train} for n, a in whole.arms.items()]}
  assert transfer_table.judged_on(plan, 'joint', ['ct', 'mr']) == ['ct', 'mr']


@pytest.mark.parametrize('fields, data, words', [
    ({}, ['c=B'], "unknown corpus of .*'c'"), ({}, ['b'], '--data b: expected NAME=PATH'),
    ({}, [], 'corpus b of .* has no path: give --data b=PATH'), ({'armz': {}}, ['b=B'], "'armz': did you mean 'arms'"),
    ({'arms': {'pretraind': {}}}, ['b=B'], "kind of arm pretraind .*did you mean 'pretrained'"),
    ({'arms': {'scratch': {'rate': 1}}}, ['b=B'], "field of arm scratch .*'rate': did you mean 'rates'"),
    ({'against': 'scrach'}, ['b=B'], "did you mean 'scratch'"), ({'seeds': (0, 0)}, ['b=B'], 'seeds of .* one or more different'),
    ({'arms': {'scratch': {'train': ('a',)}}}, ['b=B'], 'masks alone allow: corpus b is of task classify'),
    ({'arms': {'scratch': {'train': ('q',)}}}, ['b=B'], "corpus of arm scratch to train on 'q'"),
    ({'corpora': {'b': {'task': 'regress', 'data': 'B'}}}, [], 'corpus b of .* has no label'),
    ({'corpora': {'b_c': {'data': 'B'}}}, [], 'other characters'), ({'corpora': {}}, [], 'has no corpora')])
def test_mistakes_of_a_file(tmp_path, fields, data, words):
  with pytest.raises(UserError, match=words) as e:
    transfer.read(written(tmp_path, **fields), data, ['run'])
  assert '\n' not in str(e.value)


def test_an_arm_without_an_encoder_is_named(tmp_path):
  with pytest.raises(UserError, match='arm pretrained of .* has no encoder: give --encoder RUN'):
    transfer.read(written(tmp_path), ['b=B'])


@pytest.mark.parametrize('task, better', [('segment', max), ('regress', min)])
def test_the_rate_is_that_of_the_best_mean_on_val(task, better):
  plan = plan_of({'scratch': (0.1, 0.01, 0.001)}, task=task)
  metric = {'segment': 'dice', 'regress': 'val_mae'}[task]
  values = np.random.default_rng(0).uniform(size=6)
  pick, = transfer_table.chosen(plan, {c['name']: done(v, metric) for c, v in zip(plan['cells'], values)})
  means = dict(zip((0.1, 0.01, 0.001), values.reshape(3, 2).mean(1)))
  assert pick['rate'] == better(means, key=means.get) and pick['val'] == pytest.approx(better(means.values()))
  assert pick['cells'] == [c['name'] for c in plan['cells'] if c['axes']['rate'] == pick['rate']] and len(pick['cells']) == 2


def test_no_rate_is_taken_before_all_have_ended_and_none_of_which_a_seed_failed():
  plan = plan_of({'scratch': (0.1, 0.01)})
  names = [c['name'] for c in plan['cells']]
  results = dict(zip(names, (done(0.9), {'status': 'failed', 'reason': 'no luck'}, done(0.2), None)))
  pick, = transfer_table.chosen(plan, results)
  assert (pick['status'], pick['rate'], pick['cells']) == ('waiting', None, [])
  pick, = transfer_table.chosen(plan, results | {names[3]: done(0.4)})
  assert pick['rate'] == 0.01 and pick['rates'] == {0.1: None, 0.01: pytest.approx(0.3)}
  assert pick['reason'] == f'cell {names[1]} failed: no luck'
  every = {name: {'status': 'failed', 'reason': 'no luck'} for name in names}
  assert transfer_table.chosen(plan, every)[0]['status'] == 'failed'


def test_test_records_are_read_of_the_chosen_rate_alone(tmp_path, monkeypatch):
  """Whatever the others would score there: they are never judged."""
  plan = plan_of({'scratch': (0.1, 0.01)}, seeds=(0,))
  files.write_json(tmp_path / cells.PLAN, plan)
  judged = []
  monkeypatch.setattr(transfer_table, 'tested', lambda run, corpus: judged.append(run.parent.name) or said(0, 0.5))
  first, second = (c['name'] for c in plan['cells'])
  files.write_json(cells.folder(tmp_path, first) / cells.RESULT, done(0.3))
  transfer_table.settle(tmp_path, plan)
  assert judged == [] and transfer_table.report(tmp_path)['rows'][0]['status'] == 'waiting'
  files.write_json(cells.folder(tmp_path, second) / cells.RESULT, done(0.4))
  transfer_table.settle(tmp_path, plan)
  transfer_table.settle(tmp_path, plan)
  assert judged == [second]
  row, = transfer_table.report(tmp_path)['rows']
  assert (row['rate'], row['val'], row['value']) == (0.01, 0.4, pytest.approx(0.5, abs=0.03))


def said(seed, level, subjects=6, noise=0.02):
  """Dice of two cases a subject and two classes, as `tested` gives them; one case says nothing of a class."""
  rng = np.random.default_rng(seed)
  dice = np.clip(level + noise * rng.normal(size=(2 * subjects, 2)), 0, 1).tolist()
  dice[0][1] = None
  return {'ids': [*map(str, range(2 * subjects))], 'subjects': [f's{i // 2}' for i in range(2 * subjects)],
          'classes': ['x', 'y'], 'dice': dice}


def slow_difference(mine, other, draws):
  """The paired bootstrap over subjects and runs, draw by draw, from the definitions."""
  subjects = mine[0]['subjects']
  names = sorted(set(subjects))
  table = lambda s: np.array([[np.nan if v is None else v for v in row] for row in s['dice']])
  of = lambda rows, weights: np.mean([np.nansum(weights * rows[:, k]) / weights[~np.isnan(rows[:, k])].sum() for k in (0, 1)])
  counts = np.random.default_rng(0).multinomial(len(names), [1 / len(names)] * len(names), size=draws)
  runs = np.random.default_rng(1).multinomial(len(mine), [1 / len(mine)] * len(mine), size=draws)
  drawn = []
  for count, run in zip(counts, runs):
    weights = np.array([count[names.index(s)] for s in subjects], float)
    drawn.append(sum(n * (of(table(a), weights) - of(table(b), weights)) for n, a, b in zip(run, mine, other)) / len(mine))
  one = np.ones(len(subjects))
  value = np.mean([of(table(a), one) - of(table(b), one) for a, b in zip(mine, other)])
  return value, *np.percentile(drawn, [2.5, 97.5])


@pytest.fixture
def judged(tmp_path):
  """A finished benchmark of six corpora and two arms, without any training: wins, losses and ties are known."""
  corpora = ('a', 'b', 'c', 'd', 'e', 'f')
  plan = plan_of({'pretrained': (0.1,), 'scratch': (0.1,)}, corpora)
  files.write_json(tmp_path / cells.PLAN, plan)
  gain = dict(zip(corpora, (0.2, 0.2, -0.2, 0.001, 0.2, -0.001)))
  for i, cell in enumerate(plan['cells']):
    place, axes = cells.folder(tmp_path, cell['name']), cell['axes']
    files.write_json(place / cells.RESULT, done(0.5))
    level = 0.5 + (gain[axes['on'][0]] if axes['arm'] == 'pretrained' else 0)
    files.write_json(place / f'test.{axes["on"][0]}.json', said(i, level))
  return tmp_path, plan, gain


def test_differences_and_wins_are_those_of_a_slow_loop(judged):
  out, plan, gain = judged
  found = transfer_table.report(out, 200)
  rows = {(r['corpus'], r['arm']): r for r in found['rows']}
  verdicts = {}
  for name in gain:
    own = lambda arm: [files.read_json(cells.folder(out, c['name']) / f'test.{name}.json') for c in plan['cells']
                       if c['axes']['on'] == [name] and c['axes']['arm'] == arm]
    value, low, high = slow_difference(own('pretrained'), own('scratch'), 200)
    row = rows[name, 'pretrained']
    np.testing.assert_allclose([row['difference'], row['difference_low'], row['difference_high']], [value, low, high], atol=1e-12)
    verdicts[name] = row['won']
    assert row['won'] is (None if low <= 0 <= high else bool(low > 0)) and rows[name, 'scratch']['won'] is None
  assert [verdicts[n] for n in 'abce'] == [True, True, False, True]
  total = next(w for w in found['wins'] if w['by'] == 'all')
  points = [{True: 1.0, None: 0.5, False: 0.0}[v] for v in verdicts.values()]
  drawn = [np.average(points, weights=w) for w in np.random.default_rng(0).multinomial(6, [1 / 6] * 6, size=200)]
  assert total['share']['value'] == pytest.approx(np.mean(points))
  np.testing.assert_allclose([total['share']['low'], total['share']['high']], np.percentile(drawn, [2.5, 97.5]), atol=1e-12)
  assert (total['won'], total['tied'], total['lost']) == tuple([*verdicts.values()].count(v) for v in (True, None, False))
  assert total['higher'] == sum(rows[n, 'pretrained']['difference'] > 0 for n in gain)


def test_wins_by_modality_and_size_add_up(judged):
  out, plan, _ = judged
  found = transfer_table.write(out)
  for by, names in (('modality', ['CT', 'MR']), ('size', ['< 30', '30-99', '>= 100'])):
    some = [w for w in found['wins'] if w['by'] == by]
    assert [w['group'] for w in some] == names
    whole = found['wins'][0]
    assert all(sum(w[k] for w in some) == whole[k] for k in ('corpora', 'won', 'tied', 'lost', 'higher'))
  with open(out / 'table.csv', newline='', encoding='utf-8') as f:
    table = list(csv.DictReader(f))
  assert len(table) == 12 and [*table[0]] == [*transfer_table.COLUMNS]
  text = (out / 'transfer.md').read_text()
  assert '| pretrained | all | 6 |' in text and 'pretrained - scratch' in text and '24 of 24 cells done' in text
  assert json.loads((out / 'transfer.json').read_text())['wins'] == found['wins']


def test_a_lower_error_is_a_win_and_one_corpus_has_no_interval():
  cell = {'value': -2.0, 'low': -3.0, 'high': -1.0}
  pair, = wins.wins({'a': {'label': 'age', 'headline': 'mae', 'differences': [
      {'features': 'pretrained', 'minus': 'scratch', 'method': 'regress', 'metrics': {'mae': cell}}]}})
  line = transfer_table.tally(pair, plan_of({'scratch': (1,)}, task='regress')['corpora'], [30])[0]
  assert (line['won'], line['higher'], line['share']) == (1, 1, {'value': 1.0, 'low': None, 'high': None})


def test_borders_of_sizes():
  assert [transfer_table.size_of(n, (100, 30)) for n in (1, 29, 30, 99, 100)] == ['< 30', '< 30', '30-99', '30-99', '>= 100']
  assert transfer_table.size_of(5, ()) == 'any'


def test_answers_of_other_tasks_are_scored_as_fine_tuning_does():
  rng = np.random.default_rng(0)
  truth, answers = rng.integers(0, 3, 30), rng.normal(size=(30, 3))
  record = {'subjects': [str(i // 3) for i in range(30)], 'truth': truth.tolist(), 'answers': answers.tolist()}
  value, drawn = transfer_table.scored('classify', [record], 200)
  want = metrics.summarised(metrics.score(truth, answers), metrics.resampled(truth, answers, record['subjects'], draws=200))
  assert metrics.summarised(value, drawn) == want
  error = transfer_table.scored('regress', [record | {'answers': (truth + 0.5).tolist()}], 20)[0]
  assert error['mae'] == pytest.approx(0.5)


def test_a_failed_arm_is_named_and_the_others_are_compared(judged):
  out, plan, _ = judged
  broken = next(c['name'] for c in plan['cells'] if c['axes']['arm'] == 'pretrained' and c['axes']['on'] == ['a'])
  cells.fail(out, broken, 'no luck')
  other = next(c['name'] for c in plan['cells'] if c['axes']['arm'] == 'scratch' and c['axes']['on'] == ['b'])
  files.write_json(cells.folder(out, other) / 'test.b.json', {'failed': 'judging: no memory'})
  found = transfer_table.write(out)
  rows = {(r['corpus'], r['arm']): r for r in found['rows']}
  assert rows['a', 'pretrained']['status'] == 'failed' and rows['a', 'pretrained']['value'] is None
  assert rows['b', 'scratch']['status'] == 'failed' and rows['b', 'pretrained']['difference'] is None
  assert found['wins'][0]['corpora'] == 4
  text = (out / 'transfer.md').read_text()
  assert f'- pretrained on a: cell {broken} failed: no luck' in text and '- scratch on b: judging: no memory' in text


def test_other_test_records_are_refused(judged):
  out, plan, _ = judged
  files.write_json(cells.folder(out, plan['cells'][0]['name']) / 'test.a.json', said(0, 0.5, subjects=4))
  with pytest.raises(UserError, match='corpus a: its test records changed'):
    transfer_table.report(out)


def test_the_best_value_on_val_is_read_from_the_run(tmp_path):
  plan = plan_of({'scratch': (1,)})
  (tmp_path / 'run').mkdir()
  rows = [{'step': 1, 'dice': 0.2}, {'step': 2, 'dice': 0.7, 'val_loss': 1.0}, {'step': 3, 'dice': 0.6}, {'step': 4, 'dice': None}]
  (tmp_path / 'run' / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  assert transfer_table.validated(plan, plan['cells'][0], tmp_path) == {'scores': {'dice': 0.7}}
  (tmp_path / 'run' / 'metrics.jsonl').write_text(json.dumps(rows[3]))
  with pytest.raises(UserError, match='no finite dice on split val'):
    transfer_table.validated(plan, plan['cells'][0], tmp_path)


@pytest.mark.parametrize('change, words', [
    (lambda t: t | {'label': 'tissu'}, "corpus a: unknown column of .*'tissu': did you mean 'tissue'"),
    (lambda t: t | {'task': 'segment', 'label': 'mask'}, "corpus a: .*unknown column|corpus a: .*no record with a mask"),
    (lambda t: t | {'drop': 'val'}, 'corpus a: .* has no record of split val with .tissue.: rates and checkpoints'),
    (lambda t: t | {'one': True}, 'corpus a: .* has one subject in split test')])
def test_corpora_that_cannot_be_judged(corpus, monkeypatch, change, words):
  fields = change({'task': 'classify', 'label': 'tissue'})
  drop, one = fields.pop('drop', ''), fields.pop('one', False)
  source = transfer.open_source(corpus)
  split = np.array(source.table['split'].to_pylist())
  subject = np.array(source.table['subject'].to_pylist())
  keep = (split != drop) & ((split != 'test') | (subject == subject[split == 'test'][0]) if one else True)
  monkeypatch.setattr(transfer, 'open_source', lambda path: source.keep(keep))
  whole = transfer.Transfer({'a': transfer.Corpus(str(corpus), **fields)}, {})
  with pytest.raises(UserError, match=words) as e:
    transfer.check_data(whole)
  assert '\n' not in str(e.value)


@pytest.mark.usefixtures('no_figures')
def test_a_tiny_one_ends_and_goes_on(trained, tiles, tmp_path, capfd):
  """Two corpora, two arms: cell by cell, as the processes of a queue run them; then nothing is left to do.

  All four have one program: the same sizes, rate and decays.
  """
  masks = tiles_with_masks(tiles, tmp_path)
  base = FEW | {'steps': 2, 'eval_every': 1, 'checkpoint_every': 1, 'learning_rate': 1e-2, 'optimizer': {'layer_decay': 1.0},
                'augment': FEW['augment'] | {'flip': 0.0}, 'objective': {'decoder': 'linear'}}
  file = written(tmp_path, corpora={'*': {}}, arms={'pretrained': {}, 'scratch': {}}, base=base)
  out = tmp_path / 'out'
  words = ['transfer', file, '--data', f'm:light={masks}', '--data', f'n:dark={masks}', '--encoder', str(trained), '--out', str(out)]
  assert cli.main([*words, '--dry-run', '--rate', '1e9', '--json']) == 0
  dry = json.loads(capfd.readouterr().out)
  names = [f'corpus={c}_arm={a}' for a in ('pretrained', 'scratch') for c in 'mn']
  assert [c['cell'] for c in dry['cells']] == names and {c['steps'] for c in dry['cells']} == {2} and not out.exists()
  for number in range(4):
    assert cli.main([*words, '--cell-index', str(number)]) == 0, capfd.readouterr().err
  assert sorted(p.name for p in out.rglob('test.*.json')) == ['test.m.json'] * 2 + ['test.n.json'] * 2
  capfd.readouterr()
  assert cli.main([*words, '--json']) == 0
  found = json.loads(capfd.readouterr().out)
  rows = {(r['corpus'], r['arm']): r for r in found['rows']}
  assert len(rows) == 4 and all(r['status'] == 'done' and r['low'] <= r['value'] <= r['high'] for r in rows.values())
  assert [w['group'] for w in found['wins'] if w['by'] == 'modality'] == ['dark', 'light']
  assert rows['m', 'pretrained']['value'] == rows['n', 'pretrained']['value'] != rows['m', 'scratch']['value']
  seen = [r['dice'] for r in read_rows(cells.folder(out, names[0]) / 'run' / 'metrics.jsonl') if 'dice' in r]
  assert rows['m', 'pretrained']['val'] == max(seen) and len(seen) == 2
  assert cli.main(['status', str(out), '--json']) == 0
  assert json.loads(capfd.readouterr().out)['counts'] == {'done': 4}
  assert cli.main([*words, 'steps=3']) == 2
  assert 'began with another steps (2, now 3)' in capfd.readouterr().err


@pytest.mark.parametrize('path', SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_one_says_what_it_is_and_is_read(path):
  name = path.relative_to(ROOT).as_posix()
  text = ' '.join(path.read_text().split('"""')[1].split())
  for words in (f'jaxmed transfer {name}', f'jaxmed transfer {name}:laptop', 'Differs', 'ot run here at full size'):
    assert words in text, words
  assert name in config.transfers() and name not in config.recipes()
  for variant in config.variants(str(path)):
    declared = config.call(f'{path}:{variant}', 'get_transfer')
    names = [n for n in declared.corpora if n != transfer.ANY] or ['x']
    whole = transfer.read(f'{path}:{variant}', [f'{n}=somewhere' for n in names], ['RUN'])
    assert len([*transfer._wanted(whole)]) >= 2
