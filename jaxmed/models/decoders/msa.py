"""Multi-scale self-guided attention (Sinha, Dolz 2020, arXiv 1906.02849): attention over places and channels, twice.

Definition: sinAshish/Multi-Scale-Attention (96d76f2), src/models/my_stacked_danet.py and attention.py; weights of the
loss from main.py. The published network has a ResNeXt-101 32x8d before it and five classes of CHAOS. Its layers that
no output goes through (conv6, conv7, attention1 to 4, refine1 to 4) are left out.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.contracts import PENALTY, Encoder
from jaxmed.errors import UserError
from jaxmed.models.layers import kernels
from jaxmed.models.layers.convolution import Conv
from jaxmed.models.layers.norm import BatchNorm
from jaxmed.models.layers.pyramid import four_levels, resize
from jaxmed.models.layers.unet_blocks import Up, pooled_down

REDUCTION = 8  # of the width of queries and keys
SLOPE = 0.25  # first value of a PReLU, PyTorch's


class MSA(nn.Module):
  """Maps of four scales on the grid of the finest, beside what is fused of all, refined by attention in two rounds.

  In each round and scale the two maps side by side go through attention over places and over channels; their sum is
  weighted by a reconstruction of the two maps. What the first round finds weights the fused map that the second sees.
  One autoencoder reconstructs all scales of a round.

  Logits are the mean of those of the second round. With `deep_supervision` those of all scales of both rounds, on the
  grid of the image too, are trained in place of the mean, each with weight 1. In training two terms are added to any
  loss: between codes of the two rounds, and between what the autoencoders take and make.

  Attributes:
    num_classes: of the logits. deep_supervision: whether each scale of each round has logits; the published training.
    width: of all maps. code_weight, reconstruction_weight: of the two terms, sums of mean squares over scales.
  """

  num_classes: int
  deep_supervision: bool = False
  dtype: Any = 'float32'
  width: int = 64
  code_weight: float = 0.25
  reconstruction_weight: float = 0.1

  def __post_init__(self):
    if self.width < REDUCTION or self.width % REDUCTION:
      raise UserError(f'decoder.width {self.width}: expected a multiple of {REDUCTION}')
    super().__post_init__()

  @classmethod
  def levels(cls, encoder: Encoder) -> tuple[int, ...]:
    """The last four stages, or four blocks at equal distances."""
    return four_levels(encoder)

  @staticmethod
  def output_weights(count: int) -> tuple[float, ...]:
    """Of the mean, which is trained alone or not at all, and of each output after it."""
    return (1.0,) if count == 1 else (0.0, *(1.0,) * (count - 1))

  @nn.compact
  def __call__(self, image: jax.Array, maps: tuple[jax.Array, ...], train: bool = False) -> tuple[jax.Array, ...]:
    """Logits ([B, *size, K], ...) float32 of an image [B, *size, C] and maps [B, *grid, D], the finest first."""
    dtype, size = jnp.dtype(self.dtype), maps[0].shape[1:-1]
    if any(n % 4 for n in size):
      raise UserError(f'the decoder msa halves the finest map, {size}, twice: expected sides that 4 divides')
    down = [Unit(self.width, 1, dtype, name=f'down{i}')(x, train) for i, x in enumerate(maps)]
    down = [resize(x, size) for x in down]
    fused = jnp.concatenate(down[::-1], axis=-1)
    for i, kernel in enumerate((3, 3, 1)):
      fused = Unit(self.width, kernel, dtype, name=f'fuse{i}')(fused, train)
    found, codes, lost, guide = [down], [], jnp.zeros(()), [fused] * len(down)
    for turn in (1, 2):
      pairs = [jnp.concatenate(pair, axis=-1) for pair in zip(down, guide, strict=True)]
      autoencoder = Autoencoder(dtype, name=f'semantic{turn}')
      known = [autoencoder(pair, train) for pair in pairs[::-1]][::-1]  # coarse scales first, for running statistics
      codes.append([code for code, _ in known])
      lost += sum(_apart(pair, made) for pair, (_, made) in zip(pairs, known, strict=True))
      seen = [self._refined(pair, made, train, f'{turn}_{i}')
              for i, (pair, (_, made)) in enumerate(zip(pairs, known, strict=True))]
      guide, found = [x * fused for x in seen], [*found, seen]
    moved = sum(_apart(a, b) for a, b in zip(*codes, strict=True))
    if train and not self.is_initializing():
      self.sow(PENALTY, 'guided', self.code_weight * moved + self.reconstruction_weight * lost)
    return self._outputs(found[0], found[2], image.shape[1:-1])

  def _refined(self, pair: jax.Array, made: jax.Array, train: bool, name: str) -> jax.Array:
    """Attention of two maps side by side [B, *size, 2 D], weighted by what is `made` of them: [B, *size, D]."""
    dtype, width = jnp.dtype(self.dtype), self.width
    x = sum(Attended(width, kind, dtype, name=f'{kind}{name}')(pair, train) for kind in ('places', 'channels'))
    x = x * Conv(width, 3, 1, 1, kernel_init='xavier', dtype=dtype, name=f'weigh{name}')(made)
    return Conv(width, 1, kernel_init='xavier', dtype=dtype, name=f'mix{name}')(x)

  def _outputs(self, first: list[jax.Array], second: list[jax.Array], size: tuple[int, ...]) -> tuple[jax.Array, ...]:
    dtype = jnp.dtype(self.dtype)

    def logits(x, name):
      return Conv(self.num_classes, 1, kernel_init='xavier', dtype=dtype, name=name)(x).astype(jnp.float32)

    last = [logits(x, f'out2_{i}') for i, x in enumerate(second)]
    mean = resize(sum(last) / len(last), size)
    if not self.deep_supervision:
      return (mean,)
    all_of = [*(logits(x, f'out1_{i}') for i, x in enumerate(first)), *last]
    return (mean, *(resize(x, size) for x in all_of))


def _apart(a: jax.Array, b: jax.Array) -> jax.Array:
  """Mean squared difference, float32."""
  return jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).mean()


class Unit(nn.Module):
  """Convolution, batch norm, and a PReLU of one slope, or a ReLU."""

  features: int
  kernel: int
  dtype: Any = jnp.float32
  learned: bool = True

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = Conv(self.features, self.kernel, 1, self.kernel // 2, True, 'xavier', self.dtype, name='conv')(x)
    x = BatchNorm(dtype=self.dtype, name='norm')(x, train)
    if not self.learned:
      return jax.nn.relu(x)
    slope = _scalar(self, 'slope', SLOPE)
    return jnp.where(x >= 0, x, x * slope.astype(x.dtype))


def _scalar(module: nn.Module, name: str, value: float) -> jax.Array:
  """A parameter [1] of a module."""
  law = nn.with_logical_partitioning(nn.initializers.constant(value), (None,))
  return module.param(name, law, (1,), jnp.float32)


class Autoencoder(nn.Module):
  """Two halvings and back: x [B, *size, C] -> (code [B, *size / 4, 4 C], the like of x)."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
    dim, two = x.shape[-1], (2,) * (x.ndim - 2)

    def twice(x, features, name):
      for i in range(2):
        x = Unit(features, 3, self.dtype, False, name=f'{name}_{i}')(x, train)
      return x

    for i in (1, 2):
      x = pooled_down(twice(x, dim * 2**i, f'enc{i}'), two, 'max')
    code = x
    for i in (2, 1):
      x = twice(x, dim * i, f'dec{i}')
      x = Up(dim * i, two, 'transposed', self.dtype, True, 'xavier', name=f'up{i}')(x)
    return code, x


