"""The networks of a run beside its encoder: their models, weights to begin with, and those that are only read.

`towers.NAME` in a config names one, for each of the method's TOWERS: `model` with `options`, or a run or file in `init`
whose model and weights it takes. A `fixed` tower is never trained or saved: the run keeps its source and digest. The
`adapter` of a tower of texts is trained beside frozen weights; it has the keys of the section `adapter`.
`model`, `encoder.*` and `init` are the short form of `towers.image`.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.core import FrozenDict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxmed import config as config_lib
from jaxmed import objectives
from jaxmed.errors import UserError, choose
from jaxmed.models import registry
from jaxmed.models.signals import registry as signals
from jaxmed.models.text import registry as text
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.train.build import adapting

KEYS: dict[str, Any] = {'model': '', 'options': {}, 'init': '', 'fixed': False, 'adapter': {}}
TEXTS = 'text'  # what `load` is asked for in place of a method, for a tower of texts
_FREE = ('channel_names', *text.FILLED)  # in which a model may differ from its weights
FOUND = {'description': {}, 'sha256': ''}  # what `opened` adds of a tower that comes from a run or file
IMAGE = 'image'  # the tower that `model` and `encoder.*` describe; its weights are params['encoder']


class Whole(NamedTuple):
  """A run's objective and all its weights, as a tower that the method names in WHOLE."""

  model: Any
  params: Any


def path_of(tower: str) -> str:
  """Where a tower's weights lie in the parameters."""
  return 'encoder' if tower == IMAGE else tower


def short(user: Mapping[str, Any]) -> dict[str, Any]:
  """The user's values with `towers.image` written as `model`, `encoder` and `init`."""
  towers = dict(user.get('towers', {}))
  image = towers.pop(IMAGE, None)
  rest = {k: v for k, v in user.items() if k != 'towers'} | ({'towers': towers} if towers else {})
  if image is None:
    return rest
  for key in image:
    choose(f'key towers.{IMAGE}', key, [key for key in KEYS if key != 'adapter'])
  if image.get('fixed'):
    raise UserError(f'towers.{IMAGE}.fixed: the encoder of a run is what it trains; freeze=encoder keeps its weights')
  told = {'model': image.get('model', ''), 'encoder': dict(image.get('options', {})), 'init': image.get('init', '')}
  told = {k: v for k, v in told.items() if v}
  twice = [k for k in told if user.get(k)]
  if twice:
    raise UserError(f'towers.{IMAGE} and {twice[0]} say the same: give one of them')
  return rest | told


def filled(method: Any, given: Mapping[str, Any]) -> dict[str, Any]:
  """{tower: KEYS} of the towers that a method has beside the encoder, from the method's wishes and the user's values.

  Raises:
    UserError: a tower that the method has not, an unknown key, a value of another type, or a tower without a model.
  """
  names = method.TOWERS[1:]
  for name in given:
    if not names:
      raise UserError(f'towers.{name}: the method has one tower, {IMAGE}')
    choose('tower of the method', name, names)
  out, of_defaults = {}, method.DEFAULTS.get('towers', {})  # whose models optional towers have where none is named
  for name in names:
    usual = not given and of_defaults.get(name, {}).get('model')
    if name in method.OPTIONAL and not usual and not dict(given.get(name, {})):
      continue
    wishes = dict(of_defaults.get(name, {}))
    if of_texts(method, name) and dict(given.get(name, {})).get('init'):
      wishes.pop('model')  # which the weights say
    wanted = wishes | dict(given.get(name, {}))
    for key in wanted:
      choose(f'key towers.{name}', key, KEYS | FOUND)
    tower = KEYS | wanted
    for key, default in KEYS.items():
      kind = (Mapping, ConfigDict) if isinstance(default, dict) else type(default)
      if not isinstance(tower[key], kind):
        takes = {str: 'text', bool: 'True or False'}.get(type(default), 'a section')
        raise UserError(f'towers.{name}.{key} takes {takes}, not {tower[key]!r}')
    if of_texts(method, name) and tower['init']:
      _check_texts(name, tower)
    if name in signals.KINDS and tower['init']:
      raise UserError(f'towers.{name}.init={tower["init"]}: a tower of {name}s begins fresh, leave it out')
    if not tower['model'] and name in signals.KINDS:
      raise UserError(f'towers.{name} needs a model, such as towers.{name}.model={signals.KINDS[name]}')
    if tower['adapter']:
      if not of_texts(method, name):
        raise UserError(f'towers.{name}.adapter: only a tower of texts has one; the section adapter is the '
                        "encoder's")
      tower['adapter'] = adapting.of_texts(name, tower['adapter'])
    if not tower['model'] and not tower['init']:
      raise UserError(f'towers.{name} needs a model, towers.{name}.model=vit_micro/8, or a run or file, '
                      f'towers.{name}.init=RUN')
    if tower['fixed'] and not tower['init']:
      raise UserError(f'towers.{name}.fixed=True needs the weights to read: towers.{name}.init=RUN or a file')
    out[name] = tower
  return out


