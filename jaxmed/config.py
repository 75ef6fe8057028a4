"""What a run is: typed defaults, overrides, and the resolved copy that is saved beside the run.

A config is an ml_collections.ConfigDict. Zero, the empty string or the empty tuple mean "chosen from the data, the
device and the method"; what was chosen is printed and saved. The sections `encoder` and `objective` take their keys
from the chosen model and method.
"""

import ast
import difflib
import importlib.util
import math
import pathlib
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxmed.errors import UserError, choose

RECIPES = 'experiments'  # a folder of the package in a wheel, and beside the package in a checkout
STUDIES = f'{RECIPES}/studies'  # grids of runs, which are no config files
TRANSFERS = f'{RECIPES}/transfer'  # transfer benchmarks, nor are these
SHIPPED = next((p for p in (pathlib.Path(__file__).parent / RECIPES, pathlib.Path(__file__).parents[1] / RECIPES)
                if p.is_dir()), pathlib.Path(__file__).parent / RECIPES)


class Key(NamedTuple):
  """One key of a config: its default, which is also its type; what it means; the words that it takes, () for any.

  With `auto` the default stands for a value that is chosen, which users write as AUTO; no number that they give does.
  """

  default: Any
  meaning: str
  choices: tuple[str, ...] = ()
  auto: bool = False


