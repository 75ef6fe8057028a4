"""The largest component is kept where the Dice of held-out records says so, by nnU-Net's two steps."""

import numpy as np

from jaxmed.evaluate import postprocess
from jaxmed.evaluate.postprocess import Change

CLASSES = [(1, 'liver'), (2, 'spleen')]


def maps(*texts):
  """Label maps [1, n] of texts such as '11..2'."""
  return [np.array([[0 if c == '.' else int(c) for c in text]]) for text in texts]


def test_the_change_itself():
  (mask,) = maps('11.1..22.2')
  assert Change(((1,),))(mask).tolist() == maps('11....22.2')[0].tolist()
  assert Change(((1, 2),))(mask).tolist() == maps('11........')[0].tolist()
  assert Change(((1,), (2,)))(mask).tolist() == maps('11....22..')[0].tolist()
  assert Change(())(mask) is mask


def test_all_foreground_together():
  pairs = [maps('1122......', '1122...1.2'), maps('..1122....', '..1122..2.')]
  change = postprocess.choose(pairs, CLASSES)
  assert change.names == ('foreground',) and change.groups == ((1, 2),)


def test_one_class_where_together_a_class_falls():
  """The spleen lies apart, so that the largest foreground lacks it; the liver alone gains."""
  pairs = [maps('111....22', '111..1.22'), maps('111....22', '111....22')]
  assert postprocess.choose(pairs, CLASSES).names == ('liver',)


def test_together_only_where_no_class_falls():
  """Together would raise the mean (0.833 to 0.929), as the liver gains more than the spleen loses."""
  pairs = [maps('1111222.2.......', '1111222.2.111.1.')]
  assert postprocess.choose(pairs, CLASSES).names == ('liver',)


def test_nothing_where_dice_falls_or_stays():
  pairs = [maps('11.11..2.2', '11.11..2.2')]
  assert postprocess.choose(pairs, CLASSES).groups == ()
  assert postprocess.choose([maps('11..22', '11..22')], CLASSES).groups == ()


def test_what_is_made_up_may_go_and_what_is_not_annotated_is_not_counted():
  """A class that no record has, made up beside a larger one: it is gone, and no reason against the change."""
  assert postprocess.choose([maps('111....', '111...2')], CLASSES).names == ('foreground',)
  truth, predicted = maps('111....', '111...1')
  truth[0, 6] = -1
  assert postprocess.choose([(truth, predicted)], CLASSES).groups == ()
