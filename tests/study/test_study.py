"""A study from its file to its table: cells in this process, and as processes that are killed and gone on with."""

import csv
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxmed import cli, owner
from jaxmed.study import cells, compare, table
from jaxmed.train import finetune
from jaxmed.train.logs import read_rows
from tests.conftest import TINY

pytestmark = pytest.mark.usefixtures('no_figures')
ROOT = pathlib.Path(__file__).parents[2]
AXES = {'encoder.embed_dim': [32, 16], 'samples': [16, 'all'], 'seed': [0, 1]}


def written(folder, axes=AXES, base=TINY, **fields):
  path = pathlib.Path(folder) / 'study.py'
  path.write_text(f'def get_study():\n  return {dict(base=base, axes=axes) | fields!r}\n')
  return str(path)


def run(corpus, file, out, *more):
  return cli.main(['study', file, '--data', str(corpus), '--out', str(out), *map(str, more)])


def read(out):
  with open(out / 'table.csv', newline='', encoding='utf-8') as f:
    return list(csv.DictReader(f))


@pytest.fixture(scope='module')
def finished(corpus, tmp_path_factory):
  """A study of 2 x 2 x 2 cells, each run in this process as the queues' processes run them."""
  place = tmp_path_factory.mktemp('study')
  file, out = written(place), place / 's'
  for number in range(8):
    assert run(corpus, file, out, '--cell-index', number) == 0
  return file, out


def test_a_table_has_a_row_a_cell(finished):
  _, out = finished
  rows = read(out)
  assert [*rows[0]][:8] == ['cell', 'seed', 'params', 'samples', 'steps', 'flops', 'loss', 'encoder.embed_dim']
  assert [r['status'] for r in rows] == ['done'] * 8
  assert [r['cell'] for r in rows[:4]] == ['embed_dim=32_samples=16'] * 2 + ['embed_dim=32_samples=all'] * 2
  assert [(int(r['encoder.embed_dim']), int(r['samples']), int(r['seed'])) for r in rows] == [
      (w, s, seed) for w in (32, 16) for s in (16, 64) for seed in (0, 1)]
  assert all(float(r['loss']) > 0 and float(r['seconds']) > 0 and int(r['seen']) == 160 for r in rows)
  assert len({r['loss'] for r in rows}) == 8
  for r in rows:
    run_rows = read_rows(cells.folder(out, r['name']) / 'run' / 'metrics.jsonl')
    assert float(r['loss']) == [x['val_loss'] for x in run_rows if 'val_loss' in x][-1]
    config = json.loads((cells.folder(out, r['name']) / 'run' / 'config.json').read_text())
    assert config['loader']['records_seed'] == (int(r['seed']) if int(r['samples']) < 64 else 0)
    data = json.loads((cells.folder(out, r['name']) / 'run' / 'data.json').read_text())
    assert data['rows'] == int(r['samples'])


def test_groups_are_over_seeds(finished):
  _, out = finished
  whole, rows = json.loads((out / 'study.json').read_text()), read(out)
  assert [g['axes'] for g in whole['groups']] == [
      {'encoder.embed_dim': w, 'samples': s} for w in (32, 16) for s in (16, 'all')]
  losses = [float(r['loss']) for r in rows]
  for i, group in enumerate(whole['groups']):
    assert group['runs'] == 2 and group['scores']['loss'] == compare.interval(losses[2 * i : 2 * i + 2])
  text = (out / 'study.md').read_text()
  assert '8 of 8 cells done' in text and f'{np.mean(losses[:2]):.3f} [' in text


def test_what_is_done_is_left_alone(finished, corpus, capfd):
  file, out = finished
  before = {p: p.stat().st_mtime_ns for p in out.rglob('result.json')}
  assert run(corpus, file, out, '--jobs', 2, '--json') == 0
  said = json.loads(capfd.readouterr().out)
  assert len(said['cells']) == 8 and '4 cells (8 runs) for 5 parameters' in said['law']['undecided']
  assert {p: p.stat().st_mtime_ns for p in out.rglob('result.json')} == before


