"""The state that a run begins with: a checkpoint, fresh weights, or those of another run or file."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.errors import UserError
from jaxmed.interop.inflate import inflate
from jaxmed.models.encoders.bag import BagOfChannels
from jaxmed.models.encoders.vit import ViT, at_size
from jaxmed.parallel import process
from jaxmed.train.build.rundir import TRAINING_ONLY, load, load_state
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
  if not config.init:
    return None
  own = {name: vars(state)[name] for name in ('params', 'target', 'extra')}
  given = (_all_parts(config, own) if config.init_parts != 'encoder' else
           _encoder_alone(config, own, vocabulary, quiet))
  shape = lambda tree: {jax.tree_util.keystr(path, simple=True, separator='/'): x.shape
                        for path, x in jax.tree_util.tree_leaves_with_path(tree)}
  here, there = shape(own), shape(given)
  for name in sorted(here.keys() | there.keys()):
    if here.get(name) != there.get(name):
      raise UserError(f'init={config.init} is another model than {config.model} or has other heads: {name} is '
                      f'{there.get(name, "missing")} there and {here.get(name, "missing")} here')
  return given


def _encoder_alone(config: Any, own: dict[str, Any], vocabulary: Sequence[str], quiet: bool) -> dict[str, Any]:
  """The encoder's weights from a run or file, the rest as it is; the target starts as the trained parts.

  Channels go by their names: those that the encoder does not know begin as the mean of those that it knows.
  """
  given = load(config.init)
  params = given.params
  if isinstance(given.model, ViT) and given.named and given.vocabulary != tuple(vocabulary):
    params = inflate(given.model, params, given.vocabulary, vocabulary)[1]
    unknown = [name for name in vocabulary if name not in given.vocabulary]
    if unknown and not quiet and process.is_main():
      print(f'init={config.init} does not know the channels {", ".join(unknown)}: they begin as the mean of '
            f'{", ".join(given.vocabulary)}', file=sys.stderr, flush=True)
  encoder = at_size(given.model, params, tuple(config.image_size))
  fresh = own['params']['encoder']
  names = ('channel_embed', 'channel_hash') if isinstance(given.model, BagOfChannels) else ()  # to which all are one
  more = (*TRAINING_ONLY, *names)
  encoder = encoder | {k: fresh[k] for k in more if k in fresh and k not in encoder}
  params = own['params'] | {'encoder': encoder}
  return {'params': params, 'target': {name: params[name] for name in own['target']}, 'extra': own['extra']}


def _all_parts(config: Any, own: dict[str, Any]) -> dict[str, Any]:
  """Everything but moments and step from a run; what its extra state lacks stays fresh, what is not used is left."""
  if not pathlib.Path(config.init).is_dir():
    raise UserError(f'init_parts={config.init_parts} takes heads and more from a run, but init={config.init} is none')
  trainer, _, _, state = load_state(config.init)
  resized = lambda encoder: at_size(trainer.objective.encoder, encoder, tuple(config.image_size))
  whole = lambda tree: tree | {'encoder': resized(tree['encoder'])} if 'encoder' in tree else tree
  params, target = whole(state.average or state.params), whole(state.target)
  if config.init_parts == 'target':
    params = params | target
  extra = own['extra'] | {k: resized(v) if k == 'gram' else v for k, v in state.extra.items() if k in own['extra']}
  return {'params': params, 'target': target, 'extra': extra}
