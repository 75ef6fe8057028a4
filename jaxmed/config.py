"""What a run is: typed defaults, overrides, and the resolved copy that is saved beside the run.

A config is an ml_collections.ConfigDict. Zero, the empty string or the empty tuple mean "chosen from the data, the
device and the method"; what was chosen is printed and saved. The sections `encoder` and `objective` take their keys
from the chosen model and method.
"""

import ast
import importlib.util
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxmed.errors import UserError, choose


def base() -> ConfigDict:
  """The keys that every run has, with their defaults."""
  return ConfigDict({
      'method': 'mae',
      'model': '',
      'data': '',
      'seed': 0,
      'steps': 0,  # or epochs
      'epochs': 0.0,
      'batch_size': 0,  # global
      'image_size': (),  # one number means a square
      'learning_rate': 0.0,  # peak, for the whole batch
      'checkpoint_every': 0,  # steps
      'eval_every': 0,  # steps; probes on the labelled splits, where loader.label is set
      'log_every': 10,
      'on_collapse': 'warn',  # 'warn' | 'stop' | 'rollback' (to the last healthy checkpoint, at half the rate)
      'on_spike': 'warn',  # of the loss: 'ignore' | 'warn' | 'skip' (that update) | 'rollback' (at half the rate)
      'evaluation': '',  # corpora to judge by, comma-separated: records to train on that they hold too are told
      'leak_encoder': '',  # a run or file whose features find leaks too that files, subjects and hashes do not show
      'on_leak': 'warn',  # 'ignore' | 'warn' | 'stop', where there are such records
      'init': '',  # a run or file whose weights training starts from
      'init_parts': 'encoder',  # | 'all' (heads, teacher and state too) | 'target' (all, the student from the teacher)
      'encoder': {},
      'objective': {},
      'optimizer': {
          'b1': 0.9,
          'b2': 0.999,
          'name': 'adamw',  # 'adamw' | 'lars' | 'sgd'
          'weight_decay': 0.05,
          'final_weight_decay': -1.0,  # at the end of a cosine; negative: the same
          'warmup_steps': 0,  # 10 % of the steps
          'warmup_epochs': 0.0,  # instead of warmup_steps
          'final_learning_rate': 0.0,
          'layer_decay': 1.0,
          'patch_embed_scale': 1.0,  # factor on its learning rate
          'bias_scale': 1.0,  # factor on the learning rate of biases and norms
          'clip': 0.0,  # largest gradient norm, 0 for none
          'clip_scope': 'global',  # 'global' | 'module' | 'tensor'
          'moments': 'float32',  # | 'bfloat16'
          'offload': False,  # keep the moments in the host's memory between steps
          'accumulate': 1,  # microbatches a step
          'ema': 0.0,  # decay of an average of the weights, 0 for none
      },
      'augment': {
          'scale': (0.2, 1.0),  # share of the area that a crop covers
          'ratio': (3 / 4, 4 / 3),
          'flip': (),  # probability an axis; last axis only by default
          'rotate90': (0.0,),  # probability of quarter turns in the last two axes [1]
          'rotate': 0.0,  # greatest angle in the plane of the last two axes, in degrees
          'brightness': 0.0,  # additive, in standard deviations
          'contrast': 0.0,  # multiplicative, +- this share
          'jitter_probability': (1.0,),  # of brightness, contrast and color together [1]
          'noise': 0.0,  # standard deviation of Gaussian noise
          'color': (),  # RGB only: greatest change of saturation, and of hue (half of it by default)
          'grayscale': (0.0,),  # RGB only: probability [1]
          'stain': 0.0,  # RGB only: greatest change of the stains of histology; HED-light is 0.05
          'gamma': 0.0,  # exponents between 1 / (1 + gamma) and 1 + gamma
          'gamma_probability': (1.0,),  # [1]
          'bias': 0.0,  # largest coefficient of a smooth multiplicative field (MR)
          'bias_probability': (1.0,),  # [1]
          'blur': 0.0,  # largest standard deviation of a Gaussian blur, in pixels; the smallest is 0.1
          'blur_probability': (0.5,),  # [1]
          'solarize': (0.0,),  # probability of inverting what is above the middle [1]
          # [1] one number, or three: for the first global view, the other global ones, the local ones
          'views': 1,  # global views of an image; methods that compare views set it
          'local_views': 0,  # small views that go with them
          'local_size': (),  # their grid; 3/7 of image_size by default
          'local_scale': (0.05, 0.4),
          'gram_size': (),  # grid of the views of a Gram teacher
          'sample_sizes': (),  # sides of global views, of which each view of a batch has its own
          'sizes': (),  # instead of image_size: sides of global views, of which each step sees one
          'local_sizes': (),  # sides of the local views that go with each of them
          'gram_sizes': (),  # and of those of a Gram teacher
          'size_shares': (),  # shares of the steps; () for equal ones
          'size_starts': (),  # or a curriculum: the fraction of the run where each size begins, (0, 0.5, 0.8)
          'channel_sampling': 'none',  # 'none' | 'hcs' | 'hcs_sample' (each sample its own) | 'diverse' (DiChaViT)
          'channel_temperature': 0.1,  # of 'diverse': the smaller, the more unlike are the channels drawn together
          'channel_views': 'each',  # which channels views show: 'each' its own, or 'shared'
          'teacher_channels': 'all',  # 'all' | 'same': what a teacher sees where a student sees a sample
      },
      'loader': {
          'split': 'train',
          'sources': '',  # train on the records of these alone, comma-separated (column `source` of the manifest)
          'held_out': '',  # train on all but 'site=A,B;subject=7'
          'missing': '',  # channels that a share of the records shall lack in training: 'GM,WM=0.5'
          'balance': '',  # mix values of a column of the manifest: modality, dataset (of data='A,B'), n_channels, ...
          'alpha': 1.0,  # shares in proportion to records^alpha: 1 as they are, 0 all alike
          'weights': '',  # shares instead: 'CT=2,MR=1,*=1'; by fractions of the run '0:CT=1,MR=1;0.5:CT=1,MR=3'
          'schedule': 'step',  # 'step' | 'linear': how weights get from one fraction to the next
          'subjects': '',  # 'balanced': subjects alike, not records
          'label': '',
          'vocabulary': '',  # JSON of other names for channels and what else is known of them, see data/vocabulary.py
          'unknown': 'warn',  # of channels that the vocabulary does not name: 'ignore' | 'warn' | 'error'
          'load_size': (),  # what a record is fitted to before the crop
          'fit': 'resize',  # 'resize' | 'crop'
          'normalize': 'corpus',  # 'corpus' | 'image' | 'none' | 'window:LOW:HIGH' | 'percentile[:LOW:HIGH]' | 'full'
          'threads': 2,
      },
      # 0: what is left of the devices; data=0 fsdp=0 together: the model decides
      'mesh': {'replica': 1, 'data': 0, 'fsdp': 1, 'sequence': 1, 'tensor': 1},
      'checkpoint': {
          'minutes': 0.0,  # save also when so many have passed since the last one, 0 for never
          'keep': 2,  # of the latest
          'keep_every': 0,  # those of multiples of so many steps stay for ever, 0 for none
          'best': 'loss',  # the metric whose best one stays too
          'best_mode': 'min',
      },
      'watchdog': {'minutes': 0.0},  # the longest that a step may take; 0: chosen from the steps; negative: unwatched
  })


