"""A classifier that sees an image through named concepts alone, with what is known of them as a prior, on arrays.

KnoBo (Yang et al. 2024, arXiv 2405.14839; YueYANG1996/KnoBo, modules/cbm.py, modules/train_grounding.py): a balanced
logistic regression of each concept on frozen features, then a linear layer on their probabilities whose weights are
drawn to a table of classes and concepts.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmed import files
from jaxmed.errors import UserError, choose

LEAST = 10  # rows of either kind that a concept needs
ITERATIONS = 1000
RATE, BATCH, EPOCHS = 1e-3, 64, 200
_WORDS = {'yes': 1, 'no': -1, 'unknown': 0}


def read_table(path: str | os.PathLike, classes: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
  """The concepts of a JSON file {class: {concept: value}}, and the values [classes, concepts] in {1, -1, 0}.

  A value is 1 or 'yes' where the class has the concept, -1 or 'no' where it has not, 0 or 'unknown'. Concepts come in
  the order of the file; what a class does not say of a concept is 0.

  Raises:
    UserError: no such file, another form, a class that is missing or unknown, another value.
  """
  table = files.read_json(path)
  if not isinstance(table, dict) or not table or not all(isinstance(v, dict) for v in table.values()):
    raise UserError(f'{path}: expected {{class: {{concept: 1, -1 or 0}}}}')
  for name in table:
    choose(f'class in {path}', name, classes)
  for name in classes:
    choose(f'class of {path} (the label has it)', name, table)
  concepts = tuple(dict.fromkeys(c for row in table.values() for c in row))
  if not concepts:
    raise UserError(f'{path}: no class has a concept; expected {{class: {{concept: 1, -1 or 0}}}}')
  return concepts, np.array([[_value(table[k].get(c, 0), f'{path}: {k!r}: {c!r}') for c in concepts] for k in classes],
                            np.float32)


def _value(value: Any, where: str) -> int:
  if isinstance(value, str) and value.strip().lower() in _WORDS:
    return _WORDS[value.strip().lower()]
  if isinstance(value, (int, float)) and not isinstance(value, bool) and value in (-1, 0, 1):
    return int(value)
  raise UserError(f"{where} is {value!r}: expected 1, -1, 0, 'yes', 'no' or 'unknown'")


def told(values: Sequence[Any], name: str) -> np.ndarray:
  """What a column says of a concept, int8 [N]: 1, 0, or -1 where it says nothing.

  Raises:
    UserError: a value that is neither 0 or 1, true or false, yes or no.
  """
  known = {'1': 1, '1.0': 1, 'true': 1, 'yes': 1, '0': 0, '0.0': 0, 'false': 0, 'no': 0, '': -1, 'none': -1, 'nan': -1,
           'unknown': -1}
  out = np.empty(len(values), np.int8)
  for i, value in enumerate(values):
    word = str(value).strip().lower()
    if word not in known:
      raise UserError(f'concept {name!r}: {value!r} in its column; expected 0 or 1 (nothing where it is not known)')
    out[i] = known[word]
  return out


def check_told(concepts: Mapping[str, np.ndarray]) -> None:
  """A UserError where fewer than 10 training rows have a concept, or lack it."""
  for name, values in concepts.items():
    for word, value in (('have', 1), ('lack', 0)):
      count = int(np.count_nonzero(values == value))
      if count < LEAST:
        raise UserError(f'concept {name!r}: {count} training rows {word} it; expected {LEAST} or more')


class Grounding(NamedTuple):
  """Probability of each concept from unit features: weights [D, C] and bias [C] of logistic regressions."""

  weights: np.ndarray
  bias: np.ndarray

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """[N, D] features -> [N, C] float32."""
    return (1 / (1 + np.exp(-(_unit(x) @ self.weights + self.bias)))).astype(np.float32)


def ground(x: np.ndarray, concepts: Mapping[str, np.ndarray]) -> Grounding:
  """Fits a balanced logistic regression of each concept on unit features (C 1, L-BFGS, at most 1000 iterations).

  Args:
    x: features [N, D]. concepts: {name: [N] of `told`}; rows of -1 are left out.
  Raises:
    UserError: a concept with fewer than 10 rows that have it, or that do not.
  """
  from sklearn.linear_model import LogisticRegression
  from threadpoolctl import threadpool_limits
  check_told(concepts)
  x, fits = _unit(x), []
  for values in concepts.values():
    with threadpool_limits(1):
      rows = values >= 0
      fits.append(LogisticRegression(class_weight='balanced', max_iter=ITERATIONS).fit(x[rows], values[rows]))
  return Grounding(np.stack([f.coef_[0] for f in fits], axis=1), np.array([f.intercept_[0] for f in fits]))


class Head(NamedTuple):
  """Linear classifier of concepts: weights [C, K], bias [K], and the validation accuracy that it was chosen by."""

  weights: np.ndarray
  bias: np.ndarray
  accuracy: float

  def __call__(self, concepts: np.ndarray) -> np.ndarray:
    """[N, C] -> logits [N, K]."""
    return concepts @ self.weights + self.bias


def fit_head(train: np.ndarray, y: np.ndarray, val: np.ndarray, val_y: np.ndarray, prior: np.ndarray,
             weight: float = 1.0, *, epochs: int = EPOCHS, rate: float = RATE, batch: int = BATCH,
             seed: int = 0) -> Head:
  """The head of the first epoch of `trajectory` with the best validation accuracy.

  Args:
    train, val: concept probabilities [N, C], [V, C]. y, val_y: classes. The others as of `trajectory`.
  """
  weights, bias = trajectory(train, y, prior, weight, epochs=epochs, rate=rate, batch=batch, seed=seed)
  logits = np.einsum('vc,eck->evk', val, weights) + bias[:, None]
  accuracy = (logits.argmax(axis=2) == val_y).mean(axis=1)
  best = int(accuracy.argmax())
  return Head(weights[best], bias[best], float(accuracy[best]))


def trajectory(x: np.ndarray, y: np.ndarray, prior: np.ndarray, weight: float = 1.0, *, epochs: int = EPOCHS,
               rate: float = RATE, batch: int = BATCH, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Adam on cross entropy + weight * mean |tanh(W) - prior|: weights [epochs, C, K], bias [epochs, K] after each epoch.

  They start at 0. Each epoch has a new order of rows; its last batch may have fewer.

  Args:
    x: concept probabilities [N, C]. y: classes [N]. prior: [K, C] in {1, -1, 0}.
  """
  count, size = len(x), min(batch, len(x))
  steps = -(-count // size)
  orders = np.stack([np.random.default_rng([seed, e]).permutation(count) for e in range(epochs)])
  orders = np.pad(orders, ((0, 0), (0, steps * size - count)), constant_values=-1).reshape(epochs, steps, size)
  weights, bias = _epochs(jnp.asarray(x, jnp.float32), jnp.asarray(y), jnp.asarray(prior, jnp.float32).T,
                          jnp.float32(weight), jnp.float32(rate), jnp.asarray(orders))
  return np.asarray(weights), np.asarray(bias)


@jax.jit
def _epochs(x: jax.Array, y: jax.Array, prior: jax.Array, weight: jax.Array, rate: jax.Array,
            orders: jax.Array) -> tuple[jax.Array, jax.Array]:
  """See `trajectory`; orders [epochs, steps, rows], -1 for no row."""
  adam = optax.adam(rate)

  def loss(params, rows):
    logits = x[rows] @ params[0] + params[1]
    there = rows >= 0
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, y[rows])
    apart = jnp.tanh(params[0]) - prior
    # |apart|, whose slope at 0 is 0 as in PyTorch; that of jnp.abs is 1.
    return (entropy * there).sum() / there.sum() + weight * (apart * jax.lax.stop_gradient(jnp.sign(apart))).mean()

  def step(state, rows):
    params, moments = state
    updates, moments = adam.update(jax.grad(loss)(params, rows), moments)
    return (optax.apply_updates(params, updates), moments), None

  def epoch(state, order):
    state = jax.lax.scan(step, state, order)[0]
    return state, state[0]

  params = jnp.zeros(prior.shape), jnp.zeros(prior.shape[1])
  return jax.lax.scan(epoch, (params, adam.init(params)), orders)[1]


def _unit(x: np.ndarray) -> np.ndarray:
  x = np.asarray(x, np.float32)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
