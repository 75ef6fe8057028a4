"""Launches a run, says how it is, stops it: what the three verbs do, whatever the system."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from jaxmed import files
from jaxmed.data.corpus.selection import split_uri
from jaxmed.errors import UserError
from jaxmed.launch import job as job_lib
from jaxmed.launch import jobset, local, record, slurm, tpu, tpu_vm
from jaxmed.launch.options import JobSet, Local, Slurm, TpuVm

_SYSTEMS: dict[str, Any] = {'local': local, 'slurm': slurm, 'tpu-vm': tpu_vm, 'jobset': jobset}


def prepare(launcher: str, words: Sequence[str], data: str, out: str,
            options: Any, cells: int = 0, at_once: int = 0, verb: str = 'study',
            reads: Sequence[str] = ()) -> tuple[job_lib.Job, str, list[str]]:
  """The job, its script or manifest, and warnings.

  Args:
    cells, at_once, verb, reads: of a study, whose file `words` begin with; see `job.Job`.
  Raises:
    UserError: what can be known to go wrong before anything waits in a queue.
  """
  here = launcher in ('local', 'slurm')
  defaults: dict[str, Any] = {}
  if isinstance(options, Local):
    defaults = {'restarts': 0}
  elif isinstance(options, Slurm):
    defaults = {'python': 'python3' if options.container else ''}
  else:
    defaults = {'python': 'python3', 'copy': _SYSTEMS[launcher].CONFIG}
  job = job_lib.make(words, data, out, options, here=here, **defaults)
  job = dataclasses.replace(job, cells=cells, at_once=at_once, verb=verb, reads=tuple(reads))
  warnings = []
  if isinstance(options, Local):
    count = local.devices(options, local.visible_gpus(job.variables()))
  else:
    _SYSTEMS[launcher].check(options)
    count = _SYSTEMS[launcher].devices(options)
  if cells:
    _check_single(options)
  else:
    job_lib.check_config(words, *count, here=here)
  if here and job.data and not split_uri(job.data)[0].exists():
    if isinstance(options, Local):
      raise UserError(f'--data {data} does not exist: expected a corpus or a folder of images')
    warnings.append(f'--data {data} does not exist on this machine: it must on those that train')
  if isinstance(options, Slurm):
    warnings.append(job_lib.shared_warning(job.out, options.nodes))
    if not options.time:
      warnings.append('without --time SLURM gives the default of the partition, and its warning before the end comes '
                      'only where there is a limit')
  if isinstance(options, JobSet) and not jobset.shared(job, options):
    warnings.append(f'{out} is in no --claim and no --bucket: it is lost with the pod, and pods do not share it')
  if isinstance(options, TpuVm) and not job.out.startswith(('/mnt/', '/gcs/', '/nfs/', '/shared/')):
    warnings.append(f'{out} must be on storage that all machines share and that outlives them: mount it with --setup')
  return job, _SYSTEMS[launcher].script(job, options), [w for w in warnings if w]


def _check_single(options: Any) -> None:
  """Raises a UserError for options that give a cell of a study several processes."""
  if isinstance(options, TpuVm):
    raise UserError('cells of a study run by local, slurm or jobset, not by tpu-vm')
  for name in ('nodes', 'tasks_per_node', 'slices', 'processes'):
    if getattr(options, name, 1) > 1:
      raise UserError(f'a cell of a study is one process: leave --{name.replace("_", "-")} out')
  if isinstance(options, JobSet) and options.tpu:
    hosts = tpu.of_topology(options.tpu, options.topology, options.chips_per_node).hosts
    if hosts > 1:
      raise UserError(f'a cell of a study is one process, but {options.tpu} {options.topology} has {hosts} hosts: take '
                      'a --topology of one host')


_PROGRAMS = {'slurm': ('sbatch', 'run this on a machine of the cluster that takes jobs'),
             'tpu-vm': ('gcloud', 'install the Google Cloud CLI'), 'jobset': ('kubectl', 'install it')}


def launch(launcher: str, words: Sequence[str], data: str, out: str, options: Any, dry_run: bool) -> dict[str, Any]:
  """Writes the script, submits it (local: runs it to its end) and remembers what was submitted.

  Returns:
    launcher, script (path, or text of a dry run), and what the system answered: job, or code (local).
  """
  return send(launcher, *prepare(launcher, words, data, out, options), options, dry_run)


def send(launcher: str, job: job_lib.Job, text: str, warnings: Sequence[str], options: Any,
         dry_run: bool) -> dict[str, Any]:
  """Submits what `prepare` made, see `launch`."""
  for warning in warnings:
    print(f'jaxmed: warning: {warning}', file=sys.stderr, flush=True)
  if dry_run:
    return {'launcher': launcher, 'dry_run': True, 'script': text}
  if launcher in _PROGRAMS:
    record.need(_PROGRAMS[launcher][0], launcher, _PROGRAMS[launcher][1])
  _check_free(job.out)
  try:
    job.place.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(f'cannot write {job.place}: {e.strerror or e}') from e
  (job.place / record.STOP).unlink(missing_ok=True)
  if launcher == 'local':
    return {'launcher': launcher, 'run': job.out, 'place': str(job.place), **local.submit(job, options)}
  files.write_text(job.place / _SYSTEMS[launcher].FILE, text)
  answer = _SYSTEMS[launcher].submit(job, options)
  values = {'launcher': launcher, 'run': job.out, 'command': job.command(), **answer}
  record.write(job.place, values)
  return values | {'script': str(job.place / _SYSTEMS[launcher].FILE),
                   'log': _SYSTEMS[launcher].log(values | {'place': str(job.place)})}


def _check_free(out: str) -> None:
  """Raises a UserError where what was launched for this RUN before still runs: two would write into one run."""
  try:
    values = record.find(out)
  except UserError:
    return
  now = _SYSTEMS[values['launcher']].state(values)
  if now.alive:
    raise UserError(f'{out} was launched already ({now.text}): jaxmed stop {out} ends it')


def status(out: str) -> dict[str, Any]:
  """What the system says of the job, how far the run is, and where its output is."""
  values = record.find(out)
  system = _SYSTEMS[values['launcher']]
  now = system.state(values)
  return {'launcher': values['launcher'], 'run': values['run'], 'job': values.get('job'), 'alive': now.alive,
          'state': now.text, 'progress': record.progress(values['run']), 'log': system.log(values)}


def stop(out: str) -> dict[str, Any]:
  """Asks the job to save and end; it is not started again. What has ended already is left as it is."""
  values = record.find(out)
  system = _SYSTEMS[values['launcher']]
  now = system.state(values)
  said = f'has ended already ({now.text})' if now.alive is False else system.stop(values)
  return {'launcher': values['launcher'], 'run': values['run'], 'job': values.get('job'), 'stopped': said}
