"""Fits against exact laws, slow searches and published constants; intervals and chances against simulations."""

import csv
import json
import pathlib

import numpy as np
import pytest
from scipy import optimize, special

from jaxmed.study import budgets, law_intervals, laws
from jaxmed.study.laws import Design, Grid, Law, Problem
from tests.study.simulated import LAPTOP, grid, line
from tools import law_coverage

DATA = pathlib.Path(__file__).parents[2] / 'experiments' / 'data'
# Of Muennighoff et al. 2023: E, A, B, alpha = beta, R of samples, R of parameters.
MUENNIGHOFF = (np.exp(0.6254804), np.exp(6.255414), np.exp(7.3049974), 0.3526596, 15.387756, 5.309743)


def chinchilla():
  with open(DATA / 'chinchilla.csv', newline='') as f:
    rows = list(csv.DictReader(f))
  params, samples, loss = (np.array([float(r[c]) for r in rows]) for c in ('params', 'samples', 'loss'))
  return Design(np.stack([params, samples], axis=1)), loss


def flat(law):
  return np.array([law.E, *law.A, *law.alpha, *([law.repeat] if law.repeat else [])])


def test_the_published_constants():
  law = laws.fit(*chinchilla())
  want = [1.8172, 477.9, 2142.6, 0.3473, 0.3672]
  np.testing.assert_allclose(flat(law), want, rtol=3e-4)
  assert law.huber == pytest.approx(0.0010182740, rel=1e-5)


def test_huber_is_scipys():
  r = np.random.default_rng(0).standard_normal(200)
  np.testing.assert_allclose(laws.huber(r, 0.3), special.huber(0.3, r), atol=1e-15)


def slow(theta, x, y, rising, delta):
  """The sum in plain words, theta = log E, log A ..., alpha ..."""
  k, total = x.shape[1], 0.0
  for row, seen in zip(x, y, strict=True):
    value = np.exp(theta[0])
    for i in range(k):
      value += (-1 if rising else 1) * np.exp(theta[1 + i]) * row[i] ** -theta[1 + k + i]
    r = (value - seen) / np.median(np.abs(y)) if rising else np.log(max(value, 1e-300) / seen)
    total += 0.5 * r * r if abs(r) <= delta else delta * (abs(r) - delta / 2)
  return total


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('axes', [1, 2])
def test_no_start_finds_less(seed, axes):
  rng = np.random.default_rng(seed)
  design, y, _ = grid(4, 4, noise=0.02, rng=rng) if axes == 2 else line(9, noise=0.02, rng=rng)
  law = laws.fit(design, y)
  here = np.concatenate([[np.log(law.E)], np.log(law.A), law.alpha])
  assert slow(here, design.x, y, False, 1e-3) == pytest.approx(law.huber, rel=1e-9)
  for scale in (0.01, 0.1, 0.5):
    found = optimize.minimize(slow, here + scale * rng.standard_normal(len(here)) * np.abs(here), method='Nelder-Mead',
                              args=(design.x, y, False, 1e-3), options={'maxiter': 400, 'maxfev': 400})
    assert found.fun >= law.huber * (1 - 1e-6)


@pytest.mark.parametrize('law', [LAPTOP, Law(1.8, (400.0, 2000.0), (0.34, 0.37))])
def test_an_exact_law_is_found(law):
  design, y, _ = grid(law=law)
  np.testing.assert_allclose(flat(laws.fit(design, y)), flat(law), rtol=1e-4)


@pytest.mark.parametrize('rising', [False, True])
def test_an_exact_law_of_one_axis_is_found(rising):
  design, y, _ = line(rising=rising)
  found = laws.fit(design, y)
  np.testing.assert_allclose(flat(found), [0.9 if rising else 0.2, 5.0, 0.5], rtol=1e-4)
  np.testing.assert_allclose(found.predict(design.x), y, rtol=1e-6)


def test_units_change_the_coefficients_alone():
  rng = np.random.default_rng(4)
  design, y, _ = grid(noise=0.01, rng=rng)
  one, other = laws.fit(design, y), laws.fit(Design(design.x / [1e6, 1e3]), 7 * y)
  assert other.huber == pytest.approx(one.huber, rel=1e-6)
  np.testing.assert_allclose(other.alpha, one.alpha, rtol=1e-4)
  np.testing.assert_allclose(other.E, 7 * one.E, rtol=1e-4)
  np.testing.assert_allclose(other.A, 7 * np.array(one.A) * [1e6 ** -one.alpha[0], 1e3 ** -one.alpha[1]], rtol=1e-3)


