"""The benchmarks beside PyTorch run: one short round through the script itself, the steps of every case, and single functions."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from tools import bench_kernels, bench_segment, bench_step

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


@pytest.mark.parametrize('name', bench_step.CASES)
def test_every_case_at_its_smallest(name, monkeypatch):
  """Each side takes its step, which ends it where a loss is not finite; 32 pixels, few and small crops and heads."""
  monkeypatch.setattr(bench_step, 'LOCAL', {'size': 16, 'crops': 2})
  monkeypatch.setattr(bench_step, 'HEAD', {'hidden_dim': 16, 'bottleneck_dim': 8, 'out_dim': 32})
  monkeypatch.setattr(bench_step, 'DECODER', {'dim': 16, 'depth': 1, 'heads': 2})
  case = dataclasses.replace(bench_step.CASES[name], batch=2, size=32)
  assert case.flops > 0
  for make in (bench_step.jax_step, bench_step.torch_step):
    step = make(case)
    step()
    step()


def test_single_functions(tmp_path):
  out = tmp_path / 'kernels.json'
  assert bench_kernels.main(['--small', '--rounds', '1', '--step', '--json', str(out)]) == 0
  rows = json.loads(out.read_text())
  assert {r['form'] for r in rows} == {'gelu', 'gelu, gradient', 'forward', 'input', 'weights', 'weights, x turned',
                                       'weights, g turned', 'kept', 'blocks'}
  assert all(r['ms'] > 0 and r['ratio'] > 0 for r in rows)


def test_the_orders_of_a_weight_gradient_are_one_product():
  forms = bench_kernels.dense(torch, 12, 3, 5)
  want = np.asarray(forms['torch weights']())
  for name in ('weights', 'weights, x turned', 'weights, g turned'):
    np.testing.assert_allclose(forms[name](), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['unet_micro', 'swin_unetr'])
def test_segmentation_networks_at_their_smallest(name):
  case = bench_segment.counted(dataclasses.replace(bench_segment.CASES[name], size=bench_segment.SMALLEST[name], batch=1))
  for make in (bench_segment.jax_step, bench_segment.torch_step):
    make(case)()
  assert case.flops > 0


def test_forced_crops(tmp_path):
  """In a process of its own, as its contenders fork."""
  out = tmp_path / 'crops.json'
  done = subprocess.run(
      [sys.executable, 'tools/bench_segment.py', '--cases', 'crops', '--smallest', '--threads', '1', '--rounds', '1',
       '--seconds', '0.2', '--json', str(out)], capture_output=True, text=True, timeout=200, cwd=ROOT)
  assert done.returncode == 0, done.stderr[-2000:]
  rates = json.loads(out.read_text())['crops']
  assert {'jaxmed', 'monai', 'npy'} <= set(rates) and all(r['images_per_second'] > 0 for r in rates.values())


def test_arrays_are_cropped_around_classes(tmp_path):
  """The second of two crops shows a class in its centre, where it was not moved back from a border."""
  pytest.importorskip('nilearn')
  pairs = bench_segment.make_volumes(tmp_path, 1, 4)
  data = bench_segment.Arrays(bench_segment.make_arrays(tmp_path, pairs, False), 8, 2, False)
  shown = [bool(data[0]['mask'][1].any()) for _ in range(20)]
  assert all(shown) and data[0]['image'].shape == (2, 1, 8, 8, 8)
