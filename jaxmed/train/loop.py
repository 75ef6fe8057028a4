"""The training loop that every method shares."""

import collections
import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmed import config as config_lib
from jaxmed import objectives
from jaxmed import owner as owner_lib
from jaxmed.data.feed import lacking
from jaxmed.data.feed.pipeline import train_batches
from jaxmed.errors import Stopped, UserError
from jaxmed.parallel import compilation, process
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.train import evaluators, pictures, verdict
from jaxmed.train.build import (
  adapting,
  assemble,
  begin,
  data_spec,
  records,
  resolve,
  rundir,
  towers,
  weights,
  wording,
)
from jaxmed.train.build.resolve import RESUMABLE
from jaxmed.train.build.rundir import check_new
from jaxmed.train.checkpoint import Checkpoints
from jaxmed.train.evaluators import Evaluation
from jaxmed.train.logs import Logs, read_rows
from jaxmed.train.monitor.agree import Agreement, agreement
from jaxmed.train.monitor.pace import Pace
from jaxmed.train.monitor.signals import interruptible
from jaxmed.train.monitor.times import Times
from jaxmed.train.monitor.watch import RollBack, Watch
from jaxmed.train.monitor.watchdog import Watchdog
from jaxmed.train.probe import Probe
from jaxmed.train.rows import Rows
from jaxmed.train.step import TrainState

AHEAD = 2  # steps that the host may be ahead of the device: neither waits, and all hosts are at about one step


@dataclasses.dataclass
class Run:
  """One training run in progress, as its parts see it."""

  folder: pathlib.Path
  config: Any
  spec: data_spec.DataSpec
  source: Any  # the rows to train on
  corpus: Any  # all rows
  stream: Mapping[str, Any]  # see `assemble.stream`
  trainer: Any
  mesh: Any
  agreement: Agreement
  watchdog: Watchdog
  times: Times
  evaluation: Evaluation
  fixed: Mapping[str, Any]  # {tower: weights} that are only read
  owner: owner_lib.Owner | None  # of the folder, in the main process


def train(user: Mapping[str, Any], out: str | pathlib.Path, *, quiet: bool = False) -> dict[str, Any]:
  """Starts a run in the new directory `out`: checks the config alone, opens the data, builds, writes, runs.

  Args:
    user: nested config values; `data` names the corpus.
  Returns:
    A summary: run, steps, loss, skipped, seconds, images_per_second, verdict (lines that say what the features are
    worth, see `verdict.lines`).
  Raises:
    UserError: see `resolve.check` and `resolve.resolve`. Stopped: a signal came; everything is saved.
  """
  out = pathlib.Path(out)
  check_new(out)
  resolve.check(user)
  process.start()
  compilation.keep()
  times = Times(quiet)
  with agreement() as agreed, _owned(out) as owner:
    check_new(out)  # again: another process may have written it while this one began
    corpus, source = _opened(user, times)
    config, spec, stream = _built(user, corpus, source, agreed, times)
    _write(out, config, spec)
    return _run(out, config, spec, corpus, source, stream, agreed, times, owner)


def resume(out: str | pathlib.Path, changes: Mapping[str, Any] | None = None, *, quiet: bool = False) -> dict[str, Any]:
  """Goes on with a run from its latest checkpoint, or from the beginning where it has none.

  `changes` may set only what does not alter the result, see RESUMABLE.
  """
  process.start()
  compilation.keep()
  times = Times(quiet)
  rundir.check_run(out)
  with agreement() as agreed, _owned(out) as owner:
    process.check_shared(out)
    config, spec = rundir.load_config(out)
    before = config_lib.flat(config)
    config_lib.update(config, changes or {})
    for key, value in config_lib.flat(config).items():
      if value != before.get(key) and key not in RESUMABLE and key.partition('.')[0] not in RESUMABLE:
        raise UserError(f'{key} cannot change when a run goes on; these can: {", ".join(RESUMABLE)}')
    if (config.on_spike == 'skip') != (before['on_spike'] == 'skip'):
      raise UserError(f"on_spike={before['on_spike']} cannot change to {config.on_spike} when a run goes on: with skip "
                      'a run keeps its last losses')
    resolve.check_values(config)
    towers.opened(config, rundir.load_tower)
    corpus, source = _opened(config_lib.to_dict(config), times)
    data_spec.check_same(spec, source)
    resolve.check_shares(config, mesh_lib.make_mesh(config.mesh))
    lack = lacking.parse(config.loader.missing, source.channels)
    stream = assemble.stream(config, source, lack)
    return _run(pathlib.Path(out), config, spec, corpus, source, stream, agreed, times, owner)