def test_repeated_samples_as_the_paper_counts_them():
  """README.md of huggingface/datablations prints these two losses."""
  e, a, b, alpha, r_samples, r_params = MUENNIGHOFF
  g = (a / b) ** (1 / (2 * alpha))
  for (n, d, u), want in {(6.34e9, 242e9, 25e9): 2.2256440889984477, (8.67e9, 178e9, 25e9): 2.2269634075087867}.items():
    base = min(n, u * g * g)  # parameters that suit the distinct samples
    law = Law(e, (a, b), (alpha, alpha), repeat=r_samples)
    x = np.array([[laws.effective(np.array([n]), np.array([base]), r_params)[0], d]])
    assert law.predict(x, np.array([u]))[0] == pytest.approx(want, rel=1e-9)


def test_effective_samples():
  samples, distinct = np.array([50.0, 100.0, 400.0, 1e9]), np.full(4, 100.0)
  got = laws.effective(samples, distinct, 10.0)
  np.testing.assert_allclose(got[:2], [50, 100])
  assert got[2] == pytest.approx(100 + 100 * 10 * (1 - np.exp(-3 / 10)))
  assert got[3] == pytest.approx(100 * 11)  # never more than U (1 + R)
  np.testing.assert_allclose(laws.effective(samples[:3], distinct[:3], 1e9), samples[:3], rtol=1e-6)


def repeated():
  rng = np.random.default_rng(5)
  n, u, epochs = (a.ravel() for a in np.meshgrid([1e5, 1e6, 1e7], [1e3, 1e4, 1e5], [1.0, 4, 20, 80], indexing='ij'))
  return Design(np.stack([n, u * epochs], axis=1), distinct=u), rng


def test_the_constant_of_repeated_samples_is_found():
  design, _ = repeated()
  truth = Law(0.3, (12.0, 25.0), (0.35, 0.4), repeat=12.0)
  y = truth.predict(design.x, design.distinct)
  np.testing.assert_allclose(flat(laws.fit(design, y)), flat(truth), rtol=1e-3)
  given = laws.fit(Design(design.x, distinct=design.distinct, repeat=12.0), y)
  np.testing.assert_allclose(flat(given), flat(truth), rtol=1e-3)
  ignored = laws.fit(Design(design.x), y)
  assert ignored.huber > 10 * given.huber + 1e-6


