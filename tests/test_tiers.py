"""The list of the second tier names tests that exist, and its lines mean what tests/tiers.py says."""

import pathlib

import pytest

from tests import tiers


@pytest.mark.parametrize('name, starts, want', [
  ('tests/a.py::test_b[c-1]', ('tests/a.py',), 'tests/a.py'), ('tests/a.py::test_b[c-1]', ('tests/a.py::test_b',), 'tests/a.py::test_b'),
  ('tests/a.py::test_bc', ('tests/a.py::test_b',), None), ('tests/a.py::test_b[c-1]', ('tests/a.py::test_b[c',), 'tests/a.py::test_b[c'),
  ('tests/ab.py::test_b', ('tests/a',), None), ('tests/a/b.py::test_c', ('tests/a',), 'tests/a')])
def test_beginnings_end_at_a_border(name, starts, want):
  assert tiers.begins(name, starts) == want


def test_heavy_files_come_first():
  names = ['tests/a.py::test_a'] * 30 + ['tests/b.py::test_b', 'tests/b.py::test_c[1]', 'tests/c.py::test_d']
  weight = tiers.weights(names, ('tests/b.py::test_b', 'tests/b.py::test_c', 'tests/c.py'))
  assert sorted(weight, key=weight.get) == ['tests/a.py', 'tests/b.py', 'tests/c.py']


def test_each_line_names_a_test_that_exists():
  root = pathlib.Path(__file__).parent.parent
  slow, longer = tiers.listed()
  assert slow and not set(slow) & set(longer)
  for line in (*slow, *longer):
    file, _, test = line.partition('::')
    assert (root / file).exists(), line
    if test:
      assert f'def {test.partition("[")[0]}(' in (root / file).read_text(encoding='utf-8'), line
