"""`jaxmed study fit` on tables: what it returns and writes, which rows count, and one line for each mistake."""

import argparse
import csv
import json
import pathlib

import numpy as np
import pytest

from jaxmed.cli import study_fit
from jaxmed.errors import UserError
from jaxmed.study import fit as fit_lib
from jaxmed.study import law_report
from tests.study.simulated import LAPTOP, grid, line

DATA = pathlib.Path(__file__).parents[2] / 'experiments' / 'data'
QUICK = ('--draws', '100', '--hold-out', '0')


def run(*words):
  """What the verb returns; plain JSON without NaN."""
  p = argparse.ArgumentParser()
  study_fit.options(p)
  result = study_fit.run(p.parse_args([str(w) for w in words]))
  json.dumps(result['json'], allow_nan=False)
  return result


def write(path, header, rows):
  with open(path, 'w', newline='', encoding='utf-8') as f:
    csv.writer(f).writerows([header, *rows])
  return path


@pytest.fixture
def runs():
  """A grid of 4 x 4 cells with two seeds."""
  return grid(4, 4, 2, noise=0.01, rng=np.random.default_rng(0))


@pytest.fixture
def table(runs, tmp_path):
  design, y, _ = runs
  return write(tmp_path / 'runs.csv', ('params', 'samples', 'loss'), np.column_stack([design.x, y]).tolist())


def test_a_table_in_a_law_and_a_report_out(table, tmp_path):
  result = run(table, '--out', tmp_path / 'fit', '--draws', '150')
  found = result['json']
  assert found['law'] == 'loss = E + A params^-alpha + B samples^-beta'
  assert (found['verdict'], found['unclear'], found['runs'], found['cells']) == ('law', [], 32, 16)
  for name, truth in zip(('E', 'A', 'B', 'alpha', 'beta'), (LAPTOP.E, *LAPTOP.A, *LAPTOP.alpha), strict=True):
    assert found[name]['low'] <= found[name]['value'] <= found[name]['high']
    assert found[name]['low'] <= truth <= found[name]['high']
  assert found['huber'] > 0
  frontier = found['frontier']
  assert frontier['compute'] == pytest.approx({'k': 6, 'u': 1, 'v': 1, 'spread': 1})
  assert len(frontier['budgets']) == 5
  for b in frontier['budgets']:
    assert 6 * b['params']['value'] * b['samples']['value'] == pytest.approx(b['compute'])
  left = found['extrapolation']
  assert (left['cells'], left['fitted_runs'], len(left['runs'])) == (3, 26, 6)
  assert left['mean_error'] < 0.05 and left['mean_error_constant'] > left['mean_error']
  assert json.loads((tmp_path / 'fit' / 'fit.json').read_text()) == found
  rows = list(csv.DictReader((tmp_path / 'fit' / 'fit.csv').read_text().splitlines()))
  assert len(rows) == 32 and sum(int(r['held_out']) for r in rows) == 6
  assert float(rows[0]['residual']) == pytest.approx(float(rows[0]['loss']) - float(rows[0]['predicted']))
  page = (tmp_path / 'fit' / 'fit.md').read_text()
  for name in ('compute', 'residuals'):
    assert f'](fit_{name}.png)' in page and (tmp_path / 'fit' / f'fit_{name}.png').read_bytes().startswith(b'\x89PNG')
  assert 'compute-optimal, C = 6 params^1 samples^1' in result['text'] and 'undecided' not in result['text']


def test_the_same_table_gives_the_same_numbers(table):
  assert run(table, *QUICK)['json'] == run(table, *QUICK)['json']


def test_the_published_table():
  found = run(DATA / 'chinchilla.csv', *QUICK)['json']
  values = [found[name]['value'] for name in ('E', 'A', 'B', 'alpha', 'beta')]
  assert values == pytest.approx([1.8172, 477.9, 2142.6, 0.3473, 0.3672], rel=3e-4)
  assert found['huber'] == pytest.approx(0.0010182740, rel=1e-5) and found['runs'] == 240
  assert found['verdict'] == 'law' and len(found['isoflop']['curves']) > 8
  assert found['frontier']['params_exponent']['value'] == pytest.approx(0.514, abs=1e-3)


