"""Attention by the kernels that others wrote for one accelerator: Pallas on TPU, cuDNN on NVIDIA GPUs.

Operands are [B, H, N, Dh] as in `kernels`; keys and values may have another length M.
"""

import jax
import jax.numpy as jnp

from jaxmed.parallel.mesh import platform, spec

BLOCK = 128  # which the TPU kernel wants lengths to be multiples of
HELD, PASSED = 1280, 512  # at most so many queries or keys are held at a time, and so many of the others pass them


def usable(q: jax.Array) -> bool:
  """Whether the platform of the surrounding mesh has a kernel for such operands; cuDNN's takes 16-bit floats only."""
  return platform() == 'tpu' or (platform() in ('gpu', 'cuda') and q.dtype.itemsize == 2)


def block(length: int, most: int = HELD) -> int:
  """How many of so many queries or keys the TPU kernel takes at a time: the more it holds, the seldomer others pass."""
  return next(n for n in range(most, 0, -BLOCK) if length % n == 0)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Attention [B, H, N, Dh], differentiable; rows whose keys are all masked are zero. `mask` as in `kernels.attention`.

  Each device computes its samples, heads and queries with all of their keys.
  """
  if platform() != 'tpu':
    return by_library(q, k, v, mask, 'cudnn')
  heads, keys = ('batch', 'heads', 'tokens', None), ('batch', 'heads', None, None)
  specs = [spec(heads, q.shape), spec(keys, k.shape), spec(keys, v.shape)]
  operands = [q, k, v]
  if mask is not None:  # segments are also those of queries, of which a device may have a part
    names = [('batch', None)] if mask.dtype == bool else [('batch', None), ('batch', 'tokens')]
    specs += [spec(axes, mask.shape) for axes in names]
    operands += [mask] * len(names)
  if not jax.sharding.get_abstract_mesh().shape:
    return by_pallas(*operands)
  return jax.shard_map(by_pallas, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)(*operands)


def by_library(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, implementation: str) -> jax.Array:
  """`jax.nn.dot_product_attention`, which has cuDNN's kernel."""
  seen = None if mask is None else mask[:, None, None, :]
  if seen is not None and seen.dtype != bool:
    seen = (seen.swapaxes(2, 3) == seen) & (seen != 0)
  out = jax.nn.dot_product_attention(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), mask=seen,
                                     implementation=implementation)  # type: ignore[arg-type,call-overload]
  return _without_blind(out.swapaxes(1, 2), mask)


def by_pallas(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None,
              own: jax.Array | None = None) -> jax.Array:
  """The flash attention for TPU that comes with JAX (jax/experimental/pallas/ops/tpu/flash_attention.py).

  `own`: [B, N] the segments of queries where `mask` has those of keys.
  """
  from jax.experimental.pallas.ops.tpu import flash_attention as pallas

  rows, keys = q.shape[2], k.shape[2]
  grow = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % BLOCK), (0, 0)))
  segments = None
  if mask is not None or keys % BLOCK:
    there = jnp.ones((k.shape[0], keys), bool) if mask is None else mask
    grown = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK))).astype(jnp.int32)
    queries = jnp.ones((q.shape[0], rows + -rows % BLOCK), jnp.int32) if own is None else grown(own)
    segments = pallas.SegmentIds(queries, grown(there))
  q, k, v = grow(q), grow(k), grow(v)
  held_q, held_k, passed_q, passed_k = (block(x.shape[2], most) for most in (HELD, PASSED) for x in (q, k))
  sizes = pallas.BlockSizes(
      block_b=1, block_q=held_q, block_k_major=passed_k, block_k=passed_k, block_q_major_dkv=passed_q,
      block_q_dkv=passed_q, block_k_major_dkv=held_k, block_k_dkv=held_k, block_q_dq=held_q,
      block_k_major_dq=passed_k, block_k_dq=passed_k)
  out = pallas.flash_attention(q, k, v, segment_ids=segments, sm_scale=q.shape[-1] ** -0.5, block_sizes=sizes)
  return _without_blind(out[:, :, :rows], mask if own is None else own)


def _without_blind(out: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Zero where a query has no key at all: the kernels give the mean of the values there."""
  if mask is None:
    return out
  seeing = mask.any(axis=1, keepdims=True) if mask.dtype == bool else mask != 0
  return jnp.where(seeing[:, None, :, None], out, 0)
