"""The step benchmark runs: one short round of a case with both sides, through the script itself."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_one_round(tmp_path):
  out = tmp_path / 'bench.json'
  done = subprocess.run(
      [sys.executable, 'tools/bench_step.py', '--cases', 'vit_tiny', '--rounds', '1', '--each', '1', '--batch', '1',
       '--json', str(out)], capture_output=True, text=True, timeout=200, cwd=ROOT)
  assert done.returncode == 0, done.stderr[-2000:]
  case, = json.loads(out.read_text())['cases']
  assert case['case'] == 'vit_tiny' and case['batch'] == 1 and case['tokens'] == 196
  # 86 million multiply-adds a block of 197 tokens, 12 of them, forward and twice that backward.
  assert 6 < case['gflop'] < 9
  assert case['ratio'] > 0 and case['jax_seconds'] > 0 and case['torch_seconds'] > 0
