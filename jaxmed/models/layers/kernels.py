"""The few array functions in which a transformer spends its time: dense product, GELU, attention, layer norm.

Every model calls these and nothing else for that work, so a faster form for one backend is one change here.
The forms are chosen when a program is lowered for its platform, not when it is traced, so that a program
compiled on a CPU host for a TPU is the TPU's.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxmed.models.layers import flash
from jaxmed.parallel.mesh import axis_size, platform

FORMS = ('auto', 'flash')
# Keys up to which attention keeps its probabilities; with more, it computes them again going back, some queries at a
# time. On CPU half as many: what fits a cache is computed again sooner than it is read back.
KEEP = 1024
CHUNK_BYTES = 2**24  # of logits that attention on CPU makes at a time where it does not keep them
LEAST = 256  # queries at a time on accelerators, where the batch is cut over devices and products must be large
_MASKED = -1e30  # logit of a key that may not be looked at
_TINY = 1e-30  # in place of the sum of no probabilities


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Multiplies the last axis of x [..., D] with kernel [D, *F] -> [..., *F].

  The product is done on two-dimensional operands: XLA:CPU is slower on three-dimensional ones.
  """
  out = x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[0], -1)
  return out.reshape(*x.shape[:-1], *kernel.shape[1:])


def _once(x):
  """Has XLA:CPU compute `x` once and store it, rather than again inside each of its consumers."""
  return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda y: y)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, x * Phi(x) with Phi(x) = (1 + erf(x / sqrt 2)) / 2, in float32 inside; the dtype of x.

  The derivative is kept for the backward pass instead of x: erf is evaluated once a step.
  """
  return (x * _normal_cdf(x)).astype(x.dtype)


def _normal_cdf(x: jax.Array) -> jax.Array:
  return 0.5 + 0.5 * lax.erf(x.astype(jnp.float32) * 2**-0.5)


def _gelu_fwd(x):
  cdf = _once(_normal_cdf(x))
  density = jnp.exp(-0.5 * jnp.square(x.astype(jnp.float32))) / math.sqrt(2 * math.pi)
  return (x * cdf).astype(x.dtype), _once((cdf + x * density).astype(x.dtype))


gelu.defvjp(_gelu_fwd, lambda slope, g: (g * slope,))


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None,
              form: str = 'auto') -> jax.Array:
  """Scaled dot-product attention.

  Args:
    q, k, v: [B, N, H, Dh] (k and v may have another length M, and v another width).
    mask: [B, M] bool, True where a key may be looked at; None for all. Or [B, N, M] bool, the same of
      each query. Or [B, N] int32 (N = M), the segments of packed rows: a key is looked at by queries of its own
      segment, and by none where that is 0.
    form: 'auto' is this file's, whose memory is bounded; 'flash' a kernel of the accelerator where there is one.
  Returns:
    [B, N, H, Dh] in the dtype of q. The softmax is taken in float32. Rows whose keys are all masked are zero.
  """
  return _by_form((q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)), mask, form).swapaxes(1, 2)


def self_attention(qkv: jax.Array, mask: jax.Array | None = None, form: str = 'auto') -> jax.Array:
  """`attention` of queries, keys and values in one array [B, N, 3, H, Dh] -> [B, N, H, Dh]."""
  return _by_form(qkv.transpose(2, 0, 3, 1, 4), mask, form).swapaxes(1, 2)


def weights_of(q: jax.Array, k: jax.Array, mask: jax.Array | None) -> jax.Array:
  """The weights [B, H, N, M] float32 of `attention`: for looking at, without a bound on memory."""
  q, k = q.swapaxes(1, 2), k.swapaxes(1, 2)
  weights = _weights(q, k, mask, _logits(q, k, mask).max(axis=-1, keepdims=True))
  return weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), _TINY)


def _by_form(qkv, mask, form):
  q, k, v = qkv
  by_query = mask is not None and mask.ndim == 3
  if form == 'flash' and not by_query and flash.usable(q):
    return flash.attend(q, k, v, mask)
  if by_query:
    mask = mask[:, None],
  elif mask is not None and mask.dtype != bool:
    mask = mask[:, None, :, None], mask
  return _attention(qkv, mask)


# From here on operands are [B, H, N, Dh]. XLA:CPU multiplies batches fast where the contracted axis is the
# last of the left operand, and up to three times slower where it is the one before.


@jax.custom_vjp
def _attention(qkv, mask):
  """Attention of (q, k, v): a tuple, or one array with a leading axis of 3 -> [B, H, N, Dh]."""
  return _attention_fwd(qkv, mask)[0]


def _attention_fwd(qkv, mask):
  q, k, v = qkv = _once(qkv)
  if k.shape[2] <= (KEEP // 2 if platform() == 'cpu' else KEEP):
    out, _, total, weights = _attend(q, k, v, mask)
    return out, (qkv, mask, out, total, weights)
  wide = functools.partial(_attend_chunks, least=LEAST)
  out, top, total = lax.platform_dependent(q, k, v, mask, cpu=_attend_chunks, default=wide)
  return out, (qkv, mask, out, top + jnp.log(total), None)


def _attention_bwd(residuals, g):
  qkv, mask, out, total, weights = residuals
  q, k, v = qkv
  delta = (g.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)  # [B, H, N, 1]
  if weights is None:
    wide = functools.partial(_gradients_chunks, least=LEAST)
    grads = lax.platform_dependent(q, k, v, mask, g, total, delta, cpu=_gradients_chunks, default=wide)
  else:
    grads = _gradients(q, k, v, weights, (g / total).astype(g.dtype), delta / total)
  grads = tuple(d.astype(x.dtype) for d, x in zip(grads, (q, k, v), strict=True))
  return (grads if isinstance(qkv, tuple) else jnp.stack(grads)), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _product(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _seen(mask):
  """Keys that a query may look at, [B, 1, N or 1, M] bool.

  A tuple says it of each query, ([B, 1, n, M],), or by segments, (queries [B, 1, n, 1], keys [B, N]).
  """
  if not isinstance(mask, tuple):
    return mask[:, None] if mask.ndim == 3 else mask[:, None, None]
  if len(mask) == 1:
    return mask[0]
  rows, keys = mask[0], mask[1][:, None, None]
  return (rows == keys) & (keys != 0)


def _logits(q, k, mask):
  """[B, H, N, M] float32."""
  logits = _product('bhnd,bhmd->bhnm', q, k) * q.shape[-1] ** -0.5
  return logits if mask is None else jnp.where(_seen(mask), logits, _MASKED)


def _weights(q, k, mask, offset):
  """exp(logits - offset) [B, H, N, M], zero where masked."""
  weights = jnp.exp(_logits(q, k, mask) - offset)
  return weights if mask is None else jnp.where(_seen(mask), weights, 0.0)


def _attend(q, k, v, mask):
  """(output in the dtype of q, largest logit, sum of weights, weights); the middle two [B, H, N, 1]."""
  top = _logits(q, k, mask).max(axis=-1, keepdims=True)
  weights = _once(_weights(q, k, mask, top))
  total = jnp.maximum(weights.sum(axis=-1, keepdims=True), _TINY)
  weights = weights.astype(v.dtype)
  return (_product('bhnm,bhmd->bhnd', weights, v) / total).astype(q.dtype), top, total, weights


def _slope(q, v, weights, g, delta):
  """Gradient of the products of queries and keys, [B, H, N, M]."""
  return _once(weights * (_product('bhnd,bhmd->bhnm', g, v) - delta) * q.shape[-1] ** -0.5).astype(q.dtype)


def _gradients(q, k, v, weights, g, delta):
  """Gradients of q, k and v, [B, H, N, Dh] float32.

  With weights that do not sum to one, g and delta (sum of g * output) are divided by their sum.
  """
  slope = _slope(q, v, weights, g, delta)
  if q.shape[-1] >= 64:  # then the copies cost less than they save
    turned = 'bhmn,bhnd->bhmd'
    dk = _product(turned, _once(slope.swapaxes(2, 3)), q)
    dv = _product(turned, _once(weights.swapaxes(2, 3)), g)
  else:
    turned = 'bhnm,bhnd->bhmd'
    dk, dv = _product(turned, slope, q), _product(turned, weights, g)
  return _product('bhnm,bhmd->bhnd', slope, k), dk, dv


def _parts(count):
  """How many devices share the queries of a sample: each takes its part of every chunk."""
  parts = axis_size('sequence')
  return parts if count % parts == 0 else 1


def _chunked(least, q, k, *rows):
  """Cuts each of `rows` [B, H or 1, N, D] -> [chunks, B, H, n, D], zeros at the end: logits that fit a cache."""
  batch, heads, count = q.shape[:3]
  parts = _parts(count)
  own = count // parts
  size = max(CHUNK_BYTES // (4 * batch * heads * k.shape[2] * parts), least)
  chunks = -(-own // size)
  size = -(-own // chunks)

  def cut(x):
    alike = x.shape[:2]
    x = x.reshape(*alike, parts, own, -1)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, chunks * size - own), (0, 0)))
    x = jnp.moveaxis(x.reshape(*alike, parts, chunks, size, -1), 3, 0)
    return x.reshape(chunks, *alike, parts * size, -1)

  return tuple(cut(x) for x in rows)


def _joined(x, count):
  """The inverse of `_chunked` for one array."""
  chunks, batch, heads, rows = x.shape[:4]
  parts = _parts(count)
  x = jnp.moveaxis(x.reshape(chunks, batch, heads, parts, rows // parts, -1), 0, 3)
  return x.reshape(batch, heads, parts, chunks * rows // parts, -1)[:, :, :, : count // parts].reshape(
      batch, heads, count, -1)


def _of_queries(mask):
  """What of a mask belongs to queries."""
  return mask[:1] if isinstance(mask, tuple) else ()


def _of_chunk(mask, rows):
  """The mask of a chunk of queries, of which `rows` is `_of_queries`."""
  return (*rows, *mask[1:]) if rows else mask


def _attend_chunks(q, k, v, mask, least=64):
  """The first three of `_attend`, some queries at a time."""
  body = lambda _, part: (None, _attend(part[0], k, v, _of_chunk(mask, part[1:]))[:3])
  parts = lax.scan(body, None, _chunked(least, q, k, q, *_of_queries(mask)))[1]
  return tuple(_joined(x, q.shape[2]) for x in parts)


def _gradients_chunks(q, k, v, mask, g, total, delta, least=64):
  """`_gradients`, some queries at a time; weights are computed again."""

  def body(sums, part):
    q, g, total, delta, *rows = part
    weights = _once(_weights(q, k, _of_chunk(mask, rows), total)).astype(v.dtype)
    slope = _slope(q, v, weights, g, delta)
    dk = sums[0] + _product('bhdn,bhnm->bhdm', q.swapaxes(2, 3), slope)
    dv = sums[1] + _product('bhdn,bhnm->bhdm', g.swapaxes(2, 3), weights)
    return (dk, dv), _product('bhnm,bhmd->bhnd', slope, k)

  zeros = lambda x: jnp.zeros(x.swapaxes(2, 3).shape, jnp.float32)
  (dk, dv), dq = lax.scan(body, (zeros(k), zeros(v)), _chunked(least, q, k, q, g, total, delta, *_of_queries(mask)))
  return _joined(dq, q.shape[2]), dk.swapaxes(2, 3), dv.swapaxes(2, 3)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
  """Layer normalisation of x [..., D] with scale and bias [D]; float32 inside and out."""
  return _layer_norm(epsilon, x, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer_norm(epsilon, x, scale, bias):
  return _layer_norm_fwd(epsilon, x, scale, bias)[0]


def _layer_norm_fwd(epsilon, x, scale, bias):
  """Keeps x and two numbers a row; differentiated as it is written it would keep three arrays like x."""
  wide = x.astype(jnp.float32)
  mean = wide.mean(axis=-1, keepdims=True)
  inverse = lax.rsqrt(jnp.square(wide - mean).mean(axis=-1, keepdims=True) + epsilon)
  mean, inverse = _once((mean, inverse))
  return (wide - mean) * inverse * scale + bias, (x, mean, inverse, scale)


def _layer_norm_bwd(epsilon, residuals, g):
  del epsilon
  x, mean, inverse, scale = residuals
  rows = tuple(range(x.ndim - 1))
  normal = (x.astype(jnp.float32) - mean) * inverse
  scaled = g * scale
  level = scaled.mean(axis=-1, keepdims=True)
  along = (scaled * normal).mean(axis=-1, keepdims=True)
  level, along = _once((level, along))
  dx = (scaled - level - normal * along) * inverse
  return dx.astype(x.dtype), (g * normal).sum(axis=rows), g.sum(axis=rows)


_layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)