def _opened(user: Mapping[str, Any], times: Times) -> tuple[Any, Any]:
  """The corpus and its rows to train on, which are searched for leaks."""
  with times.stage('opening the corpus'):
    corpus, source = records.open_records(user)
  with times.stage('looking for records that evaluation sets hold too'):
    records.tell_leaks(user, source)
  return corpus, source


def _built(user: Mapping[str, Any], corpus: Any, source: Any, agreed: Agreement,
           times: Times) -> tuple[Any, data_spec.DataSpec, Mapping[str, Any]]:
  """The full config, what the run knows of its data, and its stream; every option is checked, nothing is written."""
  label = str(dict(user.get('loader', {})).get('label', ''))
  lack = lacking.parse(str(dict(user.get('loader', {})).get('missing', '')), source.channels)
  spec = data_spec.describe(source, label, data_spec.vocabulary_of(user, source), lack,
                            data_spec.labels_of(user, corpus), data_spec.numeric(user), data_spec.columns_of(user))
  spec = wording.added(spec, user, source)
  records.tell_classes(source, spec.labels)
  config = resolve.resolve(rundir.like_init(user), spec)
  towers.opened(config, rundir.load_tower)
  mesh = mesh_lib.make_mesh(config.mesh)
  resolve.check_shares(config, mesh)
  stream = assemble.stream(config, source, lack)
  if config.loader.fit == 'crop':
    records.tell_crops(source, config.loader.load_size, config.loader.pad)
  if 'text' in towers.fields_of(objectives.get(config.method), config.towers):
    wording.tell(spec.texts, source, config.loader.text_length)
  with times.stage('building the model'):
    trainer = assemble.build(config, spec)
    state = trainer.abstract(assemble.batch_shapes(config, spec), mesh)
    trainer.optimizer.check_paths(state.params)
    adapting.check_names(config, state.params['encoder'])
    _evaluation(trainer, config, spec, corpus, mesh, agreed)
    weights.given_weights(config, state, spec.vocabulary, quiet=False)
  return config, spec, stream


@contextlib.contextmanager
def _owned(out: str | pathlib.Path) -> Iterator[owner_lib.Owner | None]:
  """The run's folder for the processes of this run alone; the main one holds it for all.

  Raises:
    UserError: on all of them where another run writes it.
  """
  with contextlib.ExitStack() as stack:
    owner, trouble = None, ''
    if process.is_main():
      try:
        owner = stack.enter_context(owner_lib.of_folder(out))
      except UserError as e:
        trouble = str(e)
    trouble = process.gather('owner of the run', trouble)[0]
    if trouble:
      raise UserError(trouble)
    yield owner


def _write(out: pathlib.Path, config: Any, spec: data_spec.DataSpec) -> None:
  """Makes the run directory, which all processes must see."""
  if process.is_main():
    try:
      out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise UserError(f'cannot write {out}: {e.strerror or e}') from e
    rundir.save(out, config, spec)
  process.check_shared(out)


