"""A hidden Markov model of two levels over what a network says of frames: phases, and states within each phase.

EndoNet (Twinanda et al. 2017) turns confidences of phases into a workflow this way: forwards alone for online phases,
Viterbi for offline ones. There is no official code and the paper's text was not read. Here the states of a phase are
equal parts of its runs in the training videos, in order; a state stays, goes on to the next, and the last one leaves to
the first state of another phase. Each state has a normal law with a diagonal covariance over the observations. As such
a chain is one of the states of all phases, its algorithms are those of one level.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxmed.errors import UserError
from jaxmed.evaluate.segments import segments


def forward(first: np.ndarray, moves: np.ndarray, likelihood: np.ndarray) -> np.ndarray:
  """Log probabilities [T, S] of the states of each frame given the frames up to it.

  Args:
    first, moves: log probabilities of the first state [S], and from state to state [S, S]. likelihood: log p of each
      frame's observation in each state [T, S].
  """
  out = np.empty(np.shape(likelihood))
  now = first
  for t, seen in enumerate(likelihood):
    now = (now if t == 0 else _logsumexp(out[t - 1][:, None] + moves)) + seen
    out[t] = now - _logsumexp(now)
  return out


def viterbi(first: np.ndarray, moves: np.ndarray, likelihood: np.ndarray) -> np.ndarray:
  """The likeliest sequence of states [T]; arguments as of `forward`. Of equal ones, the smaller state."""
  best, back = first + likelihood[0], np.zeros(np.shape(likelihood), np.int64)
  for t in range(1, len(likelihood)):
    table = best[:, None] + moves
    back[t] = table.argmax(axis=0)
    best = table.max(axis=0) + likelihood[t]
  path = [int(best.argmax())]
  for t in range(len(likelihood) - 1, 0, -1):
    path.append(int(back[t][path[-1]]))
  return np.array(path[::-1])


@dataclasses.dataclass(frozen=True)
class WorkflowModel:
  """A fitted model: `phase` [S] of each state, `first` and `moves` as of `forward`, `mean` and `variance` [S, D]."""

  phase: np.ndarray
  first: np.ndarray
  moves: np.ndarray
  mean: np.ndarray
  variance: np.ndarray

  def likelihood(self, observed: np.ndarray) -> np.ndarray:
    """Log p [T, S] of observations [T, D]."""
    apart = (np.asarray(observed, np.float64)[:, None] - self.mean) ** 2 / self.variance
    return -0.5 * (apart + np.log(2 * np.pi * self.variance)).sum(axis=-1)

  def online(self, observed: np.ndarray) -> np.ndarray:
    """The likeliest phase [T] of each frame given the frames up to it, of observations [T, D]."""
    p = np.exp(forward(self.first, self.moves, self.likelihood(observed)))
    values = np.unique(self.phase)
    return values[np.stack([p[:, self.phase == v].sum(axis=1) for v in values], axis=1).argmax(axis=1)]

  def offline(self, observed: np.ndarray) -> np.ndarray:
    """The phases [T] of the likeliest sequence of states of a whole video, of observations [T, D]."""
    return self.phase[viterbi(self.first, self.moves, self.likelihood(observed))]


def fit(observed: Sequence[np.ndarray], phases: Sequence[np.ndarray], states: int = 3, floor: float = 1e-3,
        prior: float = 1e-3) -> WorkflowModel:
  """A model of training videos.

  Args:
    observed: [T, D] of each video, such as confidences of phases. phases: integers [T] of each.
    states: of each phase. floor: smallest variance. prior: added to the counts of possible moves.
  Raises:
    UserError: videos without frames, or arrays that do not match.
  """
  if not observed or any(len(o) != len(y) or not len(y) for o, y in zip(observed, phases, strict=True)):
    raise UserError('hmm: expected videos with observations [T, D] and phases [T] of the same frames')
  values = np.unique(np.concatenate(list(phases)))
  phase, size = np.repeat(values, states), len(values) * states
  paths = [_states(np.asarray(y), values, states) for y in phases]
  within = np.arange(size) % states
  possible = np.eye(size, dtype=bool) | np.eye(size, k=1, dtype=bool) & (within[:, None] < states - 1)
  possible |= (within[:, None] == states - 1) & (within == 0) & (phase[:, None] != phase)
  count, start = prior * possible, np.full(size, 0.0)
  start[within == 0] = prior
  for path in paths:
    start[path[0]] += 1
    np.add.at(count, (path[:-1], path[1:]), 1.0)
  seen, where = np.concatenate([np.asarray(o, np.float64) for o in observed]), np.concatenate(paths)
  mean, variance = np.empty((2, size, seen.shape[1]))
  for s in range(size):  # a state that no run is long enough for has the law of its phase
    own = seen[where == s] if (where == s).any() else seen[phase[where] == phase[s]]
    mean[s], variance[s] = own.mean(axis=0), own.var(axis=0) + floor
  log = lambda x: np.log(np.maximum(x, 0), out=np.full(x.shape, -np.inf), where=x > 0)
  return WorkflowModel(phase, log(start / start.sum()), log(count / count.sum(axis=1, keepdims=True)), mean, variance)


def _states(labels: np.ndarray, values: np.ndarray, states: int) -> np.ndarray:
  """The state [T] of each frame: equal parts of each run of a phase."""
  out = np.empty(len(labels), np.int64)
  for value, begin, end in zip(*segments(labels), strict=True):
    part = np.arange(end - begin) * states // (end - begin)
    out[begin:end] = int(np.searchsorted(values, value)) * states + part
  return out


def _logsumexp(x: np.ndarray) -> np.ndarray:
  """Over the first axis; -inf of nothing else."""
  top = np.max(x, axis=0)
  top = np.where(np.isfinite(top), top, 0)
  total = np.exp(x - top).sum(axis=0)
  return top + np.log(total, out=np.full(np.shape(total), -np.inf), where=total > 0)
