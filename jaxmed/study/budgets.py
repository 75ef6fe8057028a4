"""What a compute budget is best spent on: the frontier of a law, and parabolas through isoflop curves.

Compute is C = k N^u D^v; 6 N D of transformers on text is k = 6, u = v = 1.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxmed.study.laws import Law

LEAST = 0.1  # exponents of compute below it mean that an axis costs nothing
SAME = 1.2  # runs whose budgets differ by less lie on one isoflop curve
FEWEST = 4  # sizes on a curve: a parabola has three numbers


@dataclasses.dataclass(frozen=True)
class Compute:
  """C = k N^u D^v. `spread` is the largest factor between it and the FLOPs that runs have."""

  k: float = 6.0
  u: float = 1.0
  v: float = 1.0
  spread: float = 1.0

  @property
  def trades(self) -> bool:
    """Whether both axes cost compute, so that a budget can be spent on one or the other."""
    return min(self.u, self.v) >= LEAST

  def of(self, params: np.ndarray, samples: np.ndarray) -> np.ndarray:
    return self.k * params**self.u * samples**self.v

  def samples(self, compute: np.ndarray | float, params: np.ndarray) -> np.ndarray:
    return (compute / (self.k * params**self.u)) ** (1 / self.v)


def compute_of(params: np.ndarray, samples: np.ndarray, flops: np.ndarray) -> Compute:
  """The compute that FLOPs [n] follow: k N D where that holds within 5 %, else k N^u D^v by least squares of logs."""
  logs = np.log(flops), np.log(params), np.log(samples)
  constant = Compute(float(np.exp(np.median(logs[0] - logs[1] - logs[2]))))
  spread = lambda c: float(np.exp(np.abs(np.log(c.of(params, samples)) - logs[0]).max()))
  if spread(constant) < 1.05:
    return dataclasses.replace(constant, spread=spread(constant))
  (k, u, v), *_ = np.linalg.lstsq(np.stack([np.ones(len(flops)), *logs[1:]], axis=1), logs[0], rcond=None)
  free = Compute(float(np.exp(k)), float(u), float(v))
  return dataclasses.replace(free, spread=spread(free))


def optimum(numbers: np.ndarray, budgets: np.ndarray, compute: Compute) -> np.ndarray:
  """Compute-optimal N [M, C] of laws [M, 5] (E, A, B, alpha, beta) at budgets [C].

  The least E + A N^-alpha + B D^-beta with k N^u D^v = C has alpha A N^-alpha / u = beta B D^-beta / v; with
  k = 6, u = v = 1 this is N* = G (C / 6)^a of Hoffmann et al. 2022, equation 4.
  """
  _, a, b, alpha, beta = (numbers[:, i:i + 1] for i in range(5))
  u, v = compute.u, compute.v
  log = (np.log(alpha * a * v / (beta * b * u)) + beta / v * np.log(budgets / compute.k)) / (alpha + beta * u / v)
  return np.exp(np.clip(log, -100, 100))  # no law, no optimum


def exponents(numbers: np.ndarray, compute: Compute) -> tuple[np.ndarray, np.ndarray]:
  """a and b [M] of N* ~ C^a and D* ~ C^b."""
  alpha, beta = numbers[:, 3], numbers[:, 4]
  a = beta / (alpha * compute.v + beta * compute.u)
  return a, (1 - compute.u * a) / compute.v


def curves(compute: np.ndarray, params: np.ndarray) -> list[np.ndarray]:
  """Rows of each isoflop curve, by rising budget: runs of one budget, of FEWEST sizes at least."""
  order = np.argsort(compute, kind='stable')
  groups: list[list[int]] = []
  for row in order:
    if groups and compute[row] < SAME * compute[groups[-1][0]]:
      groups[-1].append(int(row))
    else:
      groups.append([int(row)])
  return [np.array(g) for g in groups if len(np.unique(params[g])) >= FEWEST]


def vertex(params: np.ndarray, loss: np.ndarray) -> float:
  """N of the least value of a parabola of loss [n] over log N; NaN where it has none."""
  logs = np.log(params)
  centre = logs.mean()
  bend, slope, _ = np.polyfit(logs - centre, loss, 2)
  return float(np.exp(centre - slope / (2 * bend))) if bend > 0 else float('nan')


def isoflop(compute: np.ndarray, params: np.ndarray, samples: np.ndarray, loss: np.ndarray, law: Law,
            rule: Compute) -> dict[str, Any] | None:
  """Parabolas of loss over log N at each budget (Hoffmann et al. 2022, approach 2), and N* ~ C^a through their minima.

  A parabola is the law's own curve to second order about the minimum, so on a wide grid, or one whose centre lies
  beside the minimum, its vertex is not there (arXiv 2603.22339). `bias` says by how much on this very grid: the vertex
  of a parabola through what the law gives without noise, over the law's own optimum, minus 1.

  Returns:
    {'curves': [{'compute', 'runs', 'params' (the vertex, or None), 'inside' (the grid), 'width' (largest size over
    smallest), 'centre' (of the grid over the law's optimum), 'bias'}], 'exponent' and 'biased_exponent': a of the runs,
    and of what the law gives without noise}; None without a curve.
  """
  found = []
  for rows in curves(compute, params):
    budget, n = float(np.exp(np.log(compute[rows]).mean())), params[rows]
    best = float(optimum(np.array([[law.E, *law.A, *law.alpha]]), np.array([budget]), rule)[0, 0])
    seen, exact = (vertex(n, y) for y in (loss[rows], law.predict(np.stack([n, rule.samples(budget, n)], axis=1))))
    found.append({'compute': budget, 'runs': len(rows), 'params': seen, 'inside': bool(n.min() <= seen <= n.max()),
                  'width': float(n.max() / n.min()), 'centre': float(np.sqrt(n.max() * n.min()) / best),
                  'law': best, 'bias': exact / best - 1})
  if not found:
    return None
  value = lambda x: float(x) if np.isfinite(x) else None
  out: dict[str, Any] = {'exponent': _slope([(c['compute'], c['params']) for c in found if c['inside']]),
                         'biased_exponent': _slope([(c['compute'], c['law'] * (1 + c['bias'])) for c in found])}
  out['curves'] = [{k: value(v) if isinstance(v, float) else v for k, v in c.items()} for c in found]
  return out


def _slope(points: list[tuple[float, float]]) -> float | None:
  """The exponent of a power law through (C, N) points; None of fewer than two."""
  logs = np.log([p for p in points if np.isfinite(p[1]) and p[1] > 0])
  if len(logs) < 2:
    return None
  return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