def _check_texts(name: str, tower: Mapping[str, Any]) -> None:
  if tower['fixed']:
    raise UserError(f'towers.{name}.fixed: a tower of texts has a projection that is trained; freeze={name} keeps its '
                    'weights')
  if set(tower['options']) - {'vocab_size'} and not tower['model']:  # which the tokenizer says
    raise UserError(f'towers.{name}.options are of a model: name it, towers.{name}.model=text_clip_base')


def text_model(config: ConfigDict, name: str) -> Any:
  """The model of a tower of texts as the config names it; None where its weights say it."""
  tower = config.towers[name]
  if not tower.model:
    return None
  made = text.create_text(tower.model, config.loader.text_length, **tower.options)
  return made.clone(adapter=adapting.made(tower.get('adapter')))


def of_texts(method: Any, tower: str) -> bool:
  """Whether a tower of a method takes texts: its default model is one of them."""
  return method.DEFAULTS.get('towers', {}).get(tower, {}).get('model') in text.MODELS


def fields_of(method: Any, towers: Mapping[str, Any]) -> tuple[str, ...]:
  """What a method wants of a record with these towers: a field of the name of an optional tower goes with it."""
  return tuple(name for name in method.FIELDS if name not in method.OPTIONAL or name in towers)


def fit_vocabulary(method: Any, given: ConfigDict, size: int) -> None:
  """Gives towers of texts as many ids as the tokenizer has, where the config does not say how many; 0: not known.

  Raises:
    UserError: a tower with fewer ids.
  """
  for name, tower in given.items():
    if not of_texts(method, name):
      continue
    least = size or text.BYTES
    if 'vocab_size' in tower.options and tower.options.vocab_size < least:
      what = 'bytes and padding' if least == text.BYTES else 'loader.tokenizer'
      raise UserError(f'towers.{name}.options.vocab_size={tower.options.vocab_size} is fewer than the {least} ids of '
                      f'{what}')
    if size and size != text.BYTES and 'vocab_size' not in tower.options:
      with given.unlocked():
        tower.options.vocab_size = size


def opened(config: ConfigDict, load: Any) -> None:
  """Writes into the config what the run or file of each tower with `init` is: its model and the digest of its weights.

  The weights are let go of and read again by `fixed`: a device holds one copy of them.

  Raises:
    UserError: a file that is none, another model than the one named, or other weights than the run began with.
  """
  whole = objectives.get(config.method).WHOLE
  for name, tower in config.towers.items():
    if not tower.init or (tower.get('sha256') and not tower.fixed):  # the weights of a run that goes on are its own
      continue
    texts = of_texts(objectives.get(config.method), name)
    like = text_model(config, name) if texts else None
    given = load(tower.init, TEXTS, like) if texts else _loaded(load, tower, whole.get(name, ''))
    found = described(given.model)
    if tower.model:
      wanted = described(like or registry.create_model(tower.model, given.model.image_size, given.model.in_channels,
                                                       **tower.options))
      differs = [k for k in wanted if k not in _FREE and wanted[k] != found.get(k)]
      if differs:
        raise UserError(f'towers.{name}.init={tower.init} is another model than towers.{name}.model={tower.model}: '
                        f'{differs[0]} is {found.get(differs[0])!r} there')
    digest = digest_of(given.params)
    if tower.get('sha256') and tower.sha256 != digest:
      raise UserError(f'towers.{name}.init={tower.init} has other weights than those that the run began with '
                      f'(sha256 {digest[:12]}, not {tower.sha256[:12]})')
    with config.unlocked():
      tower.description, tower.sha256 = ConfigDict(found), digest