def load_file(path: str) -> dict[str, Any]:
  """Runs a config file and returns what its `get_config()` sets, as a nested dict.

  'FILE.py:VARIANT' calls get_config('VARIANT'), as ml_collections' config flags do; the file lists its VARIANTS.
  """
  module, variant = _module(path)
  arguments = [variant] if variant else []
  try:
    config = module.get_config(*arguments)
  except Exception as e:
    raise UserError(f'config file {path}: {type(e).__name__}: {e}') from e
  if not isinstance(config, (ConfigDict, Mapping)):
    raise UserError(f'config file {path}: get_config() must return a ConfigDict, not {config!r}')
  return config.to_dict() if isinstance(config, ConfigDict) else dict(config)


def variants(path: str) -> tuple[str, ...]:
  """The variants that a config file offers, () for none."""
  return tuple(getattr(_module(path)[0], 'VARIANTS', ()))


def _module(path: str) -> tuple[Any, str]:
  """'FILE.py:VARIANT' -> the module that the file makes and the variant, which it must list ('' for none)."""
  name, colon, variant = (path, '', '') if pathlib.Path(path).is_file() else path.partition(':')
  file = pathlib.Path(name)
  if not file.is_file():
    raise UserError(f'config file {name} does not exist')
  spec = importlib.util.spec_from_file_location('jaxmed_experiment', file)
  if spec is None or spec.loader is None:
    raise UserError(f'config file {name} is not a Python file')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as e:
    raise UserError(f'config file {name}: {type(e).__name__}: {e}') from e
  if colon:
    offered = getattr(module, 'VARIANTS', ())
    if not offered:
      raise UserError(f'config file {name} has no variants: leave {colon + variant!r} out')
    choose(f'variant of {name}', variant, offered)
  return module, variant


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
  """'optimizer.clip=3.0' ... -> nested dict; values are Python literals, otherwise text."""
  nested: dict[str, Any] = {}
  for word in words:
    key, equals, text = word.partition('=')
    if not equals or not key:
      raise UserError(f'{word!r} is not an override: write key=value, for example batch_size=64')
    section = nested
    *parents, last = key.split('.')
    for parent in parents:
      section = section.setdefault(parent, {})
      if not isinstance(section, dict):
        raise UserError(f'{word!r}: {parent} was given a value before, so it cannot have the key {last!r} too')
    section[last] = _literal(text)
  return nested


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    pass
  if text.lower() in ('true', 'false'):
    return text.lower() == 'true'
  return text


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
  """Deep union of nested dicts; later ones win."""
  out: dict[str, Any] = {}
  for layer in layers:
    for key, value in layer.items():
      both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
      out[key] = merge(out[key], value) if both else value
  return out


