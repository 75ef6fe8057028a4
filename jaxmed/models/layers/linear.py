"""The linear layer of every transformer here, whose kernel may be cut over devices."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.layers import kernels
from jaxmed.models.layers.initial import initializer
from jaxmed.parallel.mesh import axis_size, weight


class Dense(nn.Module):
  """Linear layer [..., D] -> [..., *features]; `axes` are the logical names of (D, *features)."""

  features: tuple[int, ...]
  axes: tuple[str | None, ...]
  use_bias: bool = True
  kernel_init: str = 'trunc_normal'
  dtype: Any = jnp.float32
  fold: int = 1  # how many trailing axes of the input are contracted together
  bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.reshape(*x.shape[: x.ndim - self.fold], -1)
    init = nn.with_logical_partitioning(initializer(self.kernel_init), self.axes)
    kernel = self.param('kernel', init, (x.shape[-1], *self.features), jnp.float32)
    product = kernels.dense if axis_size('fsdp') == 1 else functools.partial(_gathering, self.axes)
    out = product(x.astype(self.dtype), kernel.astype(self.dtype))
    if self.use_bias:
      first = nn.with_logical_partitioning(self.bias_init, self.axes[1:])
      out = out + self.param('bias', first, self.features, jnp.float32).astype(self.dtype)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathering(axes: tuple[str | None, ...], x: jax.Array, kernel: jax.Array) -> jax.Array:
  """`kernels.dense` with a kernel that is cut over fsdp: gathered for the product, and again going back.

  Left to itself XLA gathers a kernel in several shapes, once for each way in which it is multiplied, and sums some
  gradients whole instead of in parts.
  """
  return kernels.dense(x, weight(kernel, axes, gathered=True))


def _gathering_bwd(axes, residuals, g):
  x, kernel = residuals
  dx, dkernel = jax.vjp(kernels.dense, x, weight(kernel, axes, gathered=True))[1](g)
  return dx, weight(dkernel, axes, gathered=False)


_gathering.defvjp(lambda axes, x, kernel: (_gathering(axes, x, kernel), (x, kernel)), _gathering_bwd)
