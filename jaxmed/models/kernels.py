"""The few array functions in which a transformer spends its time: dense product, GELU, attention.

Every model calls these and nothing else for that work, so a faster form for one backend is one change here.
"""

import jax
import jax.numpy as jnp


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Multiplies the last axis of x [..., D] with kernel [D, *F] -> [..., *F].

  The product is done on two-dimensional operands: XLA:CPU is slower on three-dimensional ones.
  """
  out = x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[0], -1)
  return out.reshape(*x.shape[:-1], *kernel.shape[1:])


def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, x * Phi(x)."""
  return jax.nn.gelu(x, approximate=False)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """Scaled dot-product attention.

  Args:
    q, k, v: [B, N, H, Dh] (k and v may have another length M).
    mask: [B, M] bool, True where a key may be looked at; None for all.
  Returns:
    [B, N, H, Dh] in the dtype of q. The softmax is taken in float32. Rows whose keys are all masked are zero.
  """
  logits = jnp.einsum('bnhd,bmhd->bhnm', q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
  if mask is not None:
    logits = jnp.where(mask[:, None, None, :], logits, -1e30)
  weights = jax.nn.softmax(logits, axis=-1)
  if mask is not None:
    weights = jnp.where(mask[:, None, None, :], weights, 0.0)
  return jnp.einsum('bhnm,bmhd->bnhd', weights.astype(v.dtype), v)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
  """Layer normalisation of x [..., D] with scale and bias [D]; float32 inside and out."""
  x = x.astype(jnp.float32)
  mean = x.mean(axis=-1, keepdims=True)
  centred = x - mean
  variance = jnp.square(centred).mean(axis=-1, keepdims=True)
  return centred * (jax.lax.rsqrt(variance + epsilon) * scale) + bias
