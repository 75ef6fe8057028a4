"""Trains tiny runs of real processes, does harm to them at random moments, resumes them, and compares the ends.

  nice python tools/chaos.py --corpus CORPUS --rounds 100 --seed 0 --out chaos.jsonl

Needs `pip install -e '.[test]'`: the processes are started as the tests start them.

A round is one disaster: a kill of one process or all (SIGKILL, SIGTERM, in start-up, compilation or training), a full
disk, a damaged newest checkpoint, a process that is stopped for a while, a damaged record shard; a second owner, which
resumes a run that goes on and must be refused with 2 and one line; a dead owner, whose run is resumed after a kill of
all and must be taken over with a note. Each part of a run has 1, 2 or 4 processes over 4 devices in all, so that the
mesh stays and only the wires between devices change, or 3 over 3. What launches processes is played here: when one of
them ends in an error, the others have PATIENCE seconds. Mostly they end at once; now and then gloo does not notice that
the other end is gone, and JAX's heartbeat ends them.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from jaxmed.data.corpus.open import open_source  # noqa: E402
from jaxmed.errors import choose  # noqa: E402
from tools.needs import need, run_script  # noqa: E402

need('test', 'pytest')

from tests.parallel import crew  # noqa: E402

HEARTBEAT = 15  # seconds; 100 in a run outside of here, see jaxmed/parallel/process.py
PATIENCE = 4.0 * HEARTBEAT
STEPS = 12
# Codes after which a launcher starts a run again; JAX itself aborts the others when process 0 is killed. 2 only where
# there is a mistake to mend.
AGAIN, MISTAKES = (0, 69, 75, -signal.SIGKILL, -signal.SIGABRT), ('full disk', 'shard')
DISASTERS = ('kill one', 'kill all', 'term one', 'term all', 'full disk', 'damage', 'pause', 'shard', 'second owner',
             'dead owner')
# A run of two owners goes slowly, so that the second one finds it at work.
SLOW = """
import time as _time
_fast = loop._batches
def _slowly(run, first):
  for batch in _fast(run, first):
    _time.sleep(0.5)
    yield batch
