"""What the convolutional and hierarchical encoders share: convolutions, masked input, the encoder's interface.

Images and feature maps are [B, *size, C] (size of two or three axes), kernels [*kernel, C_in, C_out].

Masked input (`hidden` patches at the final grid) comes in two forms. 'sparse' is SparK's (Tian et al. 2023;
keyu-tian/SparK, encoder.py): hidden places are zero after every layer and left out of every statistic and of attention,
so that visible ones see of them only zeros at their border. 'token' is SimMIM's (Xie et al. 2022): hidden pixels are
zero, and after the stem hidden places are a learned token. Stems whose windows overlap see those zeros in both forms.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxmed.contracts import Supports
from jaxmed.errors import UserError, choose
from jaxmed.models.layers import kernels
from jaxmed.models.layers.defaults import EncoderDefaults
from jaxmed.models.layers.initial import normal, patch_laws
from jaxmed.models.layers.norm import BatchNorm, GroupNorm
from jaxmed.models.layers.tokens import Features, Level, check_levels, drop_channels, grid_of, patchify

MASKINGS = ('sparse', 'token')
LEAK = 0.01  # slope of a leaky ReLU below zero
SLAB = 2**21  # bytes that a convolution of volumes on a CPU copies at a time: they should stay in a core's cache
LEAST = 2**26  # multiply-adds from which such a convolution is worth a program that is three times as long to compile


def enlarge(mask: jax.Array, size: tuple[int, ...]) -> jax.Array:
  """A mask [B, *grid, 1] bool on another grid, [B, *size, 1]: repeated on a finer one, any of its cells on a coarse."""
  for axis, n in enumerate(size, 1):
    have = mask.shape[axis]
    if n < have:
      mask = mask.reshape(*mask.shape[:axis], n, have // n, *mask.shape[axis + 1 :]).any(axis=axis + 1)
    else:
      mask = jnp.repeat(mask, n // have, axis=axis)
  return mask


def keep(x: jax.Array, visible: jax.Array | None) -> jax.Array:
  """x [B, *size, C] with zeros where a patch is not `visible` [B, *grid, 1]; None keeps all."""
  return x if visible is None else jnp.where(enlarge(visible, x.shape[1:-1]), x, 0)


class Conv(nn.Module):
  """Convolution [B, *size, C] -> [B, *size / stride, features], zero-padded as PyTorch does: `padding` at both ends.

  Attributes:
    kernel, stride, padding: one number, or one for each axis.
    kernel_init: 'trunc_normal' (std 0.02), 'fan_out' (normal, variance 2 / fan_out: He et al. 2015), 'leaky' (variance
      2 / (1 + 0.01**2) / fan_in, before a leaky ReLU), 'xavier' (normal, variance 2 / (fan_in + fan_out)) or 'torch'
      (uniform in +-1 / sqrt(fan_in), and so the biases: PyTorch's default).
    groups: parts of the channels that are convolved by themselves.
  """

  features: int
  kernel: int | tuple[int, ...]
  stride: int | tuple[int, ...] = 1
  padding: int | tuple[int, ...] = 0
  use_bias: bool = True
  kernel_init: str = 'trunc_normal'
  dtype: Any = jnp.float32
  groups: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    rank = x.ndim - 2
    axes = (None,) * (rank + 1) + ('embed',)
    boxed = nn.with_logical_partitioning
    shape = (*by_axis(self.kernel, rank), x.shape[-1] // self.groups, self.features)
    kernel = self.param('kernel', boxed(conv_init(self.kernel_init), axes), shape, jnp.float32).astype(self.dtype)
    x = convolve(x.astype(self.dtype), kernel, self.stride, self.padding, self.groups)
    if self.use_bias:
      law = patch_laws(self.kernel_init if self.kernel_init == 'torch' else '', '', math.prod(shape[:-1]))[1]
      x = x + self.param('bias', boxed(law, ('embed',)), (self.features,), jnp.float32).astype(self.dtype)
    return x


class Depthwise(nn.Module):
  """Convolution of each channel by itself, stride 1, odd kernel, same size: [B, *size, C] -> [B, *size, C]."""

  kernel: int
  use_bias: bool = True
  kernel_init: str = 'trunc_normal'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    rank, boxed = x.ndim - 2, nn.with_logical_partitioning
    init = boxed(conv_init(self.kernel_init, groups=x.shape[-1]), (None,) * (rank + 1) + ('embed',))
    kernel = self.param('kernel', init, (*(self.kernel,) * rank, 1, x.shape[-1]), jnp.float32).astype(self.dtype)
    x = depthwise(x.astype(self.dtype), kernel)
    if self.use_bias:
      zeros = boxed(nn.initializers.zeros_init(), ('embed',))
      x = x + self.param('bias', zeros, (x.shape[-1],), jnp.float32).astype(self.dtype)
    return x


def conv_init(name: str, groups: int = 1) -> nn.initializers.Initializer:
  """Initialiser of a kernel [*kernel, C_in / groups, C_out]."""
  if name == 'trunc_normal':
    return normal()
  if name == 'xavier':
    return nn.initializers.variance_scaling(1.0, 'fan_avg', 'normal')
  if name == 'torch':
    return nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
  gain, at = {'fan_out': (2.0, -1), 'leaky': (2 / (1 + LEAK**2), -2)}[name]

  def he(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype) * math.sqrt(gain * groups / math.prod((*shape[:-2], shape[at])))

  return he


def by_axis(value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
  """A number for each axis; one number is that of all of them."""
  return (value,) * rank if isinstance(value, int) else value


def convolve(x: jax.Array, kernel: jax.Array, stride: int | tuple[int, ...], padding: int | tuple[int, ...],
             groups: int = 1) -> jax.Array:
  """Convolution of x [B, *size, C] with kernel [*k, C / groups, D]; a matrix product where windows do not overlap.

  `stride` and `padding` are one number, or one for each axis.
  """
  rank, width = x.ndim - 2, kernel.shape[:-2]
  stride, padding = by_axis(stride, rank), by_axis(padding, rank)
  ends = tuple((n, n) for n in padding)
  if groups > 1:
    return _windows(x, kernel, stride, ends, groups)
  if math.prod(width) == 1 and not any(padding):
    x = x[(slice(None), *(slice(None, None, step) for step in stride))]
    return kernels.dense(x, kernel.reshape(kernel.shape[-2:]))
  if width == stride and not any(padding):
    grid = grid_of(x.shape[1:-1], width)
    out = kernels.dense(patchify(x, width), kernel.reshape(-1, kernel.shape[-1]))
    return out.reshape(x.shape[0], *grid, -1)
  own = rank == 3 and (max(stride) > 1 or _large(x, kernel, stride))
  return (_volume if own else _windows)(x, kernel, stride, ends)


def _windows(x, kernel, stride, ends, groups=1):
  return lax.conv_general_dilated(x, kernel, stride, ends, dimension_numbers=_axis_letters(x.ndim - 2),
                                  feature_group_count=groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _volume(x, kernel, stride, ends):
  """`_windows` of volumes. On a CPU it is `_stacked` and its gradients are `_input_gradient` and `_by_taps`.

  XLA:CPU convolves volumes several times slower than images, takes the kernel's gradient slower yet, and that of the
  input of a strided convolution by plain loops. Small convolutions differ from `_windows` by the last one alone.
  """
  if not _large(x, kernel, stride):
    return _windows(x, kernel, stride, ends)
  return lax.platform_dependent(x, kernel, cpu=lambda x, kernel: _stacked(x, kernel, stride, ends),
                                default=lambda x, kernel: _windows(x, kernel, stride, ends))


def _large(x, kernel, stride):
  return math.prod(x.shape[:-1]) * kernel.size >= LEAST * math.prod(stride)


def _volume_bwd(stride, ends, residuals, g):
  apply = lambda form: lambda x, kernel: form(x, kernel, stride, ends)
  gradient = lambda form: lambda x, kernel, g: jax.vjp(apply(form), x, kernel)[1](g)
  own = lambda x, kernel, g: (_input_gradient(x, kernel, g, stride, ends), _by_taps(x, kernel, g, stride, ends))
  large = _large(*residuals, stride)
  return lax.platform_dependent(*residuals, g, cpu=own if large else gradient(_blocked), default=gradient(_windows))


_volume.defvjp(lambda x, kernel, stride, ends: (_volume(x, kernel, stride, ends), (x, kernel)), _volume_bwd)


def _stacked(x, kernel, stride, ends):
  """The same as convolutions of images: slices of the depth that the kernel covers are channels of one, some at a time.

  The loop is over the depth, which no mesh cuts.
  """
  deep, step = kernel.shape[0], stride[0]
  x = lax.pad(x, jnp.zeros((), x.dtype), [(*pair, 0) for pair in ((0, 0), ends[0], (0, 0), (0, 0), (0, 0))])
  kernel = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], -1, kernel.shape[-1])
  depth = (x.shape[1] - deep) // step + 1
  many = _slab(depth, x[:, 0].size * deep * x.dtype.itemsize)

  def images(i):
    part = lax.dynamic_slice_in_dim(x, i * many * step, (many - 1) * step + deep, axis=1)
    part = jnp.concatenate([part[:, k : k + (many - 1) * step + 1 : step] for k in range(deep)], axis=-1)
    out = _windows(part.reshape(-1, *part.shape[2:]), kernel, stride[1:], ends[1:])
    return out.reshape(-1, many, *out.shape[1:])

  if many == depth:
    return images(0)
  out = jax.eval_shape(images, 0)
  store = lambda i, out: lax.dynamic_update_slice_in_dim(out, images(i), i * many, axis=1)
  return lax.fori_loop(0, depth // many, store, jnp.zeros((out.shape[0], depth, *out.shape[2:]), out.dtype))


def _input_gradient(x, kernel, g, stride, ends):
  """Gradient of x: the convolution of g with the kernel turned; of `_blocked` where there is a stride."""
  if max(stride) > 1:
    return jax.vjp(lambda x: _blocked(x, kernel, stride, ends), x)[1](g)[0]
  around = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in zip(kernel.shape, ends, strict=False))
  return _stacked(g, kernel[::-1, ::-1, ::-1].swapaxes(3, 4), stride, around)


def _by_taps(x, kernel, g, stride, ends):
  """Gradient of the kernel: a product of matrices for each of its places, some slices of the depth at a time."""
  width, depth = kernel.shape[:3], g.shape[1]
  x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *[(*pair, 0) for pair in ends], (0, 0, 0)])
  many = _slab(depth, x[:, 0].size * x.dtype.itemsize * math.prod(width))
  span = [(n - 1) * step + 1 for n, step in zip((many, *g.shape[2:4]), stride, strict=True)]

  def add(i, total):
    part = lax.dynamic_slice_in_dim(x, i * many * stride[0], span[0] + width[0] - 1, axis=1)
    slab = lax.dynamic_slice_in_dim(g, i * many, many, axis=1).reshape(-1, g.shape[-1])

    def product(tap):  # in a loop, as hundreds of products would be long to compile
      found = lax.dynamic_slice(part, (0, *tap, 0), (x.shape[0], *span, x.shape[-1]))
      found = found[:, :: stride[0], :: stride[1], :: stride[2]].reshape(-1, x.shape[-1])
      return jnp.tensordot(found, slab, (0, 0), preferred_element_type=jnp.float32)

    return total + lax.map(product, jnp.unravel_index(jnp.arange(math.prod(width)), width))

  total = jnp.zeros((math.prod(width), *kernel.shape[3:]), jnp.float32)
  return lax.fori_loop(0, depth // many, add, total).reshape(kernel.shape).astype(kernel.dtype)


def _slab(depth: int, size: int) -> int:
  """How many slices of a depth, of `size` bytes each, are worked on at a time: a divisor of it."""
  return next(n for n in range(depth, 0, -1) if depth % n == 0 and (n == 1 or n * size <= SLAB))


def _blocked(x, kernel, stride, ends):
  """The same as a convolution without stride: blocks of a stride's places become channels, of the kernel too.

  The kernel gets zeros in front, so that windows begin where blocks do, and behind, so that blocks fill it; x gets
  zeros behind.
  """
  windows = [(n + low + high - k) // step + 1
             for n, k, step, (low, high) in zip(x.shape[1:-1], kernel.shape, stride, ends, strict=False)]
  front = [-low % step for (low, _), step in zip(ends, stride, strict=True)]
  fill = lambda sizes: [-n % step for n, step in zip(sizes, stride, strict=True)]
  behind = fill([n + z for n, z in zip(kernel.shape, front, strict=False)])
  kernel = jnp.pad(kernel, [*zip(front, behind, strict=True), (0, 0), (0, 0)])
  x = jnp.pad(x, [(0, 0), *((0, n) for n in fill(x.shape[1:-1])), (0, 0)])
  rank = x.ndim - 2
  split = lambda shape: [n for size, step in zip(shape, stride, strict=True) for n in (size // step, step)]
  order = (*range(0, 2 * rank, 2), *range(1, 2 * rank, 2))  # blocks, then places in them
  x = x.reshape(x.shape[0], *split(x.shape[1:-1]), -1).transpose(0, *(1 + i for i in order), 1 + 2 * rank)
  kernel = kernel.reshape(*split(kernel.shape[:-2]), *kernel.shape[-2:]).transpose(*order, 2 * rank, 2 * rank + 1)
  x = x.reshape(*x.shape[:1 + rank], -1)
  kernel = kernel.reshape(*kernel.shape[:rank], -1, kernel.shape[-1])
  first = [(low + z) // step for (low, _), z, step in zip(ends, front, stride, strict=True)]
  last = [n + k - 1 - have - low for n, k, have, low in zip(windows, kernel.shape, x.shape[1:], first, strict=False)]
  ones = (1,) * rank
  return (_volume if _large(x, kernel, ones) else _windows)(x, kernel, ones, tuple(zip(first, last, strict=True)))


def _axis_letters(rank: int) -> tuple[str, str, str]:
  space = 'DHW'[-rank:]
  return f'N{space}C', f'{space}IO', f'N{space}C'


@jax.custom_vjp
def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Depthwise convolution: x [B, *size, C] with kernels [*k, 1, C], odd k, zero-padded to the same size.

  XLA:CPU computes grouped convolutions some twenty times slower than this sum of shifted products in two dimensions.
  """
  if x.ndim != 4:
    return _grouped(x, kernel)
  return lax.platform_dependent(x, kernel, cpu=_shifted, default=_grouped)


def _grouped(x, kernel):
  rank, half = x.ndim - 2, kernel.shape[0] // 2
  return lax.conv_general_dilated(x, kernel, (1,) * rank, [(half, half)] * rank, dimension_numbers=_axis_letters(rank),
                                  feature_group_count=x.shape[-1])


def _padded(x, kernel):
  half = kernel.shape[0] // 2
  return jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))


