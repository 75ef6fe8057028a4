"""The adapters of a run's encoder, from the section `adapter` of its config."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxmed import config as config_lib
from jaxmed.errors import UserError, choose
from jaxmed.models.encoders.vit import ViT
from jaxmed.models.layers import adapters
from jaxmed.models.layers.adapters import Adapter

TRAINING_ONLY = ('mask_token', 'norm_local')  # parameters that no product has
FIELDS = tuple(f.name for f in dataclasses.fields(Adapter))
LEAST = {'rank': 1, 'alpha': 0, 'prompts': 1, 'share': 1}


def check(config: ConfigDict) -> None:
  """Raises a UserError where the section contradicts itself or the rest of the config."""
  given, name = config.adapter, config.adapter.name
  defaults = {key: value.default for key, value in config_lib.SECTIONS['adapter'].items()}
  reads = ('name', 'also', *adapters.KINDS.get(name, ()))
  idle = [key for key in given if key not in reads and given[key] != defaults[key]]
  if not name:
    if idle or given.also:
      raise UserError(f'adapter.{(*idle, "also")[0]} says how adapters are, but there are none: set adapter.name')
    return
  if idle:
    raise UserError(f'adapter.{idle[0]} means nothing to {name}, which takes {", ".join(adapters.KINDS[name])}')
  if not config.init:
    raise UserError(f'adapter.name={name} trains beside a frozen encoder: give its weights, init=RUN or a file')
  if not 0 <= given.dropout < 1:
    raise UserError(f'adapter.dropout must be between 0 and 1, not {given.dropout}')
  for key, least in LEAST.items():
    if given[key] != defaults[key] and given[key] < least:
      raise UserError(f'adapter.{key} must be at least {least}, not {given[key]}')
  if config.optimizer.scaling == 'mup':
    raise UserError(f'adapter.name={name} begins from weights of one width: take optimizer.scaling=standard')


def fill(config: ConfigDict) -> None:
  """Sets what is chosen here: rank, alpha and the number of prompts."""
  given, name = config.adapter, config.adapter.name
  if not name:
    return
  given.rank = given.rank or adapters.inner_width(name, config.encoder.get('embed_dim', 0))
  if 'alpha' in adapters.KINDS[name]:
    given.alpha = given.alpha or adapters.ALPHA * given.rank
  given.prompts = given.prompts or adapters.PROMPTS.get(name, 0)


def attached(model: Any, config: ConfigDict) -> Any:
  """The encoder with its adapters; itself where there are none.

  Raises:
    UserError: a family or an option of it that they do not go with.
  """
  given = config.adapter
  if not given.name:
    return model
  if not isinstance(model, ViT):
    raise UserError(f'adapter.name={given.name} is for vit, channel_vit and bag, not for {config.model}')
  clashes = {'packing': bool(model.packing), 'channel_attention': model.channel_attention != 'joint'}
  for option, clash in clashes.items():
    if clash and given.name in ('vpt', 'vpt_deep', 'dvpt', *(('depthwise',) if option == 'packing' else ())):
      raise UserError(f'adapter.name={given.name} does not go with encoder.{option}={getattr(model, option)}: leave it '
                      'out')
  inputs = math.prod(model.patch_size) * (1 if model.per_channel else model.in_channels)
  values = {key: given[key] for key in FIELDS if key in given}
  return model.clone(adapter=Adapter(**values, fan_in=inputs))


def beside(config: ConfigDict) -> tuple[str, ...]:
  """Names in the encoder that are trained beside adapters: asked for, the papers' own, and what no product has."""
  given = config.adapter
  if not given.name:
    return ()
  asked = tuple(name.strip() for name in given.also.split(',') if name.strip())
  asked = asked or adapters.TRAINS.get(given.name, ())
  return (*(() if asked == ('none',) else asked), *TRAINING_ONLY)


def check_names(config: ConfigDict, encoder: Mapping[str, Any]) -> None:
  """Raises a UserError where no parameter of the encoder has a name of `adapter.also`."""
  paths = [[str(k.key) for k in path] for path, _ in jax.tree_util.tree_leaves_with_path(encoder)]
  known = sorted({name for path in paths for name in path})
  for name in beside(config):
    if name not in TRAINING_ONLY:
      choose('adapter.also', name, known)


def with_fresh(given: Any, fresh: Any) -> Any:
  """A tree of weights with the adapters of `fresh` where it has none."""
  if not isinstance(fresh, Mapping) or not isinstance(given, Mapping):
    return given
  more = {name: part for name, part in fresh.items() if name.startswith(adapters.MARK) and name not in given}
  return {name: with_fresh(part, fresh.get(name)) for name, part in given.items()} | more


def told(config: ConfigDict, optimizer: Any, params: Any) -> str:
  """In a line, how much of a run's parameters is trained."""
  sizes = {True: 0, False: 0}
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    sizes[optimizer.holds(tuple(str(k.key) for k in path))] += math.prod(x.shape)
  share = sizes[False] / sum(sizes.values())
  reads = (f'{key} {config_lib.shown(config.adapter[key])}' for key in adapters.KINDS[config.adapter.name])
  return (f'adapter {config.adapter.name} ({", ".join(reads)}): {sizes[False]:,} of {sum(sizes.values()):,} parameters '
          f'are trained ({100 * share:.2f} %), heads included')
