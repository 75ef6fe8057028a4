"""Damaged and hostile files never crash a reader, run on, or run their code."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[3]


def test_two_hundred_damaged_files():
  done = subprocess.run([sys.executable, ROOT / 'tools/fuzz_readers.py', '--count', '200', '--seed', '1'], cwd=ROOT,
                        capture_output=True, text=True, timeout=250, env=os.environ | {'PYTHONPATH': str(ROOT)})
  assert done.returncode == 0, done.stdout + done.stderr
  assert re.search(r'^251 files, 0 failures$', done.stdout, re.MULTILINE)
  assert 'dcm made to harm         10 refused' in done.stdout
  assert 'npz made to harm         3 refused' in done.stdout
  assert sum(int(n) for n in re.findall(r'(\d+) read', done.stdout)) > 20
