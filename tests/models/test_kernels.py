"""The kernels against float64 NumPy: values, and gradients by central differences of those."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.special import erf

from jaxmed.models.layers import kernels
from jaxmed.models.layers.transformer import Attention

from .common import normal


def differences(f, args, g, step=1e-5):
  """d sum(f(*args) * g) / d args, one entry at a time, in float64."""
  args = [np.array(a, np.float64) for a in args]
  out = []
  for a in args:
    d = np.empty_like(a)
    for i in np.ndindex(a.shape):
      keep = a[i]
      a[i] = keep + step
      high = (f(*args) * g).sum()
      a[i] = keep - step
      d[i] = (high - (f(*args) * g).sum()) / (2 * step)
      a[i] = keep
    out.append(d)
  return out


def attend(q, k, v, mask=None):
  """Row by row: softmax over the keys that may be seen, zero where there is none."""
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  for b, n, h in np.ndindex(q.shape[:3]):
    seen = slice(None) if mask is None else mask[b]
    logits = k[b, seen, h] @ q[b, n, h] / np.sqrt(q.shape[-1])
    if logits.size:
      weights = np.exp(logits - logits.max())
      out[b, n, h] = weights @ v[b, seen, h] / weights.sum()
  return out


def close(got, want, tolerance):
  """Largest error, relative to the largest entry."""
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def vjp(f, args, g):
  value, back = jax.vjp(jax.jit(f), *args)
  return value, back(g)


MASK = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)


@pytest.fixture(params=['kept', 'again'])
def path(request, monkeypatch):
  """Both ways of going back; the second with the logits of two chunks of queries."""
  if request.param == 'again':
    monkeypatch.setattr(kernels, 'KEEP', 0)
    monkeypatch.setattr(kernels, 'CHUNK_BYTES', 1)
  return request.param


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('dim', [4, 64])
def test_attention(path, masked, dim):
  queries = 70 if path == 'again' and dim == 4 else 3
  width = dim + 3 * (dim == 4)  # of values, which may differ
  q, k, v, g = (2 * normal(s, i) for i, s in enumerate([
      (3, queries, 2, dim), (3, 5, 2, dim), (3, 5, 2, width), (3, queries, 2, width)]))
  mask = MASK if masked else None
  keys = None if mask is None else jnp.asarray(mask)
  value, grads = vjp(lambda q, k, v: kernels.attention(q, k, v, keys), (q, k, v), g)
  wide = [np.asarray(a, np.float64) for a in (q, k, v)]
  close(value, attend(*wide, mask), 1e-6)
  f = lambda *a: attend(*a, mask)
  if queries > 3:  # one direction of each operand in place of every entry
    for i, grad in enumerate(grads):
      along = np.asarray(normal(wide[i].shape, 9 + i), np.float64)
      moved = lambda t: f(*(a + t * along if j == i else a for j, a in enumerate(wide)))
      slope = ((moved(1e-5) - moved(-1e-5)) * np.asarray(g)).sum() / 2e-5
      np.testing.assert_allclose((np.asarray(grad, np.float64) * along).sum(), slope, rtol=1e-5)
  elif dim == 4:
    for got, want in zip(grads, differences(f, wide, np.asarray(g, np.float64)), strict=True):
      close(got, want, 1e-5)
  else:  # the analytic gradient, from the Jacobian of the softmax
    for got, want in zip(grads, backward(*wide, np.asarray(g, np.float64), mask), strict=True):
      close(got, want, 1e-5)
  if masked:
    assert not np.asarray(value[1]).any()
    assert all(np.isfinite(a).all() for a in grads) and not any(np.asarray(a[1]).any() for a in grads)
    assert not np.asarray(grads[1][0, ~MASK[0]]).any()


def backward(q, k, v, g, mask):
  """Gradients of q, k, v through the dense Jacobian diag(p) - p p^T of every row's softmax."""
  dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  for b, n, h in np.ndindex(q.shape[:3]):
    seen = np.arange(k.shape[1]) if mask is None else np.flatnonzero(mask[b])
    if seen.size:
      p = np.exp(k[b, seen, h] @ q[b, n, h] / np.sqrt(q.shape[-1]))
      p /= p.sum()
      s = (np.diag(p) - np.outer(p, p)) @ (v[b, seen, h] @ g[b, n, h]) / np.sqrt(q.shape[-1])
      dq[b, n, h] = s @ k[b, seen, h]
      dk[b, seen, h] += np.outer(s, q[b, n, h])
      dv[b, seen, h] += np.outer(p, g[b, n, h])
  return dq, dk, dv


def test_self_attention_is_attention(path):
  qkv, g = normal((3, 5, 3, 2, 8)), normal((3, 5, 2, 8), 2)
  mask = jnp.asarray(MASK)
  one, (grad,) = vjp(lambda x: kernels.self_attention(x, mask), (qkv,), g)
  parts = [qkv[:, :, i] for i in range(3)]
  other, grads = vjp(lambda *a: kernels.attention(*a, mask), parts, g)
  close(one, other, 1e-6)
  close(grad, jnp.stack(grads, 2), 1e-6)


