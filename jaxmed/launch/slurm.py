"""A batch job of SLURM that starts again by itself after the warning before its time limit.

SLURM sends SIGUSR1 to the tasks `lead` seconds before the limit (up to a minute earlier, as it looks twice a minute).
They save and end with 75, and the script asks for the job to be queued again. A job whose machine failed is queued
again by SLURM itself (--requeue). Both go on where the run stands.
"""

import os
import pathlib
import re
import shlex
from typing import Any

from jaxmed.errors import EXIT_STOPPED, EXIT_UNAVAILABLE, UserError
from jaxmed.launch import record
from jaxmed.launch.job import Job
from jaxmed.launch.options import Slurm

FILE = 'job.sh'
_UNHANDLED = (128 + 10, 128 + 15)  # SIGUSR1 or SIGTERM came before training began: there was nothing to save
_PATIENCE = 600  # seconds that tasks may take to end after the first one ended (reports are written then)


def seconds(time: str) -> int:
  """A time limit of SLURM ('90', '1:30:00', '2-12', '2-12:30') in seconds."""
  days, dash, rest = time.rpartition('-')
  parts = [int(p) for p in rest.split(':')]
  if dash:
    hours, minutes, secs = (parts + [0, 0])[:3]
  elif len(parts) == 3:
    hours, minutes, secs = parts
  else:
    hours, (minutes, secs) = 0, (parts + [0])[:2]
  return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def devices(o: Slurm) -> tuple[int, str]:
  """How many devices the job has, and how they come about."""
  gpus = f' x {o.gpus_per_task} GPUs' if o.gpus_per_task else ''
  return o.nodes * o.tasks_per_node * max(o.gpus_per_task, 1), f'{o.nodes} nodes x {o.tasks_per_node} tasks{gpus}'


def check(o: Slurm) -> None:
  """Raises a UserError for options that contradict each other."""
  if o.time and seconds(o.time) <= o.lead + 60:
    raise UserError(f'--time {o.time} is {seconds(o.time)} s, too short for --lead {o.lead}: SLURM warns up to '
                    'a minute early, so the job would stop before it trains; make --time longer or --lead smaller')
  if o.mount and not o.container:
    raise UserError('--mount is for --container: without one the job sees all folders of its machine')


def _header(job: Job, o: Slurm) -> list[str]:
  """The #SBATCH lines."""
  log = 'log-%A_%a.txt' if job.cells else 'log-%j.txt'
  options = [
      f'--array=0-{job.cells - 1}' + (f'%{job.at_once}' if job.at_once else '') if job.cells else '',
      f'--job-name={job.name}', f'--nodes={o.nodes}', f'--ntasks-per-node={o.tasks_per_node}',
      # By the machine, so that each task sees all of them and NCCL can reach them; jaxmed shares them out.
      f'--gpus-per-node={o.gpus_per_task * o.tasks_per_node}' if o.gpus_per_task else '',
      f'--cpus-per-task={o.cpus_per_task}' if o.cpus_per_task else '',
      *(f'--{name}={value}' for name in ('mem', 'time', 'partition', 'account', 'qos') if (value := getattr(o, name))),
      f'--output={job.place}/{log}', '--open-mode=append', f'--signal=USR1@{o.lead}', '--requeue', *o.sbatch]
  return [f'#SBATCH {shlex.quote(option)}' for option in options if option]


def _mounts(job: Job, o: Slurm) -> list[str]:
  """Folders that a container must see: of the run, its data, its config file and its compiled programs."""
  config = [str(pathlib.Path(job.words[0]).parent)] if job.words and '=' not in job.words[0] else []
  folders = [job.folder, str(pathlib.PurePath(job.out).parent), job.data, *job.reads, *config, job.cache]
  return [f for f in dict.fromkeys([*folders, *o.mount]) if f]


def _step(job: Job, o: Slurm) -> str:
  """The command that srun starts once for each task."""
  words = ['srun', '--label', '--kill-on-bad-exit=0', f'--wait={_PATIENCE}']
  words += [f'--cpus-per-task={o.cpus_per_task}'] if o.cpus_per_task else []
  command = job.command()
  if o.container.endswith('.sif'):
    command = ['apptainer', 'exec', *(['--nv'] if o.gpus_per_task else []), f'--bind={",".join(_mounts(job, o))}',
               f'--pwd={job.folder}', o.container, *command]
  elif o.container:
    mounts = ','.join(m if ':' in m else f'{m}:{m}' for m in _mounts(job, o))
    words += [f'--container-image={o.container}', f'--container-mounts={mounts}', f'--container-workdir={job.folder}']
  return shlex.join([*words, *command])


