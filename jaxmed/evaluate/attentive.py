"""Attentive probes: a learnt query gathers the patch tokens of an image, then a linear layer tells its class.

Two of them, by the weights that `init` makes. CAPI's (arXiv 2502.08769, eval_classification.py): one query, keys and
values linear, no projection of the query or of the output, no norm. V-JEPA 2's (arXiv 2506.09985,
src/models/attentive_pooler.py): three blocks of self-attention, then one of cross-attention, with a norm of what is
looked at alone, no projection of the output, an MLP.

Shapes: B images, N tokens, D width, H heads, K classes, G settings of the optimizer.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmed.errors import UserError, choose

KINDS = ('capi', 'vjepa')
# Learning rates and weight decays that are tried, each with each: those of the two papers.
GRIDS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    'capi': ((1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2), (5e-4, 1e-3, 5e-2)),
    'vjepa': ((5e-3, 3e-3, 1e-3, 3e-4, 1e-4), (0.01, 0.1, 0.4, 0.8)),
}
_BLOCKS = 3  # of self-attention, in V-JEPA's
_TOGETHER = 1 << 28  # numbers in the weights, gradients and moments of settings that are trained at once
_EPS = 1e-6


def heads_of(kind: str, width: int) -> int:
  """D / 64 heads in CAPI's, 16 in V-JEPA's; the nearest smaller number that divides the width."""
  wanted = max(1, width // 64) if kind == 'capi' else 16
  return next(h for h in range(min(wanted, width), 0, -1) if width % h == 0)


def init(kind: str, key: jax.Array, width: int, num_classes: int) -> dict[str, Any]:
  """Fresh weights: truncated normal of deviation 0.02, biases 0, norms 1."""
  choose('attentive probe', kind, KINDS)
  keys = iter(jax.random.split(key, 64))
  normal = lambda *shape: 0.02 * jax.random.truncated_normal(next(keys), -2, 2, shape)
  linear = lambda i, o: {'w': normal(i, o), 'b': jnp.zeros(o)}
  norm = lambda: {'scale': jnp.ones(width), 'bias': jnp.zeros(width)}
  mlp = lambda: {'norm': norm(), 'in': linear(width, 4 * width), 'out': linear(4 * width, width)}
  params: dict[str, Any] = {'query': normal(width), 'key': linear(width, width), 'value': linear(width, width),
                            'head': linear(width, num_classes)}
  if kind == 'vjepa':
    params |= {'norm': norm(), 'project': linear(width, width), 'mlp': mlp(), 'blocks': [
        {'norm': norm(), 'qkv': linear(width, 3 * width), 'out': linear(width, width), 'mlp': mlp()}
        for _ in range(_BLOCKS)]}
  return params


def pooled(kind: str, params: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
  """What the query gathers of tokens [B, N, D]: [B, D]."""
  heads = heads_of(kind, tokens.shape[-1])
  if kind == 'capi':
    return _gather(params['query'], params, tokens, heads)  # [B, D]
  for block in params['blocks']:
    tokens = tokens + _linear(block['out'], _self_attention(_linear(block['qkv'], _norm(block['norm'], tokens)), heads))
    tokens = tokens + _mlp(block['mlp'], tokens)
  query = _linear(params['project'], params['query'])
  out = params['query'] + _gather(query, params, _norm(params['norm'], tokens), heads)  # [B, D]
  return out + _mlp(params['mlp'], out)


def logits(kind: str, params: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
  """Tokens [B, N, D] -> [B, K]."""
  return _linear(params['head'], pooled(kind, params, tokens))


def fit(train: np.ndarray, train_y: np.ndarray, val: np.ndarray, val_y: np.ndarray, asked: np.ndarray, num_classes: int,
        *, kind: str = 'capi', steps: int = 500, batch_size: int = 128, seed: int = 0,
        grid: tuple[Sequence[float], Sequence[float]] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
  """Trains a probe with each setting of a grid, all on the same batches, and asks the one that is best on `val`.

  AdamW (b1 0.9, b2 0.999, decay of matrices alone), cosine to 0 without warm-up, cross-entropy. The best has the
  highest validation accuracy (ties: the lower loss); it is not fitted again.

  Args:
    train, val, asked: tokens [N, T, D], [V, T, D], [M, T, D]. train_y, val_y: integers in 0..num_classes - 1.
    steps: updates; the papers' are 12,500 (CAPI) and 20 passes (V-JEPA).
    grid: learning rates and weight decays; default GRIDS[kind].
  Returns:
    [M, num_classes] float32 probabilities, and a dict with 'learning_rate', 'weight_decay' and 'val_accuracy' of the
    best, the number of 'settings', 'steps', and whether the best 'rate_at_edge' is the grid's least or largest.
  Raises:
    UserError: no validation row, or no setting whose loss is finite.
  """
  if not len(val_y):
    raise UserError(f'{kind}: there is no validation row to choose the probe on; expected at least one')
  rates, decays = grid or GRIDS[kind]
  settings = list(itertools.product(rates, decays))
  first = init(kind, jax.random.key(seed), train.shape[-1], num_classes)
  size = 4 * sum(x.size for x in jax.tree.leaves(first))
  step = max(1, _TOGETHER // size)
  data = jnp.asarray(train, jnp.float32), jnp.asarray(train_y, jnp.int32)
  best: tuple[tuple[float, float], int, Any] | None = None
  for start in range(0, len(settings), step):
    some = np.asarray(settings[start:start + step], np.float32)
    params = _train(kind, first, *data, some[:, 0], some[:, 1], jax.random.key(seed + 1), steps,
                    min(batch_size, len(train_y)))
    for i, found in enumerate(_judged(kind, params, val, np.asarray(val_y), batch_size)):
      if found is not None and (best is None or found > best[0]):
        best = found, start + i, jax.tree.map(lambda x, i=i: x[i], params)
  if best is None:
    raise UserError(f'{kind}: no learning rate of {min(rates):g} to {max(rates):g} keeps the loss finite')
  (accuracy, _), at, params = best
  rate, decay = settings[at]
  scores = np.concatenate([np.asarray(jax.nn.softmax(_ask(kind, params, x))) for x in _parts(asked, batch_size)]
                          or [np.zeros((0, num_classes))])
  return scores[:len(asked)].astype(np.float32), {
      'learning_rate': rate, 'weight_decay': decay, 'val_accuracy': accuracy, 'settings': len(settings),
      'steps': steps, 'rate_at_edge': len(rates) > 1 and rate in (min(rates), max(rates))}


@functools.partial(jax.jit, static_argnums=(0, 7, 8))
def _train(kind: str, first: Any, tokens: jax.Array, y: jax.Array, rates: jax.Array, decays: jax.Array, key: jax.Array,
           steps: int, batch: int) -> Any:
  """Weights [G, ...] after training from the same weights with each setting [G]."""
  adam = optax.scale_by_adam()

  def loss(params, x, target):
    return optax.softmax_cross_entropy_with_integer_labels(logits(kind, params, x), target).mean()

  def one(params, moments, rate, decay, x, target):
    updates, moments = adam.update(jax.grad(loss)(params, x, target), moments)
    move = lambda p, u: p - rate * (u + decay * p if p.ndim > 1 else u)
    return jax.tree.map(move, params, updates), moments

  def step(carry, i):
    rows = jax.random.randint(jax.random.fold_in(key, i), (batch,), 0, len(y))
    now = rates * 0.5 * (1 + jnp.cos(jnp.pi * i / steps))
    return jax.vmap(one, (0, 0, 0, 0, None, None))(*carry, now, decays, tokens[rows], y[rows]), None

  many = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(rates), *x.shape)), first)
  (params, _), _ = jax.lax.scan(step, (many, jax.vmap(adam.init)(many)), jnp.arange(steps))
  return params


def _judged(kind: str, params: Any, val: np.ndarray, y: np.ndarray, batch: int) -> list[tuple[float, float] | None]:
  """Accuracy and minus the loss of each setting on validation rows; None where they are not finite."""
  parts = [np.asarray(_ask_many(kind, params, x)) for x in _parts(val, batch)]
  found = np.concatenate(parts, axis=1)[:, :len(y)].astype(np.float64)  # [G, V, K]
  out: list[tuple[float, float] | None] = []
  for one in found:
    shifted = one - one.max(axis=1, keepdims=True)
    loss = (np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(y)), y]).mean()
    out.append((float((one.argmax(axis=1) == y).mean()), -float(loss)) if np.isfinite(loss) else None)
  return out


_ask = jax.jit(logits, static_argnums=0)
_ask_many = jax.jit(jax.vmap(logits, (None, 0, None)), static_argnums=0)


def _parts(x: np.ndarray, batch: int) -> list[np.ndarray]:
  """Rows of x, so many at a time; the last ones are padded, so that nothing is compiled again."""
  batch = min(batch, max(len(x), 1))
  short = -len(x) % batch
  padded = np.pad(np.asarray(x, np.float32), [(0, short), (0, 0), (0, 0)]) if short else np.asarray(x, np.float32)
  return [padded[i:i + batch] for i in range(0, len(padded), batch)]


def _gather(query: jax.Array, params: Mapping[str, Any], tokens: jax.Array, heads: int) -> jax.Array:
  """Attention of one query [D] over tokens [B, N, D], without a projection of the output: [B, D].

  Keys and values are linear, so that the query meets the tokens themselves, and one mean a head becomes a value.
  """
  width = tokens.shape[-1]
  query = query.reshape(heads, width // heads)
  split = lambda w: w.reshape(*w.shape[:-1], heads, width // heads)
  seen = jnp.einsum('hk,dhk->dh', query, split(params['key']['w']))  # the key's bias is the same for all tokens
  weight = jax.nn.softmax(jnp.einsum('bnd,dh->bnh', tokens, seen) / math.sqrt(width // heads), axis=1)
  mean = jnp.einsum('bnh,bnd->bhd', weight, tokens)
  values = jnp.einsum('bhd,dhk->bhk', mean, split(params['value']['w'])) + split(params['value']['b'])
  return values.reshape(len(tokens), width)


def _self_attention(qkv: jax.Array, heads: int) -> jax.Array:
  """[B, N, 3 D] -> [B, N, D]."""
  q, k, v = jnp.moveaxis(qkv.reshape(*qkv.shape[:2], 3, heads, -1), 2, 0)  # [B, N, H, D / H]
  weight = jax.nn.softmax(jnp.einsum('bnhk,bmhk->bhnm', q, k) / math.sqrt(q.shape[-1]), axis=-1)
  return jnp.einsum('bhnm,bmhk->bnhk', weight, v).reshape(*qkv.shape[:2], -1)


def _linear(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
  return x @ params['w'] + params['b']


def _norm(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
  x = x - x.mean(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + _EPS) * params['scale'] + params['bias']


def _mlp(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
  hidden = jax.nn.gelu(_linear(params['in'], _norm(params['norm'], x)), approximate=False)
  return _linear(params['out'], hidden)