def test_status_shows_the_grid(finished, capfd):
  _, out = finished
  assert cli.main(['status', str(out), '--json']) == 0
  found = json.loads(capfd.readouterr().out)
  assert found['counts'] == {'done': 8} and {c['step'] for c in found['cells']} == {20}
  assert cli.main(['status', str(out)]) == 0
  assert capfd.readouterr().out.splitlines()[-1] == '8 cells: 8 done'


def test_hours_are_of_finished_cells(finished, corpus, capfd):
  file, out = finished
  assert run(corpus, file, out, '--dry-run', '--json') == 0
  found = json.loads(capfd.readouterr().out)
  assert 'the median of 8 finished cells' in found['how'] and len(found['cells']) == 8


def test_another_study_in_the_same_folder_is_refused(finished, corpus, tmp_path, capfd):
  _, out = finished
  file = written(tmp_path, base=TINY | {'learning_rate': 2e-3})
  assert run(corpus, file, out) == 2
  err = capfd.readouterr().err
  assert 'embed_dim=32_samples=16_seed=0' in err and 'learning_rate (0.001, now 0.002)' in err and err.count('\n') == 1
  assert cells.read_plan(out)['cells'][0]['config']['learning_rate'] == 1e-3


def test_a_grid_can_grow(finished, corpus, tmp_path, capfd):
  _, out = finished
  file = written(tmp_path, axes=AXES | {'seed': [0, 1, 2]})
  assert run(corpus, file, out, '--cell', 'embed_dim=16_samples=16_seed=2') == 2  # it is not in the plan that is there
  assert "unknown cell 'embed_dim=16_samples=16_seed=2'" in capfd.readouterr().err
  shutil.copytree(out, tmp_path / 'grown')
  file, study, ready = _planned(file, corpus)
  assert len(cells.write_plan(tmp_path / 'grown', file, study, ready, str(corpus))['cells']) == 12
  assert [r['status'] for r in table.write(tmp_path / 'grown')].count('done') == 8


def _planned(file, corpus):
  from jaxmed.study import cost, grid
  study = grid.read(file)
  return file, study, cost.ready(study, cost.Corpus(str(corpus)))


def test_a_failed_cell_is_named_and_runs_again_alone(corpus, tmp_path, capfd, monkeypatch):
  out, file = tmp_path / 's', written(tmp_path, {'seed': [0, 1]})
  train = cells.loop.train

  def failing(user, place, **kwargs):
    if user['seed'] == 1:
      pathlib.Path(place).mkdir(parents=True)
      raise RuntimeError('no\nluck')
    return train(user, place, **kwargs)

  monkeypatch.setattr(cells.loop, 'train', failing)
  assert run(corpus, file, out, '--cell', 'seed=0') == 0
  assert run(corpus, file, out, '--cell', 'seed=1') == 2
  assert 'cell seed=1 failed: RuntimeError: no luck (run it anew: --cell seed=1 --again)' in capfd.readouterr().err
  assert [(r['status'], r['reason']) for r in read(out)] == [('done', ''), ('failed', 'RuntimeError: no luck')]
  assert '- seed=1 failed: RuntimeError: no luck' in (out / 'study.md').read_text()
  monkeypatch.setattr(cells.loop, 'train', train)
  assert run(corpus, file, out) == 2  # it reports what it has
  said = capfd.readouterr()
  assert 'cell seed=1 failed before' in said.err and '1 of 2 cells done, 1 failed' in said.out
  assert run(corpus, file, out, '--cell', 'seed=1') == 2
  assert run(corpus, file, out, '--cell', 'seed=1', '--again') == 0
  assert [r['status'] for r in read(out)] == ['done', 'done']
  assert (cells.folder(out, 'seed=1') / 'run.1').is_dir()


