"""Patch, batch and network of a U-Net from spacing and shape of the images, by the rule of nnU-Net v2.

Isensee et al. 2021. Facts of MIC-DKFZ/nnUNet: default_experiment_planner.py, residual_encoder_unet_planners.py,
network_topology.py. nnU-Net turns volumes so that the coarsest axis is the first; here all numbers are in the order of
the stored axes.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxmed.errors import UserError, choose

ANISOTROPY = 3.0  # ratio of spacings, and of voxels, above which the coarsest axis goes by itself
EDGE = 4  # smallest edge of the last map
LOW, GROWTH = 0.25, 1.03  # a patch with less of the image than LOW asks for a coarser plan; its spacing grows so

Sizes = tuple[int, ...]
Spacing = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Preset:
  """What a plan is made for.

  Attributes:
    gigabytes: memory of the device. reference: {axes: voxels of features that 8 GB hold in the batch REFERENCE_BATCH}.
    share: largest part of the voxels of the data set in one batch. residual: whether the encoder has residual blocks.
  """

  gigabytes: float
  reference: dict[int, float]
  share: float
  residual: bool


_RESIDUAL = {2: 135e6, 3: 680e6}
PRESETS = {
    'nnunet_plain': Preset(8, {2: 85e6, 3: 560e6}, 0.05, False),
    'resenc_m': Preset(8, _RESIDUAL, 1.0, True), 'resenc_l': Preset(24, _RESIDUAL, 1.0, True),
    'resenc_xl': Preset(40, _RESIDUAL, 1.0, True)}
REFERENCE_BATCH = {2: 12, 3: 2}
WIDEST = {2: 512, 3: 320}
START = {2: 2048, 3: 256}  # edge of the square or cube whose content the first patch has
FEWEST = 2  # samples of a batch


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes that `encoder.*` and the loader take; axes as stored.

  Attributes:
    model: name of the encoder. spacing: mm of a voxel, which images are brought to. shape: median one at that spacing.
    patch, batch: of a training step. strides, kernels: of each stage along each axis. dims, depths: of each stage.
    voxels: of feature maps of one patch, by which memory is judged.
  """

  model: str
  spacing: Spacing
  shape: tuple[float, ...]
  patch: Sizes
  batch: int
  strides: tuple[Sizes, ...]
  kernels: tuple[Sizes, ...]
  dims: Sizes
  depths: Sizes
  voxels: int

  @property
  def pools(self) -> Sizes:
    """How often each axis is halved."""
    return tuple(sum(step == 2 for step in axis) for axis in zip(*self.strides, strict=True))

  @property
  def words(self) -> list[str]:
    """The overrides of a run."""
    listed = lambda values: ','.join(map(str, values))
    stages = lambda values: ','.join('x'.join(map(str, value)) for value in values)
    return [f'model={self.model}', f'image_size={listed(self.patch)}', f'batch_size={self.batch}',
            f'encoder.depths={listed(self.depths)}', f'encoder.dims={listed(self.dims)}',
            f'encoder.kernels={stages(self.kernels)}', f'encoder.strides={stages(self.strides)}']


def target_spacing(spacings: Sequence[Spacing], shapes: Sequence[Sizes]) -> Spacing:
  """The spacing [rank] that images are brought to: the median of each axis.

  Of an axis that is coarser than ANISOTROPY times the others and has so many times fewer voxels, the tenth percentile,
  not below the others.
  """
  every = np.asarray(spacings, np.float64)
  target, size = np.percentile(every, 50, axis=0), np.percentile(np.asarray(shapes, np.float64), 50, axis=0)
  worst = int(np.argmax(target))
  others = [i for i in range(len(target)) if i != worst]
  coarsest_other = target[others].max()
  if target[worst] > ANISOTROPY * coarsest_other and size[worst] * ANISOTROPY < size[others].min():
    target[worst] = np.percentile(every[:, worst], 10)
    if target[worst] < coarsest_other:
      target[worst] = coarsest_other + 1e-5
  return tuple(target.tolist())