class Attended(nn.Module):
  """A unit, attention beside the identity with a weight that starts at 0, and a unit: DANet's (Fu et al. 2019).

  kind: 'places', whose queries and keys have an eighth of the width and products without scale; or 'channels', which
  look at those that are unlike them: softmax(largest product - product).
  """

  width: int
  kind: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = Unit(self.width, 3, self.dtype, name='before')(x, train)
    y = (self._places if self.kind == 'places' else _channels)(x).reshape(x.shape)
    x = _scalar(self, 'gamma', 0.0).astype(x.dtype) * y + x
    return Unit(self.width, 3, self.dtype, name='after')(x, train)

  def _places(self, x: jax.Array) -> jax.Array:
    small = self.width // REDUCTION
    conv = lambda n, name: Conv(n, 1, kernel_init='xavier', dtype=self.dtype, name=name)(x)
    tokens = lambda n, name: conv(n, name).reshape(x.shape[0], -1, 1, n)
    q = tokens(small, 'q') * math.sqrt(small)  # undoes the scale
    return kernels.attention(q, tokens(small, 'k'), tokens(self.width, 'v'))


def _channels(x: jax.Array) -> jax.Array:
  """Attention among the channels of x [B, *size, C] -> [B, N, C]; the softmax is taken in float32."""
  x = x.reshape(x.shape[0], -1, x.shape[-1])
  energy = jnp.einsum('bnc,bnd->bcd', x, x, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(energy.max(axis=-1, keepdims=True) - energy).astype(x.dtype)
  return jnp.einsum('bcd,bnd->bnc', weights, x)
