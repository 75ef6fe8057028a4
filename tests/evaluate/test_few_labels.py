"""Parts of the subjects: nested, with every class where that can be; the area under a curve and where two cross."""

import itertools

import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.evaluate import few_labels

FRACTIONS = (1, 5, 10, 25, 50, 100)


def rows(counts, per=3, seed=0):
  """Rows of subjects of one class each, `per` rows a subject, in any order."""
  y = np.repeat(np.arange(len(counts)), counts)
  names = np.array([f's{i}' for i in range(len(y))])
  order = np.random.default_rng(seed).permutation(len(y) * per)
  return np.repeat(names, per)[order], np.eye(len(counts), dtype=bool)[np.repeat(y, per)[order]]


@pytest.mark.parametrize('seed', range(3))
def test_parts_are_nested_whole_subjects_with_every_class(seed):
  subjects, content = rows([150, 47, 3])
  found = few_labels.parts(subjects, content, 'abc', (2, *FRACTIONS[1:]), seed)
  for smaller, larger in itertools.pairwise(found):
    assert not (smaller & ~larger).any()
  for percent, part in zip((2, *FRACTIONS[1:]), found, strict=True):
    inside = set(subjects[part])
    assert len(inside) == round(percent * 2) and not inside & set(subjects[~part])
    assert content[part].any(axis=0).all()
  share = content[found[3]].mean(axis=0)  # a quarter of the subjects: the proportions hold
  np.testing.assert_allclose(share, [0.75, 0.235, 0.015], atol=0.04)
  other = few_labels.parts(subjects, content, 'abc', (10,), seed + 1)[0]
  assert set(subjects[other]) != set(subjects[found[2]])


def test_a_part_that_cannot_hold_every_class_is_refused():
  subjects, content = rows([150, 47, 3])
  with pytest.raises(UserError, match=r'1 % of 200 training subjects \(2\) leave no row of .*all is 1.5') as e:
    few_labels.parts(subjects, content, 'abc', FRACTIONS, 0)
  assert '\n' not in str(e.value)
  # One subject that shows all classes is enough.
  assert few_labels.parts(np.append(subjects, ['all'] * 3), np.r_[content, np.eye(3, dtype=bool)], 'abc', (0.5,), 0)[0].sum() == 3


def test_what_no_row_shows_is_not_asked_for():
  subjects, content = rows([5, 5])
  content = np.c_[content, np.zeros(len(content), bool)]
  assert [p.sum() for p in few_labels.parts(subjects, content, 'abc', (20, 100), 0)] == [6, 30]


def test_the_area_is_of_the_logarithm():
  assert few_labels.area((1, 10, 100), np.array([0.2, 0.4, 0.8])) == pytest.approx((0.3 + 0.6) / 2)
  many = np.random.default_rng(0).random((5, 6))
  slow = [np.trapezoid(row, np.log(FRACTIONS)) / np.log(100) for row in many]
  np.testing.assert_allclose(few_labels.area(FRACTIONS, many), slow)
  assert few_labels.area((5,), np.array([0.7])) == 0.7
  assert few_labels.area((1, 7), np.array([0.7, 0.7])) == pytest.approx(0.7)


def test_where_curves_cross():
  cross = lambda a, b: few_labels.crossing((1, 10, 100), a, b)
  assert cross([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]) is None
  assert cross([0.5, 0.6, 0.7], [0.5, 0.7, 0.8]) == 1
  assert cross([0.5, 0.6, 0.6], [0.4, 0.5, 0.7]) == pytest.approx(10 ** 1.5)
  assert cross([0.5, 0.6, 0.7], [0.4, 0.5, 0.7]) == pytest.approx(100)
