"""The state that a run begins with: a checkpoint, fresh weights, or those of another run or file."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed import objectives
from jaxmed.errors import UserError, choose
from jaxmed.interop.inflate import inflate
from jaxmed.models import registry
from jaxmed.models.encoders import swtr_unet
from jaxmed.models.encoders.bag import BagOfChannels
from jaxmed.models.encoders.resnet import ResNet
from jaxmed.models.encoders.vit import ViT, as_volume, at_size
from jaxmed.parallel import process
from jaxmed.train.build import adapting, towers
from jaxmed.train.build.rundir import TRAINING_ONLY, encoder_of, is_run, load, load_state, load_tower
from jaxmed.train.checkpoint import Checkpoints
from jaxmed.train.step import TrainState


def state_of(run: Any, checkpoints: Checkpoints, abstract: TrainState, shapes: Any) -> TrainState:
  """The latest state, or a fresh one."""
  state = checkpoints.restore(abstract)
  return initialize(run, abstract, shapes) if state is None else state


def initialize(run: Any, abstract: TrainState, shapes: Any) -> TrainState:
  """Fresh weights, or what `init` and `init_parts` say of another run's or a file's."""
  state = run.trainer.initialize(abstract, shapes)
  given = given_weights(run.config, state, run.spec.vocabulary)
  if given is None:
    return state
  put = lambda new, old: jax.device_put(new, old.sharding)
  given = {name: jax.tree.map(put, value, vars(state)[name]) for name, value in given.items()}
  given['target'] = jax.tree.map(jnp.copy, given['target'])  # which may be the same arrays: the step is given both
  if run.trainer.ema:
    given['average'] = jax.tree.map(jnp.copy, given['params'])
  return dataclasses.replace(state, **given)


def given_weights(config: Any, state: TrainState, vocabulary: Sequence[str],
                  quiet: bool = True) -> dict[str, Any] | None:
  """`params`, `target` and `extra` of the first state as `init` and `init_parts` want them; None without `init`.

  Raises:
    UserError: what is there is another model's, or has other heads; names the first array that differs.
  """
  lent = {name: tower for name, tower in config.towers.items() if tower.init and not tower.fixed}
  if not config.init and not lent:
    return None
  own = {name: vars(state)[name] for name in ('params', 'target', 'extra')}
  given = own | {'params': own['params'] | {
      name: _lent(config, name, tower, own['params'][name]) for name, tower in lent.items()}}
  if config.init_map:
    given = _mapped(config, given, vocabulary, quiet)
  elif config.init:
    given = (_all_parts(config, given) if config.init_parts != 'encoder' else
             _encoder_alone(config, given, vocabulary, quiet))
  given |= {name: adapting.with_fresh(given[name], own[name]) for name in ('params', 'target')}
  shape = lambda tree: {jax.tree_util.keystr(path, simple=True, separator='/'): x.shape
                        for path, x in jax.tree_util.tree_leaves_with_path(tree)}
  here, there = shape(own), shape(given)
  for name in sorted(here.keys() | there.keys()):
    if here.get(name) != there.get(name):
      raise UserError(f'init={config.init} is another model than {config.model} or has other heads: {name} is '
                      f'{there.get(name, "missing")} there and {here.get(name, "missing")} here')
  return given


def _lent(config: Any, name: str, tower: Any, fresh: Any) -> Any:
  """The weights of a tower with `init`; a projection of texts to another width stays fresh."""
  if not towers.of_texts(objectives.get(config.method), name):
    return load(tower.init).params
  given = load_tower(tower.init, towers.TEXTS, towers.text_model(config, name)).params
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  return {k: v if k != 'head' or shapes(v) == shapes(fresh.get(k)) else fresh.get(k) for k, v in given.items()} | {
      k: v for k, v in fresh.items() if k not in given}


def _encoder_alone(config: Any, own: dict[str, Any], vocabulary: Sequence[str], quiet: bool) -> dict[str, Any]:
  """The encoder's weights from a run or file, the rest as it is; the target starts as the trained parts.

  Channels go by their names: those that the encoder does not know begin as the mean of those that it knows.
  """
  encoder = _encoder(config, load(config.init), own['params']['encoder'], vocabulary, quiet)
  params = own['params'] | {'encoder': encoder}
  return {'params': params, 'target': {name: params[name] for name in own['target']}, 'extra': own['extra']}


def _encoder(config: Any, given: Any, fresh: Any, vocabulary: Sequence[str], quiet: bool) -> Any:
  """The weights of a loaded encoder for the run's channels and image size; what no product has is as in `fresh`."""
  params, held = given.params, given.model.adapter
  if held is not None and held.name != config.adapter.name:
    raise UserError(f'init={config.init} has adapters of {held.name}, which no weights can take up: go on with '
                    f'adapter.name={held.name}')
  if isinstance(given.model, ViT) and given.named and given.vocabulary != tuple(vocabulary):
    params = inflate(given.model, params, given.vocabulary, vocabulary)[1]
    unknown = [name for name in vocabulary if name not in given.vocabulary]
    if unknown and not quiet and process.is_main():
      print(f'init={config.init} does not know the channels {", ".join(unknown)}: they begin as the mean of '
            f'{", ".join(given.vocabulary)}', file=sys.stderr, flush=True)
  size = tuple(config.image_size)
  if isinstance(given.model, ViT) and (len(given.model.image_size), len(size)) == (2, 3):
    params = as_volume(given.model, params, registry.create_model(config.model, size, 1, **config.encoder))
  encoder = at_size(given.model, params, size)
  names = ('channel_embed', 'channel_hash') if isinstance(given.model, BagOfChannels) else ()  # to which all are one
  names = swtr_unet.BOTTLENECK if type(given.model) is ResNet else names  # behind a pretrained ResNet
  more = (*TRAINING_ONLY, *names)
  return encoder | {k: fresh[k] for k in more if k in fresh and k not in encoder}


