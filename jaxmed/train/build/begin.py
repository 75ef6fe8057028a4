"""What a run says before its first step, and how it closes its checkpoints."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax

from jaxmed import files
from jaxmed.errors import Stopped
from jaxmed.parallel import process, sharding_table
from jaxmed.train import width
from jaxmed.train.build import adapting
from jaxmed.train.checkpoint import Checkpoints
from jaxmed.train.step import TrainState

LAST_SECONDS = 10.0


def announce(run: Any, abstract: TrainState) -> None:
  """Says what runs and how its state lies on the devices, in RUN/layout.txt array by array; all processes call it.

  With muP that file also has the factors on first values and rates.
  """
  owners, memory = process.owners(), sharding_table.device_memory()
  if not process.is_main():
    return
  table = sharding_table.table(abstract, memory)
  grown = '' if run.trainer.width is None else '\n' + width.table(run.trainer.width) + '\n'
  files.write_text(run.folder / 'layout.txt', table + '\n' + grown)
  if run.times.quiet:
    return
  c, s = run.config, run.spec
  lines = [
      f'method {c.method}, model {c.model} at {"x".join(map(str, c.image_size))}, channels {", ".join(s.vocabulary)}',
      f'{s.rows} records, batch {c.batch_size}, {c.steps} steps ({c.epochs:.4g} epochs), '
      f'learning rate {c.learning_rate:.3g}, seed {c.seed}',
      f'{jax.device_count()} {jax.devices()[0].device_kind} device(s), mesh '
      + ' '.join(f'{k}={v}' for k, v in run.mesh.shape.items() if v > 1 or k == 'data'),
      *([adapting.told(c, run.trainer.optimizer, abstract.params)] if adapting.adapted(c) else []),
      *([width.told(c.optimizer.base_width, run.trainer.width)] if c.optimizer.scaling == 'mup' else []),
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