loop._batches = _slowly
"""
HELD, TAKEN = 'is being written by process', 'which is gone: taken over'  # what the two are told
DISK = 64 << 20
# As root the disk is a small file system; otherwise no file may grow beyond a few kilobytes.
LIMIT = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, resource.RLIM_INFINITY))\n'


@dataclasses.dataclass
class Chaos:
  """One series of runs.

  Attributes:
    place: a folder for everything; runs lie in place/disk. mounted: whether that is a small file system.
  """

  server: Any
  corpus: pathlib.Path
  place: pathlib.Path
  rng: np.random.Generator
  mounted: bool
  processes: int = 0  # always as many; 0: another number each time
  part: int = 0

  @property
  def run(self) -> pathlib.Path:
    return self.place / 'disk' / 'run'

  def start(self, argv: list, count: int, hook: str = '') -> list:
    self.part += 1
    devices = 4 // count if count != 3 else 1
    return crew.launch(self.server, argv, self.place / f'part{self.part}', count, devices, hook=crew.PLAIN + hook,
                       JAXMED_HEARTBEAT_SECONDS=str(HEARTBEAT))

  def round(self, what: str) -> dict[str, Any]:
    """One part of the run with one disaster in it; what came of it."""
    resumed = (self.run / 'config.json').is_file()
    argv = ['train', '--resume', self.run] if resumed else self._fresh()
    count = self.processes or int(self.rng.choice([1, 2, 4, 3], p=[0.3, 0.35, 0.25, 0.1]))
    begun, shard = checkpoints(self.run), next(self.corpus.glob('*train*record*'))
    whole = shard.read_bytes()
    if what == 'shard':
      data = bytearray(whole)
      data[len(data) // 3: 2 * len(data) // 3] = self.rng.bytes(2 * len(data) // 3 - len(data) // 3)
      shard.write_bytes(bytes(data))
    try:
      hook = LIMIT if what == 'full disk' and not self.mounted else SLOW if what.endswith('owner') else ''
      forks = self.start(argv, count, hook)
      self._harm(what, forks)
      other = self._second() if what == 'second owner' else {}
      codes, left = outcome(forks)
      done, kept = last_row(self.run), checkpoints(self.run)
      other |= self._taken_over() if what == 'dead owner' else {}
    finally:
      shard.write_bytes(whole)
      (self.run.parent / 'ballast').unlink(missing_ok=True)
    codes_fit = all(c in AGAIN or (c == 2 and what in MISTAKES) for c in codes)
    at_peace = what != 'second owner' or set(codes) == {0}
    return {'what': what, 'processes': count, 'codes': codes, 'left': left, 'from': max(begun, default=0),
            'reached': done, 'lost': done - max(kept, default=0), 'ended': finished(self.run),
            'as_expected': not left and codes_fit and at_peace and other.get('told', True)} | other

  def _second(self) -> dict[str, Any]:
    """Resumes the run that goes on, by one or two processes; their codes, and whether each had 2 and its one line."""
    forks = self.start(['train', '--resume', self.run], int(self.rng.choice([1, 2])))
    codes, _ = outcome(forks)
    said = [fork.err.read_text().splitlines() for fork in forks]
    one_line = all(len(lines) == 1 and HELD in lines[0] for lines in said if lines)
    return {'second': codes, 'told': set(codes) == {2} and bool(said[0]) and one_line}

  def _taken_over(self) -> dict[str, Any]:
    """Resumes the run of killed processes to its end; its codes, and whether the first one took it over with a note."""
    forks = self.start(['train', '--resume', self.run], self.processes or 1)
    codes, _ = outcome(forks)
    notes = sum(TAKEN in line for line in forks[0].err.read_text().splitlines())
    return {'next': codes, 'told': set(codes) == {0} and notes == 1 and not list(self.run.glob('.owner*'))}

  def _fresh(self) -> list:
    shutil.rmtree(self.run, ignore_errors=True)
    return crew.begin(self.corpus, self.run, steps=STEPS, mesh={'fsdp': 1})

  def _harm(self, what: str, forks: list) -> None:
    last = STEPS // 2 if what.endswith('owner') else STEPS
    moment = 'device(s)' if self.rng.random() < 0.25 else f'step {int(self.rng.integers(1, last))}/{STEPS}'
    wait(forks, moment)
    time.sleep(float(self.rng.uniform(0, 0.2)))
    some = [forks[int(self.rng.integers(len(forks)))]] if what.endswith('one') or what == 'pause' else forks
    if what.startswith(('kill', 'term')) or what in ('damage', 'dead owner'):
      send(some, signal.SIGTERM if what.startswith('term') else signal.SIGKILL)
    if what == 'pause':
      send(some, signal.SIGSTOP)
      time.sleep(float(self.rng.uniform(0.5, 2)))
      send(some, signal.SIGCONT)
    if what == 'full disk' and self.mounted:
      free = shutil.disk_usage(self.run.parent).free
      # The run may take what was free a moment ago: then the disk is full as well.
      with contextlib.suppress(OSError), open(self.run.parent / 'ballast', 'wb') as f:
        f.write(bytes(max(free - int(self.rng.integers(0, 300_000)), 0)))
    if what == 'damage':
      outcome(forks)
      self._damage()

  def _damage(self) -> None:
    """Cuts or flips a file of the newest checkpoint, where there is another one to go back to."""
    steps = checkpoints(self.run)
    if len(steps) < 2:
      return
    files = sorted(p for p in (self.run / 'checkpoints' / str(steps[-1])).rglob('*') if p.is_file())
    file = files[int(self.rng.integers(len(files)))]
    data = bytearray(file.read_bytes())
    if self.rng.random() < 0.5:
      data = data[:len(data) // 2]
    elif data:
      data[int(self.rng.integers(len(data)))] ^= 1 << int(self.rng.integers(8))
    file.write_bytes(bytes(data))

  def finish(self) -> dict[str, Any]:
    """Resumes in peace until the end, and compares with the undisturbed run."""
    argv = ['train', '--resume', self.run] if (self.run / 'config.json').is_file() else self._fresh()
    codes, _ = outcome(self.start(argv, self.processes or 1))
    return {'codes': codes} | compare(self.place / 'whole', self.run)


def wait(forks: list, text: str) -> None:
  """Until process 0 has said `text`, or any has ended."""
  while all(f.poll() is None for f in forks):
    if forks[0].err.exists() and text in forks[0].err.read_text():
      return
    time.sleep(0.01)


def send(forks: list, number: int) -> None:
  """A signal to those that still run."""
  for fork in forks:
    if fork.poll() is None:
      fork.signal(number)


def outcome(forks: list) -> tuple[list[int], int]:
  """(exit codes, how many had to be killed because they went on waiting for one that had ended)."""
  end, left = None, 0
  while None in (codes := [f.poll() for f in forks]):
    if end is None and any(c not in (None, 0) for c in codes):
      end = time.monotonic() + PATIENCE
    if end is not None and time.monotonic() > end:
      left = codes.count(None)
      send(forks, signal.SIGKILL)
      end += 1000
    time.sleep(0.02)
  return codes, left


def checkpoints(run: pathlib.Path) -> list[int]:
  """Steps of the complete checkpoints."""
  return sorted(int(p.name) for p in (run / 'checkpoints').glob('*') if p.name.isdigit())


def last_row(run: pathlib.Path) -> int:
  """The last step that was logged."""
  from jaxmed.train.logs import read_rows
  return max((r['step'] for r in read_rows(run / 'metrics.jsonl')), default=0)


def finished(run: pathlib.Path) -> bool:
  """Whether the last step is saved."""
  return STEPS in checkpoints(run)


def most_lost() -> int:
  """Steps that a kill may cost: it may come while a checkpoint is being written, and the next one waits for that."""
  return 2 * crew.TRAIN['checkpoint_every']


def compare(whole: pathlib.Path, run: pathlib.Path) -> dict[str, Any]:
  """How far a run ended from the undisturbed one: rows, losses, values of the last state that differ."""
  import jax

  from jaxmed.train.logs import read_rows
  from tests.common import saved_state
  rows = [[(r['step'], r['loss']) for r in read_rows(p / 'metrics.jsonl') if 'loss' in r] for p in (whole, run)]
  flat = lambda state: np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(state)])
  a, b = flat(saved_state(whole)), flat(saved_state(run))
  same_rows = [n for n, _ in rows[0]] == [n for n, _ in rows[1]]
  off = max((abs(x / y - 1) for (_, x), (_, y) in zip(*rows, strict=False)), default=1.0) if same_rows else float('inf')
  return {'rows': same_rows, 'loss_off': off, 'values': len(a), 'differ': int((a != b).sum()),
          'most': float(np.abs(a - b).max())}


def mount(folder: pathlib.Path) -> bool:
  """Makes `folder` a file system of DISK bytes, where this user may."""
  folder.mkdir(parents=True)
  if os.geteuid():
    return False
  return not subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={DISK}', 'tmpfs', str(folder)],
                            capture_output=True).returncode


def rounds(corpus: pathlib.Path, place: pathlib.Path, count: int, seed: int, say: Any = print,
           disasters: tuple[str, ...] = DISASTERS, processes: int = 0) -> list[dict[str, Any]]:
  """Does `count` rounds on a copy of `corpus`; what came of each, and of each run that ended."""
  own = pathlib.Path(shutil.copytree(corpus, place / 'corpus'))
  server, rng = crew.Server(), np.random.default_rng(seed)
  mounted = mount(place / 'disk')
  chaos, out = Chaos(server, own, place, rng, mounted, processes), []
  try:
    plain = chaos.start(crew.begin(own, place / 'whole', steps=STEPS), processes or 1)
    assert set(outcome(plain)[0]) == {0}, plain[0].err.read_text()
    for n in range(count):
      out.append(chaos.round(disasters[n % len(disasters)]))
      say(json.dumps(out[-1]))
      if out[-1]['ended'] or n == count - 1:
        out.append(chaos.finish())
        say(json.dumps(out[-1]))
        shutil.rmtree(chaos.run)
  finally:
    server.close()
    if mounted:
      subprocess.run(['umount', '-l', str(place / 'disk')], check=False)
  return out


def summary(results: list[dict[str, Any]]) -> str:
  """A few lines for people."""
  parts, ends = [r for r in results if 'what' in r], [r for r in results if 'differ' in r]
  good = sum(r['rows'] and r['loss_off'] < 1e-5 and set(r['codes']) == {0} for r in ends)
  lost = [r['lost'] for r in parts if r['what'] not in ('term one', 'term all', 'pause', 'second owner')]
  most = lambda key: max((r[key] for r in ends), default=0)
  total = lambda key: sum(r[key] for r in ends)
  return (f'{len(parts)} disasters, {sum(r["as_expected"] for r in parts)} ended as they should\n'
          f'{good} of {len(ends)} runs survived\n'
          f'steps lost by a disaster that leaves no time to save: median {np.median(lost or [0]):g}, most '
          f'{max(lost, default=0)} (a checkpoint every {crew.TRAIN["checkpoint_every"]}, so at most {most_lost()})\n'
          f'values of the last state that differ: {total("differ")} of {total("values")}, by at most {most("most"):.2g}'
          f'\nlosses differ by at most {most("loss_off"):.2g} of themselves')


def main(argv: Sequence[str] | None = None) -> int:
  """Parses, does the rounds, prints what came of them."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--only', default=','.join(DISASTERS), help='these disasters, in this order: ' + ', '.join(DISASTERS))
  p.add_argument('--rounds', type=int, default=100)
  p.add_argument('--processes', type=int, default=0, help='always as many, so that all bits must be the same')
  p.add_argument('--seed', type=int, default=0)
  p.add_argument('--corpus', type=pathlib.Path, required=True, help='of 24 training records or more')
  p.add_argument('--out', type=pathlib.Path, help='a file for what came of each, JSON lines')
  p.add_argument('--keep', action='store_true', help='leave the runs where they are')
  args = p.parse_args(argv)
  chosen = tuple(choose('disaster', what.strip(), DISASTERS) for what in args.only.split(','))
  open_source(args.corpus)
  place = pathlib.Path(tempfile.mkdtemp(prefix='chaos-'))
  try:
    results = rounds(args.corpus, place, args.rounds, args.seed, lambda line: print(line, flush=True),
                     chosen, args.processes)
  finally:
    if args.keep:
      print(f'everything is in {place}', file=sys.stderr)
    else:
      shutil.rmtree(place, ignore_errors=True)
  if args.out:
    args.out.write_text(''.join(json.dumps(r) + '\n' for r in results))
  print(summary(results))
  return 0


if __name__ == '__main__':
  run_script(main)
