"""Whether features still tell images apart: numbers on arrays, and the signs of collapse with their likely causes."""

import dataclasses
from collections.abc import Mapping

import numpy as np

HARD_RANK, SOFT_RANK = 2.0, 10.0
ALIKE, STILL = 0.995, 0.01
LOW_ENTROPY, HIGH_ENTROPY = 0.1, 0.999
FOLDED = 0.05  # of the pixels of flows
EMPTY = 0.25  # share of crops without anything to compare
ENOUGH = 4 * SOFT_RANK  # features and rows below which a rank of SOFT_RANK is no sign


def rankme(x: np.ndarray) -> float:
  """Effective rank of features [N, D]: exp of the entropy of their normalised singular values (Garrido et al. 2023)."""
  values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
  return _effective(values)


def alpha_req(x: np.ndarray) -> float:
  """Decay of the eigenvalues of the covariance of features [N, D] as a power of their rank (Agrawal et al. 2022).

  The slope of a least-squares line through (log i, -log eigenvalue_i), of those above 1e-10 of the largest; 0 for one.
  """
  x = np.asarray(x, np.float64)
  values = np.square(np.linalg.svd(x - x.mean(axis=0), compute_uv=False)) / max(len(x), 1)
  values = values[values > 1e-10 * max(values[0], 1e-300)] if len(values) else values
  if len(values) < 2:
    return 0.0
  rank = np.log(np.arange(1, len(values) + 1))
  return float(-np.polyfit(rank, np.log(values), 1)[0])


def lidar(views: np.ndarray, delta: float = 1e-4) -> float:
  """LiDAR: effective rank of the between-image variation relative to that between views (Thilak et al. 2024).

  Args:
    views: features [N, Q, D] of Q views of N images. delta: added to the within-image covariance.
  Returns:
    exp of the entropy of the eigenvalues of Sw^-1/2 Sb Sw^-1/2.
  """
  x = np.asarray(views, np.float64)
  middle = x.mean(axis=1)  # [N, D]
  between = middle - middle.mean(axis=0)
  within = (x - middle[:, None]).reshape(-1, x.shape[-1])
  scatter = within.T @ within / max(len(x) * (x.shape[1] - 1), 1) + delta * np.eye(x.shape[-1])
  value, vector = np.linalg.eigh(scatter)
  white = between @ (vector / np.sqrt(value))  # [N, D], its covariance has the eigenvalues asked for
  return _effective(np.square(np.linalg.svd(white, compute_uv=False)))


def _effective(values: np.ndarray) -> float:
  total = values.sum()
  if not total > 0:
    return 1.0
  p = values / total + 1e-7
  return float(np.exp(-(p * np.log(p)).sum()))


def spread(x: np.ndarray) -> float:
  """Mean standard deviation of L2-normalised features [N, D] over N, times sqrt(D): 0 for equal rows, 1 for uniform."""
  unit = _unit(x)
  return float(unit.std(axis=0).mean() * np.sqrt(unit.shape[1]))


def likeness(x: np.ndarray) -> float:
  """Mean cosine between different rows of x [..., N, D], over the leading axes: images of a batch, tokens of images."""
  unit = _unit(x)
  count = unit.shape[-2]
  if count < 2:
    return float('nan')
  together = np.square(unit.sum(axis=-2)).sum(axis=-1)  # the sum of all products of pairs, rows with themselves too
  return float(((together - count) / (count * (count - 1))).mean())


def _unit(x: np.ndarray) -> np.ndarray:
  x = np.asarray(x, np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def measure(features: np.ndarray, tokens: np.ndarray, views: np.ndarray) -> dict[str, float]:
  """The numbers of a model, from pooled features [N, D], tokens [N, T, D] and pooled views [N, Q, D] of the images."""
  return {
      'rankme': rankme(features), 'alpha_req': alpha_req(features), 'lidar': lidar(views),
      'feature_std': spread(features), 'gram_offdiagonal': likeness(features), 'token_cosine': likeness(tokens)}


@dataclasses.dataclass(frozen=True)
class Collapse:
  """A sign of collapse. hard: nothing is left to learn from; else what `kind` says, which may pass."""

  sign: str
  cause: str
  hard: bool
  kind: str = 'loss of dimensions'


def diagnose(values: Mapping[str, float], rows: int, width: int, start: Mapping[str, float]) -> Collapse | None:
  """The worst sign in the metrics of a step, or None.

  An untrained network's features are nearly alike too (with a LayerScale of 1e-5 all class tokens are the same), so the
  signs in features count only where they are clearly worse than at the start of the run.

  Args:
    values: of `measure`, and of methods with a teacher over prototypes its mean entropy (teacher_entropy_share), the
      entropy of its mean (prototype_entropy_share), both over the logarithm of their number, and teacher_kl; of methods
      with displacements the share of pixels that they fold (folded_share), of methods that compare crops the share of
      crops of one value (empty_crops).
    rows, width: shape of the features. start: what `measure` gave before the first step.
  """
  get = lambda name, default: values.get(name, default)
  worse = lambda name, factor: get(name, np.inf) < factor * start.get(name, np.inf)
  entropy, used, rank = get('teacher_entropy_share', 0.5), get('prototype_entropy_share', 0.5), get('rankme', np.inf)
  if used < LOW_ENTROPY:
    return Collapse(f'the teacher puts images on few prototypes (entropy {used:.3f} of its maximum < {LOW_ENTROPY})',
                    'the teacher is too sharp: raise objective.teacher_temperature, check centring', True)
  if get('gram_offdiagonal', 0.0) > ALIKE and get('feature_std', 1.0) < STILL and worse('feature_std', 0.5):
    return Collapse(f'all images have the same features (mean cosine {values["gram_offdiagonal"]:.4f} > {ALIKE}, '
                    f'deviation {values["feature_std"]:.4f} < {STILL})',
                    'the task can be met without looking: lower learning_rate, check temperatures and momentum', True)
  if entropy > HIGH_ENTROPY and get('teacher_kl', np.inf) < 1e-2:
    return Collapse(f'teacher and student agree on the uniform distribution (entropy {entropy:.4f} of its maximum)',
                    'the teacher is too flat: lower objective.teacher_temperature', True)
  if rank < HARD_RANK and worse('rankme', 0.9):
    return Collapse(f'features have an effective rank of {rank:.2f} < {HARD_RANK}',
                    'the rate is too high or nothing keeps features apart: lower learning_rate', True)
  if get('folded_share', 0.0) > FOLDED:
    return Collapse(f'displacements fold {values["folded_share"]:.1%} of the pixels (more than {FOLDED:.0%})',
                    'they are not smooth: raise objective.smooth_weight, or set objective.squarings=7', False,
                    'no homeomorphism')
  if get('empty_crops', 0.0) > EMPTY:
    return Collapse(f'{values["empty_crops"]:.0%} of the crops have one value alone, as of air (more than {EMPTY:.0%})',
                    'crops miss the body: prepare with --crop foreground or --min-content, larger crops', False,
                    'empty crops')
  if rank < SOFT_RANK and worse('rankme', 1 / 3) and min(rows, width) >= ENOUGH:
    return Collapse(f'features have an effective rank of {rank:.1f} < {SOFT_RANK}',
                    'dimensions are being lost: lower learning_rate, more or stronger views', False)
  return None