def script(job: Job, o: Slurm) -> str:
  """The batch script."""
  folder = shlex.quote(str(job.place))
  return '\n'.join([
      '#!/bin/bash', *_header(job, o), '',
      f'# Written by jaxmed {job.verb}. Each task starts the cell of its number, or goes on with it.' if job.cells else
      '# Written by jaxmed launch slurm. The command starts the run, or goes on with it.',
      *job.exports(), *o.setup, f'cd {shlex.quote(job.folder)} || exit 1',
      'echo "$(date -Is) job $SLURM_JOB_ID starts on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"', '',
      # A task that ends alone must not take with it those that still write, so it is --wait that ends the others.
      _step(job, o), 'code=$?', '',
      f'# {EXIT_STOPPED}: a signal stopped it and everything is saved; {EXIT_UNAVAILABLE}: a process or device did not '
      f'answer any more;', f'# {", ".join(map(str, _UNHANDLED))}: the signal came before training began.',
      f'case $code in {" | ".join(map(str, (EXIT_STOPPED, EXIT_UNAVAILABLE, *_UNHANDLED)))})',
      f'  if [ -e {folder}/{record.STOP} ]; then',
      '    echo "$(date -Is) stopped by jaxmed stop"',
      f'  elif [ "${{SLURM_RESTART_COUNT:-0}}" -ge {job.restarts} ]; then',
      f'    echo "$(date -Is) stopped after {job.restarts} restarts"',
      '  else',
      '    echo "$(date -Is) stopped with code $code, queued again"',
      '    scontrol requeue "$SLURM_JOB_ID" && sleep 60  # SLURM ends this script meanwhile',
      '  fi ;;', 'esac', 'exit $code']) + '\n'


def submit(job: Job, o: Slurm) -> dict[str, Any]:
  """Gives the script to sbatch: {'job': id}."""
  del o
  said = record.call(['sbatch', '--parsable', str(job.place / FILE)],
                     'sbatch did not take the job (see --partition, --account, --time, --sbatch)')
  return {'job': said.split(';')[0], 'array': job.cells}


_ALIVE = ('PENDING', 'RUNNING', 'COMPLETING', 'CONFIGURING', 'REQUEUED', 'SUSPENDED', 'STOPPED', 'RESIZING')


def _shown(number: str) -> list[dict[str, str]]:
  """What SLURM says of a job, or of each task of an array."""
  done = record.attempt(['scontrol', '--oneliner', 'show', 'job', number])
  lines = done.stdout.splitlines() if done.returncode == 0 else []
  return [found for line in lines if 'JobState' in (found := dict(re.findall(r'(\w+)=(\S*)', line)))]


def _show(number: str) -> dict[str, str]:
  """The same of the job, or of the first task that runs, waits or is last."""
  found = _shown(number)
  living = [f for state in ('RUNNING', *_ALIVE) for f in found if f['JobState'] == state]
  return (living or found[-1:] or [{}])[0]


def state(values: dict[str, Any]) -> record.State:
  """What SLURM says of the job; it forgets ended ones after minutes, then its accounting is asked."""
  number = values['job']
  shown = _show(number)
  if shown:
    word = shown.get('JobState', '')
    alive = word in _ALIVE
    where = f' on {shown["NodeList"]}' if shown.get('NodeList') not in (None, '', '(null)') else ''
    reason = f', {shown["Reason"]}' if shown.get('Reason') not in (None, '', 'None') else ''
    return record.State(alive, f'SLURM job {number}: {word}{where}{reason}, {shown.get("RunTime", "?")} of '
                               f'{shown.get("TimeLimit", "?")}, {shown.get("Restarts", "0")} restarts')
  done = record.attempt(['sacct', '-n', '-X', '-P', '-j', number, '-o', 'State,ExitCode'])
  said = done.stdout.split('\n')[0].strip() if done.returncode == 0 else ''
  return record.State(False, f'SLURM job {number}: {said or "not known to SLURM any more"}')


def stop(values: dict[str, Any]) -> str:
  """Ends the job: its tasks get SIGTERM, save, and it is not queued again."""
  place, number = pathlib.Path(values['place']), values['job']
  place.joinpath(record.STOP).touch()
  running = _show(number).get('JobState') == 'RUNNING'
  if running and values.get('array'):  # tasks that wait have nothing to save
    record.call(['scancel', '--state=PENDING', number], f'scancel of job {number} failed')
  # To the tasks alone first: a plain scancel gives them only KillWait seconds.
  words = ['scancel', '--signal=TERM', number] if running else ['scancel', number]
  record.call(words, f'scancel of job {number} failed')
  return f'SLURM job {number}: ' + ('asked to save and end' if running else 'taken out of the queue')


def log(values: dict[str, Any]) -> str:
  """Where its output is."""
  return os.path.join(values['place'], f'log-{values["job"]}{"_*" if values.get("array") else ""}.txt')