def _shifted(x, kernel):
  """The sum of shifted products, a block of rows at a time.

  The loop over the blocks is there because XLA:CPU would otherwise fuse the sum into its consumers, and compute it
  again in each of them.
  """
  height, width = x.shape[1:3]
  blocks = next((n for n in range(2, height + 1) if height % n == 0), 1)
  rows, wide = height // blocks, _padded(x, kernel).astype(jnp.float32)

  def block(i, out):
    part = lax.dynamic_slice_in_dim(wide, i * rows, rows + kernel.shape[0] - 1, axis=1)
    total = jnp.zeros((x.shape[0], rows, *x.shape[2:]), jnp.float32)
    for down in range(kernel.shape[0]):
      for right in range(kernel.shape[1]):
        shifted = part[:, down : down + rows, right : right + width]
        total = total + shifted * kernel[down, right, 0].astype(jnp.float32)
    return lax.dynamic_update_slice_in_dim(out, total.astype(x.dtype), i * rows, axis=1)

  return lax.fori_loop(0, blocks, block, jnp.zeros_like(x))


def _kernel_gradient(x, kernel, g):
  """Gradient of the kernel [k, k, 1, C]: for each row of it a product of matrices a channel, whose diagonals count."""
  (_, height, width, channels), k = x.shape, kernel.shape[0]
  wide = _padded(x, kernel).transpose(3, 2, 1, 0)  # [C, W + k - 1, H + k - 1, B]
  g = g.transpose(3, 2, 1, 0).reshape(channels, width, -1)  # [C, W, H * B]

  def row(_, down):
    part = lax.dynamic_slice_in_dim(wide, down, height, axis=2).reshape(channels, width + k - 1, -1)
    return None, jnp.einsum('cvn,cwn->cvw', part, g, preferred_element_type=jnp.float32)

  product = lax.scan(row, None, jnp.arange(k))[1]  # [k, C, W + k - 1, W]
  right, place = jnp.arange(k)[:, None], jnp.arange(width)[None]
  return product[:, :, right + place, place].sum(axis=-1).transpose(0, 2, 1)[:, :, None].astype(kernel.dtype)


