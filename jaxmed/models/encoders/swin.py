"""Swin transformers on images and volumes: timm's (Liu et al. 2021) and the encoder of Swin UNETR (Tang et al. 2022).

Both attend within windows, shifted in every second block, with a bias of relative position. Definitions:
microsoft/Swin-Transformer, models/swin_transformer.py (as timm has it, swin_transformer.py), and Project-MONAI/MONAI,
monai/networks/nets/swin_unetr.py. Where MONAI's code is not what it says, the intended definition is the default:

- `merging`: MONAI's `merging` before release 1.5 leaves out two of the eight places that it merges and takes two twice.
- `bias_slice`: MONAI reads the bias of a window on a small map from offsets that its tokens do not have.
- `pad_mask`: MONAI's tokens look at the zeros that fill the last windows.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.errors import UserError, choose
from jaxmed.models.layers import kernels, windows
from jaxmed.models.layers.convolution import Conv, Hierarchical, Norm, Stage, enlarge, flat_features, keep, path_rates
from jaxmed.models.layers.convolution import drop_path as drop
from jaxmed.models.layers.initial import patch_laws
from jaxmed.models.layers.residual import ResidualConv
from jaxmed.models.layers.tokens import Features
from jaxmed.models.layers.transformer import Dense, rematerialised

EPSILON = 1e-5  # of all layer norms
BIAS_SLICES = ('exact', 'monai')

# Places of two along each axis in the order in which a merging lays them side by side; volumes alone have several.
_FLAT = ('00', '10', '01', '11')
MERGINGS = {
    'legacy': ('000', '100', '010', '001', '101', '010', '001', '111'),
    'corrected': ('000', '100', '010', '001', '110', '101', '011', '111'),
    'v2': ('000', '001', '010', '011', '100', '101', '110', '111'),
}

# timm 1.0.31, swin_transformer.py; 'micro' is ours, for images of 48 to 96 pixels on a few CPU cores.
_HEADS = dict(num_heads=(4, 8, 16, 32))
SIZES: dict[str, dict] = {
    'swin_micro': dict(depths=(2, 2, 2, 2), dims=(24, 48, 96, 192), num_heads=(1, 2, 4, 8), stem_patch=2,
                       window_size=4),
    'swin_tiny': dict(depths=(2, 2, 6, 2), dims=(96, 192, 384, 768)),
    'swin_small': dict(depths=(2, 2, 18, 2), dims=(96, 192, 384, 768)),
    'swin_base': dict(depths=(2, 2, 18, 2), dims=(128, 256, 512, 1024), **_HEADS),
    'swin_large': dict(depths=(2, 2, 18, 2), dims=(192, 384, 768, 1536), num_heads=(6, 12, 24, 48)),
}
# MONAI's feature_size; 192 is VoComni's huge. 'micro' is the smallest that the class takes.
UNETR_SIZES: dict[str, dict] = {
    f'swin_unetr_{name}': dict(dims=tuple(size * 2**i for i in range(4)))
    for name, size in (('micro', 12), ('24', 24), ('48', 48), ('96', 96), ('192', 192))}


class Swin(Hierarchical):
  """Swin transformer, merging 2^d places between stages; a final norm of each place, then the mean.

  Attributes:
    num_heads: of each stage.
    stem_patch: patch and stride of the stem; each merging doubles the stride.
    window_size: of each axis; maps that it covers have one window.
    mlp_ratio: width of the MLP over that of the stage.
    qkv_bias: whether queries, keys and values have biases.
    merging: order of the places of a volume that are merged: 'corrected', 'v2' or 'legacy' (MONAI's `merging` from
      release 1.5, `mergingv2`, and `merging` before, which leaves out two of the eight). Images have one order.
    bias_slice: rows of the table for windows on maps smaller than a window: 'exact', or 'monai' for MONAI's.
    pad_mask: whether tokens leave out the zeros that fill the last windows; False for MONAI, Swin and timm.
    kernel_init: initial weights of linear layers, see `initial.initializer`.
    remat: what the backward pass computes again: 'none' or a policy, to save memory.
  """

  depths: tuple[int, ...] = (2, 2, 6, 2)
  dims: tuple[int, ...] = (96, 192, 384, 768)
  num_heads: tuple[int, ...] = (3, 6, 12, 24)
  stem_patch: int = 4
  window_size: int = 7
  mlp_ratio: float = 4.0
  qkv_bias: bool = True
  merging: str = 'corrected'
  bias_slice: str = 'exact'
  pad_mask: bool = True
  kernel_init: str = 'trunc_normal'
  remat: str = 'none'

  def __post_init__(self):
    choose('encoder.merging', self.merging, MERGINGS)
    choose('encoder.bias_slice', self.bias_slice, BIAS_SLICES)
    if len(self.num_heads) != len(self.dims) or any(d % h for d, h in zip(self.dims, self.num_heads, strict=False)):
      raise UserError(f'encoder.num_heads {self.num_heads} need one number a stage that divides dims {self.dims}')
    if self.window_size < 1 or self.stem_patch < 1:
      raise UserError(f'encoder.window_size {self.window_size} and stem_patch {self.stem_patch} must be positive')
    super().__post_init__()

  @property
  def patch_size(self) -> tuple[int, ...]:
    """The total stride along each axis."""
    return (self.stem_patch * 2 ** (len(self.depths) - 1),) * len(self.image_size)

  def stem(self, image: jax.Array, visible: jax.Array | None, train: bool) -> jax.Array:
    del train
    return keep(Norm(True, EPSILON, self.compute, name='stem_norm')(self._patches(image)), visible)

  def _patches(self, image: jax.Array) -> jax.Array:
    init = 'torch' if self.kernel_init == 'torch_uniform' else 'trunc_normal'
    return Conv(self.dims[0], self.stem_patch, self.stem_patch, 0, True, init, self.compute, name='stem_conv')(image)

  def stages(self, x: jax.Array, visible: jax.Array | None, train: bool) -> list[jax.Array]:
    maps = []
    for i, dim in enumerate(self.dims):
      x = self._merged(x, dim, visible, f'down{i}') if i else x
      x = self._blocks(x, i, visible, train)
      maps.append(x)
    return maps

  def _blocks(self, x: jax.Array, i: int, visible: jax.Array | None, train: bool) -> jax.Array:
    """Stage i: every second of its blocks has shifted windows."""
    rates = path_rates(self.drop_path, self.depths)[i]
    options = (self.num_heads[i], self.window_size, self.mlp_ratio, self.qkv_bias, self.bias_slice, self.pad_mask,
               self.kernel_init)
    drops = train and self.drop_path > 0
    stage = Stage(rematerialised(Block, self.remat), self.depths[i], drops, self.compute, options, name=f'stage{i}')
    turns: Any = (rates, jnp.arange(self.depths[i]) % 2 == 1)
    return stage(x, turns, visible)

  def _merged(self, x: jax.Array, dim: int, visible: jax.Array | None, name: str) -> jax.Array:
    """x [B, *size, D] merged to [B, *size / 2, dim]."""
    x = merge(x, MERGINGS[self.merging] if x.ndim == 5 else _FLAT)
    x = keep(Norm(True, EPSILON, self.compute, name=f'{name}_norm')(x), visible)
    return Dense((dim,), ('mlp', 'embed'), False, self.kernel_init, self.compute, name=f'{name}_reduction')(x)

  def head(self, x: jax.Array, visible: jax.Array | None) -> Features:
    return flat_features(keep(Norm(True, EPSILON, self.compute, name='norm')(x), visible), visible)


class SwinUNETR(Swin):
  """The encoder of Swin UNETR: maps are merged after every stage, the last too, so that features are 2 dims[-1] wide.

  Levels, and the patches that are the last of them, are layer-normalised without scale and bias; what one stage hands
  the next is not.

  Attributes:
    patch_norm: whether the stem ends in a norm.
    use_v2: whether a residual convolution block precedes each stage (SwinUNETR-V2, He et al. 2023).
  """

  depths: tuple[int, ...] = (2, 2, 2, 2)
  dims: tuple[int, ...] = (48, 96, 192, 384)
  stem_patch: int = 2
  kernel_init: str = 'torch_uniform'  # PyTorch's default, which MONAI leaves
  patch_norm: bool = False
  use_v2: bool = False

  @property
  def embed_dim(self) -> int:
    """Channels of the last map."""
    return 2 * self.dims[-1]

  @property
  def patch_size(self) -> tuple[int, ...]:
    """The total stride along each axis."""
    return (self.stem_patch * 2 ** len(self.depths),) * len(self.image_size)

  @property
  def stem_level(self) -> bool:
    """Level 0 is twice as fine as level 1, as every stage ends in a merging."""
    return True

  def stem(self, image: jax.Array, visible: jax.Array | None, train: bool) -> jax.Array:
    if self.patch_norm:
      return super().stem(image, visible, train)
    return keep(self._patches(image), visible)

  def stages(self, x: jax.Array, visible: jax.Array | None, train: bool) -> list[jax.Array]:
    maps = []
    for i, dim in enumerate((*self.dims[1:], self.embed_dim)):
      if self.use_v2:
        x = ResidualConv(self.dims[i], self.compute, name=f'conv{i}')(x, visible)
      x = self._merged(self._blocks(x, i, visible, train), dim, visible, f'down{i}')
      maps.append(x)
    return maps

  def level(self, x: jax.Array) -> jax.Array:
    size = x.shape[-1]
    return kernels.layer_norm(x, jnp.ones(size), jnp.zeros(size), EPSILON).astype(x.dtype)

  def head(self, x: jax.Array, visible: jax.Array | None) -> Features:
    return flat_features(self.level(x), visible)


def merge(x: jax.Array, order: tuple[str, ...]) -> jax.Array:
  """Lays 2^d places side by side: x [B, *size, D], of even size -> [B, *size / 2, len(order) * D]."""
  places = [(slice(None), *(slice(int(start), None, 2) for start in corner)) for corner in order]
  return jnp.concatenate([x[place] for place in places], axis=-1)


class Block(nn.Module):
  """Pre-norm attention within windows, and an MLP; zero in hidden places throughout. Shaped for nn.scan.

  Called with (rate of stochastic depth, whether windows are shifted) in place of the rate alone.
  """

  drop: bool
  dtype: jnp.dtype
  num_heads: int
  window_size: int
  mlp_ratio: float
  qkv_bias: bool
  bias_slice: str
  pad_mask: bool
  kernel_init: str

  @nn.compact
  def __call__(self, x: jax.Array, turn: tuple[jax.Array, jax.Array], visible: jax.Array | None):
    rate, shifted = turn
    dim, dtype, norm = x.shape[-1], self.dtype, lambda name: Norm(True, EPSILON, self.dtype, name=name)
    y = keep(norm('norm1')(x), visible)
    attention = WindowAttention(self.num_heads, self.window_size, self.qkv_bias, self.bias_slice, self.pad_mask,
                                self.kernel_init, dtype, name='attn')
    x = x + self._branch(attention(y, shifted, visible), rate, visible)
    hidden = int(dim * self.mlp_ratio)
    y = linear((hidden,), ('embed', 'mlp'), dim, self.kernel_init, dtype, 'fc1')(norm('norm2')(x))
    y = linear((dim,), ('mlp', 'embed'), hidden, self.kernel_init, dtype, 'fc2')(kernels.gelu(y))
    return x + self._branch(y, rate, visible), None

  def _branch(self, y: jax.Array, rate: jax.Array, visible: jax.Array | None) -> jax.Array:
    return keep(drop(y, rate, self.make_rng('dropout')) if self.drop else y, visible)


def linear(features: tuple[int, ...], axes: tuple[str | None, ...], inputs: int, kernel_init: str, dtype: Any,
           name: str, use_bias: bool = True, fold: int = 1) -> Dense:
  """A dense layer whose biases follow PyTorch's law where its kernel does."""
  law = patch_laws('torch' if kernel_init == 'torch_uniform' else '', kernel_init, inputs)[1]
  return Dense(features, axes, use_bias, kernel_init, dtype, fold, law, name=name)


