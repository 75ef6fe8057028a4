"""The training loop that every method shares."""

import collections
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed import config as config_lib
from jaxmed.data.pipeline import train_batches
from jaxmed.data.sources import open_source
from jaxmed.errors import Stopped, UserError
from jaxmed.models.vit import at_size
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.parallel import process
from jaxmed.train import pictures, setup
from jaxmed.train.checkpoint import Checkpoints
from jaxmed.train.logs import Logs
from jaxmed.train.probe import Probe, fitted
from jaxmed.train.run import TRAINING_ONLY
from jaxmed.train.signals import StopFlag, interruptible, stop_on_signals
from jaxmed.train.step import TrainState
from jaxmed.train.watch import RollBack, Watch

MOST_SKIPPED = 10  # non-finite updates in a row after which a run stops

# What may change when a run goes on: nothing that alters the weights it ends with.
RESUMABLE = (
    'checkpoint_every', 'eval_every', 'log_every', 'data', 'mesh', 'checkpoint', 'loader.threads', 'on_collapse')


@dataclasses.dataclass
class Run:
  """One training run in progress, as its parts see it."""

  folder: pathlib.Path
  config: Any
  spec: setup.DataSpec
  source: Any  # the rows to train on
  corpus: Any  # all rows
  trainer: Any
  mesh: Any
  stop: StopFlag
  quiet: bool


def train(user: Mapping[str, Any], out: str | pathlib.Path, *, quiet: bool = False) -> dict[str, Any]:
  """Starts a run in the new directory `out`.

  Args:
    user: nested config values; `data` names the corpus.
  Returns:
    A summary: run, steps, loss, skipped, seconds, images_per_second.
  Raises:
    UserError: see `setup.resolve`. Stopped: a signal came; everything is saved.
  """
  out = pathlib.Path(out)
  check_new(out)
  process.start()
  corpus, source = _open(user)
  label = str(dict(user.get('loader', {})).get('label', ''))
  spec = setup.data_spec(source, label)
  config = setup.resolve(user, spec)
  # Every option is checked before anything is written.
  abstract = setup.build(config, spec).abstract(setup.batch_shapes(config, spec), mesh_lib.make_mesh(config.mesh))
  _given_weights(config, abstract)
  if process.is_main():
    try:
      out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise UserError(f'cannot write {out}: {e.strerror or e}') from e
    setup.save(out, config, spec)
  return _run(out, config, spec, corpus, source, quiet)


def check_new(out: str | pathlib.Path) -> None:
  """Raises a UserError when a run directory is there already (one that holds nothing but a corpus may be used)."""
  out = pathlib.Path(out)
  if out.exists() and (not out.is_dir() or any(f.name != 'corpus' for f in out.iterdir())):
    raise UserError(f'{out} exists and is not empty: choose another --out, or go on with --resume {out}')


def resume(out: str | pathlib.Path, changes: Mapping[str, Any] | None = None, *, quiet: bool = False) -> dict[str, Any]:
  """Goes on with a run from its latest checkpoint, or from the beginning where it has none.

  `changes` may set only what does not alter the result, see RESUMABLE.
  """
  process.start()
  config, spec = setup.load(out)
  before = config_lib.flat(config)
  config_lib.update(config, changes or {})
  for key, value in config_lib.flat(config).items():
    if value != before[key] and key not in RESUMABLE and key.partition('.')[0] not in RESUMABLE:
      raise UserError(f'{key} cannot change when a run goes on; these can: {", ".join(RESUMABLE)}')
  corpus, source = _open(config_lib.to_dict(config))
  setup.check_same(spec, source)
  return _run(pathlib.Path(out), config, spec, corpus, source, quiet)


def _open(user: Mapping[str, Any]) -> tuple[Any, Any]:
  """The corpus and its rows to train on."""
  if not user.get('data'):
    raise UserError('nothing to train on: give --data CORPUS or data=CORPUS')
  loader = dict(user.get('loader', {}))
  corpus = open_source(str(user['data']))
  label = loader.get('label') if user.get('method') == 'supervised' else None
  source = corpus.select(split=loader.get('split', 'train'), label=label or None)
  if not len(source):
    raise UserError(f'{user["data"]} has no records in split {loader.get("split", "train")!r}')
  return corpus, source


