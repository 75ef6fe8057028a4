"""Model FLOPs of a step, and what share of the devices' peak a run makes of them (MFU)."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from jaxmed import config as config_lib
from jaxmed.models.layers import kernels
from jaxmed.parallel import chips, flops
from jaxmed.train.build import assemble, data_spec, towers


def model_flops(config: ConfigDict, spec: data_spec.DataSpec) -> int:
  """FLOPs of one step by its jaxpr, views and optimizer included.

  Counted with rematerialisation off, also that of attention over many keys: MFU is about the model's own work.
  Of a mixture of sizes, the mean step's.
  """
  config = plain(config)
  trainer, batch = assemble.build(config, spec), assemble.batch_shapes(config, spec)
  state = nn.unbox(jax.eval_shape(trainer.create, batch))
  given = state, batch, towers.fixed_shapes(config, trainer.objective)
  alone = lambda view: dataclasses.replace(trainer, view=view, sizes=(), shares=())
  with keeping():
    if not trainer.sizes:
      return flops.count(trainer.step, *given)
    return round(sum(share * flops.count(alone(view).step, *given)
                     for view, share in zip(trainer.sizes, trainer.shares, strict=True)))


def plain(config: ConfigDict) -> ConfigDict:
  """A config without rematerialisation."""
  config = ConfigDict(config_lib.to_dict(config))
  for section in ('encoder', 'objective'):
    if 'remat' in config[section]:
      config[section].remat = 'none'
  return config


@contextlib.contextmanager
def keeping(keys: int = 1 << 62) -> Iterator[None]:
  """Has attention keep its probabilities of so many keys (`kernels.KEEP`) while something is traced; of any number."""
  before, kernels.KEEP = kernels.KEEP, keys
  try:
    yield
  finally:
    kernels.KEEP = before


class Utilization:
  """MFU of a run: model FLOPs of a step x steps a second / (devices x their peak), as in `jaxmed plan`.

  The peak is that of bfloat16 products, whatever the run computes in. Devices that are not in the table of
  `parallel.chips` have no MFU.
  """

  def __init__(self, config: ConfigDict, spec: data_spec.DataSpec):
    chip = chips.of(jax.devices()[0].device_kind)
    self._share = 0.0
    if chip is not None:
      self._share = model_flops(config, spec) / config.batch_size / (jax.device_count() * chip.flops)

  def row(self, values: dict[str, Any]) -> dict[str, float]:
    """{'mfu'} of a row with 'images_per_second', {} where it is not known."""
    return {'mfu': self._share * values['images_per_second']} if self._share else {}