class WindowAttention(nn.Module):
  """Attention within the windows of [B, *size, D], to the visible places of a window; see `windows`."""

  num_heads: int
  window_size: int
  qkv_bias: bool
  bias_slice: str
  pad_mask: bool
  kernel_init: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, shifted: jax.Array, visible: jax.Array | None) -> jax.Array:
    """`shifted` [] bool: whether windows are moved by half of their length, where a map has several."""
    size, dim, heads = x.shape[1:-1], x.shape[-1], self.num_heads
    window, shift = windows.regime(size, self.window_size)
    segments = self._segments(size, window, shift, shifted, visible)
    x = windows.pad(x, window)
    full = x.shape[1:-1]
    if any(shift):
      x = jnp.where(shifted, windows.roll(x, shift), x)
    y = windows.partition(x, window)  # [B, W, N, D]
    axes = ('embed', None, 'heads', 'head_dim')
    qkv = linear((3, heads, dim // heads), axes, dim, self.kernel_init, self.dtype, 'qkv', self.qkv_bias)(y)
    q, k, v = qkv.transpose(3, 0, 1, 4, 2, 5)  # [B, W, H, N, Dh] each
    out = windows.attend(q, k, v, self._bias(window), segments).transpose(0, 1, 3, 2, 4)
    out = linear((dim,), ('heads', 'embed'), dim, self.kernel_init, self.dtype, 'proj', fold=2)(out)
    out = windows.joined(out, full, window)
    if any(shift):
      out = jnp.where(shifted, windows.roll(out, shift, back=True), out)
    return out[(slice(None), *(slice(n) for n in size))]

  def _bias(self, window: tuple[int, ...]) -> jax.Array:
    """[H, N, N] float32."""
    rows = (2 * self.window_size - 1) ** len(window)
    law = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, 'heads'))
    table = self.param('bias_table', law, (rows, self.num_heads), jnp.float32)
    return table.T[:, windows.bias_rows(window, self.window_size, self.bias_slice == 'exact')]

  def _segments(self, size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], shifted: jax.Array,
                visible: jax.Array | None) -> jax.Array | None:
    """Regions [B or 1, W, N] of tokens that look at each other, 0 for what none looks at; None where all look at all.
    """
    fills = windows.padded(size, window) != size and self.pad_mask
    if not any(shift) and not fills and visible is None:
      return None
    plain, moved = (windows.segments(size, window, by, self.pad_mask) for by in ((0,) * len(size), shift))
    regions = jnp.where(shifted, moved, plain)[None]
    if visible is None:
      return regions
    there = windows.pad(enlarge(visible, size) * jnp.int32(1) - 1, window) + 1  # padding counts as visible
    there = jnp.where(shifted, windows.roll(there, shift), there) if any(shift) else there
    return regions * windows.partition(there, window)[..., 0]
