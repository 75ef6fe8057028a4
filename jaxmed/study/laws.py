"""Scaling laws as functions of arrays: fits whose result no start decides.

A law of K axes is  y = E + sum_k A_k x_k^-alpha_k  with E, A, alpha > 0. K = 2 with parameters N and samples D is that
of Hoffmann et al. 2022 (arXiv 2203.15556, appendix D.3); K = 1 is a power law that saturates; K = 0 a constant. Of a
score that rises the terms are taken from E.

What is minimised is the sum over runs of Huber's loss of the residual, with the paper's 1e-3 as its bound: of a falling
law log(predicted) - log(y), of a rising one (predicted - y) / median |y|. With the exponents fixed the rest is linear
(variable projection, arXiv 2603.22339), so a grid of exponents, each with its best E, A >= 0, gives the starts of a
descent in all parameters. The package `vpnls` searches the same way, but minimises Huber's loss of y itself rather than
of log y, and so does not give the published constants.

Axes are centred in the logarithm, so that A and alpha are not entangled.
"""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

DELTA = 1e-3  # Huber's bound, of Hoffmann et al. 2022
EXPONENTS = (0.01, 6.0)  # those outside cannot be told from log x, or from a step
_GRID = {0: 1, 1: 96, 2: 24}  # exponents searched an axis
REPEATS = (1.0, 4.0, 16.0, 64.0)  # starts of R; 15.4 is what Muennighoff et al. 2023 found for text
_SMALLEST = 1e-6  # a coefficient that is 0 starts the descent from this fraction of y
_DEEPEST = 30.0  # e-folds below y at which a term is none


@dataclasses.dataclass(frozen=True)
class Design:
  """Where runs lie, without what they gave.

  Attributes:
    x: [n, K] positive numbers. rising: y rises with x. distinct: [n] distinct samples, of which the last axis of x
      counts all passes; without them no sample counts as repeated. repeat: the constant R of repeated samples; None
      fits it.
  """

  x: np.ndarray
  rising: bool = False
  distinct: np.ndarray | None = None
  repeat: float | None = None

  @property
  def axes(self) -> int:
    return self.x.shape[1]

  @property
  def fits_repeat(self) -> bool:
    return self.distinct is not None and self.repeat is None

  @property
  def parameters(self) -> int:
    """How many numbers a fit decides."""
    return 1 + 2 * self.axes + self.fits_repeat

  def at(self, rows: np.ndarray) -> 'Design':
    """The design of some rows."""
    return dataclasses.replace(self, x=self.x[rows], distinct=None if self.distinct is None else self.distinct[rows])

  def without(self, axis: int) -> 'Design':
    """The design that leaves an axis out."""
    last = axis == self.axes - 1
    return dataclasses.replace(self, x=np.delete(self.x, axis, axis=1), distinct=None if last else self.distinct)


@dataclasses.dataclass(frozen=True)
class Law:
  """A fitted law; see the module. `repeat` is R of repeated samples, `huber` the sum that was minimised."""

  E: float
  A: tuple[float, ...]
  alpha: tuple[float, ...]
  rising: bool = False
  repeat: float | None = None
  huber: float = math.nan

  def predict(self, x: np.ndarray, distinct: np.ndarray | None = None) -> np.ndarray:
    """y [n] at x [n, K]."""
    x = np.array(x, np.float64)
    if self.repeat is not None and distinct is not None:
      x[:, -1] = effective(x[:, -1], distinct, self.repeat)
    terms = sum((a * x[:, k] ** -b for k, (a, b) in enumerate(zip(self.A, self.alpha, strict=True))), np.zeros(len(x)))
    return self.E - terms if self.rising else self.E + terms


def huber(residual: np.ndarray, delta: float = DELTA) -> np.ndarray:
  """Huber's loss of each residual: r^2 / 2 up to delta, delta (|r| - delta / 2) beyond."""
  size = np.abs(residual)
  return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


def effective(samples: np.ndarray, distinct: np.ndarray, repeat: Any) -> np.ndarray:
  """What repeated samples are worth in distinct ones, U + U R (1 - exp(-(D / U - 1) / R)).

  Muennighoff et al. 2023 (arXiv 2305.16264), equation 5: D / U - 1 is the number of repetitions, the passes after the
  first. Not more than one pass is worth D.
  """
  distinct = np.minimum(distinct, samples)
  return distinct * (1 + repeat * -np.expm1(-(samples / distinct - 1) / repeat))