def _run(out: pathlib.Path, config: Any, spec: setup.DataSpec, corpus: Any, source: Any, quiet: bool) -> dict[str, Any]:
  with stop_on_signals() as stop:
    mesh = mesh_lib.make_mesh(config.mesh)
    run = Run(out, config, spec, source, corpus, setup.build(config, spec), mesh, stop, quiet)
    if not quiet:
      _announce(run)
    checkpoints = Checkpoints(out, config.checkpoint.keep, config.checkpoint.best, config.checkpoint.best_mode)
    try:
      watch = Watch(out, config.on_collapse, 0, 0).load()
      state, step = _start(run, checkpoints)
      while True:
        state = dataclasses.replace(state, rate=jnp.minimum(state.rate, watch.slowdown))
        try:
          return _loop(run, state, step, checkpoints, watch)
        except RollBack:
          checkpoints.forget_after(watch.healthy)
          shapes = setup.batch_shapes(run.config, run.spec, run.mesh)
          state = _state(run, checkpoints, run.trainer.abstract(shapes, run.mesh), shapes)
    except Stopped as e:
      raise Stopped(f'{e}; everything is saved, go on with --resume {out}') from e
    finally:
      checkpoints.close()


def _announce(run: Run) -> None:
  c, s = run.config, run.spec
  lines = [
      f'method {c.method}, model {c.model} at {"x".join(map(str, c.image_size))}, channels {", ".join(s.vocabulary)}',
      f'{s.rows} records, batch {c.batch_size}, {c.steps} steps ({c.epochs:.4g} epochs), '
      f'learning rate {c.learning_rate:.3g}, seed {c.seed}',
      f'{jax.device_count()} {jax.devices()[0].device_kind} device(s), mesh '
      + ' '.join(f'{k}={v}' for k, v in run.mesh.shape.items() if v > 1 or k == 'data'),
  ]
  print('\n'.join(lines), file=sys.stderr, flush=True)


def _start(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, Any]:
  """The state to begin with and the compiled step; a signal during compilation leaves a checkpoint behind."""
  shapes = setup.batch_shapes(run.config, run.spec, run.mesh)
  abstract = run.trainer.abstract(shapes, run.mesh)
  state = _state(run, checkpoints, abstract, shapes)
  try:
    return state, interruptible(lambda: run.trainer.compile(abstract, shapes, run.mesh), run.stop)
  except Stopped:
    checkpoints.save(int(state.step), state, {})
    checkpoints.wait()
    raise


def _state(run: Run, checkpoints: Checkpoints, abstract: TrainState, shapes: Any) -> TrainState:
  """The latest state, or a fresh one."""
  state = checkpoints.restore(abstract)
  return _initialize(run, abstract, shapes) if state is None else state


def _initialize(run: Run, abstract: TrainState, shapes: Any) -> TrainState:
  """Fresh weights, or those of another run or file in the encoder."""
  state = run.trainer.initialize(abstract, shapes)
  given = _given_weights(run.config, state)
  if given is None:
    return state
  put = lambda new, old: jax.device_put(new, old.sharding)
  params = state.params | {'encoder': jax.tree.map(put, given, state.params['encoder'])}
  average = jax.tree.map(jnp.copy, params) if run.trainer.ema else {}
  target = {name: jax.tree.map(jnp.copy, params[name]) for name in state.target}
  return dataclasses.replace(state, params=params, average=average, target=target)


def _given_weights(config: Any, state: TrainState) -> Any | None:
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


