import os
import subprocess
import sys

import pytest

from jaxmed.parallel import memory

CODE = '''
import os, sys
from jaxmed.parallel.memory import restart_with_huge_pages
print('start', os.getpid(), flush=True)
had = restart_with_huge_pages()
print(had, os.environ.get('GLIBC_TUNABLES'), sys.argv[1:])
'''


def run(tunables):
  env = dict(os.environ, GLIBC_TUNABLES=tunables)
  command = [sys.executable, '-X', 'utf8', '-c', CODE, '--a b', 'c']
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


@pytest.mark.skipif(not memory.can_have_huge_pages(), reason='this system has no huge pages')
def test_starts_over_once_with_the_same_arguments_and_id():
  *starts, last = run('glibc.malloc.arena_max=4')
  assert len(starts) == 2 and starts[0] == starts[1]
  assert last == "True glibc.malloc.arena_max=4:glibc.malloc.hugetlb=1 ['--a b', 'c']"


@pytest.mark.parametrize('value', [0, 1])
def test_leaves_a_setting_alone(value):
  *starts, last = run(f'glibc.malloc.hugetlb={value}')
  assert len(starts) == 1
  assert last == f"{value == 1} glibc.malloc.hugetlb={value} ['--a b', 'c']"


@pytest.mark.parametrize('libc,text,want', [
    (('glibc', '2.36'), 'always [madvise] never', True), (('glibc', '2.31'), '[always] madvise never', False),
    (('', ''), '[always] madvise never', False), (('glibc', '2.36'), 'always madvise [never]', False),
])
def test_where_they_can_be_had(monkeypatch, tmp_path, libc, text, want):
  file = tmp_path / 'enabled'
  file.write_text(text)
  monkeypatch.setattr(memory, '_ENABLED', file)
  monkeypatch.setattr(memory.platform, 'libc_ver', lambda: libc)
  assert memory.can_have_huge_pages() is want
  monkeypatch.setattr(memory, '_ENABLED', tmp_path / 'none')
  assert not memory.can_have_huge_pages()
