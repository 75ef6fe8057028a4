"""Several real processes of the command as one run, forked from a server that has everything imported.

Each joins the others as a launcher would have it (gloo between CPUs), and ends as Python ends a process.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

from tests import forks
from tests.common import words
from tests.conftest import TINY

# Every process runs the text of the variable HOOK first, then the command, then what Python does at exit.
SERVER = forks.SERVER.replace('code = main(ask[\'argv\'])', 'exec(os.environ.get("HOOK", "")); code = main(ask["argv"])')
SERVER = SERVER.replace('      sys.stdout.flush()\n', '      import atexit; atexit._run_exitfuncs(); sys.stdout.flush()\n')
assert SERVER.count('HOOK') == SERVER.count('atexit._run_exitfuncs') == 1

# No probes: tests of those are elsewhere.
PLAIN = '''
from jaxmed.train import evaluators, loop, probe
if not os.environ.get('PROBE'):
  evaluators.Evaluation.__call__ = evaluators.Evaluation.first = lambda self, state, names=(): {}
'''
# Writes the records of each batch that this process takes to RECORD/PROCESS.jsonl.
RECORD = PLAIN + '''
import json as _json, jax as _jax
_batches = loop._batches
def _recorded(run, first):
  with open(f"{os.environ['RECORD']}/{_jax.process_index()}.jsonl", 'a') as f:
    for n, batch in enumerate(_batches(run, first), first + 1):
      f.write(_json.dumps([n, batch['index'].tolist()]) + chr(10))
      f.flush()
      yield batch
loop._batches = _recorded
'''
# The batch divides by 1 to 4; every row is written.
TRAIN = TINY | {'batch_size': 24, 'steps': 12, 'checkpoint_every': 4, 'eval_every': 12}


class Member(forks.Fork):
  """One process; its exit code is remembered."""

  code = None

  def poll(self):
    """The exit code, or None while it runs."""
    if self.code is None:
      self.code = super().poll()
    return self.code


class Server(forks.Server):
  """As in forks, with SERVER above."""

  def start(self, argv, folder, **env):
    """Starts a Member."""
    return Member(self, [str(a) for a in argv], pathlib.Path(folder), env)

  def __init__(self):
    root = pathlib.Path(__file__).parent.parent.parent
    self._process = subprocess.Popen([sys.executable, '-c', SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     stderr=subprocess.DEVNULL, text=True, cwd=root)


def flags(devices):
  """XLA's flags for so many devices a process."""
  return f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'


def free_port():
  """A port that nobody listens on."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def launch(server, argv, folder, count, devices=1, hook=PLAIN, hooks=None, **env):
  """Starts `count` processes; `hooks` are those of single ones. Output is in folder/PROCESS/."""
  env = env | {'XLA_FLAGS': flags(devices)}
  if count > 1:
    env |= {'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{free_port()}', 'JAX_NUM_PROCESSES': str(count)}
  crew = []
  for i in range(count):
    place = pathlib.Path(folder) / str(i)
    place.mkdir(parents=True, exist_ok=True)
    mine = {'HOOK': hook + (hooks or {}).get(i, '')} | ({'JAX_PROCESS_ID': str(i)} if count > 1 else {})
    crew.append(server.start(argv, place, **env, **mine))
  return crew


def ends(crew, seconds=200.0):
  """The exit codes of all; those that do not end in time are killed."""
  end = time.monotonic() + seconds
  while None in (codes := [f.poll() for f in crew]):
    if time.monotonic() > end:
      for code, fork in zip(codes, crew, strict=True):
        if code is None:
          fork.signal(9)
      raise TimeoutError(f'{codes}: ' + ' | '.join(f.err.read_text()[-1500:] for f in crew))
    time.sleep(0.02)
  return codes


def begin(corpus, out, **changes):
  """The words that start a run of TRAIN."""
  return ['train', '--data', corpus, '--out', out, *words(TRAIN | changes)]


def recorded(folder):
  """{step: sorted records} of all processes."""
  seen = {}
  for file in pathlib.Path(folder).glob('*.jsonl'):
    for line in file.read_text().splitlines():
      n, rows = json.loads(line)
      seen.setdefault(n, []).extend(rows)
  return {n: sorted(rows) for n, rows in seen.items()}
