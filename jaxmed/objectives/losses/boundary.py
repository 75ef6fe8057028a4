"""The boundary loss and the signed distance maps that it reads, computed on the device.

Masks are augmented on the device, so distances that were prepared on the host would be those of other masks. The
transform is exact and separable: along each axis of n pixels the least of f(j) + (i - j)^2 over all j, n passes over
the map (the distance of Felzenszwalb and Huttenlocher 2012 without their lower envelope, which is sequential).
"""

import jax
import jax.numpy as jnp

from jaxmed.objectives.losses.segmentation import Truth, one_hot, wanted

FAR = 1e9  # squared distance to nothing


def boundary(logp: jax.Array, truth: Truth) -> jax.Array:
  """Mean over known pixels and annotated foreground classes of p times the signed distance to the class.

  Kervadec et al. 2019, eq. 5, by LIVIAETS/boundary-loss, losses.py:SurfaceLoss. Distances are in pixels of the view.
  An unknown pixel is outside of every class.

  Args:
    logp: [B, *size, K] log probabilities.
  """
  weight = truth.known[..., None] & jnp.expand_dims(wanted(truth, logp.shape[0], logp.shape[-1]),
                                                    tuple(range(1, logp.ndim - 1)))
  values = jnp.exp(logp) * signed_distance(one_hot(truth, logp.shape[-1]) > 0)
  return jnp.where(weight, values, 0).sum() / jnp.maximum(weight.sum(dtype=jnp.float32), 1)


def signed_distance(inside: jax.Array) -> jax.Array:
  """Signed distances [B, *size, K] float32 of regions [B, *size, K] bool, in pixels.

  Outside of a region the distance to its nearest pixel; inside 1 minus that to the nearest pixel outside, so 0 on the
  last pixel of the region (one_hot2dist of LIVIAETS/boundary-loss). 0 everywhere for a region that is empty, or all.
  """
  axes = tuple(range(1, inside.ndim - 1))
  outer, inner = (jnp.sqrt(squared_distance(x, axes)) for x in (inside, ~inside))
  some = inside.any(axis=axes, keepdims=True) & ~inside.all(axis=axes, keepdims=True)
  return jax.lax.stop_gradient(jnp.where(some, jnp.where(inside, 1 - inner, outer), 0))


def squared_distance(region: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Squared Euclidean distances float32, along `axes`, to the nearest pixel of a region bool; FAR where it is empty."""
  f = jnp.where(region, 0.0, FAR)
  for axis in axes:
    f = _along(f, axis)
  return jnp.minimum(f, FAR)


def _along(f: jax.Array, axis: int) -> jax.Array:
  """min over j of f(j) + (i - j)^2 along an axis."""
  place = jnp.arange(f.shape[axis]).reshape([-1 if a == axis else 1 for a in range(f.ndim)])

  def nearer(j, best):
    return jnp.minimum(best, jax.lax.dynamic_slice_in_dim(f, j, 1, axis) + jnp.square(place - j).astype(jnp.float32))

  return jax.lax.fori_loop(0, f.shape[axis], nearer, jnp.full_like(f, jnp.inf))