# Every key that each run has, by section; '' holds those of no section. `base`, the help of `jaxmed train` and the
# reference come from here.
SECTIONS: dict[str, dict[str, Key]] = {
    '': {
        'method': Key('simclr', 'method by name; jaxmed list methods shows them'),
        'model': Key('', 'encoder by family, size and patch: vit_small/16; empty: chosen from data and device'),
        'data': Key('', 'corpus to train on; --data sets it'),
        'seed': Key(0, 'seed of weights, order of records and augmentations'),
        'steps': Key(0, 'length of the run in steps; auto: from epochs', auto=True),
        'epochs': Key(0.0, 'length of the run in passes over the corpus; auto: from steps, or chosen', auto=True),
        'batch_size': Key(0, 'records a step, over all devices; auto: chosen', auto=True),
        'image_size': Key((), 'grid of the encoder, one number for a square; auto: from the records', auto=True),
        'learning_rate': Key(0.0, 'peak learning rate for the whole batch; auto: the rate of the method for that batch',
                             auto=True),
        'checkpoint_every': Key(0, 'steps between checkpoints; auto: a tenth of the run, at least 100', auto=True),
        'eval_every': Key(0, 'steps between evaluations; auto: a fifth of the run', auto=True),
        'evaluators': Key('', 'what looks at the run while it trains, comma-separated: health, loss, knn, ridge; '
                          'knn:500 looks every 500 steps instead of eval_every; empty: all that corpus and method '
                          'serve'),
        'log_every': Key(10, 'steps between rows of metrics'),
        'loggers': Key((), 'trackers beside metrics.jsonl and TensorBoard, comma-separated', ('wandb', 'mlflow')),
        'on_collapse': Key('warn', 'action when features collapse; rollback returns to the last healthy checkpoint at '
                           'half the rate', ('warn', 'stop', 'rollback')),
        'on_spike': Key('warn', 'action when the loss jumps; skip drops the update, rollback returns to the last '
                        'checkpoint at half the rate', ('ignore', 'warn', 'skip', 'rollback')),
        'evaluation': Key('', 'corpora to judge by, comma-separated; training records that they also hold are '
                          'reported'),
        'leak_encoder': Key('', 'run or file whose features find further leaks into the evaluation corpora'),
        'on_leak': Key('warn', 'action when an evaluation corpus shares records with the training data',
                       ('ignore', 'warn', 'stop')),
        'init': Key('', 'run or file with the initial weights'),
        'init_map': Key('', "parts of init and where they go, instead of init_parts: 'target/encoder->encoder,"
                        "head->none'; the rest begins fresh"),
        'freeze': Key('', "parameters that are never trained: 'encoder/patch_embed,encoder/blocks/0..8'"),
        'init_parts': Key('encoder', 'parts of init to load; all adds heads, teacher and state, target loads the '
                          'teacher into the student too', ('encoder', 'all', 'target')),
    },
    'optimizer': {
        'b1': Key(0.9, 'decay of the first moment; the momentum of lars and sgd'),
        'b2': Key(0.999, 'decay of the second moment'),
        'name': Key('adamw', 'update rule: adamw, lars, sgd or one of optax such as muon or lion; schedule_free_ may '
                    'stand before it'),
        'options': Key({}, 'options of a rule of optax, by its names: optimizer.options.ns_steps=5'),
        'groups': Key({}, 'parameters that are trained in their own way, by a name: optimizer.groups.head.paths=head, '
                      'with .name, .options, .rate (a factor) and .every (steps)'),
        'annealing': Key('cosine', 'course of the learning rate after warm-up; poly is (1 - t)^0.9', ('cosine', 'poly',
                         'none')),
        'weight_decay': Key(0.05, 'weight decay at the first step'),
        'final_weight_decay': Key(-1.0, 'weight decay at the last step, reached by a cosine; negative: constant'),
        'warmup_steps': Key(-1, 'steps of linear warm-up; auto: from warmup_epochs, or a tenth of the run', auto=True),
        'warmup_epochs': Key(-1.0, 'warm-up in epochs; warmup_steps wins', auto=True),
        'final_learning_rate': Key(0.0, 'learning rate at the last step, reached by a cosine'),
        'decay_lengths': Key(False, 'whether lengths of weight-normalised layers decay, too'),
        'frozen_moments': Key(False, 'whether moments of what a method freezes at first go on, as with a rate of 0'),
        'layer_decay': Key(1.0, 'factor on the learning rate a layer below the top of the encoder'),
        'patch_embed_scale': Key(1.0, 'factor on the learning rate of the patch embedding'),
        'scaling': Key('standard', 'law of first values and rates over the width; mup carries the best rates of a '
                       'narrow encoder over to a wide one, for adamw and sgd', ('standard', 'mup')),
        'base_width': Key(128, 'encoder.embed_dim at which mup is the standard'),
        'base_heads': Key(0, 'encoder.num_heads at base_width; auto: as wide as those of the encoder', auto=True),
        'bias_scale': Key(1.0, 'factor on the learning rate of biases and norms'),
        'clip': Key(0.0, 'largest gradient norm; 0: no limit'),
        'clip_scope': Key('global', 'arrays that share one norm: all, those of a module, or each alone',
                          ('global', 'module', 'tensor')),
        'moments': Key('float32', 'stored type of the moments; bfloat16 halves their memory',
                       ('float32', 'bfloat16')),
        'offload': Key(False, "keep the moments in the host's memory between steps"),
        'accumulate': Key(1, 'microbatches a step'),
        'ema': Key(0.0, 'decay of an average of the weights; 0: no average'),
    },
    'augment': {
        'scale': Key((0.2, 1.0), 'fraction of the area of a record that a crop covers, low and high'),
        'ratio': Key((3 / 4, 4 / 3), 'aspect of a crop, low and high'),
        'slice_scale': Key((), 'fraction of the first axis of a volume that a crop covers, low and high; scale is then '
                           'of the other two'),
        'tiles': Key((), 'parts of a record along each axis, or along the last two, that are the first views; other '
                     'views are windows as large'),
        'flip': Key((), 'probability of a flip along each axis, or one for all; empty: 0.5 along the last axis'),
        'rotate90': Key((0.0,), 'probability of quarter turns in the last two axes [1]'),
        'rotate': Key(0.0, 'greatest angle of a rotation in the last two axes, in degrees'),
        'brightness': Key(0.0, 'greatest shift of intensity, in standard deviations'),
        'contrast': Key(0.0, 'greatest relative change of contrast'),
        'jitter_probability': Key((1.0,), 'probability of brightness, contrast and color together [1]'),
        'noise': Key(0.0, 'standard deviation of Gaussian noise'),
        'color': Key((), 'greatest change of saturation, then of hue (half of it by default); RGB only'),
        'grayscale': Key((0.0,), 'probability of gray; RGB only [1]'),
        'stain': Key(0.0, 'greatest change of the stains of histology (HED-light: 0.05); RGB only'),
        'gamma': Key(0.0, 'range of the exponent: 1 / (1 + gamma) to 1 + gamma'),
        'gamma_probability': Key((1.0,), 'probability of gamma [1]'),
        'bias': Key(0.0, 'largest coefficient of a smooth multiplicative field, as in MR'),
        'bias_probability': Key((1.0,), 'probability of bias [1]'),
        'blur': Key(0.0, 'largest standard deviation of a Gaussian blur, in pixels; the smallest is 0.1'),
        'blur_probability': Key((0.5,), 'probability of blur [1]'),
        'solarize': Key((0.0,), 'probability of inverting the intensities above the middle [1]'),
        'rotation': Key((), 'greatest angle about each axis in degrees, in one resampling with the crop; one number: '
                        "about every axis; auto: nnU-Net's rule by the sides of the view", auto=True),
        'rotation_probability': Key((0.0,), 'probability of rotation [1]'),
        'zoom': Key((0.7, 1.4), 'factor on what a view covers, low and high, in the same resampling; above 1 things '
                    'get smaller'),
        'zoom_probability': Key((0.0,), 'probability of zoom [1]'),
        'elastic': Key((0.0, 4.0), 'greatest displacement of a smooth deformation in pixels, low and high, in the same '
                       'resampling'),
        'elastic_sigma': Key((0.05, 0.2), 'smoothness of elastic: deviation of its blur as a fraction of each side'),
        'elastic_probability': Key((0.0,), 'probability of elastic [1]'),
        'noise_range': Key((0.0, 0.1), 'deviation of noise that each image draws, low and high'),
        'noise_probability': Key((0.0,), 'probability of noise_range [1]'),
        'soften': Key((0.5, 1.0), 'deviation of a blur that each axis of a channel draws, in pixels, at most 1; half '
                      'of the channels have it'),
        'soften_probability': Key((0.0,), 'probability of soften [1]'),
        'multiply': Key((0.75, 1.25), 'factor on the intensities of a channel, below and above 1 equally often'),
        'multiply_probability': Key((0.0,), 'probability of multiply [1]'),
        'stretch': Key((0.75, 1.25), 'factor on the contrast of a channel, which is cut to its old range'),
        'stretch_probability': Key((0.0,), 'probability of stretch [1]'),
        'coarse': Key((0.5, 1.0), 'resolution that half of the channels are brought down to and back from'),
        'coarse_probability': Key((0.0,), 'probability of coarse [1]'),
        'power': Key((0.7, 1.5), 'exponent of a gamma that keeps mean and deviation, below and above 1 equally often'),
        'power_probability': Key((0.0,), 'probability of power [1]'),
        'inverted_power_probability': Key((0.0,), 'probability of power on the inverted image [1]'),
        'views': Key(1, 'global views of a record; methods that compare views set it'),
        'local_views': Key(0, 'local views of a record'),
        'local_size': Key((), 'grid of a local view; auto: 3/7 of image_size', auto=True),
        'local_scale': Key((0.05, 0.4), 'fraction of the area that a local view covers, low and high'),
        'local_slice_scale': Key((), 'slice_scale of local views'),
        'gram_size': Key((), 'grid of the views of a Gram teacher'),
        'sample_sizes': Key((), 'sides of global views; each view of a batch draws its own'),
        'sizes': Key((), 'sides of global views instead of image_size; each step draws one'),
        'local_sizes': Key((), 'sides of local views, one for each of sizes'),
        'gram_sizes': Key((), 'sides of the views of a Gram teacher, one for each of sizes'),
        'size_shares': Key((), 'fraction of the steps for each of sizes; empty: equal'),
        'size_starts': Key((), 'curriculum instead: fraction of the run where each of sizes begins, such as 0,0.5,0.8'),
        'channel_sampling': Key('none', 'rule that draws the channels of a view; hcs draws for the batch, hcs_sample '
                                'for each record, single draws one, diverse prefers unlike channels (DiChaViT)',
                                ('none', 'hcs', 'hcs_sample', 'single', 'diverse')),
        'channel_temperature': Key(0.1, 'temperature of diverse; a small one draws more unlike channels'),
        'channel_views': Key('each', 'channels of the views of a record: each view draws, or all are shared',
                             ('each', 'shared')),
        'teacher_channels': Key('all', 'channels of a teacher whose student sees a sample', ('all', 'same')),
    },
    'adapter': {
        'name': Key('', 'what is trained beside the frozen encoder of init; jaxmed list adapters shows the kinds; '
                    'empty: the encoder itself is trained',
                    ('', 'lora', 'houlsby', 'adaptformer', 'vpt', 'vpt_deep', 'dvpt', 'depthwise')),
        'rank': Key(0, 'inner width; auto: 8 for lora, 64 for houlsby and adaptformer, 20 for dvpt, half of the '
                    "encoder's for depthwise", auto=True),
        'alpha': Key(0.0, 'lora: alpha over rank is the factor on what it adds; auto: twice the rank', auto=True),
        'targets': Key(('q', 'v'), 'lora: projections that have it', ('q', 'k', 'v', 'proj', 'fc1', 'fc2')),
        'dropout': Key(0.0, 'rate of dropout in adapters'),
        'prompts': Key(0, 'tokens that vpt, vpt_deep and dvpt learn; auto: 5, and 50 for dvpt', auto=True),
        'gate': Key(True, 'whether attention to prompts begins at zero, so that a run begins at the features of init'),
        'share': Key(3, 'dvpt: blocks that share a bottleneck'),
        'also': Key('', 'names in the encoder that are trained beside adapters: norm1,norm2,pos_embed; empty: those of '
                    'the papers (norms for houlsby and depthwise); none: none'),
    },
    'loader': {
        'split': Key('train', 'split to train on'),
        'sources': Key('', 'sources to train on, comma-separated, from the column source; empty: all'),
        'held_out': Key('', "records to leave out by column and value: 'site=A,B;subject=7'"),
        'records': Key(0, 'records to train on: whole subjects in an order that records_seed draws, until there are so '
                       'many; those of a smaller number are among those of a larger one; 0: all'),
        'records_seed': Key(0, 'seed of that order'),
        'missing': Key('', "channels to remove from a fraction of the records: 'GM,WM=0.5'"),
        'balance': Key('', 'column whose values are mixed by alpha or weights, such as modality, dataset, n_channels, '
                       'has_mask'),
        'alpha': Key(1.0, 'share of a value is records^alpha; 1: as the records are, 0: equal'),
        'weights': Key('', "shares of the values: 'CT=2,MR=1,*=1'; by fractions of the run: "
                       "'0:CT=1,MR=1;0.5:CT=1,MR=3'"),
        'schedule': Key('step', 'change of the weights between two fractions', ('step', 'linear')),
        'subjects': Key('', 'balanced draws each subject equally often, not each record', ('', 'balanced')),
        'label': Key('', 'column of labels, for probes and supervised training'),
        'vocabulary': Key('', 'JSON file with aliases and features of channels'),
        'unknown': Key('warn', 'action when the vocabulary lacks a channel', ('ignore', 'warn', 'error')),
        'load_size': Key((), 'grid of a record before the crop; auto: up to 1.5 times image_size, more where '
                         'records are longer', auto=True),
        'fit': Key('auto', 'way to bring a record to load_size; aspect keeps its aspect, resize does not, crop reads a '
                   'part; auto: aspect where records differ in theirs', ('auto', 'aspect', 'resize', 'crop')),
        'pad': Key(True, 'zeros around a record that is smaller than a crop; false: such a record ends the run'),
        'crops': Key(1, 'crops of a record in a batch, with fit=crop: what is read for the first one holds the others'),
        'foreground': Key(0.0, 'fraction of crops that must show a class of the mask, with fit=crop; nnU-Net: 0.33'),
        'foreground_rule': Key('slots', 'crops that must: the last ones of each batch, rounded as nnU-Net does (half '
                               'of a batch of 2), or exactly that fraction of the stream', ('slots', 'exact')),
        'normalize': Key('corpus', 'intensities by corpus or image statistics, window:LOW:HIGH, '
                         'percentile[:LOW:HIGH], foreground:LOW:HIGH:MEAN:STD (jaxmed fingerprint), full range of the '
                         'type, or none'),
        'text': Key('text', 'column of texts, or several, whose texts are joined: impression,findings'),
        'text_length': Key(256, 'ids of a text; longer ones are cut'),
        'text_draw': Key('whole', 'what of a text a sample has: all, or a sentence that is drawn',
                         ('whole', 'sentence')),
        'text_clean': Key('', 'change of a text before it becomes ids: canonicalize (SigLIP), clip (mended, unescaped, '
                          'lower case); empty: that of the tokenizer', ('', 'canonicalize', 'clip')),
        'captions': Key('', 'JSON file of captions, or templates of captions, of a label; they are the texts'),
        'tokenizer': Key('', 'bytes (the default), clip, a tokenizer.json, vocab.txt or folder, or wordpiece:SIZE or '
                         'bpe:SIZE, made of the texts to train on'),
        'signal_length': Key(0, 'steps of a signal; longer ones are cut; auto: those of the first signal', auto=True),
        'window': Key(0, 'records of a sample, for methods of sequences; 0: each record is a sample'),
        'window_group': Key('', 'column whose values are sequences, such as case; empty: all records are one'),
        'window_order': Key('', 'column that orders a sequence, such as frame_seconds; empty: as in the manifest'),
        'window_stride': Key(0, 'records between the starts of two windows of a sequence; auto: window', auto=True),
        'threads': Key(2, 'threads that read records, in each process'),
    },
    # Number of devices along each axis. One axis may be 0 and takes the devices that are left; with data=0 and fsdp=0
    # the size of the model decides.
    'mesh': {
        'replica': Key(1, 'copies of the whole mesh, as over slices of TPUs'),
        'data': Key(0, 'devices that share the batch; 0: the devices that are left'),
        'fsdp': Key(1, 'devices that share batch and weights; 0 with data=0: chosen from the size of the model'),
        'sequence': Key(1, 'devices that share the tokens of an image'),
        'tensor': Key(1, 'devices that share heads and widths'),
    },
    'checkpoint': {
        'minutes': Key(0.0, 'longest time between checkpoints, in minutes; 0: no limit'),
        'keep': Key(2, 'number of latest checkpoints to keep'),
        'keep_every': Key(0, 'steps whose multiples are kept for ever; 0: none'),
        'best': Key('loss', 'metric whose best checkpoint is kept'),
        'best_mode': Key('min', 'direction of that metric', ('min', 'max')),
    },
    'watchdog': {
        'minutes': Key(0.0, 'longest time of a step, in minutes; auto: chosen from the steps, negative: no watchdog',
                       auto=True),
    },
}
# Sections whose keys come from the chosen model and method.
OPEN = {'encoder': 'options of the model: jaxmed list models NAME', 'objective': 'options of the method: '
        'jaxmed list methods NAME', 'towers': 'networks of the method beside its encoder: towers.NAME.model, .options, '
        '.init (a run or file) and .fixed (read, never trained)'}