def update(config: ConfigDict, values: Mapping[str, Any], prefix: str = '') -> None:
  """Sets nested values in place. An unknown key names the nearest one; a value must have its default's type."""
  for key, value in values.items():
    name = prefix + key
    if key not in config:
      choose('key', name, flat(config, prefix))
    default = config[key]
    if isinstance(default, ConfigDict):
      if not isinstance(value, Mapping):
        raise UserError(f'{name} is a section: set one of its keys, for example {name}.{next(iter(default), "key")}')
      update(default, value, name + '.')
    else:
      with config.ignore_type():
        config[key] = _typed(name, value, default)


def _typed(name: str, value: Any, default: Any) -> Any:
  """`value` as the type of `default`, or a UserError that names the key and what it takes."""
  kind = type(default)
  if kind is tuple:
    items = tuple(value) if isinstance(value, (tuple, list)) else () if value == '' else (value,)
    if not all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in items):
      raise UserError(f'{name} takes numbers, not {value!r}; the default is {default!r}')
    return items
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if kind is int and isinstance(value, float) and value == int(value):
    value = int(value)
  if kind is str and not isinstance(value, (str, bool)) and value is not None:
    value = str(value)
  if type(value) is not kind or (kind is float and not math.isfinite(value)):
    raise UserError(f'{name} takes a {_KINDS.get(kind, kind.__name__)}, not {value!r}; the default is {default!r}')
  return value


_KINDS = {int: 'whole number', float: 'number', bool: 'True or False', str: 'text'}


def flat(config: ConfigDict, prefix: str = '') -> dict[str, Any]:
  """{'optimizer.clip': 0.0, ...}: every value by its full key."""
  out: dict[str, Any] = {}
  for key, value in config.items():
    out |= flat(value, f'{prefix}{key}.') if isinstance(value, ConfigDict) else {prefix + key: value}
  return out


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flat`: {'optimizer.clip': 0.0} -> {'optimizer': {'clip': 0.0}}."""
  out: dict[str, Any] = {}
  for key, value in values.items():
    section = out
    *parents, last = key.split('.')
    for parent in parents:
      section = section.setdefault(parent, {})
    section[last] = value
  return out


def to_dict(config: ConfigDict) -> dict[str, Any]:
  """The config as plain data for JSON; tuples become lists."""
  return config.to_dict()


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
  """The config that `to_dict` gave; lists become tuples again."""
  def convert(value):
    if isinstance(value, Mapping):
      return {k: convert(v) for k, v in value.items()}
    return tuple(convert(v) for v in value) if isinstance(value, list) else value
  return ConfigDict(convert(values))
