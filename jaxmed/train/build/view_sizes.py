"""Several sizes of views: of which each step sees one, a mixture (DINOv3's high-resolution stage) or a curriculum; or
of which each view has one."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from jaxmed.augment.views import ViewMaker
from jaxmed.errors import UserError
from jaxmed.models import registry

# Keys of augment, each with a number for every size.
LISTS = ('sizes', 'local_sizes', 'gram_sizes', 'size_shares', 'size_starts')


def check(config: ConfigDict) -> None:
  """Whether the lists belong together, and patches divide each side; a UserError names the list and the value."""
  augment = config.augment
  _check_samples(config)
  if not any(augment[name] for name in LISTS):
    return
  if augment.views < 2:
    raise UserError(f'augment.sizes are for methods that compare views, not for {config.method}')
  for name, wanted in (('local_sizes', augment.local_views), ('gram_sizes', augment.gram_size),
                       ('size_shares', augment.size_shares), ('size_starts', augment.size_starts)):
    count = len(augment.sizes) if wanted else 0
    if len(augment[name]) != count or not augment.sizes:
      raise UserError(f'augment.{name} has {len(augment[name])} numbers, not {count}: one for each of augment.sizes '
                      f'{augment.sizes}, and none without local_views or gram_size')
  if not all(share > 0 for share in augment.size_shares):
    raise UserError(f'augment.size_shares {augment.size_shares} must be positive')
  starts = augment.size_starts
  if starts and (augment.size_shares or starts[0] != 0 or any(b <= a for a, b in zip(starts, (*starts[1:], 1)))):
    raise UserError(f'augment.size_starts {starts} must rise from 0 and stay below 1, and go without size_shares')
  patch = registry.create_model(config.model, tuple(config.image_size), 1, **config.encoder).patch_size
  for name in LISTS[:3]:
    _check_sides(name, augment[name], patch)


def _check_samples(config: ConfigDict) -> None:
  """The same of augment.sample_sizes, which need an encoder of images of several sizes at once."""
  augment, sides = config.augment, config.augment.sample_sizes
  if not sides:
    return
  model = registry.create_model(config.model, tuple(config.image_size), 1, **config.encoder)
  if not model.supports.sizes:
    raise UserError(f'augment.sample_sizes need a vit or channel_vit, not model={config.model}')
  if any(augment[name] for name in LISTS) or augment.gram_size:
    raise UserError('augment.sample_sizes go without augment.sizes and gram_size: those are sizes of a whole batch')
  _check_sides('sample_sizes', sides, model.patch_size)
  if max(sides) > max(config.image_size):
    raise UserError(f'augment.sample_sizes: {max(sides)} is more than image_size {tuple(config.image_size)}, the size '
                    'of the largest view')


def _check_sides(name: str, sides: tuple[int, ...], patch: tuple[int, ...]) -> None:
  for side in sides:
    if type(side) is not int or side < 1 or any(side % p for p in patch):
      nearest = max(round(side / max(patch)), 1) * max(patch)
      raise UserError(f'augment.{name}: {side} is no multiple of the patch {patch}; nearest is {nearest}')


def views(
    config: ConfigDict, view: ViewMaker
) -> tuple[tuple[ViewMaker, ...], tuple[float, ...], tuple[int, ...]]:
  """`view` at each of the sizes, squares or cubes, their shares, which sum to 1, and of a curriculum the first step of
  each, else (); three times () without sizes."""
  augment, rank = config.augment, len(config.image_size)
  lists = {'size': augment.sizes, 'local_size': augment.local_sizes, 'gram_size': augment.gram_sizes}

  def at(i: int) -> ViewMaker:
    changes: dict[str, Any] = {name: (sides[i],) * rank for name, sides in lists.items() if sides}
    return dataclasses.replace(view, **changes)

  firsts = tuple(round(start * config.steps) for start in augment.size_starts)
  spans = tuple(float(b - a) for a, b in zip(firsts, (*firsts[1:], config.steps)))
  shares = spans or tuple(augment.size_shares) or (1.0,) * len(augment.sizes)
  return (tuple(at(i) for i in range(len(augment.sizes))), tuple(share / sum(shares) for share in shares), firsts)
