"""A library says nothing where nothing is wrong."""

import os
import subprocess
import sys


def test_loading_a_run_prints_nothing(trained):
  code = f'import jaxmed; print(jaxmed.load({str(trained)!r}).vocabulary)'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=os.getcwd())
  assert 'R' in done.stdout
  assert done.stderr == ''
