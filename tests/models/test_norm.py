"""Batch normalisation against NumPy, and heads against their definitions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.decoders.heads import DINOHead, MLPHead
from jaxmed.models.layers.norm import BatchNorm
from jaxmed.objectives.networks import Clock, cosine, ramp, run

RNG = np.random.default_rng(0)


def params_of(module, x, seed=0):
  shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x)['params'])
  rng = np.random.default_rng(seed)
  draw = lambda path, s: jnp.asarray(np.abs(rng.normal(size=s.shape)) if path[-1].key == 'var' else
                                     0.5 * rng.normal(size=s.shape), jnp.float32)
  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize('masked', [False, True])
def test_batch_norm(masked):
  x = RNG.normal(2.0, 3.0, (5, 4, 6)).astype(np.float32)
  where = np.asarray(RNG.uniform(size=(5, 4, 1)) > 0.4) if masked else None
  norm = BatchNorm()
  p = params_of(norm, x)
  out, stats = run(norm, p, x, train=True, where=where)
  rows = x.astype(np.float64)[np.broadcast_to(where, (5, 4, 1))[..., 0]] if masked else x.astype(np.float64).reshape(-1, 6)
  mean, var = rows.mean(0), rows.var(0)
  want = (x - mean) / np.sqrt(var + 1e-5) * np.asarray(p['scale']) + np.asarray(p['bias'])
  np.testing.assert_allclose(out, want, atol=2e-5)
  np.testing.assert_allclose(stats['mean'], 0.9 * p['mean'] + 0.1 * mean, rtol=1e-5)
  np.testing.assert_allclose(stats['var'], 0.9 * p['var'] + 0.1 * rows.var(0, ddof=1), rtol=1e-5)
  out, stats = run(norm, p, x)
  want = (x - p['mean']) / np.sqrt(p['var'] + 1e-5) * p['scale'] + p['bias']
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
  assert stats == {}


def test_a_norm_that_is_called_twice_takes_up_both_batches():
  class Twice(nn.Module):
    @nn.compact
    def __call__(self, a, b, train=False):
      norm = BatchNorm(name='norm')
      return norm(a, train), norm(b, train)

  a, b = RNG.normal(size=(2, 6, 3)).astype(np.float32)
  zero, one = jnp.zeros(3), jnp.ones(3)
  p = {'norm': {'mean': zero, 'var': one, 'scale': one, 'bias': zero}}
  stats = run(Twice(), p, a, b, train=True)[1]['norm']
  np.testing.assert_allclose(stats['mean'], 0.9 * 0.1 * a.mean(0) + 0.1 * b.mean(0), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(stats['var'], 0.9 * (0.9 + 0.1 * a.var(0, ddof=1)) + 0.1 * b.var(0, ddof=1), rtol=1e-5)


def test_no_gradient_trains_running_statistics():
  x = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)
  norm = BatchNorm()
  p = params_of(norm, x)
  for train in (True, False):
    grads = jax.grad(lambda p: jnp.square(run(norm, p, x, train=train)[0] - 1).sum())(p)  # noqa: B023
    assert not float(jnp.abs(grads['mean']).max()) and not float(jnp.abs(grads['var']).max())
    assert float(jnp.abs(grads['scale']).max()) > 0


def test_mlp_head():
  x = RNG.normal(size=(7, 5)).astype(np.float32)
  head = MLPHead((8, 6), last_norm='plain')
  p = params_of(head, x)
  assert sorted(p) == ['dense0', 'dense1', 'norm0', 'norm1'] and sorted(p['norm1']) == ['mean', 'var']
  assert sorted(p['dense0']) == ['kernel'] and sorted(p['dense1']) == ['bias', 'kernel']
  out, stats = run(head, p, x, train=True)
  normal = lambda h: (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
  p64 = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
  h = normal(x @ p64['dense0']['kernel']) * p64['norm0']['scale'] + p64['norm0']['bias']
  want = normal(np.maximum(h, 0) @ p64['dense1']['kernel'] + p64['dense1']['bias'])
  np.testing.assert_allclose(out, want, atol=1e-4)
  assert sorted(stats) == ['norm0', 'norm1']


@pytest.mark.parametrize('last', ['weight_norm', 'fixed_norm', 'linear'])
def test_dino_head(last):
  from scipy.special import erf
  x = RNG.normal(size=(4, 5)).astype(np.float32)
  head = DINOHead(9, hidden_dim=7, bottleneck_dim=3, last=last)
  p = params_of(head, x)
  p64 = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
  gelu = lambda h: h * 0.5 * (1 + erf(h / np.sqrt(2)))
  h = x.astype(np.float64)
  for name in ('dense0', 'dense1'):
    h = gelu(h @ p64[name]['kernel'] + p64[name]['bias'])
  h = h @ p64['bottleneck']['kernel'] + p64['bottleneck']['bias']
  h /= np.linalg.norm(h, axis=-1, keepdims=True)
  kernel = p64['last']['kernel']
  if last != 'linear':
    kernel = kernel / np.linalg.norm(kernel, axis=0) * (p64['last']['length'] if last == 'weight_norm' else 1)
  np.testing.assert_allclose(head.apply({'params': p}, x), h @ kernel, rtol=1e-4, atol=1e-5)
  assert ('length' in p['last']) == (last == 'weight_norm')
  fresh = nn.unbox(head.init(jax.random.key(0), x)['params'])
  assert last != 'weight_norm' or (np.asarray(fresh['last']['length']) == 1).all()


def test_schedules():
  assert [float(ramp(0.04, 0.07, jnp.asarray(s), 30)) for s in (0, 15, 30, 99)] == pytest.approx([.04, .055, .07, .07])
  assert [float(cosine(0.996, 1.0, jnp.asarray(s), 100)) for s in (0, 50, 100)] == pytest.approx([.996, .998, 1.0])
  assert Clock(1000, 10.0).warmup(30) == 300 and Clock(100, 10.0).warmup(30) == pytest.approx(30)
