"""Huge pages for the scratch memory of programs on CPU.

XLA asks the C library for all scratch memory of a step at once and gives it back after the step, so the
kernel makes each step's pages anew, 4 KiB at a time. In pages of 2 MiB a small ViT's training step takes a tenth to a
quarter less time (tools/bench_step.py with and without --huge-pages). glibc (2.35 and newer) reads the setting when a
process starts, never again.
"""

import os
import pathlib
import platform
import sys

TUNABLE = 'glibc.malloc.hugetlb'
_ENABLED = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')


def has_huge_pages() -> bool:
  """Whether this process asks for huge pages."""
  return f'{TUNABLE}=1' in os.environ.get('GLIBC_TUNABLES', '').split(':')


def can_have_huge_pages() -> bool:
  """Whether this system could give them: Linux that has them not switched off, glibc >= 2.35."""
  name, version = platform.libc_ver()
  if name != 'glibc' or tuple(map(int, version.split('.')[:2])) < (2, 35) or not _ENABLED.is_file():
    return False
  return '[never]' not in _ENABLED.read_text()


def restart_with_huge_pages() -> bool:
  """Starts this process over, same id and arguments, with huge pages; to be called before anything else.

  Returns:
    True if the process has them already, so that the second start goes on from here; False if it cannot. The
    user's own setting (any value of glibc.malloc.hugetlb) stays as it is.
  """
  tunables = os.environ.get('GLIBC_TUNABLES', '')
  if TUNABLE in tunables or not can_have_huge_pages():
    return has_huge_pages()
  env = dict(os.environ, GLIBC_TUNABLES=':'.join(filter(None, [tunables, f'{TUNABLE}=1'])))
  sys.stdout.flush()
  sys.stderr.flush()
  os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)