def test_judges_add_columns(corpus, tmp_path):
  tuning = {'task': 'finetune', 'label': 'tissue', 'options': {'task': 'classify', 'steps': 2, 'batch_size': 8, 'fraction': 0.5}}
  file = written(tmp_path, {'seed': [0]}, judges=['loss', {'task': 'classify', 'label': 'tissue'}, tuning])
  assert run(corpus, file, tmp_path / 's', '--cell', 'seed=0') == 0
  row, = read(tmp_path / 's')
  said = json.loads((cells.folder(tmp_path / 's', 'seed=0') / 'classify.json').read_text())
  trained = {r['method']: r['metrics'] for r in said['rows'] if r['features'] == 'trained'}
  assert float(row['classify knn accuracy']) == trained['knn']['accuracy']['value']
  assert {f'classify {m} {k}' for m in ('knn', 'logistic') for k in ('accuracy', 'balanced_accuracy', 'auroc')} <= {*row}
  place = cells.folder(tmp_path / 's', 'seed=0')
  tuned = finetune.scores(place / 'finetune')
  assert float(row['finetune classify accuracy']) == tuned['metrics']['accuracy']['value']
  config = json.loads((place / 'finetune' / 'config.json').read_text())
  assert (config['init'], config['steps'], config['loader']['records']) == (str(place / 'run'), 2, 32)
  cells._renew(place)  # a run that begins anew is tuned anew
  assert not (place / 'finetune').exists() and (place / 'run.1' / 'finetune' / 'config.json').exists()


def test_scores_of_any_result():
  rows = [{'features': 'trained', 'method': 'a', 'metrics': {'x': {'value': 1.0}}},
          {'features': 'untrained', 'method': 'a', 'metrics': {'x': {'value': 2.0}}}]
  assert cells.scores_of({'rows': rows}) == {'a x': 1.0}
  assert cells.scores_of({'index': {'value': 0.5, 'low': 0}, 'drop': {'ood': {'value': 2}}, 'n': 3}) == {
      'index': 0.5, 'drop ood': 2.0}
  assert len(cells.scores_of({str(i): {'value': i} for i in range(100)})) == cells.MOST_SCORES


@pytest.mark.parametrize('argv, said', [
    ([], 'give a study file'), (['steps=3'], 'give a study file'), (['none.py'], 'none.py does not exist'),
    (['FILE', '--cell', 'seed=9'], "unknown cell 'seed=9': did you mean 'seed="),
    (['FILE', '--cell-index', '7'], '--cell-index 7: expected a number from 0 to 1'),
    (['FILE', '--cell-index', 'auto'], 'neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set'),
    (['FILE', '--launcher', 'slrum'], "did you mean 'slurm'"), (['FILE', '--nodes', '2'], '--nodes is an option of'),
    (['FILE', '--topology', 'v5e:4x4'], '--topology v5e:4x4 is for --dry-run'),
    (['FILE', '--rows', '5'], '--rows'), (['FILE', '--jobs', '0'], '--jobs'), (['FILE', 'stpes=3'], "'stpes'"),
    (['FILE', '--launcher', 'tpu-vm', '--accelerator', 'v6e-8', '--zone', 'z'], 'not by tpu-vm'),
])
def test_mistakes_are_one_line(corpus, tmp_path, capfd, argv, said):
  file = written(tmp_path, {'seed': [0, 1]})
  words = [file if w == 'FILE' else w for w in argv]
  assert cli.main(['study', *words, '--data', str(corpus), '--out', str(tmp_path / 's')]) == 2
  out, err = capfd.readouterr()
  assert said in err and err.count('\n') == 1 and out == ''
  assert not list((tmp_path / 's').rglob('config.json'))