def models(config: ConfigDict, channels: int, names: tuple, signal: Sequence[int] = (0, 0),
           table: Sequence[Mapping[str, Any]] = ()) -> FrozenDict:
  """{tower: model} of the towers beside the encoder; those without `init` have the run's image size and channels, those
  of texts its longest text, those of signals its steps and channels, those of tables the columns."""
  out: dict[str, Any] = {}
  for name, tower in config.towers.items():
    if tower.get('description'):
      out[name] = rebuilt(config_lib.to_dict(tower.description))
      if isinstance(out[name], text.CLASSES):
        _check_sizes(config, name, out[name])
        out[name] = out[name].clone(adapter=adapting.made(tower.get('adapter')))
    elif of_texts(objectives.get(config.method), name):
      out[name] = text_model(config, name)
    elif name == 'signal':
      out[name] = signals.create_signal(tower.model, signal[0], signal[1], **tower.options)
    elif name == 'table':
      out[name] = signals.create_table(tower.model, table, **tower.options)
    else:
      out[name] = registry.create_model(tower.model, tuple(config.image_size), channels, names, **tower.options)
  return FrozenDict(out)


def _check_sizes(config: ConfigDict, name: str, model: Any) -> None:
  """Raises a UserError where texts of the run have more ids, or others, than the weights of their tower know."""
  tower, length = config.towers[name], config.loader.text_length
  if model.context < length:
    raise UserError(f'loader.text_length={length} is longer than the {model.context} ids of towers.{name}.init='
                    f'{tower.init}: set loader.text_length={model.context}')
  wanted = tower.options.get('vocab_size', text.BYTES)
  if model.vocab_size < wanted:
    raise UserError(f'towers.{name}.init={tower.init} knows {model.vocab_size} ids, loader.tokenizer has {wanted}: '
                    'give the tokenizer of the weights')


def fixed_shapes(config: ConfigDict, objective: Any, mesh: Mesh | None = None) -> dict[str, Any]:
  """{tower: shapes of the weights} of the towers that are only read; on a mesh they lie by the rules of all weights."""
  out = {}
  for name, tower in config.towers.items():
    if tower.fixed:
      model = objective.towers[name]
      encoder = model if isinstance(model, nn.Module) else model.encoder
      image = jax.ShapeDtypeStruct((1, *encoder.image_size, encoder.in_channels), np.dtype('float32'))
      batch = image if encoder is model else {'image': image}
      boxed = jax.eval_shape(model.init, jax.random.key(0), batch)['params']
      out[name] = nn.unbox(boxed) if mesh is None else mesh_lib.placed(boxed, mesh_lib.shardings(boxed, mesh))
  return out


def fixed(config: ConfigDict, shapes: Mapping[str, Any], load: Any) -> dict[str, Any]:
  """{tower: weights} of the towers that are only read, on the devices as `fixed_shapes` says."""
  put = lambda x, shape: jax.device_put(np.asarray(x, shape.dtype), shape.sharding)
  whole = objectives.get(config.method).WHOLE
  return {name: jax.tree.map(put, _loaded(load, config.towers[name], whole.get(name, '')).params, shape)
          for name, shape in shapes.items()}


def _loaded(load: Any, tower: Any, method: str) -> Any:
  return load(tower.init, method) if method else load(tower.init)


def described(model: Any) -> dict[str, Any]:
  """A tower's model as plain data, which `rebuilt` turns back into it: an encoder, or the objective of a whole run."""
  if isinstance(model, text.CLASSES):
    return text.describe(model)
  if isinstance(model, nn.Module):
    return registry.describe(model)
  name = next(name for name, method in objectives.METHODS.items() if type(model) is method)
  options = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name != 'encoder'}
  plain = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
  return {'method': name, 'options': plain, 'encoder': registry.describe(model.encoder)}


def rebuilt(description: dict[str, Any]) -> Any:
  """The model that `described` described."""
  if description.get('family') in text.FAMILIES:
    return text.rebuild(description)
  if 'method' not in description:
    return registry.rebuild(description)
  options = {k: tuple(v) if isinstance(v, list) else v for k, v in description['options'].items()}
  return objectives.get(description['method'])(encoder=registry.rebuild(description['encoder']), **options)


def digest_of(params: Any) -> str:
  """SHA-256 of a tree of arrays: paths, types, shapes and bytes."""
  total = hashlib.sha256()
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    x = np.asarray(x)
    total.update(f'{jax.tree_util.keystr(path)} {x.dtype.name} {x.shape}'.encode())
    total.update(np.ascontiguousarray(x).tobytes())
  return total.hexdigest()
