"""Reading what a run wrote: its state, its encoder; `jaxmed.load`."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxmed import config as config_lib
from jaxmed import files, objectives
from jaxmed.augment import nnunet, views
from jaxmed.data.feed.tokenizers import Tokenizer
from jaxmed.encoder import Encoder, from_file
from jaxmed.errors import UserError, choose
from jaxmed.interop import folders, text, vit_mae
from jaxmed.interop.two_towers import Towers
from jaxmed.models import registry
from jaxmed.models.layers import adapters
from jaxmed.models.signals.signal import SignalEncoder
from jaxmed.models.signals.table import TableEncoder
from jaxmed.models.text.registry import CLASSES as TEXT_MODELS
from jaxmed.objectives import feature_of
from jaxmed.objectives.dense.segment import Segment
from jaxmed.objectives.masked.mae import MAE
from jaxmed.objectives.paired.clip import Paired
from jaxmed.pair import Joint, Pair, TextEncoder
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.segmenter import Segmenter
from jaxmed.train.build import assemble, towers, view_sizes, wording
from jaxmed.train.build.adapting import TRAINING_ONLY
from jaxmed.train.build.data_spec import DataSpec
from jaxmed.train.build.resolve import METHOD, MIXTURE
from jaxmed.train.checkpoint import Checkpoints


def load_encoder(run: str | pathlib.Path, which: str = 'latest', tower: str = towers.IMAGE) -> Any:
  """The encoder of a run, with the weights of a checkpoint: 'latest', 'best' or a step. Errors as of `load_state`."""
  return encoder_of(*load_state(run, which), tower)


def load_state(run: str | pathlib.Path, which: str = 'latest') -> tuple[Any, Any, DataSpec, Any]:
  """Trainer, config, data and state of a run at a checkpoint: 'latest', 'best' or a step.

  Raises:
    UserError: not a run, or without a checkpoint.
  """
  run = pathlib.Path(run)
  config, spec = load_config(run)
  trainer = assemble.build(config, spec)
  mesh = mesh_lib.make_mesh({'data': 0})
  abstract = trainer.abstract(assemble.batch_shapes(config, spec), mesh)
  if not (run / 'checkpoints').is_dir():
    raise UserError(f'{run} has no checkpoint yet')
  checkpoints = Checkpoints(run, best=config.checkpoint.best, best_mode=config.checkpoint.best_mode, read_only=True)
  state = checkpoints.restore(abstract, which)
  checkpoints.close()
  if state is None:
    raise UserError(f'{run} has no checkpoint yet')
  return trainer, config, spec, state


def plain(model: Any) -> Any:
  """The encoder without options that only training uses; its features are the same."""
  off = {'mask_token': False, 'local_norm': False, 'rope_shift': 0.0, 'rope_jitter': 0.0, 'rope_rescale': 0.0,
         'hash_draw': False, 'packing': 0.0}
  fields = {f.name for f in dataclasses.fields(model)}  # a family without the option has it off as a constant
  return model.clone(**{k: v for k, v in off.items() if k in fields})


def product(model: Any, params: Any) -> tuple[Any, Any]:
  """The encoder without options and weights that only training uses, see `plain`.

  Adapters that are linear are merged into the weights.
  """
  model = plain(model)
  if model.adapter is not None and model.adapter.linear:
    model, params = model.clone(adapter=None), adapters.merged(model.adapter, params)
  return model, {k: v for k, v in params.items() if k not in TRAINING_ONLY}


def encoder_of(trainer: Any, config: Any, spec: DataSpec, state: Any, tower: str = towers.IMAGE) -> Any:
  """The encoder, or another tower, of a training state; with the averaged weights if the run keeps them. A tower of
  texts is a `TextEncoder`."""
  variables = state.variables() | ({'params': state.average} if state.average else {})
  products = trainer.objective.products(variables)
  if tower == Joint.tower and isinstance(trainer.objective, Paired):
    return Joint(encoder_of(trainer, config, spec, state))
  weights = products[choose('tower', tower, products)]
  own = config.towers.get(tower)
  name = own.model or own.init if own else config.model
  info = {'method': config.method, 'model': name, 'steps': int(jax.device_get(state.step)),
          'summary': spec.summary, 'mixed': spec.mixed or config.augment.channel_sampling != 'none'}
  network = trainer.objective.model_of(tower)
  if isinstance(network, TEXT_MODELS) and isinstance(trainer.objective, Paired):
    return TextEncoder(encoder_of(trainer, config, spec, state))
  if isinstance(network, (*TEXT_MODELS, SignalEncoder, TableEncoder)):
    raise UserError(f'tower {tower} is a model of {tower}s: jaxmed.load gives encoders of images, here '
                    f'{", ".join(t for t in products if t != tower)}')
  model, params = product(network, weights)
  pair = None
  if tower == towers.IMAGE and isinstance(trainer.objective, Paired):
    rest = {key: value for key, value in variables['params'].items() if key != 'encoder'}
    pair = Pair(trainer.objective, rest, config.loader.text_length, wording.of(spec.texts))
  return Encoder(model, params, spec.channels, config.loader.normalize,
                 feature_of(trainer.objective) or 'mean' if model.class_token else 'mean', info, pair)


def load_tower(path: str | os.PathLike, method: str = '', like: Any = None) -> Any:
  """What a tower begins with, as `model` and `params`: an encoder, or with `method` the objective of such a run and all
  its weights, averaged where the run keeps that. With method towers.TEXTS the tower of texts of a run, file or folder;
  `like` is the model of a file that does not say it.

  Raises:
    UserError: neither a run nor a file, or a run of another method.
  """
  if method == towers.TEXTS:
    if not is_run(path):
      return towers.Whole(*text.read_text(path, like))
    trainer, _, _, state = load_state(os.fspath(path))
    products = trainer.objective.products(state.variables() | ({'params': state.average} if state.average else {}))
    choose(f'tower of {path}', 'text', products)
    return towers.Whole(trainer.objective.model_of('text'), products['text'])
  if not method:
    return load(path)
  config, _ = load_config(os.fspath(path))
  if config.method != method:
    raise UserError(f'{path} is a run of method {config.method}: expected one of method {method}')
  trainer, _, _, state = load_state(os.fspath(path))
  return towers.Whole(trainer.objective, state.average or state.params)


def load_for_folder(path: str | os.PathLike, checkpoint: str, tower: str, fmt: str) -> tuple[Encoder, Any, Any, Any]:
  """What `jaxmed export` writes as a folder: the encoder; both towers and their tokenizer (of 'hf' and 'open_clip',
  None for the encoder alone); the tensors and config of a decoder (of 'hf_vit_mae').

  Raises:
    UserError: as of `load`; 'open_clip' of anything but a run of images and texts.
  """
  nothing: Any = ({}, {})
  if not is_run(path):
    if fmt == 'open_clip':
      raise UserError(f'--format open_clip writes both towers of a run of images and texts: {path} is no run')
    return load(path, checkpoint, tower), None, None, nothing
  trainer, config, spec, state = load_state(os.fspath(path), checkpoint)
  encoder, objective = encoder_of(trainer, config, spec, state, tower), trainer.objective
  params = (state.average if state.average else None) or state.params
  if isinstance(objective, Paired) and tower == towers.IMAGE and fmt in ('hf', 'open_clip'):
    scale, bias = objective.logits(params)
    tokenizer = wording.of(spec.texts).tokenizer if spec.texts else Tokenizer()
    return encoder, Towers(
        encoder.model, encoder.params, objective.text, params['text'],
        params['projection']['kernel'] if objective.project else None, float(jnp.log(scale)),
        float(bias) if 'bias' in params['similarity'] else None, objective.feature, tokenizer.end), tokenizer, nothing
  if fmt == 'open_clip':
    raise UserError(f'--format open_clip writes both towers of a run of images and texts, not of method '
                    f'{config.method}')
  if fmt == 'hf_vit_mae' and isinstance(objective, MAE):
    return encoder, None, None, vit_mae.to_decoder(
        encoder.model, objective.decoder, params['decoder'], objective.mask_ratio, objective.norm_pixels)
  return encoder, None, None, nothing


def load_segmenter(path: str | os.PathLike, checkpoint: str = 'latest') -> Segmenter:
  """Loads the segmentation network of a run of method segment or semi_segment.

  Args:
    path: a run directory. checkpoint: 'latest', 'best' or a step.
  Returns:
    A Segmenter; `predict(image, channels=...)` gives the mask of a whole image.
  Raises:
    UserError: no run, or one of another method.
  """
  path = pathlib.Path(path)
  config, _ = load_config(path)
  if not issubclass(objectives.get(config.method), Segment):
    raise UserError(f'{path} is a run of method {config.method}, which has no classes of pixels: expected a run of '
                    'method segment or semi_segment')
  return segmenter_of(*load_state(path, checkpoint))


def segmenter_of(trainer: Any, config: Any, spec: DataSpec, state: Any) -> Segmenter:
  """The segmentation network of a training state; with the averaged weights if the run keeps them."""
  params = (state.average if state.average else None) or state.variables()['params']
  info = {'method': config.method, 'model': config.model, 'steps': int(jax.device_get(state.step)),
          'summary': spec.summary, 'mixed': spec.mixed or config.augment.channel_sampling != 'none'}
  return Segmenter(trainer.objective, params, spec.channels, config.loader.normalize,
                   tuple(config.loader.load_size) if config.loader.fit == 'crop' else (), spec.spacing,
                   mirrored_axes(config.augment.flip, len(trainer.objective.encoder.image_size)), info)


def mirrored_axes(flip: Sequence[float], rank: int) -> tuple[int, ...]:
  """The axes that augment.flip mirrors: a probability each, or one for all; of () the last axis."""
  chances = tuple(flip) * rank if len(flip) == 1 else tuple(flip) or (0.0,) * (rank - 1) + (0.5,)
  return tuple(axis for axis, chance in enumerate(chances) if chance > 0)


def like_init(user: Mapping[str, Any]) -> dict[str, Any]:
  """The user's values with the encoder of `init` as far as they leave it open, where labels or masks are learned.

  Methods have wishes for encoders, such as the fixed positions of `mae`; a run that is fine-tuned keeps those that it
  was trained with. Another model than that of `init` stays as it is said, and drop path is the new run's.
  """
  user = towers.short(user)
  init, method = str(user.get('init', '')), objectives.get(str(user.get('method', METHOD)))
  if not init or user.get('init_map') or not method.PREDICTS:
    return user
  if is_run(init):
    config, spec = load_config(init)
    words = registry.named(plain(assemble.build(config, spec).objective.encoder), config.model)
  else:
    words = registry.named(load(init).model)
  if str(user.get('model') or words['model']) != words['model']:
    return user
  words['encoder'].pop('drop_path', None)
  return config_lib.merge(words, {k: v for k, v in user.items() if k != 'model' or v})


# Keys that runs of earlier versions lack, whose defaults do what those did.
ADDED = ('on_spike', 'evaluation', 'leak_encoder', 'on_leak', 'loggers', 'checkpoint.minutes', 'checkpoint.keep_every',
         'watchdog.minutes', 'mesh.sequence', 'loader.sources', 'loader.held_out', 'loader.missing',
         'loader.records', 'loader.records_seed',
         'loader.vocabulary', 'loader.unknown', 'augment.channel_temperature', *(f'loader.{key}' for key in MIXTURE),
         'optimizer.moments', 'optimizer.offload', 'optimizer.annealing', 'optimizer.decay_lengths',
         'optimizer.frozen_moments', 'optimizer.scaling', 'optimizer.base_width', 'optimizer.base_heads',
         'init_parts', 'init_map', 'freeze',
         'evaluators', 'loader.text_length', 'loader.signal_length', 'loader.table', 'loader.text', 'loader.text_draw',
         'loader.text_clean', 'loader.captions', 'loader.tokenizer',
         'loader.window', 'loader.window_group', 'loader.window_order', 'loader.window_stride',
         *(f'augment.{name}' for name in ('rotation', *views.RANGES, *nnunet.CHANCES)),
         *(f'adapter.{name}' for name in config_lib.SECTIONS['adapter']),
         'loader.foreground', 'loader.foreground_rule', 'loader.crops', 'loader.pad',
         *(f'augment.{name}' for name in view_sizes.LISTS))


def save(run: pathlib.Path, config: ConfigDict, spec: DataSpec) -> None:
  """Writes RUN/config.json and RUN/data.json."""
  files.write_json(run / 'data.json', dataclasses.asdict(spec))
  wording.save(run, spec.texts)
  files.write_json(run / 'config.json', config_lib.to_dict(config))


def check_run(run: str | pathlib.Path) -> pathlib.Path:
  """The folder of a run, or a UserError where it is none."""
  run = pathlib.Path(run)
  if not (run / 'config.json').is_file():
    raise UserError(f'{run} is not a run: it has no config.json')
  return run


def load_config(run: str | pathlib.Path) -> tuple[ConfigDict, DataSpec]:
  """Reads back what `save` wrote."""
  run = check_run(run)
  values = files.read_json(run / 'config.json')
  values = values if isinstance(values, dict) else {}
  have, wanted = config_lib.flat(config_lib.from_dict(values)), config_lib.flat(config_lib.base())
  lost = [key for key in wanted if key not in have and not (key in ADDED and have)]
  if lost:
    raise UserError(f'{run / "config.json"} has no {lost[0]}: it is damaged or of another version')
  # A run of an earlier version goes on as it began: what it lacks does by default what it did.
  config = config_lib.from_dict(config_lib.merge(config_lib.to_dict(config_lib.base()), values))
  data = files.read_json(run / 'data.json')
  try:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    spec = DataSpec(**fields)
  except (TypeError, AttributeError) as e:
    raise UserError(f'{run / "data.json"} is damaged or of another version: {e}') from e
  return config, spec


# In a run directory, before config.json.
_BEFORE = re.compile(r'corpus|data\.json|tokenizer(_config)?\.json|\.(data|tokenizer|tokenizer_config|config)\.json\..*'
                     r'\.part|\.owner\.json.*')


def is_run(path: str | os.PathLike) -> bool:
  """Whether a path is a folder that is none of transformers' or open_clip's weights."""
  return pathlib.Path(path).is_dir() and not folders.is_folder(path)


def check_new(out: str | pathlib.Path) -> None:
  """Raises a UserError when a run directory is there already.

  One may be used that holds a corpus alone, or what a start left that was killed before it wrote config.json, the last.
  """
  out = pathlib.Path(out)
  if out.exists() and (not out.is_dir() or any(not _BEFORE.fullmatch(f.name) for f in out.iterdir())):
    raise UserError(f'{out} exists and is not empty: choose another --out, or go on with --resume {out}')


def load(path: str | os.PathLike, checkpoint: str = 'latest', tower: str = towers.IMAGE) -> Any:
  """Loads an encoder.

  Args:
    path: a run directory, a file that `jaxmed export` or `jaxmed import` wrote, or a folder of transformers or
      open_clip.
    checkpoint: of a run: 'latest', 'best' or a step.
    tower: of a run whose method trains several; 'image' is the encoder, 'image+text' is both (see `jaxmed.pair.Joint`).
  Returns:
    An Encoder; `embed(images, channels=...)` gives class, mean-pooled and patch features. Of a tower of texts a
    `jaxmed.pair.TextEncoder`; `embed(texts)` gives their vectors.
  Raises:
    UserError: the path is neither, or damaged.
  """
  path = pathlib.Path(path)
  if is_run(path):
    return load_encoder(path, checkpoint, tower)
  if tower != towers.IMAGE:
    raise UserError(f'{path} is a file of one encoder: it has no tower {tower!r}')
  return from_file(path)