def test_four_published_sizes_are_undecided():
  result = run(DATA / 'stu_net.csv', '--axis', 'params', '--score', 'dice', '--draws', '200')
  found = result['json']
  assert found['law'] == 'dice = E - A params^-alpha' and found['rising']
  assert found['verdict'] == 'undecided' and found['chance']['law'] == pytest.approx(1 / 24)
  assert found['extrapolation'] is None and 'B' not in found
  assert result['text'].startswith('undecided: ')
  assert found['E']['high'] - found['E']['low'] > 2


def test_noise_is_undecided(runs, tmp_path):
  design, y, _ = runs
  y = np.exp(0.05 * np.random.default_rng(1).standard_normal(len(y)))
  result = run(write(tmp_path / 'a.csv', ('params', 'samples', 'loss'), np.column_stack([design.x, y]).tolist()), *QUICK)
  assert result['json']['verdict'] == 'undecided' and 'does not tell a law from a constant' in result['text']


def test_an_axis_without_a_law_is_named(runs, tmp_path):
  design = runs[0]
  y = (0.3 + 25 * design.x[:, 1] ** -0.4) * np.exp(0.02 * np.random.default_rng(1).standard_normal(32))
  result = run(write(tmp_path / 'a.csv', ('params', 'samples', 'loss'), np.column_stack([design.x, y]).tolist()), *QUICK)
  assert result['json']['unclear'] == ['params']
  assert 'does not tell whether it depends on params' in result['text']


def test_runs_of_equal_steps_have_no_frontier(runs, tmp_path):
  """Their FLOPs follow the size of the model alone: no budget can be spent on more samples."""
  design, y, _ = runs
  path = write(tmp_path / 'runs.csv', ('params', 'samples', 'loss', 'flops'),
               np.column_stack([design.x, y, 2e4 * design.x[:, 0]]).tolist())
  result = run(path, '--out', tmp_path / 'fit', *QUICK)
  assert result['json']['frontier'] is None and result['json']['isoflop'] is None
  assert 'FLOPs do not grow with samples' in result['text'] and 'compute-optimal' not in result['text']
  assert (tmp_path / 'fit' / 'fit_law.png').stat().st_size > 5000
  other = write(tmp_path / 'other.csv', ('params', 'samples', 'loss', 'flops'),
                np.column_stack([design.x, y, 2e4 * design.x[:, 1]]).tolist())
  assert 'FLOPs do not grow with params' in run(other, *QUICK)['text']


def test_isoflop_curves_of_a_table(tmp_path):
  rows = [(n, c / (6 * n)) for c in (1e12, 1e13, 1e14) for n in np.sqrt(c) * np.geomspace(0.02, 0.5, 5)]
  x = np.array(rows)
  path = write(tmp_path / 'a.csv', ('params', 'samples', 'loss'), np.column_stack([x, LAPTOP.predict(x)]).tolist())
  result = run(path, *QUICK, '--out', tmp_path / 'o')
  assert len(result['json']['isoflop']['curves']) == 3 and (tmp_path / 'o' / 'fit_isoflop.png').exists()
  assert 'bias of the parabola' in result['text']


def study(tmp_path, runs, failed=2):
  """A folder as a study leaves it: two failed runs, one without a loss, an axis and a score."""
  design, y, cells = runs
  header = ('cell', 'seed', 'status', 'params', 'samples', 'steps', 'flops', 'loss', 'method', 'knn')
  rows = []
  for i, (x, value, cell) in enumerate(zip(design.x, y, cells, strict=True)):
    status, loss = ('failed', '') if i < failed else ('done', '' if i == failed else value)
    rows.append((f'c{cell}', i % 2, status, *x, 100, 40 * x[0] * x[1], loss, 'mae', 0.5 + 0.4 * (1 - 30 * x[1] ** -0.5)))
  folder = tmp_path / 'study'
  folder.mkdir()
  write(folder / 'table.csv', header, rows)
  return folder