@pytest.mark.parametrize('kind', ['falling', 'rising', 'repeats'])
def test_slopes_are_those_of_finite_differences(kind):
  design, y = repeated()[0], None
  if kind != 'repeats':
    design = Design(design.x, rising=kind == 'rising')
  y = np.linspace(1, 2, len(design.x))
  problem = Problem(design, y)
  theta = np.array([[1.0, -1.0, -1.5, np.log(0.3), np.log(0.4), np.log(7.0)]])[:, :problem.size]
  _, slopes = problem.slopes(theta)
  for i in range(problem.size):
    ends = [problem.residuals(problem.slopes(theta + sign * 1e-6 * np.eye(problem.size)[i])[0], y[None]) for sign in (1, -1)]
    np.testing.assert_allclose(slopes[0, :, i], (ends[0] - ends[1])[0] / 2e-6, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('axes', [1, 2])
def test_the_grid_is_least_squares_without_negative_coefficients(axes):
  rng = np.random.default_rng(6)
  design, y, _ = grid(3, 4, noise=0.3, rng=rng) if axes == 2 else line(6, noise=0.3, rng=rng)
  problem = Problem(design, y)
  solver = Grid.of(problem)
  rss, coefficient = solver.solve(np.stack([y, y[::-1]]))
  for g in rng.integers(0, len(solver.alpha), 20):
    columns = np.concatenate([np.ones((len(y), 1)), np.exp(-solver.alpha[g] * problem.logs()[0][0])], axis=1) / y[:, None]
    for i, values in enumerate((y, y[::-1])):
      want, norm = optimize.nnls(columns, values / y)
      assert rss[i, g] == pytest.approx(norm**2, rel=1e-6, abs=1e-9)
      np.testing.assert_allclose(columns @ coefficient[i, g], columns @ want, rtol=1e-4, atol=1e-4)


def test_draws_are_fitted_as_tables_are():
  rng = np.random.default_rng(7)
  design, y, _ = grid(noise=0.01, rng=rng)
  law = laws.fit(design, y)
  draws = law.predict(design.x) * np.exp(0.01 * rng.standard_normal((6, len(y))))
  got = laws.fit_draws(design, y, draws, law)
  for row, values in zip(got, draws, strict=True):
    best = laws.fit(design, values)
    ended = laws.huber(np.log(law_intervals.law_of(design, row).predict(design.x) / values)).sum()
    assert ended <= best.huber * 1.02


def test_the_optimum_is_the_least_loss_of_a_budget():
  numbers = np.array([[0.3, 12.0, 25.0, 0.35, 0.4], [1.8, 400, 2000, 0.34, 0.37]])
  for rule in (budgets.Compute(), budgets.Compute(40.0, 0.9, 1.1)):
    got = budgets.optimum(numbers, np.array([1e12, 1e15]), rule)
    for i, (e, a, b, alpha, beta) in enumerate(numbers):
      for j, c in enumerate((1e12, 1e15)):
        loss = lambda n: e + a * np.exp(n) ** -alpha + b * rule.samples(c, np.exp(n)) ** -beta  # noqa: B023
        found = optimize.minimize_scalar(loss, bounds=(0, 30), method='bounded', options={'xatol': 1e-9})
        assert got[i, j] == pytest.approx(np.exp(found.x), rel=1e-3)
    a, b = budgets.exponents(numbers, rule)
    np.testing.assert_allclose(a, np.log(got[:, 1] / got[:, 0]) / np.log(1e3), rtol=1e-9)
    np.testing.assert_allclose(rule.u * a + rule.v * b, 1)


def test_the_rule_of_compute_is_found():
  rng = np.random.default_rng(8)
  n, d = np.exp(rng.uniform(5, 15, (2, 30)))
  six = budgets.compute_of(n, d, 6 * n * d)
  assert (six.k, six.u, six.v, six.spread) == pytest.approx((6, 1, 1, 1))
  other = budgets.compute_of(n, d, 3 * n**0.8 * d**1.1)
  assert (other.k, other.u, other.v, other.spread) == pytest.approx((3, 0.8, 1.1, 1))


def test_parabolas_and_their_bias():
  """A symmetric law on a centred grid has none; wide and off-centre it is far off, as arXiv 2603.22339 finds."""
  law, rule = Law(1.0, (30.0, 30.0), (0.4, 0.4)), budgets.Compute()
  def curve(width, shift, law=law):
    parts = []
    for c in (1e12, 1e14):
      best = budgets.optimum(np.array([flat(law)]), np.array([c]), rule)[0, 0]
      n = best * shift * np.geomspace(1 / width, width, 9)
      parts.append((np.full(9, c), n, rule.samples(c, n)))
    compute, n, d = (np.concatenate(p) for p in zip(*parts, strict=True))
    return budgets.isoflop(compute, n, d, law.predict(np.stack([n, d], axis=1)), law, rule)
  for found in (curve(2, 1), curve(16, 1)):
    assert [c['bias'] for c in found['curves']] == pytest.approx([0, 0], abs=1e-6)
    assert found['exponent'] == pytest.approx(0.5)
  assert abs(curve(16, 4)['curves'][0]['bias']) > 0.05
  skewed = Law(1.0, (30.0, 30.0), (0.5, 0.2))
  narrow, wide = curve(1.5, 1, skewed), curve(16, 1, skewed)
  assert abs(narrow['curves'][0]['bias']) < 0.05 < abs(wide['curves'][0]['bias'])
  assert all(c['inside'] and c['runs'] == 9 for c in wide['curves'])


def test_a_curve_needs_four_sizes_of_one_budget():
  compute = np.array([1.0, 1.05, 1.1, 1.15, 9, 9, 9, 9])
  assert [r.tolist() for r in budgets.curves(compute, np.array([1.0, 2, 3, 4, 1, 2, 3, 3]))] == [[0, 1, 2, 3]]
  assert np.isnan(budgets.vertex(np.array([1.0, 2, 3, 4]), -np.log([1.0, 2, 3, 4]) ** 2))


def test_seeds_of_a_cell_are_drawn_together():
  cells = np.array([0, 0, 1, 1, 1, 2, 3, 3])
  residual = np.array([5.0, 5, 1, 1, 1, -2, 0.5, 0.5])  # the same in all seeds of a cell
  drawn = law_intervals.redrawn(residual, cells, 1.0 + cells[:, None], 1, 2000, 0)
  spread = drawn.std()
  for c in (0, 1, 3):
    rows = drawn[:, cells == c]
    assert np.ptp(rows, axis=1).mean() < 0.6 * spread
  between = np.corrcoef(drawn[:, 0], drawn[:, 2])[0, 1]
  assert np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1] > 0.8 > 0.3 > abs(between)


def test_noise_may_differ_along_a_table():
  rng, x = np.random.default_rng(0), np.geomspace(1, 1e6, 200)[:, None]
  residual = np.where(np.arange(200) < 100, 0.01, 1.0) * rng.standard_normal(200)
  spread = law_intervals.redrawn(residual, np.arange(200), x, 3, 400, 0).std(axis=0)
  np.testing.assert_allclose([spread[:80].mean(), spread[120:].mean()], [0.0115, 1.15], rtol=0.15)


