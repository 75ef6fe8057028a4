"""The adapters of a run: of its encoder, from the section `adapter` of its config, and of towers of texts."""

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
from jaxmed.models.text import registry as texts

TRAINING_ONLY = ('mask_token', 'norm_local')  # parameters that no product has
FIELDS = tuple(f.name for f in dataclasses.fields(Adapter))
LEAST = {'rank': 1, 'alpha': 0, 'prompts': 1, 'share': 1}


def check(config: ConfigDict) -> None:
  """Raises a UserError where the section contradicts itself or the rest of the config."""
  given, name = config.adapter, config.adapter.name
  defaults = {key: value.default for key, value in config_lib.SECTIONS['adapter'].items()}
  reads = ('name', 'also', *adapters.KINDS.get(name, ()))
  idle = [key for key in given if key not in reads and given[key] != defaults[key]]
  _check_texts(config)
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


def of_texts(tower: str, given: Mapping[str, Any]) -> dict[str, Any]:
  """The section `towers.NAME.adapter` of a tower of texts, whole.

  Raises:
    UserError: an unknown key, or a value that is none.
  """
  known = {key: value.default for key, value in config_lib.SECTIONS['adapter'].items()}
  where = f'towers.{tower}.adapter'
  name = choose(f'{where}.name', str(given.get('name', '')), texts.TEXT_KINDS)
  keys = ('name', *adapters.KINDS[name])
  for key in given:
    choose(f'key {where}', key, keys)
  out = {key: known[key] for key in keys} | dict(given)
  targets = out['targets']
  out['targets'] = tuple(t.strip() for t in targets.split(',')) if isinstance(targets, str) else tuple(targets)
  for target in out['targets']:
    choose(f'{where}.targets', target, adapters.TARGETS)
  for key in ('rank', 'alpha', 'dropout'):
    if isinstance(out[key], bool) or not isinstance(out[key], (int, float)) or out[key] < 0:
      raise UserError(f'{where}.{key} takes a number of at least 0, not {out[key]!r}')
  if not out['dropout'] < 1:
    raise UserError(f'{where}.dropout must be between 0 and 1, not {out["dropout"]}')
  out['rank'] = int(out['rank']) or adapters.RANKS[name]
  out['alpha'] = float(out['alpha']) or adapters.ALPHA * out['rank']
  return out


def made(given: Mapping[str, Any] | None) -> Adapter | None:
  """The adapter that a whole section describes; None for an empty one."""
  values = {key: given[key] for key in FIELDS if key in given} if given else {}
  return Adapter(**values | {'targets': tuple(values['targets'])}) if values else None


def _of_towers(config: ConfigDict) -> dict[str, Any]:
  """{tower: section} of the towers of texts that have adapters."""
  return {name: tower.adapter for name, tower in config.towers.items() if tower.get('adapter')}


def _check_texts(config: ConfigDict) -> None:
  for name in _of_towers(config):
    if not (config.towers[name].get('init') or config.init_map or (config.init and config.init_parts != 'encoder')):
      raise UserError(f'towers.{name}.adapter trains beside a frozen tower: give its weights, '
                      f'init=RUN init_map=params/{name}->{name}')
    if config.optimizer.scaling == 'mup':
      raise UserError(f'towers.{name}.adapter begins from weights of one width: take '
                      'optimizer.scaling=standard')


def adapted(config: ConfigDict) -> tuple[str, ...]:
  """Paths of the towers whose adapters alone are trained."""
  return (*(('encoder',) if config.adapter.name else ()), *_of_towers(config))


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
  given, own = config.adapter, texts.HEADS if _of_towers(config) else ()
  if not given.name:
    return own
  asked = tuple(name.strip() for name in given.also.split(',') if name.strip())
  asked = asked or adapters.TRAINS.get(given.name, ())
  return (*(() if asked == ('none',) else asked), *TRAINING_ONLY, *own)


def check_names(config: ConfigDict, encoder: Mapping[str, Any]) -> None:
  """Raises a UserError where no parameter of the encoder has a name of `adapter.also`."""
  paths = [[str(k.key) for k in path] for path, _ in jax.tree_util.tree_leaves_with_path(encoder)]
  known = sorted({name for path in paths for name in path})
  for name in beside(config):
    if name not in (*TRAINING_ONLY, *texts.HEADS):
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
  sections = ({'': config.adapter} if config.adapter.name else {}) | _of_towers(config)
  plain = lambda value: config_lib.shown(tuple(value) if isinstance(value, list) else value)  # as in a resumed run
  reads = lambda given: ', '.join(f'{key} {plain(given[key])}' for key in adapters.KINDS[given.name])
  kinds = (f'adapter {given.name}{f" of {tower}" if tower else ""} ({reads(given)})'
           for tower, given in sections.items())
  return (f'{", ".join(kinds)}: {sizes[False]:,} of {sum(sizes.values()):,} parameters '
          f'are trained ({100 * share:.2f} %), heads included')
