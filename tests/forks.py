"""Real processes of the command that start in a moment: a server imports everything once and forks for each.

A fork before JAX starts its threads is a process like any other, with its own signals and exit code. Its run draws no
figures, unless its environment has FIGURES: they are the half of a tiny run's time.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

SERVER = '''
import gc, importlib, json, os, signal, sys
gc.set_threshold(20_000, 10, 10)
for name in ('jax', 'jaxmed.cli', 'jaxmed.train.loop', 'jaxmed.evaluate.page', 'jaxmed.train.build.rundir', 'tensorboardX',
             'tensorflow_datasets', 'jaxmed.interop.verify', 'jaxmed.evaluate.protocols.classify', 'jaxmed.data.prepare.prepare'):
  importlib.import_module(name)
from jaxmed.cli import main
from jaxmed.train import pictures
gc.collect()
gc.freeze()  # what is imported stays: no child looks through it
for line in sys.stdin:
  ask = json.loads(line)
  if 'argv' in ask:
    pid = os.fork()
    if not pid:
      os.environ.update(ask['env'])
      os.chdir(ask.get('cwd', '.'))
      for number, name in ((1, ask['out']), (2, ask['err'])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
      os.close(0)
      code = 1
      if 'FIGURES' not in ask['env']:
        pictures.views = pictures.end = lambda run, state: None
      try:
        code = main(ask['argv'])
      except SystemExit as e:
        code = e.code
      except BaseException:
        import traceback
        traceback.print_exc()
      sys.stdout.flush()
      os._exit(code)
    print(pid, flush=True)
  else:
    pid, status = os.waitpid(ask['wait'], ask['flags'])
    print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
'''


class Server:
  """Forks processes of `jaxmed`; `close` ends it."""

  def __init__(self):
    root = pathlib.Path(__file__).parent.parent
    self._process = subprocess.Popen([sys.executable, '-c', SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     stderr=subprocess.DEVNULL, text=True, cwd=root)

  def ask(self, **words):
    """One request, one answer."""
    self._process.stdin.write(json.dumps(words) + '\n')
    self._process.stdin.flush()
    return json.loads(self._process.stdout.readline())

  def start(self, argv, folder, cwd='.', **env):
    """Starts `jaxmed ARGV` in `cwd`; its output goes to files in `folder`."""
    return Fork(self, [str(a) for a in argv], pathlib.Path(folder), env, str(cwd))

  def run(self, argv, folder, cwd='.', **env):
    """Runs it to its end: (exit code, stdout, stderr)."""
    fork = self.start(argv, folder, cwd, **env)
    return fork.wait(), fork.out.read_text(), fork.err.read_text()

  def close(self):
    """Ends the server."""
    self._process.stdin.close()
    self._process.wait()


class Fork:
  """One process."""

  def __init__(self, server, argv, folder, env, cwd='.'):
    self.out, self.err, self._server = folder / 'stdout', folder / 'stderr', server
    self.err.unlink(missing_ok=True)
    self.pid = server.ask(argv=argv, out=str(self.out), err=str(self.err), env=env,
                          cwd=cwd)

  def poll(self):
    """The exit code, or None while it runs."""
    return self._server.ask(wait=self.pid, flags=os.WNOHANG)

  def wait(self, seconds=120.0):
    """The exit code; negative for a signal."""
    end = time.monotonic() + seconds
    while (code := self.poll()) is None:
      if time.monotonic() > end:
        self.signal(9)
        raise TimeoutError(self.err.read_text())
      time.sleep(0.01)
    return code

  def signal(self, number):
    """Sends a signal."""
    os.kill(self.pid, number)

  def wait_for(self, text, seconds=120.0):
    """Returns when the process has said `text` on stderr; fails if it ended before."""
    end = time.monotonic() + seconds
    while not self.err.exists() or text not in self.err.read_text():
      assert time.monotonic() < end, f'no {text!r} in {self.err.read_text()}'
      assert self.poll() is None, f'ended without {text!r}: {self.err.read_text()}'
      time.sleep(0.005)
