"""Makes the faults of tools/mutations.py one by one and says which tests see them.

A test suite is worth what it notices. Each fault is made in a copy of the repository, and its files of tests run there.
They run once without a fault before: what fails then does not count. A run that does not end in time counts as caught.
`fast` says whether a test without the marker `slow` is among those that failed; these run first, so that one failure
(--most 1, the quickest) tells it. Compiled programs are kept from one run to the next, as most of them are equal.

Needs `pip install -e '.[test]'`.

Example:
  python tools/mutate.py --only centre_added,rotary_sign
  python tools/mutate.py --jobs 2 --json /tmp/mutations.json --out docs/develop/mutations.md
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from mutations import FAULTS, Fault, room  # noqa: E402
from needs import need, run_script  # noqa: E402

need('test', 'pytest')

import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
SECONDS = 600.0  # that the tests of a fault may take
MOST_FAILURES = 12
NOT_COPIED = ('.git', '.venv', 'runs', '__pycache__', '.*_cache', '*.egg-info')
REPORT = 'JAXMED_MUTATE_REPORT'  # the file to which this module, as a plugin of pytest, writes what failed
TIME, EXIT = 'time', 'exit code'  # beside the test that ran, where a run did not end, or ended in another way


# The plugin of pytest.


def _note(**values: Any) -> None:
  if REPORT in os.environ:
    with open(os.environ[REPORT], 'a', encoding='utf-8') as f:
      f.write(json.dumps(values) + '\n')


def pytest_runtest_logstart(nodeid: str) -> None:
  """Notes a test that begins."""
  _note(started=nodeid)


def pytest_runtest_logreport(report: Any) -> None:
  """Notes a test that failed, in its set-up and after it too."""
  if report.failed:
    _note(failed=report.nodeid)


def pytest_collectreport(report: Any) -> None:
  """Notes a file that could not be imported."""
  if report.failed:
    _note(failed=report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list) -> None:
  """Puts the first tier first."""
  items.sort(key=lambda item: item.get_closest_marker('slow') is not None)


def pytest_collection_finish(session: Any) -> None:
  """Notes all tests."""
  for item in session.items:
    _note(collected=item.nodeid)


# The runs.


class Ended(Exception):
  """The tool was asked to stop."""


@dataclasses.dataclass(frozen=True)
class Found:
  """What a run of pytest says: the tests that there are, that began and that failed, its exit code (None: no end)."""

  collected: tuple[str, ...]
  started: tuple[str, ...]
  failed: tuple[str, ...]
  code: int | None
  seconds: float
  tail: str


@dataclasses.dataclass
class Place:
  """A copy of the repository in which one fault at a time is made."""

  root: pathlib.Path
  cache: pathlib.Path
  stop: threading.Event

  def environment(self) -> dict[str, str]:
    """The variables that tests/conftest.py sets where it is not told a cache of compiled programs, and that cache."""
    flags = os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0'
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      if importlib.metadata.version('jaxlib').startswith('0.10.'):
        flags += ' --xla_cpu_use_fusion_emitters=false'
    # Without bytecode: a fault of the same length, made within the same second, would not be seen.
    return os.environ | {
        'PYTHONPATH': os.pathsep.join((str(self.root), str(pathlib.Path(__file__).parent))), 'XLA_FLAGS': flags.strip(),
        'PYTHONDONTWRITEBYTECODE': '1', 'JAX_PLATFORMS': 'cpu', 'JAXMED_TEST_CACHE': str(self.cache)}

  @contextlib.contextmanager
  def mutated(self, fault: Fault) -> Iterator[None]:
    """Makes the fault and takes it back."""
    path = source_of(self.root, fault.module)
    source = path.read_text(encoding='utf-8')
    if source.count(fault.old) != 1:
      raise SystemExit(f'{fault.name}: {fault.module} holds the snippet {source.count(fault.old)} times')
    try:
      path.write_text(source.replace(fault.old, fault.new), encoding='utf-8')
      yield
    finally:
      path.write_text(source, encoding='utf-8')

  def pytest(self, words: Sequence[str], seconds: float) -> Found:
    """Runs pytest to its end, or until the time is up, and kills what is left of it."""
    with tempfile.TemporaryDirectory(prefix='jaxmed-mutate-run-', ignore_cleanup_errors=True) as scratch:
      notes, said, begun = pathlib.Path(scratch, 'notes'), pathlib.Path(scratch, 'said'), time.monotonic()
      command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'mutate', '--tb=line',
                 f'--basetemp={scratch}/tests', *words]
      with open(said, 'wb') as out:
        process = subprocess.Popen(command, cwd=self.root, env=self.environment() | {REPORT: str(notes)}, stdout=out,
                                   stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)
        try:
          code = self._wait(process, begun + seconds)
        finally:
          _end(process)
      rows = [json.loads(line) for line in notes.read_text(encoding='utf-8').splitlines()] if notes.is_file() else []
      pick = lambda key: tuple(dict.fromkeys(row[key] for row in rows if key in row))
      return Found(pick('collected'), pick('started'), pick('failed'), code, time.monotonic() - begun,
                   said.read_bytes()[-2000:].decode('utf-8', 'replace'))

  def _wait(self, process: subprocess.Popen, end: float) -> int | None:
    while (code := process.poll()) is None:
      if self.stop.is_set():
        raise Ended
      if time.monotonic() > end:
        return None
      time.sleep(0.1)
    return code


def _end(process: subprocess.Popen) -> None:
  """Kills a process and all that it started; nothing where it has ended."""
  if process.poll() is not None:
    return
  with contextlib.suppress(psutil.NoSuchProcess):
    for child in psutil.Process(process.pid).children(recursive=True):
      with contextlib.suppress(psutil.NoSuchProcess):
        child.kill()
  process.kill()
  process.wait()


def source_of(root: pathlib.Path, module: str) -> pathlib.Path:
  """The file of a module."""
  path = root.joinpath(*module.split('.'))
  return path / '__init__.py' if path.is_dir() else path.with_suffix('.py')


def copied(root: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
  """A copy of the repository without its history and what was built in it."""
  return pathlib.Path(shutil.copytree(root, to, ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True))


def check_import(place: Place) -> None:
  """Ends where Python would take the package from elsewhere than the copy."""
  done = subprocess.run([sys.executable, '-c', 'import jaxmed; print(jaxmed.__file__)'], cwd=place.root, text=True,
                        env=place.environment(), capture_output=True, check=False)
  if not done.stdout.startswith(str(place.root)):
    raise SystemExit(f'jaxmed comes from {done.stdout.strip() or done.stderr.strip()}, not from the copy {place.root}')


def judged(fault: Fault, found: Found, before: set[str], fast: set[str]) -> dict[str, Any]:
  """What is kept of a fault: the tests that see it, and those of the fast tier among them."""
  tests = [name for name in found.failed if name not in before]
  how = TIME if found.code is None else f'{EXIT} {found.code}' if not tests and found.code not in (0, 1, 5) else ''
  if how:  # the last test that began did not end
    tests.append(f'{found.started[-1] if found.started else fault.tests[0]} ({how})')
  quick = []
  for name in tests:
    plain = name.removesuffix(f' ({how})')
    if any(t == plain or t.startswith(f'{plain}::') for t in fast):  # a file that cannot be imported is all its tests
      quick.append(name)
  return {'kind': fault.kind, 'room': room(fault.module), 'change': digest(fault), 'caught': tests, 'fast': quick,
          'seconds': round(found.seconds, 1)}


def digest(fault: Fault) -> str:
  """A short name of the change, by which an older result is known to be of this one."""
  return hashlib.sha256(f'{fault.old}\0{fault.new}'.encode()).hexdigest()[:12]


def measured(root: pathlib.Path, faults: Sequence[Fault], cache: pathlib.Path, *, jobs: int = 1, tier: str = 'all',
             seconds: float = SECONDS, most: int = MOST_FAILURES, clean: bool = True,
             keep: Any = lambda name, result: None) -> dict[str, dict[str, Any]]:
  """Runs the tests of each fault; `keep` is given each result as it comes.

  Args:
    most: failures of a fault after which its run ends. clean: whether to run all tests without a fault first.

  Returns:
    {name: {'kind', 'room', 'caught', 'fast', 'seconds', 'change'}}.
  """
  stop, files = threading.Event(), sorted({test for fault in faults for test in fault.tests})
  only_fast = ['-m', 'not slow']
  chosen = only_fast if tier == 'fast' else []
  results: dict[str, dict[str, Any]] = {}
  with tempfile.TemporaryDirectory(prefix='jaxmed-mutate-', ignore_cleanup_errors=True) as scratch:
    places = [Place(copied(root, pathlib.Path(scratch, f'copy{i}')), cache, stop) for i in range(jobs)]
    check_import(places[0])
    free, lock = list(places), threading.Lock()

    def work(fault: Fault | None, words: Sequence[str]) -> Found:
      with lock:
        place = free.pop()
      try:
        with place.mutated(fault) if fault else contextlib.nullcontext():
          return place.pytest(words, seconds if fault else float('inf'))
      finally:
        with lock:
          free.append(place)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
      try:
        fast = set(work(None, ['--collect-only', *only_fast, *files]).collected)
        parts = [[*chosen, *files[i::jobs]] for i in range(jobs) if files[i::jobs]]
        before = _anyway(pool, work, parts) if clean else set()
        limit = [f'--maxfail={most + len(before)}']
        waiting = {pool.submit(work, fault, [*chosen, *limit, *fault.tests]): fault for fault in faults}
        for number, done in enumerate(concurrent.futures.as_completed(waiting), 1):
          fault = waiting[done]
          result = judged(fault, done.result(), before, fast) | {'tier': tier}
          results[fault.name] = result
          keep(fault.name, result)
          _say(f'{number} of {len(faults)} {fault.name}: {seen(result)}, {result["seconds"]:.0f} s')
      except BaseException:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
  return results


def _anyway(pool: concurrent.futures.Executor, work: Any, parts: Sequence[Sequence[str]]) -> set[str]:
  """The tests that fail without a fault."""
  _say('without a fault ...')
  found = list(pool.map(lambda words: work(None, words), parts))
  for one in found:
    if one.code not in (0, 1, 5):
      raise SystemExit(f'the tests do not run without a fault:\n{one.tail}')
  failed = {name for one in found for name in one.failed}
  _say('\n  '.join([f'{sum(f.seconds for f in found):.0f} s, {len(failed)} fail and do not count', *sorted(failed)]))
  return failed


def seen(result: dict[str, Any], most: int = 3) -> str:
  """The first tests that see a fault, and how many there are."""
  tests = result['caught']
  short = [name.removeprefix('tests/') for name in tests[:most]]
  return f'{", ".join(short)} ({len(tests)})' if tests else 'NOT CAUGHT'


def table(results: dict[str, dict[str, Any]]) -> str:
  """All results in Markdown, with totals."""
  lines = ['| fault | kind | room | caught by | fast tier |', '|---|---|---|---|---|']
  for name, r in results.items():
    tests = seen(r).replace('|', '/')
    lines.append(f'| {name} | {r["kind"]} | {r["room"]} | {tests} | {"yes" if r["fast"] else "no"} |')
  return '\n'.join([*lines, '', totals(results)]) + '\n'


def totals(results: dict[str, dict[str, Any]]) -> str:
  """One line."""
  caught, fast = (sum(bool(r[key]) for r in results.values()) for key in ('caught', 'fast'))
  return f'caught by all: {caught} of {len(results)}, by fast: {fast} of {len(results)}'


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _interrupt(number: int, frame: Any) -> None:
  raise KeyboardInterrupt


def _known(path: str, faults: Sequence[Fault]) -> dict[str, dict[str, Any]]:
  """Results of a file that are of the faults as they are now."""
  if not path or not os.path.isfile(path):
    return {}
  values = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  return {f.name: values[f.name] for f in faults if values.get(f.name, {}).get('change') == digest(f)}


def main(argv: Sequence[str] | None = None) -> int:
  """The command; returns its exit code."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='', metavar='NAME,NAME', help='these faults alone')
  parser.add_argument('--tier', choices=('fast', 'all'), default='all', help='run tests without the marker slow alone')
  parser.add_argument('--jobs', type=int, default=1, help='faults at a time')
  parser.add_argument('--seconds', type=float, default=SECONDS, help='that the tests of a fault may take')
  parser.add_argument('--most', type=int, default=MOST_FAILURES, help='failures of a fault after which its run ends')
  parser.add_argument('--trust', action='store_true', help='take it that all tests pass without a fault')
  parser.add_argument('--json', default='', metavar='FILE', help='keeps the results; those of other faults stay in it')
  parser.add_argument('--out', default='', metavar='FILE.md', help='writes the table')
  parser.add_argument('--cache', default='', metavar='DIR', help='keeps compiled programs for the next time')
  args = parser.parse_args(argv)
  names = [name for name in args.only.split(',') if name]
  unknown = set(names) - {fault.name for fault in FAULTS}
  if unknown:
    parser.error(f'no fault of the name {", ".join(sorted(unknown))}')
  results = _known(args.json, FAULTS)

  def keep(name: str, result: dict[str, Any]) -> None:
    results[name] = result
    if args.json:
      part = pathlib.Path(f'{args.json}.part')
      part.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
      part.replace(args.json)

  for number in (signal.SIGTERM, signal.SIGINT):  # also where a shell started it in the background
    signal.signal(number, _interrupt)
  code, chosen = 0, [fault for fault in FAULTS if not names or fault.name in names]
  with tempfile.TemporaryDirectory(prefix='jaxmed-mutate-cache-', ignore_cleanup_errors=True) as scratch:
    cache = pathlib.Path(args.cache or scratch).absolute()
    cache.mkdir(parents=True, exist_ok=True)
    try:
      measured(ROOT, chosen, cache, jobs=max(args.jobs, 1), tier=args.tier, seconds=args.seconds, most=args.most,
               clean=not args.trust, keep=keep)
    except (KeyboardInterrupt, Ended):
      _say('stopped')
      code = 130
  ordered = {fault.name: results[fault.name] for fault in FAULTS if fault.name in results}
  print(table(ordered), end='')
  if args.out and not code:
    path = pathlib.Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = '# What the tests see\n\nWritten by `tools/mutate.py`, which says what it does.\n\n'
    path.write_text(head + table(ordered), encoding='utf-8')
  return code or int(any(not r['caught'] for r in ordered.values()))


if __name__ == '__main__':
  run_script(main)
