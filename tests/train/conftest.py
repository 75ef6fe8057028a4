"""Runs of these tests draw no figures."""

import pytest


@pytest.fixture(autouse=True, scope='module')
def plain(no_figures):
  """See tests/conftest.py."""
