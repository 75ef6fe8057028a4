"""Probes on frozen features, as pure functions on arrays: weighted neighbours and logistic regression."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxmed.errors import UserError

SHORT_GRID = tuple(10.0 ** np.linspace(-4, 2, 7))
FULL_GRID = tuple(10.0 ** np.linspace(-6, 5, 45))  # DINOv2's: dinov2/eval/log_regression.py
RIDGE_GRID = tuple(10.0 ** np.linspace(-4, 2, 7))
_SMALL = 2**28  # multiply-adds of one gradient below which threads only get in each other's way
_CHUNK = 2**24  # similarities held at once: 64 MiB of float32


def knn(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, num_classes: int,
        k: int = 20, temperature: float = 0.07) -> np.ndarray:
  """Weighted k-nearest-neighbour votes, as in DINO (arXiv 2104.14294, eval_knn.py).

  Features are L2-normalised; each of the k training rows of largest cosine similarity s votes for its class
  with weight exp(s / temperature). With fewer than k training rows all of them vote. Which of several equally
  similar rows is the k-th is not defined. Work goes in chunks, so that [M, N] is never held.

  Args:
    train_x: [N, D] features. train_y: [N] integers in 0..num_classes - 1. test_x: [M, D] features.

  Returns:
    [M, num_classes] float32 scores; each row sums to 1.

  Raises:
    UserError: no training row, or k or temperature is not positive.
  """
  if not len(train_x):
    raise UserError('knn: there is no training row to vote; expected at least one')
  if k < 1 or temperature <= 0:
    raise UserError(
      f'knn: k={k} and temperature={temperature} must be positive (the usual ones are 20 and 0.07)'
    )
  y = np.asarray(train_y, np.int64)
  scores = np.zeros((len(test_x), num_classes), np.float64)
  for start, top, vote in _votes(train_x, test_x, k, temperature):
    rows = np.broadcast_to(np.arange(start, start + len(top))[:, None], top.shape)
    np.add.at(scores, (rows, y[top]), vote)
  return (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)


def knn_mean(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, k: int = 20,
             temperature: float = 0.07) -> np.ndarray:
  """Weighted means of what the k nearest training rows have: as `knn`, of numbers.

  Args:
    train_x: [N, D]. train_y: [N, L] numbers. test_x: [M, D].
  Returns:
    [M, L] float64.
  """
  y = np.asarray(train_y, np.float64)
  out = np.zeros((len(test_x), y.shape[1]))
  for start, top, vote in _votes(train_x, test_x, k, temperature):
    weight = vote / vote.sum(axis=1, keepdims=True)
    out[start:start + len(top)] = np.einsum('mk,mkl->ml', weight, y[top])
  return out


def _votes(train_x: np.ndarray, test_x: np.ndarray, k: int,
           temperature: float) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
  """Yields the first row of some test rows, their nearest training rows [m, k], and the weights [m, k] of these."""
  train, test = unit(train_x), unit(test_x)
  k = min(k, len(train))
  step = max(1, _CHUNK // len(train))
  for start in range(0, len(test), step):
    similar = test[start:start + step] @ train.T  # [m, N]
    top = np.argpartition(similar, len(train) - k, axis=1)[:, -k:]  # [m, k]
    value = np.take_along_axis(similar, top, axis=1).astype(np.float64)
    yield start, top, np.exp((value - value.max(axis=1, keepdims=True)) / temperature)  # the shift cancels


def logistic(
  train_x: np.ndarray,
  train_y: np.ndarray,
  val_x: np.ndarray,
  val_y: np.ndarray,
  test_x: np.ndarray,
  num_classes: int,
  *,
  grid: tuple[float, ...] = SHORT_GRID,
  max_iter: int = 1000,
  refit: bool = True,
) -> tuple[np.ndarray, dict[str, Any]]:
  """Multinomial logistic regression (scikit-learn, L-BFGS) on standardised features.

  The penalty C is the one of `grid` with the highest validation accuracy (ties: lower log loss, then the
  stronger penalty); fits go from strong to weak penalty, each started from the one before. The model is then
  fitted again, standardisation included, on train and validation rows together.

  Args:
    train_x, val_x, test_x: [N, D], [V, D], [M, D] features. train_y, val_y: integers in 0..num_classes - 1.
    grid: candidates for C. `FULL_GRID` is DINOv2's.
    max_iter: most L-BFGS iterations of one fit, which ends when no gradient exceeds 1e-4.
    refit: False keeps the fit on the training rows alone.

  Returns:
    [M, num_classes] float32 probabilities (0 for classes that no fitted row has), and a dict with the chosen
    'C', its 'val_accuracy', the 'grid' with 'grid_val_accuracy', the 'iterations' of all fits together and
    'unconverged', the number of fits (of len(grid) + 1) that stopped before they converged.

  Raises:
    UserError: the training rows have fewer than two classes, or there is no validation row.
  """
  train_y, val_y = np.asarray(train_y, np.int64), np.asarray(val_y, np.int64)
  if len(np.unique(train_y)) < 2:
    raise UserError(f'logistic: the {len(train_y)} training rows have a single class; expected two or more')
  if not len(val_y):
    raise UserError('logistic: there is no validation row to choose the penalty on; expected at least one')
  grid = tuple(sorted(float(c) for c in grid))
  mean, scale = standardiser(train_x)
  train, val = _scaled(train_x, mean, scale), _scaled(val_x, mean, scale)
  fits, chosen = Fits(max_iter), []
  for c in grid:
    p = fits.fit(train, train_y, c).probabilities(val, num_classes)
    loss = -np.log(np.clip(p[np.arange(len(val_y)), val_y], 1e-12, 1)).mean()
    chosen.append((float((p.argmax(axis=1) == val_y).mean()), -loss, -c))
  best = max(range(len(grid)), key=lambda i: chosen[i])
  both_x, both_y = np.asarray(train_x, np.float32), train_y
  if refit:
    both_x, both_y = np.concatenate([both_x, np.asarray(val_x, np.float32)]), np.concatenate([train_y, val_y])
  mean, scale = standardiser(both_x)
  fits.restart()
  fits.fit(_scaled(both_x, mean, scale), both_y, grid[best])
  info = dict(
    C=grid[best],
    val_accuracy=chosen[best][0],
    grid=list(grid),
    grid_val_accuracy=[c[0] for c in chosen],
    iterations=fits.iterations,
    unconverged=fits.unconverged,
  )
  return fits.probabilities(_scaled(test_x, mean, scale), num_classes).astype(np.float32), info


def ridge(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, num_classes: int,
          penalties: tuple[float, ...] = RIDGE_GRID) -> np.ndarray:
  """Linear least squares to one-hot targets in closed form, on standardised features.

  The penalty is the one of `penalties` (times the number of rows) with the smallest leave-one-out error, which the
  singular values give without fitting again (Golub, Heath, Wahba 1979; the exact leave-one-out form).

  Args:
    train_x, test_x: [N, D], [M, D]. train_y: integers in 0..num_classes - 1.
  Returns:
    [M, num_classes] float32 scores.
  """
  mean, scale = standardiser(train_x)
  x, test = (_scaled(a, mean, scale).astype(np.float64) for a in (train_x, test_x))
  target = np.eye(num_classes)[np.asarray(train_y)]
  middle = target.mean(axis=0)
  u, s, vt = np.linalg.svd(x, full_matrices=False)
  inner = u.T @ (target - middle)  # [r, K]
  best, weights = np.inf, np.zeros((x.shape[1], num_classes))
  for penalty in penalties:
    shrink = s**2 / (s**2 + penalty * len(x))
    left = target - middle - u @ (shrink[:, None] * inner)
    leverage = np.minimum((u**2) @ shrink + 1 / len(x), 1 - 1e-6)
    error = np.square(left / (1 - leverage)[:, None]).mean()
    if error < best:
      best, weights = error, vt.T @ ((shrink / np.maximum(s, 1e-12))[:, None] * inner)
  return (test @ weights + middle).astype(np.float32)


def ridge_numbers(train_x: np.ndarray, train_y: np.ndarray, val_x: np.ndarray, val_y: np.ndarray, test_x: np.ndarray, *,
                  penalties: tuple[float, ...] = RIDGE_GRID, refit: bool = True) -> tuple[np.ndarray, dict[str, Any]]:
  """Ridge regression of a number on standardised features, the penalty chosen on validation rows.

  The penalty, times the number of rows, is that of `penalties` with the smallest squared error on the validation rows
  (ties: the stronger). The model is then fitted again on train and validation rows together, as in `logistic`.

  Args:
    train_x, val_x, test_x: [N, D], [V, D], [M, D]. train_y, val_y: [N], [V] numbers.
    refit: False keeps the fit on the training rows alone.
  Returns:
    [M] float64, and a dict with the chosen 'penalty', the 'grid' and the 'grid_val_mse'.
  """
  if not len(val_y):
    raise UserError('ridge: there is no validation row to choose the penalty on; expected at least one')
  y, val_y = np.asarray(train_y, np.float64), np.asarray(val_y, np.float64)
  grid = tuple(sorted(map(float, penalties), reverse=True))
  errors = [float(np.square(p - val_y).mean()) for p in _ridge_paths(train_x, y, val_x, grid)]
  best = grid[int(np.argmin(errors))]
  x = np.asarray(train_x, np.float32)
  if refit:
    x, y = np.concatenate([x, np.asarray(val_x, np.float32)]), np.concatenate([y, val_y])
  found = next(_ridge_paths(x, y, test_x, (best,)))
  return found, {'penalty': best, 'grid': list(grid), 'grid_val_mse': errors}


def _ridge_paths(x: np.ndarray, y: np.ndarray, asked: np.ndarray, penalties: Sequence[float]) -> Iterator[np.ndarray]:
  """Predictions [M] for rows of `asked` with each penalty, by the eigenvectors of the smaller of both Gram matrices."""
  mean, scale = standardiser(x)
  x, asked = (_scaled(a, mean, scale).astype(np.float64) for a in (x, asked))
  middle = y.mean()
  wide = x.shape[1] > len(x)
  values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
  inner = vectors.T @ (y - middle if wide else x.T @ (y - middle))
  outer = asked @ (x.T @ vectors if wide else vectors)
  for penalty in penalties:
    yield outer @ (inner / (np.maximum(values, 0) + penalty * len(x))) + middle


def standardiser(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation of the columns of x [N, D], float32 [D]; constant ones get deviation 1."""
  mean = np.asarray(np.mean(x, axis=0, dtype=np.float64))
  scale = np.asarray(np.std(x, axis=0, dtype=np.float64))
  # A constant column's deviation is rounding noise, not exactly 0: dividing by it would blow the noise up.
  scale[scale <= 1e-6 * np.maximum(np.abs(mean), 1e-30)] = 1.0
  return mean.astype(np.float32), scale.astype(np.float32)