# Sections that take any key; what reads them looks at what they hold.
FREE = ('towers', 'optimizer.options', 'optimizer.groups', 'objective.decoder_options')
NOTES = {'1': 'one number, or three: for the first global view, the other global views, the local views'}
AUTO = 'auto'
_FULL = {f'{section}.{name}' if section else name: key for section, keys in SECTIONS.items()
         for name, key in keys.items()}
CHOICES = {name: key.choices for name, key in _FULL.items() if key.choices}


def base() -> ConfigDict:
  """The keys that every run has, with their defaults."""
  values: dict[str, Any] = {name: key.default for name, key in SECTIONS[''].items()}
  values |= {name: {} for name in OPEN}
  return ConfigDict(values | {section: {name: key.default for name, key in keys.items()}
                              for section, keys in SECTIONS.items() if section})


def kind(key: Key) -> str:
  """The type of a key in words, from its default; a tuple with choices holds names."""
  if isinstance(key.default, tuple):
    return 'names' if key.choices else 'numbers'
  return _KINDS[type(key.default)]


def default_of(key: Key) -> str:
  """The default of a key as a user writes it."""
  return AUTO if key.auto else shown(key.default)


def shown(default: Any) -> str:
  """A value as a user writes it."""
  if isinstance(default, tuple):
    return ','.join(f'{n:.4g}' if isinstance(n, float) else str(n) for n in default) or '()'
  if isinstance(default, float):
    return f'{default:.6g}'
  return default or "''" if isinstance(default, str) else str(default)


