"""One server for all runs of several processes."""

import pytest


@pytest.fixture(scope='session')
def crews():
  """Starts real processes that join, see tests/parallel/crew.py."""
  from tests.parallel.crew import Server
  server = Server()
  yield server
  server.close()
