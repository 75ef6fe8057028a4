"""Fine-tuning: from a trained encoder and a task to the config of a run, by the recipe of its family; its control.

The second half of a run is a run like any other: `recipe` gives what `jaxmed train` takes. A control from scratch has
the same model, data, batch, views and schedule, and the recipe's own rate for first weights.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxmed import config as config_lib
from jaxmed import files
from jaxmed.augment.nnunet import VIEWS
from jaxmed.data.corpus.open import open_source
from jaxmed.data.corpus.source import Source
from jaxmed.errors import UserError, choose
from jaxmed.evaluate import metrics, overlap, regression
from jaxmed.evaluate.protocols.segment import Segment
from jaxmed.evaluate.protocols.tasks import subjects_of
from jaxmed.models import registry
from jaxmed.models.encoders.vit import ViT
from jaxmed.parallel import compilation, process
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.train import loop
from jaxmed.train.build import records, rundir
from jaxmed.train.build.resolve import ACCELERATOR_IMAGES, CPU_IMAGES
from jaxmed.train.probe import Probe

TASKS = {'segment': 'segment', 'classify': 'supervised', 'regress': 'regress'}  # the method of each
BEST = {'segment': ('dice', 'max'), 'classify': ('val_balanced_accuracy', 'max'), 'regress': ('val_mae', 'min')}
EVALUATORS = {'segment': 'loss,dice', 'classify': 'loss,head', 'regress': 'loss,head'}
ARMS = ('pretrained', 'scratch')
CONTROL = 'control.json'
BATCH = {2: 32, 3: 2}  # records a step by the rank of an image; nnssl's trainers have 2 volumes
FOREGROUND = 0.33  # nnU-Net's oversample_foreground_percent
LOOKS = 10  # evaluations, and checkpoints, of a run

# Each recipe: `rate` of pretrained and of first weights, `reference` batch of these (0: the rate is for any batch),
# `warmup` as a fraction of the run, values of the section optimizer, `source`.
RECIPES: dict[tuple[str, str], dict[str, Any]] = {
    ('dense', 'transformer'): {
        'rate': (1e-4, 3e-4), 'reference': 0, 'warmup': 0.05,
        'optimizer': {'name': 'adamw', 'b1': 0.9, 'b2': 0.98, 'weight_decay': 0.05, 'clip': 1.0, 'annealing': 'poly'},
        'source': "nnssl's fine-tuning of Primus (nnUNet, pretrainedTrainer.py); layer decay and drop path: MAE"},
    ('dense', 'convolution'): {
        'rate': (1e-3, 1e-2), 'reference': 0, 'warmup': 0.05,
        'optimizer': {'name': 'sgd', 'b1': 0.99, 'weight_decay': 3e-5, 'clip': 12.0, 'annealing': 'poly'},
        'source': "nnssl's fine-tuning of ResEnc-L (nnUNet, pretrainedTrainer.py)"},
    ('vector', 'transformer'): {
        'rate': (5e-4, 5e-4), 'reference': 256, 'warmup': 0.05,
        'optimizer': {'name': 'adamw', 'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.05, 'annealing': 'cosine',
                      'final_learning_rate': 1e-6},
        'source': "MAE's fine-tuning of ViT-B (facebookresearch/mae, FINETUNE.md); scratch: ChannelViT's rate"},
    ('vector', 'convolution'): {
        'rate': (6.25e-4, 1e-3), 'reference': 256, 'warmup': 0.2,
        'optimizer': {'name': 'adamw', 'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.05, 'annealing': 'cosine',
                      'final_learning_rate': 1e-6},
        'source': "ConvNeXt V2's fine-tuning (facebookresearch/ConvNeXt-V2, TRAINING.md); scratch: ConvNeXt's 4e-3 "
                  'for a batch of 4096, by the root'},
}


@dataclasses.dataclass(frozen=True)
class Request:
  """What to fine-tune on what.

  Attributes:
    path: run or exported file. data: corpus. task: of TASKS. label: column, 'mask' for masks. user: config values that
      win over the recipe's. freeze: whether the encoder stays as it is. scratch: whether it begins
      anew. fraction: of the training records, by whole subjects.
  """

  path: str
  data: str
  task: str
  label: str
  user: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  freeze: bool = False
  scratch: bool = False
  fraction: float = 1.0

  def __post_init__(self):
    choose('--task', self.task, TASKS)
    if self.task == 'segment' and self.label != 'mask':
      raise UserError(f'--task segment learns the column mask: give --label mask, not --label {self.label}')
    if self.task != 'segment' and self.label == 'mask':
      of = 'numbers' if self.task == 'regress' else 'classes'
      raise UserError(f'--task {self.task} learns a column of {of}: masks are for --task segment')
    if not 0 < self.fraction <= 1:
      raise UserError(f'--fraction {self.fraction:g} must be above 0 and at most 1')
    if self.freeze and dict(self.user.get('adapter', {})).get('name'):
      raise UserError('--freeze keeps the whole encoder as it is, its adapters too: leave --freeze or adapter.name out')


def recipe(asked: Request, encoder: Any = None) -> dict[str, Any]:
  """The config of the run: the recipe of the encoder's family, then the user's values.

  Args:
    encoder: that of `asked.path`, where it is loaded already.
  Raises:
    UserError: no run or file, no record with a mask or label, or a wrong value.
  """
  process.start()
  compilation.keep()
  encoder = encoder or rundir.load(asked.path)
  corpus = open_source(asked.data)
  whole = {'data': asked.data, 'method': TASKS[asked.task],
           'loader': {} if asked.task == 'segment' else {'label': asked.label}}
  source = records.rows(corpus, config_lib.merge(whole, asked.user))
  rows = max(1, round(asked.fraction * len(source)))
  fixed = config_lib.merge(whole, family(encoder, asked), {'loader': {'normalize': encoder.normalize}})
  if rows < len(source):
    fixed['loader']['records'] = rows
  if asked.task == 'segment' and len(encoder.image_size) == 3:
    fixed['loader'] |= crops(config_lib.merge(fixed, asked.user)['image_size'], source)
  if not asked.scratch:
    fixed['init'] = asked.path
  user = config_lib.merge(fixed, watched(asked, corpus), asked.user)
  return _timed(user, asked, rows, len(encoder.image_size))


def family(encoder: Any, asked: Request) -> dict[str, Any]:
  """The model of an encoder, and what does not depend on the data: optimizer, drop path, views, freezing."""
  model = encoder.model
  transformer = isinstance(model, ViT)
  out = {'image_size': tuple(model.image_size), **registry.named(model)}
  decay = 1.0 if asked.scratch or asked.freeze or not transformer else layer_decay(model)
  out['optimizer'] = of_model(out['model'], asked.task)['optimizer'] | {'layer_decay': decay, 'ema': 0.0}
  if transformer and 'drop_path' not in out['encoder']:
    out['encoder']['drop_path'] = 0.0 if asked.freeze else drop_path(model)
  if asked.task == 'segment':
    out['augment'] = dict(VIEWS)
  out['objective'] = {'freeze_encoder': asked.freeze, 'head_first': 0.0}
  if asked.task != 'segment':
    out['objective']['feature'] = encoder.feature
  return out


def crops(size: Any, source: Source) -> dict[str, Any]:
  """Volumes are read in crops of the size of a view, every second of two around a class, as nnU-Net has it."""
  size = tuple(size) if isinstance(size, (tuple, list)) else (size,)
  return {'fit': 'crop', 'load_size': size} | ({'foreground': FOREGROUND} if source.places else {})


def of_model(name: str, task: str) -> dict[str, Any]:
  """The recipe of a model by its name; those of transformers have a patch."""
  return RECIPES['dense' if task == 'segment' else 'vector', 'transformer' if '/' in name else 'convolution']


def layer_decay(model: ViT) -> float:
  """MAE's and BEiT's 0.65 for the 12 blocks of a ViT-B, MAE's 0.75 for more (FINETUNE.md), and for fewer too."""
  return 0.65 if model.depth == 12 else 0.75


