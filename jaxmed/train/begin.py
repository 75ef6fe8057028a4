"""What a run does before its first step: its directory, its records, the state that it begins with."""

import contextlib
import dataclasses
import pathlib
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmed import files
from jaxmed.data.sources import open_source
from jaxmed.errors import Stopped, UserError
from jaxmed.models.vit import at_size
from jaxmed.parallel import layout, process
from jaxmed.train.checkpoint import Checkpoints
from jaxmed.train.run import TRAINING_ONLY
from jaxmed.train.step import TrainState

LAST_SECONDS = 10.0


def check_new(out: str | pathlib.Path) -> None:
  """Raises a UserError when a run directory is there already (one that holds nothing but a corpus may be used)."""
  out = pathlib.Path(out)
  if out.exists() and (not out.is_dir() or any(f.name != 'corpus' for f in out.iterdir())):
    raise UserError(f'{out} exists and is not empty: choose another --out, or go on with --resume {out}')


def records(user: Mapping[str, Any]) -> tuple[Any, Any]:
  """The corpus that a config names, and its rows to train on."""
  if not user.get('data'):
    raise UserError('nothing to train on: give --data CORPUS or data=CORPUS')
  loader = dict(user.get('loader', {}))
  corpus = open_source(str(user['data']))
  label = loader.get('label') if user.get('method') == 'supervised' else None
  sources = [name for name in str(loader.get('sources', '')).split(',') if name]
  source = corpus.select(split=loader.get('split', 'train'), label=label or None, sources=sources)
  if not len(source):
    of = f' of {", ".join(sources)}' if sources else ''
    raise UserError(f'{user["data"]} has no records{of} in split {loader.get("split", "train")!r}')
  return corpus, source


def announce(run: Any, abstract: TrainState) -> None:
  """Says what runs and how its state lies on the devices, in RUN/layout.txt array by array; all processes call it."""
  owners, memory = process.owners(), layout.device_memory()
  if not process.is_main():
    return
  table = layout.table(abstract, memory)
  files.write_text(run.folder / 'layout.txt', table + '\n')
  if run.quiet:
    return
  c, s = run.config, run.spec
  lines = [
      f'method {c.method}, model {c.model} at {"x".join(map(str, c.image_size))}, channels {", ".join(s.vocabulary)}',
      f'{s.rows} records, batch {c.batch_size}, {c.steps} steps ({c.epochs:.4g} epochs), '
      f'learning rate {c.learning_rate:.3g}, seed {c.seed}',
      f'{jax.device_count()} {jax.devices()[0].device_kind} device(s), mesh '
      + ' '.join(f'{k}={v}' for k, v in run.mesh.shape.items() if v > 1 or k == 'data'),
      *owners, table if jax.device_count() > 1 else layout.total(abstract, memory),
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
  """Fresh weights, or those of another run or file in the encoder."""
  state = run.trainer.initialize(abstract, shapes)
  given = given_weights(run.config, state)
  if given is None:
    return state
  put = lambda new, old: jax.device_put(new, old.sharding)
  params = state.params | {'encoder': jax.tree.map(put, given, state.params['encoder'])}
  average = jax.tree.map(jnp.copy, params) if run.trainer.ema else {}
  target = {name: jax.tree.map(jnp.copy, params[name]) for name in state.target}
  return dataclasses.replace(state, params=params, average=average, target=target)


def given_weights(config: Any, state: TrainState) -> Any | None:
  """The encoder's weights that `init` names, or None. A UserError tells of another model's."""
  if not config.init:
    return None
  from jaxmed.loading import load
  own = state.params['encoder']
  given = load(config.init)
  other = at_size(given.model, given.params, tuple(config.image_size))
  other = other | {k: own[k] for k in TRAINING_ONLY if k in own and k not in other}
  shape = lambda tree: {jax.tree_util.keystr(k): v.shape for k, v in jax.tree_util.tree_leaves_with_path(tree)}
  wrong = sorted(set(shape(own).items()) ^ set(shape(other).items()))
  if wrong:
    raise UserError(f'init={config.init} is another model than {config.model}: {wrong[0][0]} differs')
  return other