def resampled_shape(shape: Sizes, spacing: Spacing, target: Spacing) -> Sizes:
  """Voxels of an image of `shape` at another spacing."""
  return tuple(round(n * a / b) for n, a, b in zip(shape, spacing, target, strict=True))


def separate_axis(spacing: Spacing, target: Spacing) -> int | None:
  """The axis that is resampled by itself and by nearest neighbours, after cubic resampling in its plane; or None.

  It is the one coarsest axis where the spacings of the image, or else of the target, differ by more than ANISOTROPY.
  """
  for values in (spacing, target):
    if max(values) / min(values) > ANISOTROPY:
      worst = [i for i, n in enumerate(values) if n == max(values)]
      return worst[0] if len(worst) == 1 else None
  return None


def topology(spacing: Spacing, size: Sequence[float]) -> tuple[tuple[Sizes, ...], tuple[Sizes, ...]]:
  """Strides and kernels of the stages for a patch of `size`.

  An axis is halved while it has 2 * EDGE voxels and its spacing is less than twice the finest that can be halved; a
  kernel is 3 from where its axis is less than twice as coarse as the finest one.
  """
  now, left, kernel = list(spacing), list(size), [1] * len(spacing)
  strides, kernels = [(1,) * len(spacing)], []
  while True:
    able = [i for i, n in enumerate(left) if n >= 2 * EDGE]
    able = [i for i in able if now[i] / min(now[j] for j in able) < 2]
    if not able or (len(able) == 1 and left[able[0]] < 3 * EDGE):
      break
    kernel = [3 if k == 3 or s / min(now) < 2 else 1 for k, s in zip(kernel, now, strict=True)]
    kernels.append(tuple(kernel))
    strides.append(tuple(2 if i in able else 1 for i in range(len(left))))
    now = [s * step for s, step in zip(now, strides[-1], strict=True)]
    left = [math.ceil(n / step) for n, step in zip(left, strides[-1], strict=True)]
  return tuple(strides), (*kernels, (3,) * len(spacing))


def total(strides: Sequence[Sizes]) -> Sizes:
  """The stride of all stages along each axis."""
  return tuple(math.prod(axis) for axis in zip(*strides, strict=True))


