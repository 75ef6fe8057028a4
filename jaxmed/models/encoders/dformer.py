"""The encoder of D-Former (Wu et al. 2022, arXiv 2201.00462): attention in local and dilated groups in turn.

Definition: kkk55596/D-Former (dc3deb7), model.py:DFormer3D; `layers.dilated` says where it differs. With the decoder
`dformer` it is the whole published network.
"""

from typing import Any

import jax

from jaxmed.errors import UserError
from jaxmed.models.encoders.swin import merge
from jaxmed.models.layers import dilated
from jaxmed.models.layers.convolution import Conv, Hierarchical, Norm, flat_features, keep, path_rates
from jaxmed.models.layers.tokens import Features
from jaxmed.models.layers.transformer import Dense

# 'micro' is ours, for images of 48 to 96 pixels on a few CPU cores; the other one is SegNetwork's.
SIZES: dict[str, dict] = {
    'dformer_micro': dict(depths=(2, 2, 2, 2), dims=(24, 48, 96, 192), num_heads=(1, 2, 4, 8), stem_patch=(2, 2, 2),
                          group_size=(2, 4, 4)),
    'dformer': {},
}


class DFormer(Hierarchical):
  """D-Former: a stage has positions from a depthwise convolution, and blocks whose groups are local and global in turn.

  Levels are what the published decoder takes: level i is the input of stage i + 1, before its positions, and the last
  one the normalised output of the last stage. The input of the last stage is none of them. The published kernels start
  as PyTorch's or as a 2D Swin's; here they start as timm's, with a deviation of 0.02.

  Attributes:
    num_heads: of each stage.
    stem_patch: patch and stride of the stem along each axis of a volume; images have the last two.
    group_size: places of a group along each axis of a volume; images have the last two.
    mlp_ratio: width of the MLP over that of the stage.
    remat: what the backward pass computes again: 'none' or a policy, to save memory.
  """

  depths: tuple[int, ...] = (2, 2, 6, 2)
  dims: tuple[int, ...] = (96, 192, 384, 768)
  num_heads: tuple[int, ...] = (3, 6, 12, 24)
  stem_patch: tuple[int, ...] = (2, 4, 4)
  group_size: tuple[int, ...] = (2, 8, 8)
  mlp_ratio: float = 4.0
  remat: str = 'none'

  def __post_init__(self):
    if len(self.num_heads) != len(self.dims) or any(d % h for d, h in zip(self.dims, self.num_heads, strict=False)):
      raise UserError(f'encoder.num_heads {self.num_heads} need one number a stage that divides dims {self.dims}')
    for name, values in (('stem_patch', self.stem_patch), ('group_size', self.group_size)):
      if len(values) < len(self.image_size) or min(values) < 1:
        raise UserError(f'encoder.{name} {values} must be positive, one for each of {len(self.image_size)} axes')
    super().__post_init__()

  @property
  def patch_size(self) -> tuple[int, ...]:
    """The total stride along each axis."""
    return tuple(n * 2 ** (len(self.depths) - 1) for n in self._by_axis(self.stem_patch))

  @property
  def num_levels(self) -> int:
    """Stages without the last, whose input no decoder takes."""
    return max(1, len(self.depths) - 1)

  @property
  def stem_level(self) -> bool:
    """Level 0 is twice as fine as level 1."""
    return True

  @property
  def decoder_options(self) -> dict[str, dict[str, Any]]:
    """Options of the decoder `dformer` with which this is the published network."""
    return {'dformer': dict(depths=self.depths[:-1], num_heads=self.num_heads[:-1], group_size=self.group_size,
                            mlp_ratio=self.mlp_ratio)}

  def _by_axis(self, values: tuple[int, ...]) -> tuple[int, ...]:
    return values[-len(self.image_size):]

  def stem(self, image: jax.Array, visible: jax.Array | None, train: bool) -> jax.Array:
    del train
    patch = self._by_axis(self.stem_patch)
    x = Conv(self.dims[0], patch, patch, 0, True, 'torch', self.compute, name='stem_conv')(image)
    return keep(Norm(True, dilated.EPSILON, self.compute, name='stem_norm')(x), visible)

  def stages(self, x: jax.Array, visible: jax.Array | None, train: bool) -> list[jax.Array]:
    drops, group, maps = train and self.drop_path > 0, self._by_axis(self.group_size), []
    norm = lambda x, name: keep(Norm(True, dilated.EPSILON, self.compute, name=name)(x), visible)
    for i, rates in enumerate(path_rates(self.drop_path, self.depths)):
      if i:
        x = norm(merge(x, _places(x.ndim - 2)), f'down{i}_norm')
        x = Dense((self.dims[i],), ('mlp', 'embed'), False, dtype=self.compute, name=f'down{i}_reduction')(x)
        maps.append(x)
      shape = (self.num_heads[i], group, self.mlp_ratio)
      x = dilated.stage(x, rates, visible, drops, self.compute, shape, f'stage{i}', self.remat)
    return [*maps[:-1], norm(x, 'norm')]

  def head(self, x: jax.Array, visible: jax.Array | None) -> Features:
    return flat_features(x, visible)


def _places(rank: int) -> tuple[str, ...]:
  """Places of two along each axis in rows, as they are laid side by side: '000', '001', '010' ..."""
  return tuple(f'{n:0{rank}b}' for n in range(2**rank))
