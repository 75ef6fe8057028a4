"""Attentive probes: against attention written out in NumPy, and on tokens of which one tells the class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxmed.errors import UserError
from jaxmed.evaluate import attentive


def weights(kind, width=12, classes=3):
  """Weights whose biases and norms are not those that change nothing."""
  params = attentive.init(kind, jax.random.key(0), width, classes)
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: np.asarray(x + 0.3 * rng.normal(size=x.shape), np.float64), params)


def attention(q, k, v, heads):
  """Of q [N, D] over k, v [M, D], head by head: [N, D]."""
  size = q.shape[1] // heads
  out = np.zeros_like(q)
  for h in range(heads):
    part = slice(h * size, (h + 1) * size)
    for i in range(len(q)):
      z = np.array([q[i, part] @ k[j, part] / np.sqrt(size) for j in range(len(k))])
      w = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
      out[i, part] = sum(w[j] * v[j, part] for j in range(len(k)))
  return out


def linear(p, x):
  return x @ p['w'] + p['b']


def norm(p, x):
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']


def mlp(p, x):
  z = linear(p['in'], norm(p['norm'], x))
  return linear(p['out'], z * 0.5 * (1 + scipy.special.erf(z / np.sqrt(2))))


def reference(kind, p, tokens):
  """Logits [K] of the tokens [N, D] of one image."""
  width = tokens.shape[1]
  if kind == 'capi':
    q = p['query'][None]
    return linear(p['head'], attention(q, linear(p['key'], tokens), linear(p['value'], tokens), max(1, width // 64)))[0]
  heads = attentive.heads_of(kind, width)
  for block in p['blocks']:
    qkv = np.split(linear(block['qkv'], norm(block['norm'], tokens)), 3, axis=-1)
    tokens = tokens + linear(block['out'], attention(*qkv, heads))
    tokens = tokens + mlp(block['mlp'], tokens)
  seen, q = norm(p['norm'], tokens), p['query'][None]
  q = q + attention(linear(p['project'], q), linear(p['key'], seen), linear(p['value'], seen), heads)
  return linear(p['head'], q + mlp(p['mlp'], q))[0]


@pytest.mark.parametrize('kind, width', [('capi', 12), ('capi', 128), ('vjepa', 12)])
def test_logits_equal_attention_written_out(kind, width):
  p = weights(kind, width)
  tokens = np.random.default_rng(1).normal(size=(3, 5, width))
  got = attentive.logits(kind, jax.tree.map(jnp.asarray, p), jnp.asarray(tokens))
  np.testing.assert_allclose(got, [reference(kind, p, t) for t in tokens], rtol=2e-3, atol=2e-3)


def test_numbers_of_heads():
  assert [attentive.heads_of('capi', d) for d in (32, 64, 192, 384)] == [1, 1, 3, 6]
  assert [attentive.heads_of('vjepa', d) for d in (384, 12, 5)] == [16, 12, 5]


def test_uniform_attention_is_mean_pooling():
  p = weights('capi', 128) | {'query': np.zeros(128), 'value': {'w': np.eye(128), 'b': np.zeros(128)}}
  tokens = np.random.default_rng(1).normal(size=(3, 5, 128))
  got = attentive.pooled('capi', jax.tree.map(jnp.asarray, p), jnp.asarray(tokens))
  np.testing.assert_allclose(got, tokens.mean(axis=1), atol=1e-5)


def tokens_of(rng, y, width=8, count=6):
  """One token of each image says its class, at any place and marked; the mean is drowned in noise."""
  x = rng.normal(size=(len(y), count, width)).astype(np.float32)
  x[..., 0] = 0
  at = rng.integers(0, count, len(y))
  x[np.arange(len(y)), at, 0] = 3.0
  x[np.arange(len(y)), at, 1] = 3.0 * (2 * y - 1)
  return x


@pytest.mark.parametrize('kind', attentive.KINDS)
def test_a_probe_finds_the_token_that_tells(kind):
  rng = np.random.default_rng(0)
  sets = [(y, tokens_of(rng, y)) for y in (rng.integers(0, 2, n) for n in (120, 40, 50))]
  (train_y, train), (val_y, val), (test_y, test) = sets
  grid = ((1e-9, 1e-2, 1e9), (0.01,))
  scores, info = attentive.fit(train, train_y, val, val_y, test, 2, kind=kind, steps=150, batch_size=32, grid=grid)
  assert (scores.argmax(axis=1) == test_y).mean() > 0.9 and scores.shape == (50, 2)
  np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
  assert info['learning_rate'] == 1e-2 and info['settings'] == 3 and not info['rate_at_edge']
  # A test row says nothing about another, and settings trained alone are those trained together.
  again, other = attentive.fit(train, train_y, val, val_y, test[:7], 2, kind=kind, steps=150, batch_size=32,
                               grid=((1e-2,), (0.01,)))
  np.testing.assert_allclose(again, scores[:7], atol=1e-3)
  assert other['val_accuracy'] == info['val_accuracy'] and not other['rate_at_edge']


def test_settings_in_parts_are_the_same(monkeypatch):
  rng = np.random.default_rng(0)
  y = rng.integers(0, 2, 40)
  x = tokens_of(rng, y)
  ask = dict(kind='capi', steps=20, batch_size=16, grid=((1e-3, 1e-2, 3e-2), (0.0, 0.1)))
  whole, info = attentive.fit(x[:30], y[:30], x[30:], y[30:], x, 2, **ask)
  monkeypatch.setattr(attentive, '_TOGETHER', 1)
  parts, again = attentive.fit(x[:30], y[:30], x[30:], y[30:], x, 2, **ask)
  assert info == again
  np.testing.assert_allclose(whole, parts, atol=1e-5)


def test_what_is_refused():
  x, y = np.zeros((4, 2, 8), np.float32), np.array([0, 1, 0, 1])
  with pytest.raises(UserError, match='no validation row'):
    attentive.fit(x, y, x[:0], y[:0], x, 2)
  with pytest.raises(UserError, match='no learning rate of 1e.* keeps the loss finite'):
    attentive.fit(x + np.nan, y, x + np.nan, y, x, 2, steps=2)
  with pytest.raises(UserError, match="'cappi'.*'capi'"):
    attentive.init('cappi', jax.random.key(0), 8, 2)
