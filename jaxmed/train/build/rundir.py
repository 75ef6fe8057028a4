"""Reading what a run wrote: its state, its encoder; `jaxmed.load`."""

import dataclasses
import os
import pathlib
from typing import Any

import jax

from jaxmed.encoder import Encoder, from_file
from jaxmed.errors import UserError
from jaxmed.objectives import feature_of
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.train.build import setup
from jaxmed.train.checkpoint import Checkpoints

TRAINING_ONLY = ('mask_token', 'norm_local')  # parameters that no product has


def load(path: str | os.PathLike, checkpoint: str = 'latest') -> Encoder:
  """Loads an encoder.

  Args:
    path: a run directory, or a file that `jaxmed export` or `jaxmed import` wrote.
    checkpoint: of a run: 'latest', 'best' or a step.
  Returns:
    An Encoder; `embed(images, channels=...)` gives class, mean-pooled and patch features.
  Raises:
    UserError: the path is neither, or damaged.
  """
  path = pathlib.Path(path)
  return load_encoder(path, checkpoint) if path.is_dir() else from_file(path)


def load_encoder(run: str | pathlib.Path, which: str = 'latest') -> Encoder:
  """The encoder of a run, with the weights of a checkpoint: 'latest', 'best' or a step. Errors as of `load_state`."""
  return encoder_of(*load_state(run, which))


def load_state(run: str | pathlib.Path, which: str = 'latest') -> tuple[Any, Any, setup.DataSpec, Any]:
  """Trainer, config, data and state of a run at a checkpoint: 'latest', 'best' or a step.

  Raises:
    UserError: not a run, or without a checkpoint.
  """
  run = pathlib.Path(run)
  config, spec = setup.load(run)
  trainer = setup.build(config, spec)
  mesh = mesh_lib.make_mesh({'data': 0})
  abstract = trainer.abstract(setup.batch_shapes(config, spec), mesh)
  if not (run / 'checkpoints').is_dir():
    raise UserError(f'{run} has no checkpoint yet')
  checkpoints = Checkpoints(run, best=config.checkpoint.best, best_mode=config.checkpoint.best_mode, read_only=True)
  state = checkpoints.restore(abstract, which)
  checkpoints.close()
  if state is None:
    raise UserError(f'{run} has no checkpoint yet')
  return trainer, config, spec, state


def product(model: Any, params: Any) -> tuple[Any, Any]:
  """The encoder without what is of use in training only: its features are the same."""
  off = {'mask_token': False, 'local_norm': False, 'rope_shift': 0.0, 'rope_jitter': 0.0, 'rope_rescale': 0.0,
         'hash_draw': False, 'packing': 0.0}
  fields = {f.name for f in dataclasses.fields(model)}  # a family without the option has it off as a constant
  model = model.clone(**{k: v for k, v in off.items() if k in fields})
  return model, {k: v for k, v in params.items() if k not in TRAINING_ONLY}


def encoder_of(trainer: Any, config: Any, spec: setup.DataSpec, state: Any) -> Encoder:
  """The encoder inside a training state; the averaged weights where there are some."""
  variables = state.variables | ({'params': state.average} if state.average else {})
  info = {'method': config.method, 'model': config.model, 'steps': int(jax.device_get(state.step)),
          'summary': spec.summary, 'mixed': spec.mixed or config.augment.channel_sampling != 'none'}
  model, params = product(trainer.objective.encoder, trainer.objective.encoder_params(variables))
  return Encoder(model, params, spec.channels, config.loader.normalize,
                 feature_of(trainer.objective) if model.class_token else 'mean', info)
