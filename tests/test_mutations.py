"""The list of faults fits the code: each can be made, changes its module, and names tests that there are."""

import collections
import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def _tool(name):
  spec = importlib.util.spec_from_file_location(name, ROOT / 'tools' / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


mutations = _tool('mutations')


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