def test_a_study_with_runs_that_failed(runs, tmp_path):
  folder = study(tmp_path, runs)
  result = run(folder, *QUICK)
  found = result['json']
  assert found['runs'] == 29 and found['left_out'] == [
      'cell c0, seed 0 (failed)', 'cell c0, seed 1 (failed)', 'cell c1, seed 0 (loss empty)']
  assert 'left out 3 runs: cell c0, seed 0 (failed)' in result['text']
  assert found['frontier']['compute']['k'] == pytest.approx(40)
  assert (folder / 'fit' / 'fit.json').exists()
  assert run(folder, *QUICK, '--constant', '6')['json']['frontier']['compute']['k'] == 6


def test_a_score_of_one_axis_and_some_of_the_runs(runs, tmp_path):
  folder = study(tmp_path, runs, failed=0)
  found = run(folder, '--axis', 'samples', '--score', 'knn', '--where', 'method=mae', *QUICK)['json']
  assert found['E']['value'] == pytest.approx(0.9, abs=1e-3) and found['alpha']['value'] == pytest.approx(0.5, abs=1e-2)
  assert 'cells have the axes of another one' in found['notes'][0]
  with pytest.raises(UserError, match='has no runs of these values'):
    run(folder, '--where', 'method=dino')


def test_repeated_samples(tmp_path):
  n, u, epochs = (a.ravel() for a in np.meshgrid([1e5, 1e6, 1e7], [1e3, 1e4, 1e5], [1.0, 8, 64], indexing='ij'))
  worth = u * (1 + 12 * (1 - np.exp(-(epochs - 1) / 12)))
  y = LAPTOP.predict(np.stack([n, worth], axis=1)) * np.exp(0.003 * np.random.default_rng(0).standard_normal(27))
  path = write(tmp_path / 'a.csv', ('params', 'samples', 'epochs', 'seen', 'loss'),
               np.column_stack([n, u, epochs, u * epochs, y]).tolist())
  found = run(path, '--epochs', 'epochs', *QUICK)['json']
  assert found['law'] == 'loss = E + A params^-alpha + B effective(samples)^-beta'
  assert found['R']['low'] < 12 < found['R']['high']
  same = run(path, '--samples', 'seen', '--unique', 'samples', *QUICK)['json']
  assert same['R'] == pytest.approx(found['R'])
  given = run(path, '--epochs', 'epochs', '--repeat', '12', *QUICK)['json']
  assert 'R' not in given and given['beta']['value'] == pytest.approx(0.4, abs=0.05)


def test_columns_by_their_aliases(runs, tmp_path):
  design, y, _ = runs
  rows = np.column_stack([design.x, y]).tolist()
  assert run(write(tmp_path / 'a.csv', ('N', 'D', 'Val Loss'), rows), *QUICK)['json']['axes'] == ['N', 'D']
  named = run(write(tmp_path / 'b.csv', ('size', 'seen', 'nll'), rows), '--params', 'size', '--samples', 'seen', '--loss',
              'nll', *QUICK)['json']
  assert named['law'] == 'nll = E + A size^-alpha + B seen^-beta'


