"""Files are whole or absent, also where the system refuses."""

import os

import pytest

from jaxmed import files
from jaxmed.errors import UserError


@pytest.mark.parametrize('call', ['fsync', 'replace'])
def test_what_the_system_refuses_is_told_and_leaves_the_old_file(tmp_path, monkeypatch, call):
  path = tmp_path / 'x.json'
  files.write_json(path, {'a': 1})

  def refuse(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, call, refuse)
  with pytest.raises(UserError, match=r'cannot write .*x\.json: No space left on device'):
    files.write_json(path, {'a': 2})
  assert files.read_json(path) == {'a': 1} and [p.name for p in tmp_path.iterdir()] == ['x.json']


def test_a_link_is_written_through(tmp_path):
  (tmp_path / 'disk').mkdir()
  (tmp_path / 'x.txt').symlink_to(tmp_path / 'disk' / 'y.txt')
  files.write_text(tmp_path / 'x.txt', 'whole')
  assert (tmp_path / 'x.txt').is_symlink() and (tmp_path / 'disk' / 'y.txt').read_text() == 'whole'


def test_damaged_lines_are_counted(tmp_path):
  (tmp_path / 'm.jsonl').write_text('{"a": 1}\n{"a": 2\n\n{"a": 3}\n')
  assert files.read_json_lines(tmp_path / 'm.jsonl') == ([{'a': 1}, {'a': 3}], 1)