class Fits:
  """Consecutive fits of one scikit-learn model, warm-started, with their troubles counted."""

  def __init__(self, max_iter: int):
    self.max_iter, self.iterations, self.unconverged = max_iter, 0, 0
    self.restart()

  def restart(self) -> None:
    """The next fit starts from nothing."""
    from sklearn.linear_model import LogisticRegression
    self.model = LogisticRegression(solver='lbfgs', max_iter=self.max_iter, warm_start=True)

  def fit(self, x: np.ndarray, y: np.ndarray, c: float) -> 'Fits':
    """Fits x [N, D], y [N] with the penalty C, from where the fit before ended."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    self.model.set_params(C=c)
    # The threads of small products mostly wait for each other: on 2 cores one thread is 5 times faster.
    small = x.size * len(np.unique(y)) < _SMALL
    one = threadpool_limits(1) if small else contextlib.nullcontext()
    with one, warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always', ConvergenceWarning)
      self.model.fit(x, y)
    self.unconverged += any(issubclass(w.category, ConvergenceWarning) for w in caught)
    self.iterations += int(np.max(self.model.n_iter_))
    return self

  def probabilities(self, x: np.ndarray, num_classes: int) -> np.ndarray:
    """[N, num_classes] float64, 0 for classes that no fitted row has."""
    out = np.zeros((len(x), num_classes), np.float64)
    if len(x):
      out[:, self.model.classes_] = self.model.predict_proba(x)
    return out


def unit(x: np.ndarray) -> np.ndarray:
  """Rows [N, D] of length 1, float32; a row of zeros stays."""
  x = np.asarray(x, np.float32)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _scaled(x: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
  return (np.asarray(x, np.float32) - mean) / scale