def _depthwise_bwd(residuals, g):
  x, kernel = residuals
  if x.ndim != 4:
    return jax.vjp(_grouped, x, kernel)[1](g)
  turned = lambda x, kernel, g: (_shifted(g, kernel[::-1, ::-1]), _kernel_gradient(x, kernel, g))
  return lax.platform_dependent(x, kernel, g, cpu=turned, default=lambda x, k, g: jax.vjp(_grouped, x, k)[1](g))


depthwise.defvjp(lambda x, kernel: (depthwise(x, kernel), (x, kernel)), _depthwise_bwd)


class Norm(nn.Module):
  """Layer normalisation over the last axis, statistics in float32, with the epsilon that a family has."""

  use_bias: bool = True
  epsilon: float = 1e-6
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    boxed, size = nn.with_logical_partitioning, x.shape[-1]
    scale = self.param('scale', boxed(nn.initializers.ones_init(), ('embed',)), (size,), jnp.float32)
    bias = jnp.zeros(size, jnp.float32)
    if self.use_bias:
      bias = self.param('bias', boxed(nn.initializers.zeros_init(), ('embed',)), (size,), jnp.float32)
    return kernels.layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


def normalise(norm: BatchNorm | GroupNorm, x: jax.Array, visible: jax.Array | None, train: bool) -> jax.Array:
  """A norm of x [B, *size, D] with the statistics of the visible places, and zeros in the others."""
  return keep(norm(x, train, None if visible is None else enlarge(visible, x.shape[1:-1])), visible)


