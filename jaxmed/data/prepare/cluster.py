"""Blocks done by the workers of a Dask cluster that is there, or that is made of SLURM jobs."""

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxmed.data.prepare import blocks
from jaxmed.data.readers import Masks
from jaxmed.errors import Unavailable, UserError, need

_POLL = 0.2  # seconds
_CONNECT = 20.0  # seconds
_ASK = 15.0  # seconds between questions to SLURM about its jobs, while no worker is there
_RETRIES = 3  # of a block whose file system failed


@dataclasses.dataclass(frozen=True)
class Slurm:
  """SLURM jobs that prepare. What is empty here is taken from dask-jobqueue's configuration, if any.

  Attributes:
    jobs: how many.
    cores: of each, and as many processes that read.
    memory: of each.
    time: limit of each.
    partition, account: to send them to.
    sbatch: further options of sbatch, such as '--qos=low'.
  """

  jobs: int
  cores: int = 4
  memory: str = '16GB'
  time: str = '12:00:00'
  partition: str = ''
  account: str = ''
  sbatch: tuple[str, ...] = ()

  def __post_init__(self):
    for name in ('jobs', 'cores'):
      if getattr(self, name) < 1:
        raise UserError(f'slurm: {name} is {getattr(self, name)}: expected a positive number')
    if not re.fullmatch(r'\d+(\.\d+)?\s*([kMGT]i?)?B?', self.memory, re.IGNORECASE):
      raise UserError(f'slurm: memory is {self.memory!r}: expected, for example, 16GB')


def at(address: str) -> Any:
  """A client of the scheduler at an address.

  Raises:
    UserError: none answers.
  """
  distributed = need('distributed', 'cluster')
  try:
    return distributed.Client(address, timeout=_CONNECT)
  except (OSError, ValueError, TimeoutError) as e:
    raise UserError(f'no Dask scheduler answers at {address}: expected, for example, tcp://host:8786') from e


@contextlib.contextmanager
def of_slurm(slurm: Slurm, logs: pathlib.Path) -> Iterator[tuple[Any, Callable[[], None]]]:
  """Sends jobs, which are cancelled at the end. Yields a client of their scheduler, which runs here, and a check to
  call now and then.

  The check raises Unavailable when all jobs have ended, which nobody else would tell.

  Raises:
    UserError: no SLURM here, or it does not take such jobs.
  """
  jobqueue = need('dask_jobqueue', 'cluster')
  if shutil.which('sbatch') is None:
    raise UserError('there is no sbatch here: --slurm sends jobs from a machine of a SLURM cluster')
  logs.mkdir(parents=True, exist_ok=True)
  with jobqueue.SLURMCluster(
    queue=slurm.partition or None, account=slurm.account or None, cores=slurm.cores, processes=slurm.cores,
    memory=slurm.memory, walltime=slurm.time, job_name='jaxmed-prepare', log_directory=str(logs.absolute()),
    job_extra_directives=list(slurm.sbatch), python=sys.executable, scheduler_options={'dashboard_address': ':0'},
  ) as cluster:
    _check_taken(cluster.job_script())
    cluster.scale(jobs=slurm.jobs)
    print(f'jaxmed: {slurm.jobs} SLURM jobs of {slurm.cores} cores; logs in {logs}', file=sys.stderr)
    with need('distributed', 'cluster').Client(cluster) as client:
      yield client, _check(cluster, client, logs)


def run(
    tasks: Sequence[blocks.Task], folder: pathlib.Path, client: Any, tick: Callable[[int], Any],
    check: Callable[[], None] = lambda: None,
) -> None:
  """Blocks are done again elsewhere when a worker dies; done twice, they have the same bytes.

  Raises:
    Unavailable: workers were killed again and again; what is done is kept. Whatever `blocks.write` or `check` raises.
  """
  distributed = need('distributed', 'cluster')
  futures = {client.submit(blocks.write, _absolute(t), folder, key=f'{folder}/{t.name}', retries=_RETRIES): t
             for t in tasks}
  pending = set(futures)
  try:
    while pending:
      tick(0)
      check()
      with contextlib.suppress(TimeoutError):
        done, pending = distributed.wait(pending, timeout=_POLL, return_when='FIRST_COMPLETED')
        for future in done:
          future.result()
          tick(len(futures[future].items))
  except distributed.KilledWorker as e:
    raise Unavailable('Dask workers were killed again and again (too little memory?); finished blocks are kept: the '
                      'same command goes on') from e
  finally:
    client.cancel(list(futures))


def _check_taken(script: str) -> None:
  """dask-jobqueue would wait for ever for jobs that SLURM does not take."""
  with tempfile.NamedTemporaryFile('w', suffix='.sh') as f:
    f.write(script)
    f.flush()
    said = subprocess.run(['sbatch', '--test-only', f.name], capture_output=True, text=True, check=False)
  if said.returncode:
    last = (said.stderr.strip().splitlines() or ['no reason given'])[-1]
    raise UserError(f'sbatch does not take such jobs: {last}')


def _check(cluster: Any, client: Any, logs: pathlib.Path) -> Callable[[], None]:
  asked = time.monotonic()

  def check() -> None:
    nonlocal asked
    if time.monotonic() - asked < _ASK:
      return
    asked = time.monotonic()
    jobs = [str(w.job_id) for w in cluster.workers.values() if getattr(w, 'job_id', None)]
    if not jobs or client.scheduler_info(n_workers=-1)['workers']:
      return
    words = ['squeue', '-h', '-o', '%i', '-j', ','.join(jobs)]
    if not subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip():
      raise Unavailable(f'all SLURM jobs ended before the work was done (their logs are in {logs}); finished blocks '
                        'are kept: the same command goes on')

  return check


def _absolute(task: blocks.Task) -> blocks.Task:
  """The task for a process in another working directory."""
  absolute = lambda path: pathlib.Path(os.path.abspath(path))
  beside = lambda path: None if path is None else absolute(path)
  of = lambda several: several and dataclasses.replace(several, files=tuple(map(absolute, several.files)))
  items = []
  for item in task.items:
    mask = of(item.mask) if isinstance(item.mask, Masks) else beside(item.mask)
    items.append(dataclasses.replace(item, file=absolute(item.file), group=of(item.group), parts=of(item.parts),
                                     mask=mask, signal=beside(item.signal)))
  return dataclasses.replace(task, items=tuple(items))
