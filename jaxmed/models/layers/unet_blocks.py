"""What U-Nets are made of: blocks of convolutions with a norm and a leaky ReLU, and ways down and up.

All take maps [B, *size, D] and the mask of visible places [B, *grid, 1], None for all; hidden places stay zero. A
block is `block(features, kernel, stride, first, style)(x, rate, visible, train)`; `kernel` and `stride` have a number
for each axis.
"""

import ast
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.errors import UserError
from jaxmed.models.layers import kernels
from jaxmed.models.layers.convolution import Conv, conv_init, keep, normalise
from jaxmed.models.layers.convolution import drop_path as drop
from jaxmed.models.layers.norm import BatchNorm, GroupNorm
from jaxmed.models.layers.tokens import unpatchify

NORMS = ('instance', 'group', 'batch')
GROUP = 8  # channels of a group of the norm 'group'
DOWNS = ('conv', 'mean', 'max')
UPS = ('transposed', 'nearest', 'linear')


@dataclasses.dataclass(frozen=True)
class Style:
  """What all layers of a network share.

  Attributes:
    norm: one of NORMS, each with scale, bias and an epsilon of 1e-5.
    slope: of the leaky ReLU below zero.
    zero_last: whether the last norm of a residual branch starts at zero.
    drop: whether branches are dropped, by the rate that a block is given.
  """

  norm: str = 'instance'
  slope: float = 0.01
  zero_last: bool = False
  drop: bool = False
  dtype: Any = jnp.float32

  def normed(self, x: jax.Array, visible: jax.Array | None, train: bool, name: str, zero: bool = False) -> jax.Array:
    """x through a norm of that name, inside of a compact method."""
    if self.norm == 'batch':
      return normalise(BatchNorm(dtype=self.dtype, zero_scale=zero, name=name), x, visible, train)
    channels = GROUP if self.norm == 'group' else 1
    return normalise(GroupNorm(channels, dtype=self.dtype, zero_scale=zero, name=name), x, visible, train)

  def conv(self, features: int, kernel: tuple[int, ...], stride: tuple[int, ...], name: str,
           use_bias: bool = True) -> Conv:
    """A convolution whose odd kernel is padded to the same size."""
    padding = tuple((k - 1) // 2 for k in kernel)
    return Conv(features, kernel, stride, padding, use_bias, 'leaky', self.dtype, name=name)

  def act(self, x: jax.Array) -> jax.Array:
    """Leaky ReLU."""
    return nn.leaky_relu(x, self.slope)


class Plain(nn.Module):
  """Convolution, norm, leaky ReLU: a layer of nnU-Net's plain network (dynamic-network-architectures,
  simple_conv_blocks.py:ConvDropoutNormReLU)."""

  features: int
  kernel: tuple[int, ...]
  stride: tuple[int, ...]
  first: bool
  style: Style

  @nn.compact
  def __call__(self, x: jax.Array, rate: jax.Array, visible: jax.Array | None, train: bool) -> jax.Array:
    del rate
    x = self.style.conv(self.features, self.kernel, self.stride, 'conv')(x)
    return self.style.act(self.style.normed(x, visible, train, 'norm'))


class Residual(nn.Module):
  """Two convolutions beside a shortcut, which in the first block of a stage is a strided 1x1 convolution with a bias
  and no norm: STU-Net's (uni-medical/STU-Net, STUNet.py:BasicResBlock)."""

  features: int
  kernel: tuple[int, ...]
  stride: tuple[int, ...]
  first: bool
  style: Style

  @nn.compact
  def __call__(self, x: jax.Array, rate: jax.Array, visible: jax.Array | None, train: bool) -> jax.Array:
    y = _branch(self, x, rate, visible, train)
    if self.first:
      ones = (1,) * len(self.kernel)
      x = keep(self.style.conv(self.features, ones, self.stride, 'skip_conv')(x), visible)
    return self.style.act(x + y)


class ResidualD(nn.Module):
  """The same with the shortcut of ResNet-D: a mean over each window of the stride, and where widths differ a 1x1
  convolution without bias and a norm (dynamic-network-architectures, residual.py:BasicBlockD)."""

  features: int
  kernel: tuple[int, ...]
  stride: tuple[int, ...]
  first: bool
  style: Style

  @nn.compact
  def __call__(self, x: jax.Array, rate: jax.Array, visible: jax.Array | None, train: bool) -> jax.Array:
    y, ones = _branch(self, x, rate, visible, train), (1,) * len(self.kernel)
    x = pooled_down(x, self.stride, 'mean')
    if x.shape[-1] != self.features:
      x = self.style.conv(self.features, ones, ones, 'skip_conv', False)(x)
      x = self.style.normed(x, visible, train, 'skip_norm')
    return self.style.act(x + y)


def _branch(block: Residual | ResidualD, x: jax.Array, rate: jax.Array, visible: jax.Array | None,
            train: bool) -> jax.Array:
  """Two convolutions with norms and a leaky ReLU between them, dropped by `rate`."""
  style, ones = block.style, (1,) * len(block.kernel)
  y = style.conv(block.features, block.kernel, block.stride, 'conv1')(x)
  y = style.act(style.normed(y, visible, train, 'norm1'))
  y = style.conv(block.features, block.kernel, ones, 'conv2')(y)
  y = style.normed(y, visible, train, 'norm2', style.zero_last)
  return drop(y, rate, block.make_rng('dropout')) if style.drop else y


BLOCKS: dict[str, type[nn.Module]] = {'plain': Plain, 'residual': Residual, 'residual_d': ResidualD}


def pooled_down(x: jax.Array, stride: tuple[int, ...], how: str) -> jax.Array:
  """The 'mean' or 'max' of each window: [B, *size, D] -> [B, *size / stride, D]; the stride divides the size."""
  if math.prod(stride) == 1:
    return x
  split = [n for size, step in zip(x.shape[1:-1], stride, strict=True) for n in (size // step, step)]
  windows = x.reshape(x.shape[0], *split, x.shape[-1])
  reduce = jnp.max if how == 'max' else jnp.mean
  return reduce(windows, axis=tuple(range(2, 2 * len(stride) + 1, 2)))


class Up(nn.Module):
  """A map `factor` times larger along each axis: [B, *size, C] -> [B, *size * factor, features].

  Attributes:
    how: 'transposed', a transposed convolution whose windows do not overlap (nnU-Net); 'nearest' or 'linear', a 1x1
      convolution and an interpolation, in the order that computes less: the two commute (STU-Net interpolates first).
    use_bias, kernel_init: of the transposed convolution; a law of `conv_init`, with the fan-in that PyTorch counts, its
      outputs times the window.
  """

  features: int
  factor: tuple[int, ...]
  how: str = 'transposed'
  dtype: Any = jnp.float32
  use_bias: bool = True
  kernel_init: str = 'leaky'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    size = tuple(n * f for n, f in zip(x.shape[1:-1], self.factor, strict=True))
    if self.how != 'transposed':
      x = Conv(self.features, 1, kernel_init='leaky', dtype=self.dtype, name='conv')(x)
      if self.how == 'linear':
        return jax.image.resize(x, (x.shape[0], *size, self.features), 'linear')
      for axis, factor in enumerate(self.factor, 1):
        x = jnp.repeat(x, factor, axis=axis)
      return x
    boxed, rank = nn.with_logical_partitioning, len(self.factor)
    law = boxed(_transposed(conv_init(self.kernel_init)), (None,) * (rank + 1) + ('embed',))
    shape = (*self.factor, x.shape[-1], self.features)
    kernel = self.param('kernel', law, shape, jnp.float32).astype(self.dtype)
    flat = jnp.moveaxis(kernel, -2, 0).reshape(x.shape[-1], -1)
    patches = kernels.dense(x.astype(self.dtype).reshape(x.shape[0], -1, x.shape[-1]), flat)
    out = unpatchify(patches, size, self.factor)
    if not self.use_bias:
      return out
    bias = self.param('bias', boxed(nn.initializers.zeros_init(), ('embed',)), (self.features,), jnp.float32)
    return out + bias.astype(self.dtype)


def _transposed(law: nn.initializers.Initializer) -> nn.initializers.Initializer:
  """The law of a kernel [*k, C, D] for the kernel [*k, D, C] of a transposed convolution."""
  return lambda key, shape, dtype=jnp.float32: law(key, (*shape[:-2], shape[-1], shape[-2]), dtype).swapaxes(-1, -2)


def stages_text(name: str, values: Any, count: int | None, rank: int) -> str:
  """An option with one entry a stage, each a number for all axes or one for each, as its plain text: '1x3x3,3,3'.

  Args:
    values: such a text, or a sequence of numbers, texts and sequences: (1, (1, 2, 2), '2x2x2').
    count: entries that there must be, if any; None for any number.
  Raises:
    UserError: an entry that is none of these, or another number of entries or axes; names the option.
  """
  entries = ['x'.join(map(str, _entry(name, value, rank))) for value in _listed(values)]
  if count is not None and len(entries) not in (0, count):
    raise UserError(f'{name} has {len(entries)} entries: expected one for each of {count} stages')
  return ','.join(entries)


def each_stage(text: str, count: int, rank: int, rest: int) -> list[tuple[int, ...]]:
  """The numbers of each axis of each of `count` stages in such a text; '' is `rest` in all of them."""
  entries = [tuple(map(int, entry.split('x'))) for entry in text.split(',')] if text else [(rest,)] * count
  return [entry * rank if len(entry) == 1 else entry for entry in entries]


def _listed(values: Any) -> list[Any]:
  if isinstance(values, str):
    try:
      values = ast.literal_eval(values)  # a sequence that a config has made text of
    except (ValueError, SyntaxError):
      values = values.split(',') if values else []
  return list(values) if isinstance(values, (tuple, list)) else [values]


def _entry(name: str, value: Any, rank: int) -> list[int]:
  parts = value.split('x') if isinstance(value, str) else list(value) if isinstance(value, (tuple, list)) else [value]
  if not all(str(part).strip().isdigit() and int(part) > 0 for part in parts) or len(parts) not in (1, rank):
    raise UserError(f'{name} has the entry {value!r}: expected a positive number, or one for each of {rank} axes, as '
                    + 'x'.join('133'[-rank:]))
  return [int(part) for part in parts]