def drop_path(model: ViT) -> float:
  """MAE's for fine-tuning: 0.1 up to ViT-B, 0.2 for the 24 blocks of ViT-L, 0.3 for ViT-H (FINETUNE.md)."""
  return 0.1 if model.depth < 24 else 0.2 if model.depth < 32 else 0.3


def recipe_alone(asked: Request) -> dict[str, Any]:
  """The config of a run of the task whose model and optimizer are the user's, without any encoder or recipe."""
  corpus = open_source(asked.data)
  whole = {'data': asked.data, 'method': TASKS[asked.task],
           'loader': {} if asked.task == 'segment' else {'label': asked.label}}
  user = config_lib.merge(watched(asked, corpus), asked.user, whole)
  if asked.fraction < 1:
    count = max(1, round(asked.fraction * len(records.rows(corpus, user))))
    user = config_lib.merge(user, {'loader': {'records': count}})
  return user


def watched(asked: Request, corpus: Source) -> dict[str, Any]:
  """Evaluators, and the metric whose best checkpoint is kept; the training loss where nothing is held out."""
  column = asked.label
  held = column in corpus.table.column_names and len(corpus.select(split='val', label=column))
  if not held:
    return {'checkpoint': {'best': 'loss', 'best_mode': 'min'}}
  best, mode = BEST[asked.task]
  return {'evaluators': EVALUATORS[asked.task], 'checkpoint': {'best': best, 'best_mode': mode}}


