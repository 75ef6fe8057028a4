"""Two tiers of tests: what `make test` runs, and the rest, which `make test-all` runs too.

tests/slow.txt lists the tests of the second tier, a line each: an id, or the beginning of one. Its lines with a `>` name
tests of the first tier that may take more than LIMIT seconds of CPU; with --guard any other one that does fails.
With --cpu FILE the CPU seconds of each test (set-up, call, teardown; children that ended included) are appended to FILE.
"""

import json
import os
import pathlib

import pytest

LIMIT = 5.0
LIST = pathlib.Path(__file__).parent / 'slow.txt'
COST = pytest.StashKey[dict]()
SLOW, WHOLE = 20, 1000  # a test of the second tier is worth so many of the first; one of a file that is slow as a whole


def listed():
  """(beginnings of the ids of slow tests, those of tests that may take longer than LIMIT)."""
  lines = [line.split('#')[0].strip() for line in LIST.read_text(encoding='utf-8').splitlines()]
  slow = tuple(line for line in lines if line and not line.startswith('>'))
  return slow, tuple(line[1:].strip() for line in lines if line.startswith('>'))


def begins(name, starts):
  """The first of `starts` that the id begins with, at a border of its parts; None without one."""
  return next((s for s in starts if name.startswith(s) and name[len(s) : len(s) + 1] in ('', ':', '[', '-', '/')), None)


def pytest_addoption(parser):
  parser.addoption('--guard', action='store_true', help='fail tests of the fast tier that take too much CPU')
  parser.addoption('--cpu', default='', help='append the CPU seconds of each test to this file')


def pytest_configure(config):
  if hasattr(config.option, 'loadscopereorder'):  # of pytest-xdist, which would begin with the files of most tests
    config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
  slow, _ = listed()
  for item in items:
    if begins(item.nodeid, slow):
      item.add_marker(pytest.mark.slow)
  if hasattr(config, 'workerinput'):  # a worker of pytest-xdist: no core is to idle at the end for a long file
    weight = weights([item.nodeid for item in items], slow)
    items.sort(key=lambda item: -weight[file_of(item.nodeid)])


def file_of(name):
  """The file of an id."""
  return name.partition('::')[0]


def weights(names, slow):
  """{file: about what it costs} of ids: a file that is slow as a whole comes first, then those of most slow tests."""
  out = {}
  for name in names:
    start = begins(name, slow)
    out[file_of(name)] = out.get(file_of(name), 0) + (SLOW if start else 1) + (WHOLE if start == file_of(name) else 0)
  return out


def _seconds():
  t = os.times()
  return t.user + t.system + t.children_user + t.children_system


def _timed(item, phase):
  start = _seconds()
  result = yield
  item.stash.setdefault(COST, {})[phase] = round(_seconds() - start, 2)
  return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
  return (yield from _timed(item, 'setup'))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
  result = yield from _timed(item, 'call')
  cost = item.stash[COST]['call']
  if (item.config.getoption('--guard') and cost > LIMIT and not item.get_closest_marker('slow')
      and not begins(item.nodeid, listed()[1])):
    pytest.fail(f'took {cost} s of CPU: make it cheaper, or list it in tests/slow.txt', pytrace=False)
  return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
  result = yield from _timed(item, 'teardown')
  if item.config.getoption('--cpu'):
    with open(item.config.getoption('--cpu'), 'a', encoding='utf-8') as f:
      f.write(json.dumps({'id': item.nodeid} | item.stash[COST]) + '\n')
  return result