def _loop(run: Run, state: TrainState, step, checkpoints: Checkpoints, watch: Watch) -> dict[str, Any]:
  config, first = run.config, int(state.step)
  batches = _batches(run, first)
  probe = Probe(run.trainer, config, run.spec, run.corpus, run.mesh,
                run.stop.check if jax.process_count() == 1 else lambda: None)  # a probe is collective
  logs = Logs(run.folder, first, config.steps, config.batch_size, run.quiet or not process.is_main())
  latest = dict(logs.latest)
  watch.rows, watch.width = probe.shape
  pending: collections.deque = collections.deque()
  begun = time.monotonic()
  try:
    if first == 0:
      pictures.views(run, state)
      watch.begin(_probe(probe.health, state, logs, 0))
    logs.go()
    for n in range(first + 1, config.steps + 1):
      clock = time.monotonic()
      batch = mesh_lib.put_batch(fitted(next(batches), run.spec), run.mesh)
      logs.waited(time.monotonic() - clock)
      state, metrics = step(state, batch)
      last = n == config.steps
      if n % config.log_every == 0 or last:
        pending.append((n, metrics))
      stopping, due = _stopping(run, n), last or n % config.checkpoint_every == 0
      probing = last or n % config.eval_every == 0
      # One row behind, so that the device never waits for the host; but a checkpoint and a probe have all rows before.
      while len(pending) > (0 if due or stopping or probing else 1):
        row, values = pending.popleft()
        values = {k: float(v) for k, v in jax.device_get(values).items()} | logs.speed(row)
        latest |= values
        logs.scalars(row, values)
        _check_finite(latest, checkpoints)
      logs.pause()
      if probing and not stopping:
        latest |= _probe(probe, state, logs, n)
        stopping = _stopping(run, n)
        watch.look(n, latest)
      if due or stopping:
        checkpoints.save(n, state, _plain(latest))
      logs.go()
      if stopping and not last:
        checkpoints.wait()
        raise Stopped(run.stop.name or 'a signal to another process')
    checkpoints.wait()
  finally:
    logs.close()
  pictures.end(run, state)
  seconds = time.monotonic() - begun
  return {'run': str(run.folder), 'steps': config.steps, 'loss': latest.get('loss'), 'seconds': seconds,
          'skipped': int(state.skipped), 'images_per_second': (config.steps - first) * config.batch_size / seconds,
          'memory_bytes': _memory(step),
          **{k: latest[k] for k in ('val_loss', 'knn', 'ridge', 'rankme') if k in latest}}


def _memory(step: Any) -> int:
  """Bytes of a device that a compiled step takes: its arguments (state and batch), new results, and scratch."""
  m = step.memory_analysis()
  return int(m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes)


def _stopping(run: Run, n: int) -> bool:
  """Whether a signal came; several processes ask each other only where they write a row or a checkpoint."""
  if jax.process_count() == 1:
    return bool(run.stop)
  c = run.config
  return any(n % every == 0 for every in (c.log_every, c.checkpoint_every)) and process.any_process(bool(run.stop))


def _batches(run: Run, first: int):
  c = run.config
  return train_batches(run.source, batch_size=c.batch_size, seed=c.seed, start_step=first, threads=c.loader.threads,
                       **setup.reading(c, run.spec))


def _probe(probe: Callable[[TrainState], dict[str, float]], state: TrainState, logs: Logs, n: int) -> dict[str, float]:
  """Measures; a signal meanwhile leaves it unfinished, the loop saves and stops."""
  try:
    values = _plain(probe(state))
  except Stopped:
    return {}
  if values:
    logs.scalars(n, values)
  return values


def _plain(values: Mapping[str, float]) -> dict[str, float]:
  return {k: float(v) for k, v in values.items() if np.isfinite(v)}


def _check_finite(latest: Mapping[str, float], checkpoints: Checkpoints) -> None:
  """Ends a run whose updates are all left out; the weights are those before the first of them."""
  if latest.get('skipped_in_row', 0) >= MOST_SKIPPED:
    checkpoints.wait()
    steps = checkpoints.steps()
    kept = f'{checkpoints.folder / str(steps[-1])} is the last good checkpoint' if steps else 'no checkpoint was due'
    raise UserError(f'loss or gradient was not finite {int(latest["skipped_in_row"])} steps in a row (loss '
                    f'{latest["loss"]:.3g}); {kept}: lower learning_rate or set optimizer.clip=1')