def feature_voxels(patch: Sizes, strides: Sequence[Sizes], dims: Sizes, depths: Sizes, residual: bool,
                   classes: int) -> int:
  """Voxels of all feature maps of one patch, as nnU-Net counts them (compute_conv_feature_map_size)."""
  sizes, size = [], patch
  for stride in strides:
    size = tuple(n // step for n, step in zip(size, stride, strict=True))
    sizes.append(math.prod(size))
  decoder = 1 if residual else 2
  found = classes * sizes[0] + sum((decoder + 1) * d * n for d, n in zip(dims[:-1], sizes[:-1], strict=True))
  if not residual:
    return found + sum(depth * d * n for depth, d, n in zip(depths, dims, sizes, strict=True))
  found += dims[0] * sizes[0]  # the stem
  for i, (depth, d, n) in enumerate(zip(depths, dims, sizes, strict=True)):
    found += (2 * depth + (i > 0)) * d * n  # a shortcut where width or size changes
  return found


def plan(spacing: Spacing, shape: Sequence[float], records: int, classes: int, preset: str = 'nnunet_plain',
         gigabytes: float | None = None, voxels: float | None = None) -> Plan:
  """The plan for images of a median `shape` at the target `spacing`.

  Args:
    records: images of the training set. classes: with the background. gigabytes: memory; None for the preset's.
    voxels: of the data set; None for records of the median shape.
  Raises:
    UserError: an unknown preset, a spacing or shape that is not positive, or so little memory that no patch fits.
  """
  made = PRESETS[choose('preset', preset, PRESETS)]
  gigabytes = made.gigabytes if gigabytes is None else gigabytes
  if len(spacing) not in START or min(*spacing, *shape, gigabytes) <= 0 or len(shape) != len(spacing):
    raise UserError(f'no plan for the spacing {tuple(spacing)}, the shape {tuple(shape)} and {gigabytes} GB: expected '
                    'positive numbers, of two or three axes')
  worst = int(np.argmax(spacing))
  order = [worst, *(i for i in range(3) if i != worst)] if len(spacing) == 3 else [0, 1]
  turned = lambda values: [values[i] for i in order]
  back = lambda values: tuple(values[order.index(i)] for i in range(len(order)))
  sides, strides, kernels, dims, depths, estimate = _fitted(turned(spacing), turned(shape), classes, made, gigabytes)
  rank = len(spacing)
  budget = made.reference[rank] * gigabytes / 8
  batch = round(budget / estimate * REFERENCE_BATCH[rank])
  whole = math.prod(shape) * records if voxels is None else voxels
  batch = max(min(batch, round(whole * made.share / math.prod(sides))), FEWEST)
  return Plan(preset, tuple(spacing), tuple(shape), back(sides), batch, tuple(map(back, strides)),
              tuple(map(back, kernels)), dims, depths, estimate)


def _fitted(spacing, shape, classes, preset, gigabytes):
  """The largest patch whose features fit: (patch, strides, kernels, dims, depths, voxels of features)."""
  rank = len(spacing)
  budget = preset.reference[rank] * gigabytes / 8
  if rank == 2 and not preset.residual:  # nnU-Net's residual planner asks the whole budget of one patch
    budget *= REFERENCE_BATCH[2] / FEWEST
  unit = [1 / s for s in spacing]
  scale = (START[rank] ** rank / math.prod(unit)) ** (1 / rank)
  patch = [min(round(n * scale), most) for n, most in zip(unit, shape, strict=True)]
  while True:
    strides, kernels = topology(spacing, patch)
    patch = [math.ceil(n / step) * step for n, step in zip(patch, total(strides), strict=True)]
    dims = tuple(min(WIDEST[rank], 32 * 2**i) for i in range(len(strides)))
    depths = ((1, 3, 4) + (6,) * len(strides))[: len(strides)] if preset.residual else (2,) * len(strides)
    estimate = feature_voxels(tuple(patch), strides, dims, depths, preset.residual, classes)
    if len(strides) == 1 and max(shape) >= 2 * EDGE:
      raise UserError(f'no patch of spacing {tuple(spacing)} fits {gigabytes} GB: expected more memory')
    if estimate <= budget:
      return tuple(patch), strides, kernels, dims, depths, estimate
    axis = int(np.argsort([n / most for n, most in zip(patch, shape, strict=True)])[-1])
    fewer = list(patch)
    fewer[axis] -= total(strides)[axis]
    patch[axis] -= total(topology(spacing, fewer)[0])[axis]  # the smaller patch may divide by less


def low_resolution(fine: Plan, records: int, classes: int, gigabytes: float | None = None) -> Plan | None:
  """The plan at a coarser spacing whose patch shows a quarter of an image, which nnU-Net adds; None where none is due.

  Arguments are those of `plan`, whose result is `fine`.
  """
  spacing, found = np.array(fine.spacing), fine
  voxels = whole = math.prod(fine.shape)
  while math.prod(found.patch) / voxels < LOW:
    apart = spacing.max() / spacing > 2
    spacing = np.where(apart | ~apart.any(), spacing * GROWTH, spacing)
    shape = [round(n * a / b) for n, a, b in zip(fine.shape, fine.spacing, spacing.tolist(), strict=True)]
    voxels = math.prod(n * a / b for n, a, b in zip(fine.shape, fine.spacing, spacing.tolist(), strict=True))
    found = plan(tuple(spacing.tolist()), shape, records, classes, fine.model, gigabytes, voxels * records)
  return None if found is fine or whole / voxels < 2 else found
