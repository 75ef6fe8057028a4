"""Studies of these tests draw no figures, and trace each shape once for all tests of a file."""

import pytest

from jaxmed.study import cost


@pytest.fixture(autouse=True, scope='module')
def traced(no_figures):
  """One memory of shapes for all studies of a file."""
  own = cost.Sizes()
  with pytest.MonkeyPatch.context() as m:
    m.setattr(cost, 'Sizes', lambda: own)
    yield