def _timed(user: dict[str, Any], asked: Request, rows: int, rank: int) -> dict[str, Any]:
  """With batch, rate, length, warm-up and looks, where the user gives none."""
  chosen = of_model(str(user['model']), asked.task)
  devices = jax.device_count()
  batch = int(config_lib.given(user, 'batch_size') or max(min(BATCH[rank], rows) // devices, 1) * devices)
  epochs = config_lib.given(user, 'epochs') or float(np.clip(
      (CPU_IMAGES if jax.default_backend() == 'cpu' else ACCELERATOR_IMAGES) / rows, 1, 400))
  steps = int(config_lib.given(user, 'steps') or math.ceil(epochs * rows / batch))
  rate = chosen['rate'][int(asked.scratch)]
  if chosen['reference']:
    rate *= math.sqrt(batch / chosen['reference'])
  every = max(1, steps // LOOKS)
  fill = {'batch_size': batch, 'steps': steps, 'learning_rate': float(f'{rate:.4g}'), 'eval_every': every,
          'checkpoint_every': every, 'optimizer': {'warmup_steps': round(chosen['warmup'] * steps)}}
  if 'warmup_epochs' in user.get('optimizer', {}):
    del fill['optimizer']
  return config_lib.merge(fill, {k: v for k, v in user.items() if k != 'epochs' and v != config_lib.AUTO})


def told(user: Mapping[str, Any], asked: Request) -> str:
  """The recipe as text: what it sets, key by key, and where it is from."""
  values = config_lib.flat(config_lib.from_dict({k: v for k, v in user.items() if k not in ('data', 'method')}))
  own = config_lib.flat(config_lib.from_dict(dict(asked.user)))
  words = [f'{k}={config_lib.shown(v)}' for k, v in values.items() if k not in own]
  return f'recipe: {" ".join(words)}\nfrom: {of_model(str(user["model"]), asked.task)["source"]}'


def control(asked: Request, out: str | pathlib.Path, quiet: bool = False) -> dict[str, Any]:
  """Trains OUT/pretrained and OUT/scratch, or goes on with them, and compares them on the test split.

  OUT/control.json holds what was asked; OUT/comparison.json what `compared` says.
  """
  out = pathlib.Path(out)
  process.start()
  users = {arm: recipe(dataclasses.replace(asked, scratch=arm == 'scratch')) for arm in ARMS}
  if process.is_main():
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / CONTROL, dataclasses.asdict(asked))
  for arm, user in users.items():
    if (out / arm / 'config.json').is_file():
      loop.resume(out / arm, quiet=quiet)
    else:
      loop.train(user, out / arm, quiet=quiet)
  found = compared(out / ARMS[0], out / ARMS[1])
  if process.is_main():
    files.write_json(out / 'comparison.json', found)
  return found


def controlled(out: str | pathlib.Path) -> Request | None:
  """What `control` was asked in a folder; None where it holds none."""
  place = pathlib.Path(out) / CONTROL
  return Request(**files.read_json(place)) if place.is_file() else None


def compared(first: pathlib.Path, second: pathlib.Path, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
  """The best checkpoints of two runs of one task on the test records: each metric, and first minus second.

  Masks are those of whole images on their stored grid, by the metrics of `jaxmed evaluate --task segment`; several
  processes, whose devices no tiles of one image are spread over, take Dice at the size of a view. Intervals are 95 %
  bootstraps over subjects, the same ones for both.

  Returns:
    {'records', 'subjects', 'arms': {name: {metric: {'value', 'low', 'high'}}}, 'difference': the same}, and 'masks'
    (True) where these are of whole images.
  Raises:
    UserError: no test record with a mask or label.
  """
  config, _ = rundir.load_config(first)
  if config.method == 'segment' and jax.process_count() == 1:
    return _whole(config.data, first, second, draws, seed)
  scored = [_judged(run, draws, seed) for run in (first, second)]
  arms = {run.name: metrics.summarised(value, drawn) for run, (value, drawn, _) in zip((first, second), scored)}
  return _counted(scored[0][2]) | {'arms': arms, 'difference': metrics.difference(*scored[0][:2], *scored[1][:2])}


def _whole(data: str, first: pathlib.Path, second: pathlib.Path, draws: int, seed: int) -> dict[str, Any]:
  """`compared` of two runs on masks."""
  one, other = (rundir.load_segmenter(run, 'best') for run in (first, second))
  result = Segment().run(one, open_source(data), beside={second.name: other}, draws=draws, seed=seed)
  arms = {run.name: row['metrics'] for run, row in zip((first, second), result['rows'], strict=True)}
  return {'records': result['splits']['test'], 'subjects': result['subjects']['test'], 'masks': True, 'arms': arms,
          'difference': result['differences'][0]['metrics']}


def scores(run: pathlib.Path, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
  """The best checkpoint of one run: {'records', 'subjects', 'metrics': {metric: {'value', ...}}}.

  Of masks Dice at the size of a view, mean over cases, then over foreground classes.
  """
  value, drawn, subjects = _judged(run, draws, seed)
  return _counted(subjects) | {'metrics': metrics.summarised(value, drawn)}


def _counted(subjects: np.ndarray) -> dict[str, int]:
  return {'records': len(subjects), 'subjects': len(np.unique(subjects))}


def _judged(run: pathlib.Path, draws: int, seed: int) -> tuple[dict[str, float], dict[str, np.ndarray], np.ndarray]:
  """(values, values on resampled subjects, subjects [N]) of the best checkpoint of a run on its test records."""
  predicts, answers, truth, rows = answered(run)
  subjects = subjects_of(rows)
  return (*scored(predicts, answers, truth, subjects, draws, seed), subjects)


def answered(run: pathlib.Path) -> tuple[str, np.ndarray, np.ndarray, Source]:
  """What the best checkpoint of a run says of its test records: what it predicts, then as of `Probe.answers`, and the
  records."""
  trainer, config, spec, state = rundir.load_state(run, 'best')
  corpus = open_source(config.data)
  probe = Probe(trainer, config, spec, corpus, mesh_lib.make_mesh(config.mesh), lambda: None)
  column = 'mask' if probe.predicts == 'mask' else config.loader.label
  rows = corpus.select(split='test', label=column)
  if not len(rows):
    raise UserError(f'{config.data} has no record of split test with {column!r}: nothing to judge {run} on')
  return (probe.predicts, *probe.answers(state, rows), rows)


def scored(predicts: str, answers: np.ndarray, truth: np.ndarray, subjects: np.ndarray, draws: int,
            seed: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """({metric: value}, {metric: values on resampled subjects}) of what `Probe.answers` gave."""
  ask: dict[str, Any] = dict(draws=draws, seed=seed)
  if predicts == 'mask':
    return dice_of(overlap.dice_of_cases(answers, truth), subjects, draws, seed)
  if predicts == 'number':
    return regression.score(truth, answers), regression.resampled(truth, answers, subjects, **ask)
  known = truth >= 0
  y, scores = truth[known], answers[known]
  return metrics.score(y, scores), metrics.resampled(y, scores, subjects[known], **ask)


def dice_of(cases: np.ndarray, subjects: np.ndarray, draws: int,
            seed: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """The same of Dice of cases and classes [N, K]: the mean over cases, then over classes."""
  drawn = metrics.resampled_means(cases, subjects, draws=draws, seed=seed)
  return {'dice': float(overlap.mean(overlap.mean(cases, 0)[None], 1)[0])}, {'dice': overlap.mean(drawn, 1)}


def table(found: Mapping[str, Any]) -> str:
  """What `compared` found as text."""
  text = lambda x, sign: 'n/a' if x is None else f'{x:{sign}.3f}'
  cell = lambda v, sign='': text(v['value'], sign) + (
      f' [{text(v["low"], sign)}, {text(v["high"], sign)}]' if v['low'] is not None and np.isfinite(v['low']) else '')
  heads = ('metric', *found['arms'], ' - '.join(found['arms']))
  lines = [heads, *((m, *(cell(arm[m]) for arm in found['arms'].values()), cell(d, '+'))
                    for m, d in found['difference'].items())]
  wide = [max(len(line[i]) for line in lines) for i in range(len(heads))]
  body = '\n'.join('  '.join(f'{c:{w}}' for c, w in zip(line, wide)).rstrip() for line in lines)
  whole = 'masks of whole images, ' if found.get('masks') else ''
  return f'{body}\n{whole}{found["records"]} test records of {found["subjects"]} subjects, 95 % intervals over subjects'
