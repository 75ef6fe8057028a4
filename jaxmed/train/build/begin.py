"""What a run does before its first step: its directory, its records, the state that it begins with."""

import contextlib
import dataclasses
import pathlib
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmed import files
from jaxmed.data.corpus import selection
from jaxmed.data.corpus.open import open_source
from jaxmed.data.curate import leakage
from jaxmed.data.curate.features import unit
from jaxmed.data.feed.sampling import parse_values
from jaxmed.errors import Stopped, UserError, choose
from jaxmed.interop.inflate import inflate
from jaxmed.models.encoders.bag import BagOfChannels
from jaxmed.models.encoders.vit import ViT, at_size
from jaxmed.parallel import process, sharding_table
from jaxmed.parallel.axes import filled, open_mesh
from jaxmed.parallel.mesh import make_mesh
from jaxmed.train.build import setup
from jaxmed.train.build.rundir import TRAINING_ONLY, load, load_state
from jaxmed.train.checkpoint import Checkpoints
from jaxmed.train.step import Trainer, TrainState

LAST_SECONDS = 10.0
_HASHING = 24 * 3600.0  # seconds that the others wait while one process hashes a corpus for the first time
_BEFORE = re.compile(r'corpus|data\.json|\.(data|config)\.json\..*\.part')  # in a run directory, before config.json


def check_new(out: str | pathlib.Path) -> None:
  """Raises a UserError when a run directory is there already.

  One may be used that holds a corpus alone, or what a start left that was killed before it wrote config.json, the last.
  """
  out = pathlib.Path(out)
  if out.exists() and (not out.is_dir() or any(not _BEFORE.fullmatch(f.name) for f in out.iterdir())):
    raise UserError(f'{out} exists and is not empty: choose another --out, or go on with --resume {out}')


def records(user: Mapping[str, Any]) -> tuple[Any, Any]:
  """The corpus that a config names, and its rows to train on."""
  if not user.get('data'):
    raise UserError('nothing to train on: give --data CORPUS or data=CORPUS')
  loader = dict(user.get('loader', {}))
  corpus = open_source(str(user['data']))
  label = loader.get('label') if user.get('method') == 'supervised' else None
  sources = [name for name in str(loader.get('sources', '')).split(',') if name]
  source = corpus.where(parse_values(str(loader.get('held_out', '')), 'loader.held_out'), but=True)
  source = source.select(split=loader.get('split', 'train'), label=label or None, sources=sources)
  if not len(source):
    of = f' of {", ".join(sources)}' if sources else ''
    raise UserError(f'{user["data"]} has no records{of} in split {loader.get("split", "train")!r}')
  tell_leaks(user, source)
  return corpus, source


def tell_leaks(user: Mapping[str, Any], source: Any) -> None:
  """Says which records to train on are in the corpora of `evaluation` too; with on_leak=stop raises a UserError."""
  action = choose('on_leak', str(user.get('on_leak', 'warn')), setup.ON_LEAK)
  against = [name.strip() for name in str(user.get('evaluation', '')).split(',') if name.strip()]
  if not against or action == 'ignore':
    return
  held = [leakage.held_out(name) for name in against]  # by all processes: what is wrong with one, all say
  judge, main = str(user.get('leak_encoder', '')), process.is_main()
  if judge and not pathlib.Path(judge).exists():
    raise UserError(f'leak_encoder={judge} does not exist: expected a run or an exported file')
  given = _embedded(judge, source, held) if judge and main else [None] * len(against)
  found = [leakage.between(source, name, rows, progress=sys.stderr.isatty(), given=pair)
           for name, rows, pair in zip(against, held, given, strict=True)] if main else []
  texts = process.gather('leaks', [leaks.text() for leaks in found if leaks.rows.any()], _HASHING)[0]
  if not texts:
    return
  parts = [part.strip() for part in str(user['data']).split(',')]
  clean = ','.join(f'{selection.split_uri(part)[0]}@clean' for part in parts)
  more = f' --encoder {judge}' if judge else ''
  text = (f'{"; ".join(texts)}: jaxmed curate {parts[0]} --against {",".join(against)}{more} --drop-leaks --out clean '
          f'leaves them out{"" if len(parts) == 1 else " (and so for each corpus)"}, train with data={clean}')
  if action == 'stop':
    raise UserError(text)
  if main:
    print(f'jaxmed: {text}', file=sys.stderr, flush=True)


def _embedded(encoder: str, source: Any, held: Sequence[Any]) -> list[tuple[Any, Any]]:
  """Features of length 1 of the rows to train on and of each evaluation set."""
  loaded = load(encoder)
  features = lambda rows: unit(loaded.embed_source(rows)[loaded.feature])
  mine = features(source)
  return [(mine, features(rows)) for rows in held]


def mesh_of(config: Any, spec: setup.DataSpec, trainer: Trainer) -> Mesh:
  """The mesh of a run. With mesh.data=0 and mesh.fsdp=0 the state decides how many devices share a copy of it."""
  sizes = dict(config.mesh)
  if open_mesh(sizes):
    memory = min(process.gather('device memory', sharding_table.device_memory() or 0))
    whole = filled(sizes, jax.device_count())
    if memory and whole:
      boxed = jax.eval_shape(trainer.create, setup.batch_shapes(config, spec))
      sizes = sharding_table.fitted(boxed, whole, memory)
  return make_mesh(sizes)


def announce(run: Any, abstract: TrainState) -> None:
  """Says what runs and how its state lies on the devices, in RUN/layout.txt array by array; all processes call it."""
  owners, memory = process.owners(), sharding_table.device_memory()
  if not process.is_main():
    return
  table = sharding_table.table(abstract, memory)
  files.write_text(run.folder / 'layout.txt', table + '\n')
  if run.times.quiet:
    return
  c, s = run.config, run.spec
  lines = [
      f'method {c.method}, model {c.model} at {"x".join(map(str, c.image_size))}, channels {", ".join(s.vocabulary)}',
      f'{s.rows} records, batch {c.batch_size}, {c.steps} steps ({c.epochs:.4g} epochs), '
      f'learning rate {c.learning_rate:.3g}, seed {c.seed}',
      f'{jax.device_count()} {jax.devices()[0].device_kind} device(s), mesh '
      + ' '.join(f'{k}={v}' for k, v in run.mesh.shape.items() if v > 1 or k == 'data'),
      *owners, table if jax.device_count() > 1 else sharding_table.total(abstract, memory),
  ]
  print('\n'.join(lines), file=sys.stderr, flush=True)


def _close_quietly(checkpoints: Checkpoints) -> None:
  with contextlib.suppress(Exception):  # there is an error to tell already
    checkpoints.close()


@contextlib.contextmanager
def closing(checkpoints: Checkpoints) -> Iterator[None]:
  """Closes them; after an error only for LAST_SECONDS: a save that goes on may wait for a process that is gone."""
  try:
    yield
  except Stopped as e:
    checkpoints.close()
    raise Stopped(f'{e}; everything is saved, go on with --resume {checkpoints.folder.parent}') from e
  except BaseException:
    thread = threading.Thread(target=_close_quietly, args=(checkpoints,), daemon=True)
    thread.start()
    thread.join(LAST_SECONDS if process.several() else None)
    raise
  checkpoints.close()


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
