"""What a run measures of itself: the loss as it is held out, and labels of rows that the probes have not seen."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.augment.views import ViewMaker
from jaxmed.train import evaluators, probe


def test_the_held_out_loss_is_not_that_of_training():
  """Always with the same views and masks, whatever the step, and nothing of training in it."""
  calls = []

  class Objective:
    def loss(self, variables, batch, rng, step, train):
      calls.append((batch, rng, train))
      return jnp.float32(variables), None

  view = types.SimpleNamespace(held_out=lambda rng, batch: (batch, rng))
  for step in (1, 2):
    assert probe._val_loss(Objective(), view, 3.0, 'batch', 5, step) == 3
  (first, first_key, train), (second, second_key, _) = calls
  assert not train
  assert first == second and first[0] == 'batch'
  assert first_key == second_key != first[1]


@pytest.mark.parametrize('likely', [True, False])
def test_labels_are_those_of_rows_that_the_probes_were_not_fitted_on(monkeypatch, likely):
  """Two blobs: held-out rows have the labels of their blob, or by far the most have the other one."""
  rng = np.random.default_rng(0)
  blob = np.repeat([0, 1], 40)
  features = lambda: np.float32(np.eye(2)[blob] * 8 + rng.normal(size=(80, 2)))

  class Part:
    def __init__(self, labels):
      self.labels, self.features = labels, features()

    def codes(self, label, classes):
      assert (label, classes) == ('blob', ('a', 'b'))
      return self.labels

  encoder = types.SimpleNamespace(feature='mean', embed_source=lambda part: {'mean': part.features})
  monkeypatch.setattr(probe, 'encoder_of', lambda *args: encoder)
  source = types.SimpleNamespace(classes=lambda label: ('a', 'b'))
  config = types.SimpleNamespace(loader=types.SimpleNamespace(label='blob'))
  me = types.SimpleNamespace(trainer=None, config=config, spec=None, source=source, check=lambda: None,
                             labelled=(Part(blob), Part(blob if likely else 1 - blob)))
  snapshot = probe.Snapshot(me, None)
  assert evaluators.KNN(1)(snapshot) == {'knn': float(likely)}
  assert evaluators.Ridge(1)(snapshot) == {'ridge': float(likely)}


def test_one_view_of_makers_of_many():
  """Also where records are cut into tiles, which need more views than there are tiles."""
  view = ViewMaker((8, 8), (0.0,), (1.0,), views=6, tiles=(2, 2), scale=(0.5, 1.0))
  one = probe.single(view)
  assert one.views == 1 and not one.many and one.scale == view.scale