def test_attention_of_large_logits_does_not_overflow(path):
  q, k, v, g = (normal((1, 4, 1, 4), i) for i in range(4))
  value, grads = vjp(kernels.attention, (1e4 * q, k, v), g)
  close(value, attend(*(np.asarray(a, np.float64) for a in (1e4 * q, k, v))), 1e-5)
  assert all(np.isfinite(a).all() for a in grads)


@pytest.mark.parametrize('dim', [4, 64])
def test_attention_in_bfloat16(path, dim):
  q, k, v, g = (normal((2, 6, 2, dim), i).astype(jnp.bfloat16) for i in range(4))
  value, grads = vjp(kernels.attention, (q, k, v), g)
  assert value.dtype == jnp.bfloat16 and {a.dtype for a in grads} == {jnp.dtype(jnp.bfloat16)}
  wide = [np.asarray(a, np.float64) for a in (q, k, v)]
  close(np.asarray(value, np.float64), attend(*wide), 1e-2)
  for got, want in zip(grads, backward(*wide, np.asarray(g, np.float64), None), strict=True):
    close(np.asarray(got, np.float64), want, 2e-2)


def test_gelu():
  x = jnp.concatenate([jnp.linspace(-12, 12, 2001), jnp.asarray([-1e4, -0.0, 1e4])])
  wide = np.asarray(x, np.float64)
  value, (slope,) = vjp(kernels.gelu, (x,), jnp.full(x.shape, 2.0))
  cdf = 0.5 * (1 + erf(wide / np.sqrt(2)))
  np.testing.assert_allclose(value, wide * cdf, rtol=1e-6, atol=1e-6)
  want = cdf + wide * np.exp(-(wide**2) / 2) / np.sqrt(2 * np.pi)
  np.testing.assert_allclose(slope, 2 * want, rtol=1e-6, atol=1e-6)
  low, (slope,) = vjp(kernels.gelu, (x.astype(jnp.bfloat16),), jnp.ones(x.shape, jnp.bfloat16))
  assert low.dtype == slope.dtype == jnp.bfloat16
  np.testing.assert_allclose(low.astype(jnp.float32), wide * cdf, rtol=2e-2, atol=2e-2)


def test_layer_norm():
  x, scale, bias, g = 3 * normal((2, 3, 8)) + 5, normal((8,), 2), normal((8,), 3), normal((2, 3, 8), 4)

  def norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-2) * scale + bias

  f = lambda x, scale, bias: kernels.layer_norm(x, scale, bias, 1e-2)
  value, grads = vjp(f, (x, scale, bias), g)
  wide = [np.asarray(a, np.float64) for a in (x, scale, bias)]
  close(value, norm(*wide), 1e-6)
  for got, want in zip(grads, differences(norm, wide, np.asarray(g, np.float64)), strict=True):
    close(got, want, 2e-6)
  low, (dx, *_) = vjp(f, (x.astype(jnp.bfloat16), scale, bias), g)
  assert low.dtype == jnp.float32 and dx.dtype == jnp.bfloat16
  flat, (dx, *_) = vjp(f, (jnp.full((1, 8), 7.0), scale, bias), g[0, :1])  # a constant row
  np.testing.assert_allclose(flat[0], bias, atol=1e-6)
  assert np.isfinite(dx).all()


def test_layer_norm_far_from_zero():
  x = normal((4, 64)) + 300.0
  wide = np.asarray(x, np.float64)
  want = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
  close(kernels.layer_norm(x, jnp.ones(64), jnp.zeros(64), 0.0), want, 1e-4)


def network(x, weights, mask):
  """Twice all kernels, scanned."""

  def block(x, w):
    y = kernels.layer_norm(x, w['scale'], w['bias'], 1e-6)
    y = kernels.self_attention(kernels.dense(y, w['qkv']), mask)
    x = x + kernels.dense(y.reshape(x.shape), w['proj'])
    return x + kernels.gelu(x), None

  return block, weights


def sample():
  w = {'scale': normal((2, 8), 1), 'bias': normal((2, 8), 2), 'qkv': normal((2, 8, 3, 2, 4), 3) / 3,
       'proj': normal((2, 8, 8), 4) / 3}
  return normal((8, 5, 8)), w, jnp.asarray(np.concatenate([MASK, MASK, MASK])[:8])


def total(x, w, mask, wrap=lambda f: f, scan=True):
  block, w = network(x, w, mask)
  block = wrap(block)
  if scan:
    x, _ = jax.lax.scan(block, x, w)
  else:
    for i in range(2):
      x, _ = block(x, jax.tree.map(lambda a, i=i: a[i], w))
  return (x * jnp.arange(8)).sum() / 100