def fit(design: Design, y: np.ndarray, delta: float = DELTA) -> Law:
  """The law of least Huber sum for y [n].

  Every block of the grid of exponents gives a start, and the best ends are polished by L-BFGS on a sum whose scale is
  that of its bound: with the plain sum a stopping rule ends too early (Besiroglu et al. 2024, arXiv 2404.10102).
  """
  problem = Problem(design, y, delta)
  starts = problem.starts()
  theta, _ = problem.descend(starts, np.broadcast_to(problem.y, (len(starts), len(y))), 150)
  theta, _ = problem.descend(problem.polished(theta)[None], problem.y[None], 200, newton=True)
  return problem.law(theta[0])


def fit_draws(design: Design, y: np.ndarray, draws: np.ndarray, law: Law, delta: float = DELTA) -> np.ndarray:
  """Fits of many draws [M, n] of y at one design: numbers [M, 1 + 2 K (+ 1)], E, A, alpha and R.

  Each draw starts at the law of y and at the best point of its own grid, and the better end counts.
  """
  problem = Problem(design, y, delta)
  starts = [np.broadcast_to(problem.theta(law), (len(draws), problem.size)), problem.projected(draws)]
  ends = [problem.descend(start, draws, 60) for start in starts]
  theta = np.where((ends[0][1] <= ends[1][1])[:, None], ends[0][0], ends[1][0])
  return problem.numbers(theta)