LINES = {
    'no column': (('paras', 'samples', 'loss'), None, (), "'params': did you mean 'paras'"),
    'option': (('params', 'samples', 'loss'), None, ('--loss', 'los'), "unknown column of .*'los': did you mean 'loss'"),
    'two': (('N', 'n_params', 'samples', 'loss'), [(1, 1, 2, 3)], (), 'columns N, n_params may all be params: choose with --params'),
    'text': (('params', 'samples', 'loss'), [(1, 2, 'abc')], (), "line 2: loss is 'abc', expected a number"),
    'negative': (('params', 'samples', 'loss'), [(1, 2, -3)], (), 'line 2: loss is -3, expected a number above 0'),
    'zero': (('params', 'samples', 'loss'), [(0, 2, 3)], (), 'line 2: params is 0, expected a number above 0'),
    'few': (('params', 'samples', 'loss'), [(1, 2, 3), (2, 2, 3), (1, 3, 3), (2, 3, 3)], (), '4 cells .* for 5 parameters, expected at least 6'),
    'single size': (('params', 'samples', 'loss'), [(1, i, 3) for i in range(1, 9)], (), 'have params 1, expected at least two sizes'),
    'nothing': (('params', 'samples', 'loss'), [], (), 'has no runs'),
    'all empty': (('params', 'samples', 'loss'), [(1, 2, '')], (), 'none of 1 runs has params, samples, loss; the first: line 2'),
    'twice': (('cell', 'seed', 'params', 'samples', 'loss'), [('a', 0, 1, 2, 3), ('a', 0, 1, 2, 3)], (), 'cell a, seed 0 stands twice'),
    'names': (('params', 'params', 'loss'), [(1, 2, 3)], (), "two columns of the name 'params'"),
    'draws': (('params', 'samples', 'loss'), None, ('--draws', '5'), '--draws is 5, expected at least 100'),
    'share': (('params', 'samples', 'loss'), None, ('--hold-out', '2'), '--hold-out is 2, expected 0 to 0.5'),
    'constant': (('params', 'samples', 'loss'), None, ('--constant', '-1'), '--constant is -1, expected a number above 0'),
    'budgets': (('params', 'samples', 'loss'), None, ('--compute', '1e18,x'), "--compute is '1e18,x', expected FLOPs"),
    'where': (('params', 'samples', 'loss'), None, ('--where', 'methd=a'), 'unknown column'),
    'both': (('params', 'samples', 'loss', 'epochs'), [(1, 2, 3, 4)], ('--epochs', 'epochs', '--unique', 'samples'), '--unique does not go with --epochs'),
    'axis': (('params', 'samples', 'loss'), None, ('--axis', 'params', '--samples', 'samples'), '--axis does not go with --samples'),
    'frontier': (('params', 'samples', 'loss'), None, ('--axis', 'params', '--compute', '1e9'), '--compute does not go with --axis'),
    'repeat': (('params', 'samples', 'loss'), None, ('--repeat', '5'), '--repeat needs the column of --unique or --epochs'),
}


@pytest.mark.parametrize('case', LINES)
def test_one_line_for_each_mistake(case, runs, tmp_path):
  header, rows, options, message = LINES[case]
  path = write(tmp_path / 't.csv', header, np.column_stack([runs[0].x, runs[1]]).tolist() if rows is None else rows)
  with pytest.raises(UserError, match=message) as e:
    run(path, *options, '--out', tmp_path / 'fit')
  assert '\n' not in str(e.value)


def test_a_place_that_is_not_there(tmp_path):
  with pytest.raises(UserError, match='does not exist: expected a CSV file or the folder of a study'):
    run(tmp_path / 'a.csv')
  with pytest.raises(UserError, match='has no table.csv'):
    run(tmp_path)
  with pytest.raises(UserError, match='cannot read'):
    (tmp_path / 'b.csv').write_bytes(b'\xff\xfe\x00')
    run(tmp_path / 'b.csv')


def test_what_the_numbers_rest_on_is_said(tmp_path):
  design, y, _ = line(5)
  path = write(tmp_path / 'a.csv', ('samples', 'loss'), np.column_stack([design.x, y]).tolist())
  notes = run(path, '--axis', 'samples', '--draws', '100')['json']['notes']
  assert any('2 degrees of freedom' in n for n in notes)
  power = 5 * design.x[:, 0] ** -0.5  # without a floor
  path = write(tmp_path / 'b.csv', ('samples', 'loss'), np.column_stack([design.x[:, 0], power]).tolist())
  assert any('E may be 0' in n for n in run(path, '--axis', 'samples', *QUICK)['json']['notes'])


def test_options_are_fields():
  with pytest.raises(TypeError):
    fit_lib.Options(paramz=1)
  assert law_report.NUMBERS[:5] == ('E', 'A', 'B', 'alpha', 'beta')