def about(width: int = 100, column: int = 27) -> str:
  """Every key by section with default, type, meaning and choices, as `jaxmed train --help` prints it."""
  lines = ['keys and defaults:']
  for section, keys in SECTIONS.items():
    lines += ['', f'  {section}.*'] if section else []
    for name, key in keys.items():
      choices = f' ({" | ".join(c or repr(c) for c in key.choices)})' if key.choices else ''
      lines += entry(f'  {name}={default_of(key)}', f'{kind(key)}: {key.meaning}{choices}', width, column)
  lines.append('')
  for section, meaning in OPEN.items():
    lines += entry(f'  {section}.*', meaning, width, column)
  return '\n'.join([*lines, '', *(f'  [{mark}] {text}' for mark, text in NOTES.items())])


def entry(head: str, text: str, width: int, column: int) -> list[str]:
  """A name and a text in two columns; the text begins a line later where the name is too long."""
  wrapped = textwrap.wrap(text, width - column, break_on_hyphens=False) or ['']
  rest = [' ' * column + line for line in wrapped]
  return [head, *rest] if len(head) > column - 2 else [f'{head:{column}}{wrapped[0]}', *rest[1:]]


def load_file(path: str) -> dict[str, Any]:
  """Runs a config file and returns what its `get_config()` sets, as a nested dict.

  'FILE.py:VARIANT' calls get_config('VARIANT'), as ml_collections' config flags do; the file lists its VARIANTS. A file
  in the working directory wins over a recipe of that name which comes with jaxmed.
  """
  config = call(path, 'get_config')
  if not isinstance(config, (ConfigDict, Mapping)):
    raise UserError(f'config file {path}: get_config() must return a ConfigDict, not {config!r}')
  return config.to_dict() if isinstance(config, ConfigDict) else dict(config)