@pytest.mark.parametrize('count', [6, 60])
def test_an_interval_is_hardly_wider_than_students_t_and_not_narrower(count):
  from scipy import stats
  ratios = []
  for seed in range(20):
    values = np.random.default_rng(seed).standard_normal(count)
    drawn = law_intervals.redrawn(values - values.mean(), np.arange(count), 1.0 + np.arange(count)[:, None], 1, 4000, seed)
    half = stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count)
    ratios.append(np.ptp(np.percentile(drawn.mean(axis=1), [2.5, 97.5])) / 2 / half)
  assert 1.1 < np.mean(ratios) < 1.2 * (1 + 2 / count)


def test_four_cells_are_undecided():
  """All 24 orders are tried, and the best comes by chance once in 24."""
  design, y, _ = line(4, rising=True)
  assert law_intervals.chance(design, y) == pytest.approx(1 / 24)


def test_a_law_is_decided_and_its_reverse_is_not():
  rng = np.random.default_rng(10)
  design, y, _ = grid(4, 4, 2, noise=0.02, rng=rng)
  assert law_intervals.chances(design, y, ('params', 'samples')) == pytest.approx(
      {'law': 0.001, 'params': 0.001, 'samples': 0.001})
  reverse = law_intervals.chances(design, 1 / y, ('params', 'samples'), permutations=99)
  assert min(reverse.values()) > 0.5


def test_an_axis_without_a_law_is_undecided():
  rng, seen = np.random.default_rng(11), []
  for _ in range(8):
    design, _, _ = grid(4, 4, 2)
    y = (0.3 + 25 * design.x[:, 1] ** -0.4) * np.exp(0.02 * rng.standard_normal(32))
    found = law_intervals.chances(design, y, ('params', 'samples'), permutations=99)
    assert found['samples'] <= law_intervals.LEVEL
    seen.append(found['params'])
  assert sum(p <= law_intervals.LEVEL for p in seen) <= 1 and 0.2 < np.mean(seen) < 0.8


def test_of_equal_compute_the_larger_axes_are_held_out():
  design, y, cells = grid(4, 4, 1, noise=0.01, rng=np.random.default_rng(0))
  found = law_intervals.held_out(design, y, cells, design.x[:, 0], 0.1, draws=100)
  assert len(found['rows']) == 2 and (design.x[found['rows'], 0] == design.x[:, 0].max()).all()
  assert sorted(design.x[found['rows'], 1]) == sorted(np.unique(design.x[:, 1]))[-2:]



def test_noise_is_undecided():
  rng, design, chances = np.random.default_rng(12), grid(4, 4, 2)[0], []
  for _ in range(60):
    chances.append(law_intervals.chance(design, np.exp(0.05 * rng.standard_normal(32)), permutations=99))
  assert sum(p > law_intervals.LEVEL for p in chances) >= 56
  assert 0.4 < np.mean(chances) < 0.6  # an exact test: chances of noise are even


def test_the_largest_cells_are_predicted():
  design, y, cells = grid(4, 4, 2)
  size = design.x.prod(axis=1)
  found = law_intervals.held_out(design, y, cells, size, 0.2, draws=100)
  assert sorted(set(cells[found['rows']].tolist())) == sorted(set(cells[np.argsort(size, kind='stable')[-6:]].tolist()))
  np.testing.assert_allclose(found['predicted'], y[found['rows']], rtol=1e-5)
  assert found['constant'] > y[found['rows']].min()
  few, values, names = line(4)
  assert law_intervals.held_out(few, values, names, few.x[:, 0]) is None


def inside(seed, draws=100, **how):
  """Whether the intervals of E, A, B, alpha, beta hold the truth in one simulation."""
  design, y, cells = grid(noise=0.01, rng=np.random.default_rng(seed), **how)
  numbers = law_intervals.bootstrap(design, y, laws.fit(design, y), cells, draws, seed)
  low, high = np.percentile(numbers, [2.5, 97.5], axis=0)
  return (low <= flat(LAPTOP)) & (flat(LAPTOP) <= high)


def test_intervals_hold_the_truth():
  """tools/law_coverage.py simulates more."""
  held = np.array([inside(seed, widths=4, sizes=4, seeds=2) for seed in range(6)])
  assert (held.sum(axis=0) >= 5).all()


def test_the_script_counts(tmp_path, capsys):
  law_coverage.main(['--grids', 'laptop:4x4x1:0.01t', '--simulations', '2', '--draws', '50', '--out', str(tmp_path / 'a.json')])
  assert '| laptop:4x4x1:0.01t |' in capsys.readouterr().out
  (row,) = json.loads((tmp_path / 'a.json').read_text())
  assert row['law'] == row['noise undecided'] == 2 and all(0 <= row[name] <= 2 for name in law_coverage.NAMES)
