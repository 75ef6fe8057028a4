"""A Cloud TPU slice: asked for as a queued resource, trained on by ssh to all its machines, given back at the end.

The script runs on the machine that launches, until training ends: it waits for the slice, starts the command on every
machine, and asks for another slice where a spot one was taken away.
"""

import os
import pathlib
import shlex
import signal
import subprocess
from typing import Any

from jaxmed.errors import EXIT_STOPPED, EXIT_UNAVAILABLE
from jaxmed.launch import record, tpu
from jaxmed.launch.job import Job
from jaxmed.launch.options import TpuVm, require

FILE = 'job.sh'
CONFIG = 'config.py'  # in the home directory, where ssh begins


def check(o: TpuVm) -> None:
  """Raises a UserError for an option that is missing or of a size that there is not."""
  require(o, 'tpu-vm', 'accelerator', 'zone')
  tpu.of_type(o.accelerator)


def devices(o: TpuVm) -> tuple[int, str]:
  """How many devices the slice has, and how they come about."""
  return tpu.of_type(o.accelerator)[0].devices, o.accelerator


def _where(o: TpuVm) -> list[str]:
  return [f'--zone={o.zone}', *([f'--project={o.project}'] if o.project else []), '--quiet']


def remote(job: Job, o: TpuVm) -> str:
  """What each machine runs. A lock keeps a second start from the TPU while a first one, cut off, still saves."""
  hosts = tpu.of_type(o.accelerator)[0].hosts
  # The number tells jaxmed to join; the rest JAX learns from the metadata of the machines.
  joined = [f'export JAX_NUM_PROCESSES={hosts}'] if hosts > 1 else []
  lock = f'flock --wait 600 --conflict-exit-code {EXIT_STOPPED} /tmp/{job.unique}.lock'
  return '\n'.join(['set -e', *job.exports(), *joined, *o.setup, f'exec {lock} {job.line()}'])


_SCRIPT = '''\
#!/bin/bash
# Written by jaxmed launch tpu-vm. Run it on a machine that stays on; it may be run again at any time.
set -u
NAME={name}
WHERE=({where})

say() {{ echo "$(date -Is) $*"; }}
show() {{ gcloud compute tpus queued-resources describe "$NAME" "${{WHERE[@]}}" "$@"; }}
# Its state; NONE where there is none, UNKNOWN where that cannot be asked.
state() {{
  local said
  if said=$(show '--format=value(state.state)' 2>&1); then echo "${{said##*$'\\n'}}"
  elif [[ $said == *NOT_FOUND* ]]; then echo NONE
  else echo UNKNOWN; say "$said" >&2; fi
}}
delete() {{ say "giving $NAME back"; gcloud compute tpus queued-resources delete "$NAME" "${{WHERE[@]}}" --force; }}
create() {{
  say "asking for {accelerator}"
  gcloud compute tpus queued-resources create "$NAME" "${{WHERE[@]}}" --node-id="$NAME" \\
    --accelerator-type={accelerator} --runtime-version={runtime}{tier}
}}

# Waits for the slice; one that was taken away is asked for again, a request that failed is not.
ready() {{
  local unknown=0
  while true; do
    case "$(state)" in
      ACTIVE) return 0 ;;
      NONE) create || return 1 ;;
      UNKNOWN) unknown=$((unknown + 1)); [ $unknown -lt 20 ] || return 1 ;;
      SUSPENDED) delete || return 1 ;;
      FAILED) show; return 1 ;;
    esac
    sleep "${{POLL:-30}}"
  done
}}
{end}
code=1
for attempt in $(seq 0 {restarts}); do
  [ ! -e {stop} ] || {{ say "stopped by jaxmed stop"; break; }}
  ready || break
  say "attempt $attempt"{copy}
  gcloud compute tpus tpu-vm ssh "$NAME" "${{WHERE[@]}}" --worker=all --command={command}
  code=$?
  say "ended with code $code"
  [ $code != 0 ] || break
  # {stopped}: saved and stopped; {unavailable}: a process did not answer; 255: the connection broke.
  case $code in {stopped} | {unavailable} | 255) continue ;; esac
  [ "$(state)" = ACTIVE ] && break
done
exit $code
'''

_COPY = '''
  gcloud compute tpus tpu-vm scp {file} "$NAME:{to}" "${{WHERE[@]}}" --worker=all || continue'''


def script(job: Job, o: TpuVm) -> str:
  """The script that waits for the slice and trains on it."""
  runtime = o.runtime or tpu.of_type(o.accelerator)[1]
  tier = (' --spot' if o.spot else '') + (' --reserved' if o.reserved else '')
  copy = _COPY.format(file=shlex.quote(job.config), to=CONFIG) if job.config else ''
  end = '' if o.keep else '\n# Whatever happens, the bill ends with this script.\ntrap delete EXIT\n'
  return _SCRIPT.format(
      name=job.unique, where=shlex.join(_where(o)), accelerator=o.accelerator, runtime=shlex.quote(runtime), tier=tier,
      end=end, copy=copy, restarts=job.restarts, stop=shlex.quote(str(job.place / record.STOP)),
      command=shlex.quote(remote(job, o)), stopped=EXIT_STOPPED, unavailable=EXIT_UNAVAILABLE)


def submit(job: Job, o: TpuVm) -> dict[str, Any]:
  """Starts the script in the background: {'job': name, 'zone', 'project', 'script_process': [id, begin]}."""
  with open(job.place / 'log.txt', 'ab') as log_file:
    process = subprocess.Popen(['bash', str(job.place / FILE)], stdin=subprocess.DEVNULL, stdout=log_file,
                               stderr=subprocess.STDOUT, start_new_session=True)
  return {'job': job.unique, 'where': _where(o), 'script_process': record.identity(process.pid)}


def _state(values: dict[str, Any]) -> str:
  words = ['gcloud', 'compute', 'tpus', 'queued-resources', 'describe', values['job'], *values['where'],
           '--format=value(state.state)']
  done = record.attempt(words)
  return done.stdout.strip() if done.returncode == 0 else ''


def state(values: dict[str, Any]) -> record.State:
  """The state of the queued resource, and whether the script still looks after it."""
  script_runs, resource = record.alive(values['script_process']), _state(values)
  text = f'TPU {values["job"]}: ' + (resource or 'no queued resource of this name') + (
      ', its script runs here' if script_runs else ', its script does not run here')
  if resource and not script_runs:
    text += f'; it is still billed: jaxmed stop {values["run"]} gives it back'
  return record.State(script_runs or bool(resource), text)


def stop(values: dict[str, Any]) -> str:
  """Asks the processes to save and end, then deletes the slice."""
  pathlib.Path(values['place'], record.STOP).touch()
  alive = record.alive(values['script_process'])
  if alive and _state(values) == 'ACTIVE':
    # The bracket keeps the pattern from matching the shell that carries it.
    record.call(['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', values['job'], *values['where'], '--worker=all',
                 "--command=pkill -TERM -f '[j]axmed train' || true"], 'ssh to the TPU failed')
    return f'TPU {values["job"]}: asked to save and end; its script gives the machines back (unless --keep)'
  if alive:
    os.killpg(int(values['script_process'][0]), signal.SIGTERM)
  record.call(['gcloud', 'compute', 'tpus', 'queued-resources', 'delete', values['job'], *values['where'], '--force'],
              f'giving {values["job"]} back failed')
  return f'TPU {values["job"]}: given back'


def log(values: dict[str, Any]) -> str:
  """Where its output is."""
  return os.path.join(values['place'], 'log.txt')