def recipes() -> dict[str, pathlib.Path]:
  """{name: file} of the shipped recipes and of recipes in the working directory, by the name that `load_file` takes."""
  return {name: path for name, path in _files(RECIPES).items() if not name.startswith((f'{STUDIES}/', f'{TRANSFERS}/'))}


def studies() -> dict[str, pathlib.Path]:
  """The same of study files, see jaxmed.study.grid."""
  return _files(STUDIES)


def transfers() -> dict[str, pathlib.Path]:
  """The same of files of transfer benchmarks, see jaxmed.study.transfer."""
  return _files(TRANSFERS)


def _files(folder: str) -> dict[str, pathlib.Path]:
  places = (SHIPPED.parent, pathlib.Path())
  return {p.relative_to(place).as_posix(): p for place in places for p in sorted((place / folder).rglob('*.py'))}


def find(name: str) -> pathlib.Path:
  """The file of a config by its path, or the recipe of that name.

  Raises:
    UserError: there is none; names the nearest recipe.
  """
  file = pathlib.Path(name)
  if file.is_file():
    return file
  known = _files(RECIPES)
  found = known.get(file.as_posix())
  if found is None:
    near = difflib.get_close_matches(file.as_posix(), known, n=3, cutoff=0.7)
    hint = f'; recipes near it: {", ".join(near)}' if near else '; jaxmed list recipes shows those that there are'
    raise UserError(f'config file {name} does not exist{hint}')
  return found


