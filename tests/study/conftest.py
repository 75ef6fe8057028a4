"""Studies of these tests trace each shape once for all tests of a file."""

import pytest

from jaxmed.study import cost


@pytest.fixture(autouse=True, scope='module')
def traced():
  """One memory of shapes for all studies of a file."""
  own = cost.Sizes()
  with pytest.MonkeyPatch.context() as m:
    m.setattr(cost, 'Sizes', lambda: own)
    yield
