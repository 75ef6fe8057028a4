"""Orbax checkpoints of a run: asynchronous, atomic, checksummed, latest and best kept, damaged ones passed over.

With several processes all of them call each function here alike, and find the same.
"""

import contextlib
import json
import logging
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from jaxmed.errors import UserError
from jaxmed.parallel import process
from jaxmed.train import sums


class Checkpoints:
  """The checkpoints in RUN/checkpoints, one folder a step.

  Args:
    run: the run directory. keep: how many of the latest stay. best, best_mode: the metric whose best one stays too.
    keep_every: those of steps that this divides stay for ever; 0 for none.
  """

  def __init__(self, run: pathlib.Path, keep: int = 2, best: str = 'loss', best_mode: str = 'min',
               read_only: bool = False, keep_every: int = 0):
    self.folder = pathlib.Path(run).absolute() / 'checkpoints'
    self._read_only = read_only
    self._manager: Any = None
    self._set_aside_bad_metrics()
    worst = float('inf') if best_mode == 'min' else float('-inf')
    policy = AnyPreservationPolicy([
        LatestN(max(keep, 1)),
        *([EveryNSteps(keep_every)] if keep_every else []),
        BestN(get_metric_fn=lambda m: m.get(best, worst), reverse=best_mode == 'min', n=1,
              keep_checkpoints_without_metrics=False),
    ])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy, best_fn=lambda m: m.get(best, worst), best_mode=best_mode, read_only=read_only,
        create=not read_only, cleanup_tmp_directories=not read_only, save_interval_steps=0 if read_only else 1,
        async_options=ocp.AsyncOptions(post_finalization_callback=self._take_sums))
    self._saving = -1
    with _unsaid('Given directory is read only'):
      self._manager = ocp.CheckpointManager(self.folder, options=options)

  def save(self, step: int, state: Any, metrics: dict[str, float]) -> None:
    """Starts to save; returns once the state is copied. An existing checkpoint of that step stays."""
    if step in self._manager.all_steps():
      return
    size, free = sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(self.folder).free
    if size > free:  # told before the storage below fails in its own words, half-way
      raise UserError(f'No space left for checkpoint {self.folder / str(step)}: it takes {size / 1e6:.1f} MB, '
                      f'{free / 1e6:.1f} MB are free; make room, then go on with --resume {self.folder.parent}')
    self.wait()
    try:
      self._saving = step
      args = ocp.args.Composite(state=ocp.args.StandardSave(state))
      self._manager.save(step, args=args, metrics=metrics, force=True)
    except OSError as e:
      raise UserError(f'cannot write checkpoint {self.folder / str(step)}: {e.strerror or e}') from e

  def wait(self) -> None:
    """Returns when everything that was begun is on disk."""
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except (OSError, ValueError) as e:
      raise UserError(f'cannot write a checkpoint to {self.folder}: {e}') from e

  def told(self) -> str:
    """What to say of them while one may be half-written: '; the last whole checkpoint is of step 20'."""
    whole = [int(p.name) for p in self.folder.glob('*') if p.name.isdigit()]  # renamed into place, once whole
    return f'; the last whole checkpoint is of step {max(whole)}' if whole else '; there is no whole checkpoint'

  def forget_after(self, step: int) -> None:
    """Removes the checkpoints of later steps."""
    self.wait()
    for later in self.steps():
      if later > step:
        self._manager.delete(later)

  def steps(self) -> list[int]:
    """Complete checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

  def best_step(self) -> int | None:
    """The step with the best metric."""
    return self._manager.best_step()

  def restore(self, abstract: Any, which: str = 'latest') -> Any | None:
    """Restores the latest readable checkpoint, 'best', or a given step; None where there is none.

    A damaged checkpoint is passed over for the one before it, with a warning that names the folder.

    Raises:
      UserError: nothing readable, or the checkpoint belongs to another model.
    """
    steps = self.steps()
    best = self.best_step()
    if which == 'best' and best is not None:
      steps = [best]
    elif which not in ('latest', 'best'):
      if not str(which).isdigit() or int(which) not in steps:
        raise UserError(f'{self.folder} has no checkpoint {which!r}: choose latest, best or one of {steps}')
      steps = [int(which)]
    failed: dict[int, str] = {}
    for step in reversed(steps):
      reason, state = self._read(step, abstract)
      if reason:
        failed[step] = reason
        continue
      self._set_aside(failed)
      return state
    if not steps:
      return None
    step, reason = next(iter(failed.items()))
    if all(any(word in r.lower() for word in ('shape', 'structure', 'tree')) for r in failed.values()):
      raise UserError(f'checkpoint {self.folder / str(step)} belongs to another model or method: {reason}')
    raise UserError(f'no checkpoint in {self.folder} is readable (tried {sorted(failed)}): {reason}; to begin again, '
                    'move that folder away')

  def _read(self, step: int, abstract: Any) -> tuple[str, Any]:
    """(reason of failure, state), the reason the same on all processes: each checks its share of the files first."""
    damage = sums.damage(self.folder, step, jax.process_index(), jax.process_count())
    said = [d for d in process.gather('checksums', damage) if d]
    if said:
      return said[0], None
    state, reason = None, ''
    try:
      state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))['state']
    except Exception as e:  # the storage below raises kinds of its own for damaged files
      reason = ' '.join(str(e).split())[:200] or type(e).__name__
    said = [r for r in process.gather('restore', reason) if r]
    return (said[0], None) if said else ('', state)

  def _take_sums(self) -> None:
    """Called when all files of the checkpoint are written and it is to get its final name."""
    if process.is_main():
      for folder in self.folder.glob(f'{self._saving}.orbax-checkpoint-tmp*'):
        sums.take(self.folder, self._saving, folder)
      sums.prune(self.folder, [int(p.name) for p in self.folder.iterdir() if p.name.isdigit()] + [self._saving])

  def _set_aside_bad_metrics(self) -> None:
    """Metrics are read when the manager is made, which damaged ones would end."""
    bad = []
    for file in sorted(self.folder.glob('*/metrics/metrics')):
      try:
        json.loads(file.read_text(encoding='utf-8'))
      except (OSError, ValueError) as e:
        bad.append((file.parts[-3], f'{file} is damaged: {e}'))
    bad = process.gather('metrics of checkpoints', bad)[0]
    if self._read_only and bad:
      raise UserError(f'checkpoint metrics {bad[0][1]}; go on with the run, or move that folder away')
    self._set_aside({int(step): reason for step, reason in bad if step.isdigit()})

  def _set_aside(self, damaged: dict[int, str]) -> None:
    """Renames checkpoints that could not be read, with a warning, so that the run can write those steps again."""
    if not damaged:
      return
    if process.is_main():
      for step, reason in damaged.items():
        print(f'warning: checkpoint {self.folder / str(step)} is not readable, trying the one before it: {reason}',
              file=sys.stderr, flush=True)
        if not self._read_only:
          place = self.folder.parent / 'damaged' / f'{step}-{time.time_ns()}'
          place.parent.mkdir(exist_ok=True)
          (self.folder / str(step)).rename(place)
    if not self._read_only:
      process.gather('damaged checkpoints', True)
      if self._manager is not None:
        self._manager.reload()

  def close(self) -> None:
    """Waits and releases the threads."""
    self.wait()
    self._manager.close()


@contextlib.contextmanager
def _unsaid(beginning: str) -> Iterator[None]:
  """Keeps one message of Orbax from the log: what the caller asked for is no warning."""
  logger, keep = logging.getLogger('absl'), lambda record: not str(record.msg).startswith(beginning)
  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)