def variants(path: str) -> tuple[str, ...]:
  """The variants that a config file offers, () for none."""
  return tuple(getattr(_module(path)[0], 'VARIANTS', ()))


def call(path: str, name: str) -> Any:
  """What the function `name` of FILE.py returns, or of FILE.py:VARIANT for that variant.

  Raises:
    UserError: no such file or variant (the nearest is named), no such function, or what it raises.
  """
  module, variant = _module(path)
  if not hasattr(module, name):
    raise UserError(f'config file {path} has no {name}()')
  try:
    return getattr(module, name)(*([variant] if variant else []))
  except Exception as e:
    raise UserError(f'config file {path}: {type(e).__name__}: {e}') from e


def _module(path: str) -> tuple[Any, str]:
  """'FILE.py:VARIANT' -> the module that the file makes and the variant, which it must list ('' for none)."""
  name, colon, variant = (path, '', '') if pathlib.Path(path).is_file() else path.partition(':')
  file = find(name)
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


def given(user: Mapping[str, Any], key: str) -> Any:
  """What a user gave for a key without a section; None where it is to be chosen."""
  value = user.get(key, AUTO)
  return None if isinstance(value, str) and value == AUTO else value


def update(config: ConfigDict, values: Mapping[str, Any], prefix: str = '') -> None:
  """Sets nested values in place. An unknown key names the nearest one; a value must have its default's type."""
  for key, value in values.items():
    name = prefix + key
    if key not in config:
      choose('key', name, flat(config, prefix))
    default = config[key]
    if name in FREE:
      if not isinstance(value, Mapping):
        raise UserError(f'{name} is a section: set one of its keys, not {value!r}')
      config[key] = ConfigDict(merge(default.to_dict(), value))
    elif isinstance(default, ConfigDict):
      if not isinstance(value, Mapping):
        raise UserError(f'{name} is a section: set one of its keys, for example {name}.{next(iter(default), "key")}')
      update(default, value, name + '.')
    else:
      with config.ignore_type():
        config[key] = _typed(name, value, default)


def _typed(name: str, value: Any, default: Any) -> Any:
  """`value` as the type of `default`, or a UserError that names the key and what it takes."""
  kind, key = type(default), _FULL.get(name)
  if key is not None and key.auto:
    if value == AUTO:
      return key.default
    if value == 0 and key.default == 0:  # the mark of what is chosen; a number is taken, or refused
      raise UserError(f'{name}={value}: expected a number above 0, or {AUTO}')
    if key.default == -1 and isinstance(value, (int, float)) and value < 0:
      raise UserError(f'{name}={value}: expected a number of at least 0, or {AUTO}')
  if kind is tuple:
    items = tuple(value) if isinstance(value, (tuple, list)) else () if value == '' else (value,)
    if name in CHOICES:
      return tuple(choose(name, part.strip(), CHOICES[name]) for item in items for part in str(item).split(','))
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


_KINDS = {dict: 'section', int: 'whole number', float: 'number', bool: 'True or False', str: 'text'}


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