def _run(out: pathlib.Path, config: Any, spec: data_spec.DataSpec, corpus: Any, source: Any, stream: Mapping[str, Any],
         agreement: Agreement, times: Times, owner: owner_lib.Owner | None) -> dict[str, Any]:
  agreement.folder, agreement.minutes = out, config.checkpoint.minutes
  with Watchdog(out, config.watchdog.minutes, agreement) as watchdog:
    trainer = assemble.build(config, spec)
    mesh = assemble.mesh_of(config, spec, trainer)
    fixed = towers.fixed(config, towers.fixed_shapes(config, trainer.objective, mesh), rundir.load_tower)
    evaluation = _evaluation(trainer, config, spec, corpus, mesh, agreement, fixed)
    run = Run(out, config, spec, source, corpus, stream, trainer, mesh, agreement, watchdog, times, evaluation, fixed,
              owner)
    c = config.checkpoint
    checkpoints = Checkpoints(out, c.keep, c.best, c.best_mode, keep_every=c.keep_every)
    agreement.stop.doing, agreement.stop.lost = 'saving', checkpoints.told
    with begin.closing(checkpoints):
      watch = Watch(out, config.on_collapse, 0, 0).load()
      state, step = _start(run, checkpoints)
      while True:
        state = dataclasses.replace(state, rate=jnp.minimum(state.rate, watch.slowdown))
        try:
          return _loop(run, state, step, checkpoints, watch)
        except RollBack as back:
          checkpoints.forget_after(back.step)
          shapes = assemble.batch_shapes(run.config, run.spec, run.mesh)
          state = weights.state_of(run, checkpoints, run.trainer.abstract(shapes, run.mesh), shapes)


def _evaluation(trainer: Any, config: Any, spec: data_spec.DataSpec, corpus: Any, mesh: Any,
                agreement: Agreement, fixed: Any = None) -> Evaluation:
  """What looks at the run while it trains; a UserError where it cannot look at what the config names."""
  probe = Probe(trainer, config, spec, corpus, mesh, agreement.check, fixed)
  return evaluators.evaluation(config.evaluators, config.eval_every, config.steps, probe)


def _start(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, Any]:
  """The state to begin with and the compiled step; a signal during compilation leaves a checkpoint behind."""
  shapes = assemble.batch_shapes(run.config, run.spec, run.mesh)
  with run.times.stage('building the model'):
    abstract = run.trainer.abstract(shapes, run.mesh)
  begin.announce(run, abstract)
  with run.times.stage('the first state'):
    state = weights.state_of(run, checkpoints, abstract, shapes)
  run.watchdog.beat('compilation', step=False)
  try:
    with run.times.compilation('the step'):
      step = interruptible(lambda: _compiled(run, abstract, shapes), run.agreement.peek)
    run.agreement.check()
    return state, step
  except Stopped:
    checkpoints.save(int(state.step), state, {})
    checkpoints.wait()
    raise


def _compiled(run: Run, abstract: TrainState, shapes: Any) -> Callable:
  """The step, once all processes have it: a first collective of gloo's waits for half a minute only."""
  step = run.trainer.compile(abstract, shapes, run.mesh, run.fixed)
  process.gather('compilation', True, max(run.watchdog.limit, 3600.0))
  return step