def drop_path(x: jax.Array, rate: jax.Array | float, key: jax.Array) -> jax.Array:
  """Zeroes a sample of x [B, ...] with probability `rate`, and divides the others by 1 - rate."""
  alive = jax.random.bernoulli(key, 1 - rate, (x.shape[0], *[1] * (x.ndim - 1)))
  return x * (alive / (1 - rate)).astype(x.dtype)


class Hierarchical(EncoderDefaults, nn.Module):
  """An encoder whose stages shrink the map; patches are the places of the last one. The fields are the config.

  A family defines `stem(image, visible, train)`, `stages(x, visible, train)`, which gives the output of each stage, and
  `head(x, visible)`, all called inside the one compact method, and `patch_size` and `embed_dim`. A pooling that follows
  the stem is `pool_stem(x, visible)`, so that level 0 has the stride of the stem itself.

  Attributes:
    image_size: native size, only its rank binds: any size that divides by the total stride works.
    in_channels: channels of the input, in one fixed order.
    drop_path: rate of the last block; rates grow linearly from 0.
    masking: what `hidden` patches become: 'sparse' or 'token', see the module.
    mask_token: whether there is the learned token that 'token' needs.
    dtype: 'float32' or 'bfloat16' compute; parameters are float32.
    depths, dims: blocks and channels of each stage.
  """

  image_size: tuple[int, ...] = (224, 224)
  in_channels: int = 3
  drop_path: float = 0.0
  masking: str = 'sparse'
  mask_token: bool = False
  dtype: Any = 'float32'

  depths: tuple[int, ...] = (2, 2, 2, 2)
  dims: tuple[int, ...] = (64, 128, 256, 512)

  supports = Supports(levels=True)

  def __post_init__(self):
    choose('encoder.masking', self.masking, MASKINGS)
    if len(self.depths) != len(self.dims) or min((*self.depths, *self.dims), default=0) < 1:
      raise UserError(f'encoder.depths {self.depths} and encoder.dims {self.dims} must be positive, one for each stage')
    super().__post_init__()

  @property
  def embed_dim(self) -> int:
    """Channels of the last map."""
    return self.dims[-1]

  @property
  def num_levels(self) -> int:
    """Stages."""
    return len(self.depths)

  @property
  def stem_level(self) -> bool:
    """Whether level 0 is a finer map than level 1, as a decoder with skips wants it."""
    return False

  @property
  def compute(self) -> jnp.dtype:
    """The type of activations."""
    return jnp.dtype(self.dtype)

  @nn.compact
  def __call__(self, image: jax.Array, channels: jax.Array | None = None, channel_mask: jax.Array | None = None,
               train: bool = False, hidden: jax.Array | None = None, levels: tuple[int, ...] = ()) -> Features:
    """Features of images [B, *size, C], normalised float.

    Args:
      channels: not used: the order is fixed.
      channel_mask: [B, C] bool; channels that it rules out are zeroed and the rest scaled by C / n.
      hidden: [B, N] bool over the final grid, or [B, *grid] over another one, whose cells divide those of each map or
        are divided by them: a place of a coarser map is hidden where all of its cells are. With masking 'sparse',
        `valid` of the features is its negation.
      levels: stages whose outputs are wanted, each at its own stride; 0 is the stem, before the mask token. Hidden
        places of a sparse encoder are zero.
    """
    del channels
    check_levels(type(self).__name__, levels, 0, self.num_levels)
    size = image.shape[1:-1]
    grid = grid_of(size, self.patch_size)
    visible = None if hidden is None else ~(hidden.reshape(-1, *grid) if hidden.ndim == 2 else hidden)[..., None]
    image = keep(drop_channels(image, channel_mask), visible).astype(self.compute)
    sparse = visible if self.masking == 'sparse' else None
    first = self.stem(image, sparse, train)
    x = self._hide(self.pool_stem(first, sparse), None if self.masking == 'sparse' else visible)
    maps = [first, *self.stages(x, sparse, train)]
    features = self.head(maps[-1], sparse)
    shown = [self.level(maps[i]) for i in levels]
    found = tuple(Level(x.reshape(len(image), -1, x.shape[-1]), x.shape[1:-1]) for x in shown)
    return dataclasses.replace(features, levels=found) if levels else features

  def pool_stem(self, x: jax.Array, visible: jax.Array | None) -> jax.Array:
    """What follows the stem before the stages; nothing here."""
    del visible
    return x

  def level(self, x: jax.Array) -> jax.Array:
    """What is shown of the output of a stage or the stem as a level; the output itself here."""
    return x

  def _hide(self, x: jax.Array, visible: jax.Array | None) -> jax.Array:
    """x [B, *size, C] of the stem with the mask token in hidden places."""
    if self.mask_token:
      init = nn.with_logical_partitioning(normal(), (None, 'embed'))
      token = self.param('mask_token', init, (1, x.shape[-1]), jnp.float32)
    if visible is None:
      return x
    if not self.mask_token:
      raise UserError("encoder.masking='token' needs encoder.mask_token=True")
    return jnp.where(enlarge(visible, x.shape[1:-1]), x, token.astype(x.dtype))