POLICIES = {'full': None, 'dots': jax.checkpoint_policies.dots_saveable,
            'dots_no_batch': jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


@pytest.mark.parametrize('policy', POLICIES)
def test_under_remat_and_scan(path, policy):
  x, w, mask = sample()
  want = jax.grad(lambda x, w: total(x, w, mask, scan=False), (0, 1))(x, w)  # op by op
  assert all(np.isfinite(a).all() and np.abs(a).max() > 1e-3 for a in jax.tree.leaves(want))
  wrap = lambda f: jax.checkpoint(f, policy=POLICIES[policy])
  got = jax.jit(jax.grad(lambda x, w: total(x, w, mask, wrap), (0, 1)))(x, w)
  jax.tree.map(lambda a, b: close(a, b, 2e-5), got, want)


def parallel():
  """Run by the test below in a process with 8 devices: samples over devices, for both ways of going back."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows, same = NamedSharding(mesh, P('data')), NamedSharding(mesh, P())
  for kernels.KEEP in (1024, 0):
    kernels.CHUNK_BYTES = 1
    f = jax.jit(jax.value_and_grad(lambda x, w, mask: total(x, w, mask), (0, 1)))
    x, w, mask = sample()
    one = f(x, w, mask)
    put = jax.device_put(x, rows), jax.device_put(w, same), jax.device_put(mask, rows)
    many = f(*put)
    assert many[1][0].sharding.is_equivalent_to(rows, 3)
    jax.tree.map(lambda a, b: close(a, b, 2e-5), many, one)
    text = f.lower(*put).compile().as_text()
    assert 'all-reduce' in text
    assert 'all-gather' not in text and 'all-to-all' not in text


def test_data_parallel_gives_the_same():
  code = 'from tests.models.test_kernels import parallel; parallel()'
  flags = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
  root = pathlib.Path(__file__).parents[2]
  done = subprocess.run([sys.executable, '-c', code], cwd=root, env=dict(os.environ, XLA_FLAGS=flags),
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_vmap(path):
  q, k, v = (normal((3, 2, 4, 2, 4), i) for i in range(3))
  f = jax.grad(lambda *a: (kernels.attention(*a) ** 2).sum())
  want = jnp.stack([f(*a) for a in zip(q, k, v, strict=True)])
  got = jax.vmap(f)(q, k, v)
  close(got, want, 1e-5)


@pytest.mark.parametrize('platform,barrier', [('cpu', True), ('tpu', False), ('cuda', False)])
def test_the_form_is_chosen_when_lowering(path, platform, barrier):
  """A program lowered for another platform on this host is that platform's: no barriers; chunks on all of them."""
  x, w, mask = sample()
  f = jax.jit(jax.grad(lambda x, w: total(x, w, mask, scan=False), (0, 1)))
  text = f.trace(x, w).lower(lowering_platforms=(platform,)).as_text()
  assert ('optimization_barrier' in text) == barrier
  assert ('stablehlo.while' in text) == (path == 'again')


@pytest.mark.parametrize('count, parts', [(70, 1), (72, 2), (72, 4), (71, 4)])
def test_chunks_of_each_devices_queries(monkeypatch, count, parts):
  """Where devices share the queries of a sample, a chunk has some of each; 71 do not divide and stay together."""
  monkeypatch.setattr(kernels, 'axis_size', lambda axis: parts)
  monkeypatch.setattr(kernels, 'CHUNK_BYTES', 1)
  q, k, v = (jnp.asarray(normal((2, 3, n, 4), i)) for i, n in enumerate((count, 9, 9)))
  cut, = kernels._chunked(7, q, k, q)
  own = count // parts if count % parts == 0 else count
  assert cut.shape[0] == -(-own // 7) > 1
  if count % parts == 0:  # the first chunk has the first queries of each device
    first = cut[0].reshape(2, 3, parts, -1, 4)[:, :, :, 0]
    np.testing.assert_array_equal(first, q.reshape(2, 3, parts, own, 4)[:, :, :, 0])
  np.testing.assert_array_equal(kernels._joined(cut, count), q)
  mask = jnp.asarray(np.arange(9) != 3)[None].repeat(2, 0)
  whole, chunks = kernels._attend(q, k, v, mask)[:3], kernels._attend_chunks(q, k, v, mask, least=7)
  for got, want in zip(chunks, whole, strict=True):
    close(got, np.asarray(want), 1e-6)


def test_less_is_kept_where_probabilities_are_made_again(monkeypatch):
  """Bytes that the forward pass hands to the backward pass."""
  q = jax.ShapeDtypeStruct((2, 64, 2, 8), jnp.float32)

  def kept(limit):
    monkeypatch.setattr(kernels, 'KEEP', limit)
    back = jax.eval_shape(lambda q: jax.vjp(lambda q: kernels.attention(q, q, q), q)[1], q)
    return sum(a.size for a in jax.tree.leaves(back))

  square = 2 * 2 * 64 * 64
  assert kept(2 * 63) < square <= kept(2 * 64)
  monkeypatch.setattr(kernels, 'platform', lambda: 'tpu')
  assert kept(63) < square <= kept(64)


def test_the_layer_is_the_same_with_and_without_rotation():
  """Rotation by nothing takes the other way through `attention`."""
  layer = Attention(2)
  x = normal((2, 5, 8))
  params = jax.tree.map(lambda a: 0.3 * normal(a.shape), layer.init(jax.random.key(0), x, (None,), (None,)))
  out = layer.apply(params, x, (None,), (None,))
  close(out, layer.apply(params, x, (None,), (jnp.zeros((1, 5, 2)),)), 1e-6)
