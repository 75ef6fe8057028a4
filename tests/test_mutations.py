"""The list of faults fits the code: each can be made, changes its module, and names tests that there are."""

import collections
import importlib
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT / 'tools'))
mutations, mutate = (importlib.import_module(name) for name in ('mutations', 'mutate'))


@pytest.mark.parametrize('fault', mutations.FAULTS, ids=lambda f: f.name)
def test_a_fault_can_be_made(fault):
  path = ROOT.joinpath(*fault.module.split('.')).with_suffix('.py')
  path = path if path.is_file() else path.with_suffix('') / '__init__.py'
  source = path.read_text(encoding='utf-8')
  assert source.count(fault.old) == 1
  mutated = source.replace(fault.old, fault.new)
  assert mutated != source
  compile(mutated, str(path), 'exec')
  assert fault.tests
  for test in fault.tests:
    assert (ROOT / test).is_file(), test


def test_there_are_enough_and_no_two_alike():
  assert len(mutations.FAULTS) >= 60
  assert len({f.name for f in mutations.FAULTS}) == len(mutations.FAULTS)
  assert len({(f.module, f.old, f.new) for f in mutations.FAULTS}) == len(mutations.FAULTS)


def test_every_room_has_at_least_two():
  modules = ('.'.join(path.relative_to(ROOT).with_suffix('').parts) for path in (ROOT / 'jaxmed').rglob('*.py')
             if path.name != '__init__.py')
  counts = collections.Counter(mutations.room(fault.module) for fault in mutations.FAULTS)
  few = {room: counts[room] for room in map(mutations.room, modules) if counts[room] < 2}
  assert not few


MODULE = """def double(x):
  return 2 * x


def half(x):
  return x / 2
"""
TESTS = """import pytest

from jaxmed.room.sums import double


def test_double():
  assert double(3) == 6


@pytest.mark.slow
def test_double_of_nothing():
  assert double(0) == 0


def test_fails_anyway():
  assert double(1) == 3
"""
TOY = (('slow_alone', 'return 2 * x', 'return 2 * max(x, 1)'), ('survivor', 'x / 2', 'x / 3'),
       ('broken', 'def double(x):', 'def twice(x):'))
FAULT = mutations.Fault('fault', 'kind', 'jaxmed.room.sums', 'a', 'b', ('tests/test_sums.py',))


@pytest.fixture(scope='module')
def toy_root(tmp_path_factory):
  """A repository of one module and one file of tests, one of which fails."""
  root = tmp_path_factory.mktemp('toy')
  for name, text in (('jaxmed/__init__.py', ''), ('jaxmed/room/__init__.py', ''), ('jaxmed/room/sums.py', MODULE),
                     ('tests/test_sums.py', TESTS)):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text(text)
  (root / 'pytest.ini').write_text('[pytest]\nmarkers =\n  slow: takes long\n')
  return root


TOYS = [mutations.Fault(name, 'kind', 'jaxmed.room.sums', old, new, ('tests/test_sums.py',)) for name, old, new in TOY]


@pytest.fixture(scope='module')
def toy(toy_root):
  """What is found out about the faults of a toy."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('PYTEST_DISABLE_PLUGIN_AUTOLOAD', '1')  # starts sooner
    results = mutate.measured(toy_root, TOYS, toy_root / 'cache')
  assert (toy_root / 'jaxmed/room/sums.py').read_text() == MODULE
  return results


def test_the_command(toy_root, tmp_path, monkeypatch, capsys):
  """One fault, which no test sees: 1, the table in both files; a name that there is not is told."""
  for name, value in (('ROOT', toy_root), ('FAULTS', TOYS)):
    monkeypatch.setattr(mutate, name, value)
  monkeypatch.setattr(mutate.signal, 'signal', lambda number, does: None)
  monkeypatch.setenv('PYTEST_DISABLE_PLUGIN_AUTOLOAD', '1')
  files = ['--json', str(tmp_path / 'out.json'), '--out', str(tmp_path / 'out.md')]
  assert mutate.main(['--only', 'survivor', '--tier', 'fast', *files]) == 1
  assert '| survivor | kind | room | NOT CAUGHT | no |' in capsys.readouterr().out
  assert list(json.loads((tmp_path / 'out.json').read_text())) == ['survivor']
  assert (tmp_path / 'out.md').read_text().startswith('# What the tests see')
  with pytest.raises(SystemExit):
    mutate.main(['--only', 'no_such'])


@pytest.mark.parametrize(('fault', 'tests', 'fast'), [
    ('slow_alone', ['tests/test_sums.py::test_double_of_nothing'], False), ('survivor', [], False),
    ('broken', ['tests/test_sums.py'], True)])
def test_what_sees_a_fault(toy, fault, tests, fast):
  assert toy[fault]['caught'] == tests
  assert toy[fault]['fast'] == (tests if fast else [])


def test_the_table(toy):
  text = mutate.table(toy)
  assert text.endswith('caught by all: 2 of 3, by fast: 1 of 3\n')
  assert '| survivor | kind | room | NOT CAUGHT | no |' in text
  assert '| broken | kind | room | test_sums.py (1) | yes |' in text


@pytest.mark.parametrize(('code', 'failed', 'started', 'want'), [
    (None, (), ('t.py::a', 't.py::b'), ['t.py::b (time)']), (None, ('t.py::a',), ('t.py::a',), ['t.py::a', 't.py::a (time)']),
    (-11, (), ('t.py::a',), ['t.py::a (exit code -11)']), (4, (), (), ['tests/test_sums.py (exit code 4)']),
    (1, ('t.py::anyway',), ('t.py::anyway',), []), (5, (), (), []), (0, (), ('t.py::a',), [])])
def test_a_run_that_does_not_end_is_the_last_tests(code, failed, started, want):
  found = mutate.Found((), started, failed, code, 1.0, '')
  assert mutate.judged(FAULT, found, {'t.py::anyway'}, {'t.py::a'})['caught'] == want
  quick = mutate.judged(FAULT, found, {'t.py::anyway'}, {'t.py::a'})['fast']
  assert quick == [name for name in want if 't.py::a' in name]
