"""Orbax checkpoints of a run: asynchronous, atomic, the latest and the best kept, a damaged one passed over."""

import pathlib
import shutil
import sys
import time
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jaxmed.errors import UserError


class Checkpoints:
  """The checkpoints in RUN/checkpoints, one folder a step.

  Args:
    run: the run directory. keep: how many of the latest stay. best, best_mode: the metric whose best one stays too.
  """

  def __init__(self, run: pathlib.Path, keep: int = 2, best: str = 'loss', best_mode: str = 'min',
               read_only: bool = False):
    self.folder = pathlib.Path(run).absolute() / 'checkpoints'
    worst = float('inf') if best_mode == 'min' else float('-inf')
    policy = AnyPreservationPolicy([
        LatestN(max(keep, 1)),
        BestN(get_metric_fn=lambda m: m.get(best, worst), reverse=best_mode == 'min', n=1,
              keep_checkpoints_without_metrics=False),
    ])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy, best_fn=lambda m: m.get(best, worst), best_mode=best_mode, read_only=read_only,
        create=not read_only, cleanup_tmp_directories=not read_only)
    self._manager = ocp.CheckpointManager(self.folder, options=options)
    self._read_only = read_only

  def save(self, step: int, state: Any, metrics: dict[str, float]) -> None:
    """Starts to save; returns once the state is copied. An existing checkpoint of that step stays."""
    if step in self._manager.all_steps():
      return
    size, free = sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(self.folder).free
    if size > free:  # told before the storage below fails in its own words, half-way
      raise UserError(f'No space left for checkpoint {self.folder / str(step)}: it takes {size / 1e6:.1f} MB, '
                      f'{free / 1e6:.1f} MB are free; make room, then go on with --resume {self.folder.parent}')
    try:
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
      try:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        state = self._manager.restore(step, args=args)['state']
      except Exception as e:  # the storage below raises kinds of its own for damaged files
        failed[step] = ' '.join(str(e).split())[:200] or type(e).__name__
        continue
      for bad, reason in failed.items():
        print(f'warning: checkpoint {self.folder / str(bad)} is not readable, trying the one before it: {reason}',
              file=sys.stderr)
      self._set_aside(list(failed))
      return state
    if not steps:
      return None
    step, reason = next(iter(failed.items()))
    if all(any(word in r.lower() for word in ('shape', 'structure', 'tree')) for r in failed.values()):
      raise UserError(f'checkpoint {self.folder / str(step)} belongs to another model or method: {reason}')
    raise UserError(f'no checkpoint in {self.folder} is readable (tried {sorted(failed)}): {reason}')

  def _set_aside(self, damaged: list[int]) -> None:
    """Renames checkpoints that could not be read, so that the run can write those steps again."""
    if damaged and not self._read_only:
      for step in damaged:
        place = self.folder.parent / 'damaged' / f'{step}-{time.time_ns()}'
        place.parent.mkdir(exist_ok=True)
        (self.folder / str(step)).rename(place)
      self._manager.reload()

  def close(self) -> None:
    """Waits and releases the threads."""
    self.wait()
    self._manager.close()
