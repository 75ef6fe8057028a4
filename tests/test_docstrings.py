"""Meanings of options from docstrings."""

import dataclasses

import pytest

from jaxmed import docstrings, objectives
from jaxmed.models import registry


@dataclasses.dataclass
class Base:
  """Base.

  Attributes:
    width: of a block. depth, heads: how many; a head has `size` numbers.
    mask_*: of tokens, see `mask.py: x`.
  """

  width: int = 1
  depth: int = 2
  heads: int = 3
  size: int = 4
  mask_ratio: float = 0.5
  mask_mode: str = 'a'
  silent: int = 0


@dataclasses.dataclass
class Child(Base):
  """A child
  of two lines.

  More.

  Attributes:
    depth: another meaning,
      on two lines.

  width: no entry, as the section ended.
  """


def test_entries():
  assert docstrings.meanings(Base) == {
      'width': 'of a block', 'depth': 'how many; a head has `size` numbers', 'heads': 'how many; a head has `size` numbers',
      'size': 'see depth', 'mask_ratio': 'of tokens, see `mask.py: x`', 'mask_mode': 'of tokens, see `mask.py: x`', 'silent': ''}


def test_the_nearest_class_wins():
  meanings = docstrings.meanings(Child)
  assert meanings['depth'] == 'another meaning, on two lines'
  assert meanings['width'] == 'of a block'
  assert docstrings.summary(Child) == 'A child\nof two lines.\n\nMore.'


@pytest.mark.parametrize('name', objectives.METHODS)
def test_every_option_of_a_method_is_explained(name):
  meanings = docstrings.meanings(objectives.get(name))
  assert not [option for option in objectives.default_options(name) if not meanings[option]]


@pytest.mark.parametrize('family', registry.FAMILIES)
def test_every_option_of_a_model_is_explained(family):
  meanings = docstrings.meanings(registry.FAMILIES[family])
  assert not [option for option in registry.family_options(family) if not meanings[option]]
