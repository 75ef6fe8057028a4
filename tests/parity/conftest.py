"""These tests compare with PyTorch; without it (extra `parity`) they are skipped with a word."""

import importlib.util

import pytest

MISSING = [name for name in ('torch', 'timm') if importlib.util.find_spec(name) is None]

if MISSING:
  collect_ignore_glob = ['channelvit_torch.py']


def pytest_collection_modifyitems(items):
  if MISSING:
    skip = pytest.mark.skip(reason=f"{' and '.join(MISSING)} not installed: pip install 'jaxmed[parity]'")
    for item in items:
      if 'parity' in item.path.parts:
        item.add_marker(skip)