def _loop(run: Run, state: TrainState, step, checkpoints: Checkpoints, watch: Watch) -> dict[str, Any]:
  config, first, agreement, watchdog = run.config, int(state.step), run.agreement, run.watchdog
  times, evaluation = run.times, run.evaluation
  read = (run.fixed,) if run.fixed else ()
  batches = _batches(run, first)
  logs = Logs(run.folder, first, config.steps, config.batch_size, run.times.quiet, process.is_main(),
              config.loggers, config_lib.flat(config))
  pace = Pace(first, config.batch_size)
  rows = Rows(config, run.spec, logs, watch, checkpoints, pace)
  watch.rows, watch.width = evaluation.probe.shape
  watch.skipped = int(state.skipped)
  running: collections.deque = collections.deque()
  begun = time.monotonic()
  try:
    if first == 0:
      watchdog.beat('the first evaluation', step=False)
      with times.stage('a figure of views'):
        pictures.views(run, state)
      with times.stage('the first evaluation'):
        watch.begin(_probe(evaluation.first, state, logs, 0))
    elif names := _left_out(run, evaluation, first):
      watchdog.beat(f'the evaluation at step {first}', step=False)
      with times.stage('evaluations'):
        rows.latest |= _probe(functools.partial(evaluation, names=names), state, logs, first)
      agreement.check()
    times.write(run.folder)
    pace.go()
    agreement.saved()
    for n in range(first + 1, config.steps + 1):
      watchdog.beat(f'step {n}', step=n > first + 2 * config.log_every)
      clock = time.monotonic()
      with times.stage('the first batch') if n == first + 1 else contextlib.nullcontext():
        batch = mesh_lib.put_batch(next(batches), run.mesh)
      waited = time.monotonic() - clock
      state, metrics = step(state, batch, *read)
      pace.step(n, metrics['loss'], waited)
      running.append(metrics['loss'])
      if len(running) > AHEAD:
        rows.hosts.wait(running.popleft())
      last = n == config.steps
      if n % config.log_every == 0 or last:
        rows.add(n, metrics)
      stopping = agreement.point()
      due = last or agreement.due or n % config.checkpoint_every == 0
      probing = evaluation.due(n)
      # One row behind, so that the device never waits for the host; but a checkpoint and a probe have all rows before.
      rows.tell(0 if due or stopping or probing else 1)
      if due or stopping or probing:
        pace.pause()
      found: dict[str, float] = {}
      if probing and not stopping:
        watchdog.beat(f'the evaluation at step {n}', step=False)
        with times.stage('evaluations'):
          found = _probe(functools.partial(evaluation, names=probing), state, logs, n)
        rows.latest |= found
        stopping = agreement.point()
        if evaluation.tells_collapse(probing):
          watch.look(n, rows.latest)
      if due or stopping:
        watchdog.beat(f'the checkpoint of step {n}', step=False)
        if run.owner is not None:
          run.owner.check()
        with times.stage('checkpoints'):
          # Without evaluations of an earlier state: the best checkpoint is one that was looked at.
          checkpoints.save(n, state, _plain(rows.trained | found))
        agreement.saved()
      pace.go()
      if stopping and (not last or (probing and not found)):  # a run that goes on evaluates what was left out
        checkpoints.wait()
        raise Stopped(agreement.reason)
    watchdog.beat('the last checkpoint and the report', step=False)
    with times.stage('the last checkpoint'):
      checkpoints.wait()
    times.write(run.folder)  # the report shows it
    with times.stage('figures and report'):
      pictures.end(run, state)
    logs.figures(config.steps, sorted((run.folder / 'figures').glob('*.png')))
  finally:
    pace.close()
    logs.close()
  times.write(run.folder)
  times.tell()
  seconds = time.monotonic() - begun
  return {'run': str(run.folder), 'steps': config.steps, 'loss': rows.latest.get('loss'), 'seconds': seconds,
          'skipped': int(state.skipped), 'images_per_second': (config.steps - first) * config.batch_size / seconds,
          'memory_bytes': _memory(step), 'verdict': verdict.lines(rows.latest, watch.start, _length(config)),
          **{k: rows.latest[k] for k in ('val_loss', 'knn', 'ridge', 'rankme') if k in rows.latest}}


def _length(config: Any) -> verdict.Length:
  return verdict.Length(config.method, config.model, config.epochs)


def _memory(step: Any) -> int:
  """Bytes of a device that a compiled step takes: its arguments (state and batch), new results, and scratch."""
  m = step.memory_analysis()
  return int(m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes)


def _batches(run: Run, first: int):
  c = run.config
  return train_batches(run.source, batch_size=c.batch_size, seed=c.seed, start_step=first, threads=c.loader.threads,
                       **run.stream, **assemble.reading(c, run.spec))


def _left_out(run: Run, evaluation: Any, step: int) -> Any:
  """What was to be evaluated at the step that a run goes on from, where a stop came before it was done."""
  names = evaluation.due(step)
  rows = read_rows(run.folder / 'metrics.jsonl') if names and process.is_main() else []
  done = any(r.get('step') == step and 'learning_rate' not in r for r in rows)
  return names if names and not process.gather('evaluation left out', done)[0] else None


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