class Stage(nn.Module):
  """`depth` equal blocks under one scan, parameters stacked [depth, ...]: x, rates [depth] -> x.

  `block(drop, dtype, *args)(x, rate, visible)` gives (x, None).
  """

  block: type[nn.Module]
  depth: int
  drop: bool
  dtype: Any
  args: tuple = ()

  @nn.compact
  def __call__(self, x: jax.Array, rates: jax.Array, visible: jax.Array | None) -> jax.Array:
    scanned = nn.scan(
        self.block, variable_axes={'params': 0}, split_rngs={'params': True, 'dropout': True},
        in_axes=(0, nn.broadcast), length=self.depth, metadata_params={nn.PARTITION_NAME: 'layers'})
    return scanned(self.drop, self.dtype, *self.args, name='blocks')(x, rates, visible)[0]


def path_rates(last: float, depths: tuple[int, ...]) -> list[jax.Array]:
  """Rates of stochastic depth of each stage's blocks, linear from 0 to `last` over all of them."""
  return jnp.split(jnp.linspace(0.0, last, sum(depths)), list(itertools.accumulate(depths))[:-1])


def flat_features(x: jax.Array, visible: jax.Array | None, pool: jax.Array | None = None) -> Features:
  """Features of the last map x [B, *grid, D]."""
  flat = x.reshape(x.shape[0], -1, x.shape[-1])
  return Features(None, None, flat, flatten(visible, x.shape[1:-1]), x.shape[1:-1], pool)


def flatten(visible: jax.Array | None, size: tuple[int, ...]) -> jax.Array | None:
  """The mask of tokens [B, N] at a map of `size`, for attention."""
  return None if visible is None else enlarge(visible, size).reshape(visible.shape[0], -1)


def pooled(x: jax.Array, visible: jax.Array | None) -> jax.Array:
  """Mean over the visible places of x [B, *size, D] -> [B, D] float32."""
  axes = tuple(range(1, x.ndim - 1))
  if visible is None:
    return x.astype(jnp.float32).mean(axis=axes)
  visible = enlarge(visible, x.shape[1:-1])
  count = jnp.maximum(visible.sum(axis=axes), 1)
  return jnp.where(visible, x.astype(jnp.float32), 0).sum(axis=axes) / count