def _mapped(config: Any, own: dict[str, Any], vocabulary: Sequence[str], quiet: bool) -> dict[str, Any]:
  """Parts of a run or file by `init_map`, the rest as it is; the target starts as the trained parts.

  A part is a path of parameters, such as 'head' or 'encoder/patch_embed', or of the target after 'target/'; a tower may
  be written towers.NAME. What goes into a whole tower follows the run's channels and image size.
  """
  params, source = own['params'], None
  if is_run(config.init):
    trainer, old, spec, state = load_state(config.init)
    source = (state.average or state.params) | {'target': state.target}
  for pair in config.init_map.split(','):
    part, arrow, goal = (word.strip() for word in pair.partition('->'))
    part, goal = (towers.path_of(word.removeprefix('towers.')) for word in (part, goal))
    if not arrow or not part or not goal:
      raise UserError(f'init_map: {pair.strip()!r} is no pair: expected PART->PART or PART->none')
    if source is None and part != 'encoder':
      raise UserError(f'init_map: {config.init} is a file and holds the encoder alone, not {part!r}')
    found = None if source is None else _at(source, part, f'part of {config.init}')
    if goal == 'none':
      continue
    fresh = _at(params, goal, 'part of the run')
    if goal == 'encoder':
      given = load(config.init) if source is None else dataclasses.replace(
          encoder_of(trainer, old, spec, state), params=found)
      found = _encoder(config, given, fresh, vocabulary, quiet)
    params = _replaced(params, goal.split('/'), found)
  return own | {'params': params, 'target': {name: params[name] for name in own['target']}}


def _at(tree: Any, path: str, kind: str) -> Any:
  """The part of a nested dict at a path; a UserError names the nearest."""
  done: list[str] = []
  for key in path.split('/'):
    known = ['/'.join([*done, k]) for k in tree] if isinstance(tree, Mapping) else []
    choose(kind, '/'.join([*done, key]), known)
    tree = tree[key]
    done.append(key)
  return tree


def _replaced(tree: Any, keys: Sequence[str], value: Any) -> Any:
  """A nested dict with another part at a path."""
  return tree | {keys[0]: _replaced(tree[keys[0]], keys[1:], value)} if keys else value


def _all_parts(config: Any, own: dict[str, Any]) -> dict[str, Any]:
  """Everything but moments and step from a run; entries that its extra state lacks stay fresh."""
  if not is_run(config.init):
    raise UserError(f'init_parts={config.init_parts} takes heads and more from a run, but init={config.init} is none')
  trainer, _, _, state = load_state(config.init)
  resized = lambda encoder: at_size(trainer.objective.encoder, encoder, tuple(config.image_size))
  whole = lambda tree: tree | {'encoder': resized(tree['encoder'])} if 'encoder' in tree else tree
  params, target = whole(state.average or state.params), whole(state.target)
  if config.init_parts == 'target':
    params = params | target
  extra = own['extra'] | {k: resized(v) if k == 'gram' else v for k, v in state.extra.items() if k in own['extra']}
  return {'params': params, 'target': target, 'extra': extra}
