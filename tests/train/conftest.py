"""Runs of these tests draw no figures: that is the half of their time, and tests/test_cli.py looks at them."""

import pytest

from jaxmed.train import pictures


@pytest.fixture(autouse=True, scope='package')
def no_figures(trained):
  """`trained` comes first: it has its figures."""
  with pytest.MonkeyPatch.context() as m:
    m.setattr(pictures, 'views', lambda run, state: None)
    m.setattr(pictures, 'end', lambda run, state: None)
    yield