def test_what_is_missing(corpus, tmp_path, capfd):
  file = written(tmp_path, {'seed': [0]})
  assert cli.main(['study', file, '--out', str(tmp_path / 's')]) == 2
  assert 'give --data CORPUS' in capfd.readouterr().err
  assert cli.main(['study', file, '--data', str(corpus)]) == 2
  assert 'give --out STUDY' in capfd.readouterr().err
  assert cli.main(['status', str(tmp_path)]) == 2
  assert 'nothing was launched' in capfd.readouterr().err
  assert cli.main(['study', 'fit', str(tmp_path / 'none.csv')]) == 2
  assert 'none.csv does not exist' in capfd.readouterr().err
  assert cli.main(['study', 'fti', 'none.csv']) == 2
  assert 'config file fti does not exist' in capfd.readouterr().err


def test_a_law_needs_two_sizes_of_both():
  row = lambda params, samples, seen, status='done': dict(params=params, samples=samples, seen=seen, status=status, loss=1.0)
  assert table.law_axes([row(1, 1, 1), row(2, 1, 2)]) == {'samples': 'seen'}
  assert table.law_axes([row(1, 1, 1), row(2, 2, 1)]) == {'samples': 'samples'}
  assert table.law_axes([row(1, 1, 1), row(1, 2, 1)]) is None
  assert table.law_axes([row(1, 1, 1), row(2, 2, 2, 'failed')]) is None and table.law_axes([]) is None


def begin(file, corpus, out, *more):
  return subprocess.Popen([sys.executable, '-m', 'jaxmed', 'study', file, '--data', str(corpus), '--out', str(out),
                           *map(str, more)], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait(condition, seconds=250.0):
  end = time.monotonic() + seconds
  while not (value := condition()):
    assert time.monotonic() < end, 'waited too long'
    time.sleep(0.02)
  return value


@pytest.mark.timeout(900)
def test_a_study_that_is_killed_twice_ends_as_one_that_nothing_stopped(finished, corpus, tmp_path):
  """First the study with SIGKILL, so that its cells see their parent gone; then with SIGTERM, so that it ends them."""
  _, want = finished
  file, out = written(tmp_path, AXES | {'encoder.embed_dim': [32]}), tmp_path / 's'
  names = [c['name'] for c in cells.read_plan(want)['cells']][:4]
  steps = lambda name: [r['step'] for r in read_rows(cells.folder(out, name) / 'run' / 'metrics.jsonl') if 'loss' in r]
  process = begin(file, corpus, out, '--jobs', 2)
  wait(lambda: steps(names[0]))
  process.kill()
  process.wait()
  wait(lambda: not [c for c in table.status(out)['cells'] if c['status'] == 'running'])
  process = begin(file, corpus, out, '--jobs', 2)
  wait(lambda: (out / '.owner.json').exists() and owner._read(out / '.owner.json').get('process') == process.pid)
  second = begin(file, corpus, out)
  assert 'is being written by process' in second.communicate(timeout=250)[1] and second.returncode == 2
  wait(lambda: cells.result(out, names[1]) and steps(names[2]))
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=250)
  assert process.returncode == 75, err
  counts = table.status(out)['counts']
  assert counts.get('done', 0) >= 1 and counts['done'] < 4 and 'failed' not in counts and 'running' not in counts
  process = begin(file, corpus, out, '--jobs', 2)
  _, err = process.communicate(timeout=600)
  assert process.returncode == 0, err
  assert [r['status'] for r in read(out)] == ['done'] * 4
  losses = [[float(r['loss']) for r in read(place)][:4] for place in (out, want)]
  np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.timeout(600)
def test_a_cell_whose_process_is_killed_is_named_and_the_others_go_on(corpus, tmp_path):
  out, file = tmp_path / 's', written(tmp_path, {'seed': [0, 1]}, base=TINY | {'steps': 400})
  process = begin(file, corpus, out, 'steps=20')
  lock = wait(lambda: next(iter(cells.folder(out, 'seed=0').glob('.owner.json')), None))
  os.kill(json.loads(lock.read_text())['process'], signal.SIGKILL)
  _, err = process.communicate(timeout=400)
  assert process.returncode == 2 and 'cell seed=0: failed: its process was killed by signal 9' in err, err
  assert [r['status'] for r in read(out)] == ['failed', 'done']