class Problem:
  """A design with y, and the search in theta [M, p]: log E, log A at the centre of x, log alpha (, log R)."""

  def __init__(self, design: Design, y: np.ndarray, delta: float = DELTA):
    self.design, self.y, self.delta = design, np.asarray(y, np.float64), delta
    self.size, self.axes, self.sign = design.parameters, design.axes, -1.0 if design.rising else 1.0
    self.scale = float(np.median(np.abs(self.y))) or 1.0
    self.centre = np.log(design.x).mean(axis=0)
    low = math.log(self.scale) - _DEEPEST
    self.low = np.array([low] * (1 + self.axes) + [math.log(EXPONENTS[0])] * self.axes + [math.log(0.05)])[:self.size]
    self.high = np.array([math.log(self.scale) + 20] * (1 + self.axes) + [math.log(EXPONENTS[1])] * self.axes
                         + [math.log(1e4)])[:self.size]

  def logs(self, repeat: np.ndarray | float | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Centred logarithms of x [M or 1, n, K], and the slope of the last one in log R [M, n] where R is fitted."""
    z = np.log(self.design.x)[None]
    distinct, slope = self.design.distinct, None
    if distinct is not None:
      r = np.reshape(np.asarray(repeat if self.design.repeat is None else self.design.repeat, np.float64), (-1, 1))
      samples = self.design.x[None, :, -1]
      worth = effective(samples, distinct[None], r)
      u = np.maximum(samples / np.minimum(distinct, samples) - 1, 0) / r
      slope = np.minimum(distinct, samples) * r * (-np.expm1(-u) - u * np.exp(-u)) / worth
      z = np.concatenate([np.broadcast_to(z[..., :-1], (len(r), *z.shape[1:-1], self.axes - 1)),
                          np.log(worth)[..., None]], axis=-1)
    return z - self.centre, slope if self.design.fits_repeat else None

  def residuals(self, value: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What is left of y [M, n] by values of the law [M, n]."""
    return (value - y) / self.scale if self.design.rising else np.log(value) - np.log(y)

  def terms(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Signed terms [M, n, K] of theta [M, p], and what `logs` says."""
    k = self.axes
    z, along = self.logs(np.exp(theta[:, -1]))
    power = theta[:, None, 1:1 + k] - np.exp(theta[:, None, 1 + k:1 + 2 * k]) * z
    return self.sign * np.exp(np.clip(power, -700, 300)), z, along

  def slopes(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of the law [M, n], and slopes of its residuals in theta [M, n, p]."""
    terms, z, along = self.terms(theta)
    floor, alpha = np.exp(theta[:, :1]), np.exp(theta[:, None, 1 + self.axes:1 + 2 * self.axes])
    value = floor + terms.sum(axis=2)
    parts = [np.broadcast_to(floor, value.shape)[..., None], terms, -alpha * z * terms]
    if along is not None:
      parts.append((-alpha[..., -1] * terms[..., -1] * along)[..., None])
    return value, np.concatenate(parts, axis=2) / (self.scale if self.design.rising else value[..., None])

  def loss(self, theta: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Huber sums [M] of theta [M, p] for y [M, n]."""
    value = np.exp(theta[:, :1]) + self.terms(theta)[0].sum(axis=2)
    return huber(self.residuals(value, y), self.delta).sum(axis=1)

  def descend(self, theta: np.ndarray, y: np.ndarray, steps: int,
              newton: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Reweighted least squares, damped as by Levenberg and Marquardt, of all rows at once: their ends and losses.

    With `newton` the curvature is that of Huber's loss itself, none beyond its bound: fast at the end, poor before.
    """
    theta = np.clip(theta, self.low, self.high)
    loss, damping = self.loss(theta, y), np.full(len(theta), 1e-2)
    for _ in range(steps):
      value, slopes = self.slopes(theta)
      r = self.residuals(value, y)
      weight = np.minimum(1.0, self.delta / np.maximum(np.abs(r), 1e-300))
      down = np.swapaxes(slopes, 1, 2) @ (weight * r)[..., None]
      curved = (weight == 1).astype(float) if newton else weight
      square = np.swapaxes(slopes * curved[..., None], 1, 2) @ slopes  # [M, p, p]
      diagonal = np.einsum('mpp->mp', square)
      bound = diagonal.max(axis=1, keepdims=True) * 1e-9 + 1e-300
      square[:, np.arange(self.size), np.arange(self.size)] += damping[:, None] * diagonal + bound
      step = -np.linalg.solve(square, down)[..., 0]
      tried = np.clip(theta + np.clip(step, -1.5, 1.5), self.low, self.high)
      found = self.loss(tried, y)
      better = found < loss
      theta, loss = np.where(better[:, None], tried, theta), np.where(better, found, loss)
      damping = np.clip(np.where(better, damping / 4, damping * 6), 1e-9, 1e9)
    return theta, loss

  def polished(self, theta: np.ndarray, count: int = 4) -> np.ndarray:
    """The best of `count` rows [p] after L-BFGS in their own scale."""
    from scipy.optimize import minimize
    y, best = self.y[None], (math.inf, theta[0])
    def sums(t: np.ndarray) -> tuple[float, np.ndarray]:
      value, slopes = self.slopes(t[None])
      r = self.residuals(value, y)
      return (float(huber(r, self.delta).sum()) / self.delta**2,
              np.clip(r, -self.delta, self.delta)[0] @ slopes[0] / self.delta**2)
    order = np.argsort(self.loss(theta, np.broadcast_to(y, (len(theta), y.shape[1]))))[:count]
    for start in theta[order]:
      for _ in range(3):  # L-BFGS forgets a poor history
        found = minimize(sums, start, jac=True, method='L-BFGS-B', bounds=list(zip(self.low, self.high, strict=True)),
                         options={'maxiter': 3000, 'maxfun': 6000, 'ftol': 1e-15, 'gtol': 1e-9, 'maxcor': 30})
        start = found.x
      best = min(best, (found.fun, found.x), key=lambda b: b[0])
    return best[1]

  def starts(self) -> np.ndarray:
    """The best point of each block of the grid (and of each start of R): [S, p]."""
    out = []
    for r in REPEATS if self.design.fits_repeat else (None,):
      grid = Grid.of(self, r)
      rss, coefficient = grid.solve(self.y[None])
      side = round(len(grid.alpha) ** (1 / max(self.axes, 1)))
      width = max(1, side // 6)
      block = np.zeros(len(grid.alpha), int)
      for place in np.unravel_index(np.arange(len(grid.alpha)), (side,) * self.axes) if self.axes else ():
        block = block * side + place // width
      best = [min(np.flatnonzero(block == b), key=lambda i: rss[0, i]) for b in np.unique(block)]
      out.append(self._theta_of(grid.alpha[best], coefficient[0, best], r))
    return np.concatenate(out)

  def projected(self, draws: np.ndarray) -> np.ndarray:
    """The best point of the grid for each draw [M, n] of y: [M, p]."""
    best, theta = np.full(len(draws), np.inf), np.zeros((len(draws), self.size))
    for r in REPEATS if self.design.fits_repeat else (None,):
      grid = Grid.of(self, r)
      for some in np.array_split(np.arange(len(draws)), -(-len(draws) * len(grid.alpha) // 400_000)):
        rss, coefficient = grid.solve(draws[some])
        i = rss.argmin(axis=1)
        rows = np.arange(len(some))
        better = rss[rows, i] < best[some]
        found = self._theta_of(grid.alpha[i], coefficient[rows, i], r)
        theta[some] = np.where(better[:, None], found, theta[some])
        best[some] = np.minimum(best[some], rss[rows, i])
    return theta

  def _theta_of(self, alpha: np.ndarray, coefficient: np.ndarray, repeat: float | None) -> np.ndarray:
    """theta [M, p] of exponents [M, K] and coefficients [M, 1 + K]."""
    parts = [np.log(np.maximum(coefficient, _SMALLEST * self.scale)), np.log(alpha)]
    if repeat is not None and self.design.fits_repeat:
      parts.append(np.full((len(alpha), 1), math.log(repeat)))
    return np.concatenate(parts, axis=1)

  def numbers(self, theta: np.ndarray) -> np.ndarray:
    """E, A, alpha (and R) [M, p] of theta."""
    k, out = self.axes, np.array(theta)
    out[:, 1:1 + k] += np.exp(theta[:, 1 + k:1 + 2 * k]) * self.centre
    return np.exp(out)

  def theta(self, law: Law) -> np.ndarray:
    """theta [p] of a law."""
    alpha = np.array(law.alpha)
    parts = [[math.log(law.E)], np.log(law.A) - alpha * self.centre, np.log(alpha)]
    if self.design.fits_repeat:
      parts.append([math.log(law.repeat or REPEATS[0])])
    return np.concatenate(parts)

  def law(self, theta: np.ndarray) -> Law:
    """The law of theta [p]."""
    k, numbers = self.axes, self.numbers(theta[None])[0]
    return Law(float(numbers[0]), tuple(map(float, numbers[1:1 + k])), tuple(map(float, numbers[1 + k:1 + 2 * k])),
               self.design.rising, float(numbers[-1]) if self.design.fits_repeat else self.design.repeat,
               float(self.loss(theta[None], self.y[None])[0]))


@dataclasses.dataclass(frozen=True)
class Grid:
  """For each point of a grid of exponents the least squares in E and A, none negative, of any y at once.

  Attributes:
    alpha: [G, K]. parts: for each set of columns that are not 0: the columns, orthonormal bases [n, G * s] and inverses
      [n, G * s]. weight: [n], of a row's residual.
  """

  alpha: np.ndarray
  parts: tuple[tuple[tuple[int, ...], np.ndarray, np.ndarray], ...]
  weight: np.ndarray

  @classmethod
  def of(cls, problem: Problem, repeat: float | None = None, points: int | None = None) -> 'Grid':
    """`points` exponents an axis, all pairs of them; by default as many as starts are looked for among."""
    z = problem.logs(repeat)[0][0]
    k, n = problem.axes, len(problem.y)
    values = np.geomspace(*EXPONENTS, points or _GRID[k])
    alpha = np.array(list(itertools.product(values, repeat=k)), float).reshape(len(values) ** k, k)
    weight = 1 / (np.full(n, problem.scale) if problem.design.rising else problem.y)
    columns = np.concatenate([np.ones((len(alpha), n, 1)), problem.sign * np.exp(-alpha[:, None] * z)], axis=2)
    columns = columns * weight[:, None]
    parts = []
    for count in range(1, k + 2):
      for chosen in itertools.combinations(range(k + 1), count):
        q, r = np.linalg.qr(columns[..., chosen])  # [G, n, s], [G, s, s]
        inverse = np.linalg.solve(r + 1e-12 * np.abs(r).max(axis=(1, 2), keepdims=True) * np.eye(count),
                                  np.swapaxes(q, 1, 2))
        flat = lambda a: np.ascontiguousarray(np.moveaxis(a, 1, 0).reshape(n, -1))
        parts.append((chosen, flat(q), flat(np.swapaxes(inverse, 1, 2))))
    return cls(alpha, tuple(parts), weight)

  def solve(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Residual sums [M, G] and coefficients [M, G, 1 + K] of y [M, n]."""
    scaled, points = y * self.weight, len(self.alpha)
    total = np.square(scaled).sum(axis=1, keepdims=True)
    best = np.repeat(total, points, axis=1)
    coefficient = np.zeros((*best.shape, 1 + self.alpha.shape[1]))
    for chosen, basis, inverse in self.parts:
      rss = total - np.square((scaled @ basis).reshape(len(y), points, -1)).sum(axis=2)
      found = (scaled @ inverse).reshape(len(y), points, -1)
      better = (rss < best) & (found >= 0).all(axis=2)
      best = np.where(better, rss, best)
      coefficient[better] = 0
      for i, column in enumerate(chosen):
        coefficient[..., column] = np.where(better, found[..., i], coefficient[..., column])
    return np.maximum(best, 0), coefficient
