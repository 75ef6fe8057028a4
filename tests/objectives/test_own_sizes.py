"""Images of several sizes in a batch, in every method; packed and over devices they are in test_devices.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models.layers.positions import inside
from jaxmed.objectives import METHODS
from jaxmed.objectives.losses.diversity import token_diversity
from jaxmed.objectives.networks import on_own_grids
from tests.objectives import devices

SIZE = 16
DRAW = ('mae', 'simmim', 'ijepa', 'data2vec', 'ibot', 'dinov2', 'dinov3', 'lvm_med')  # places of the grid


def clean(batch):
  """The batch without its Gram crops; missing channels are zero."""
  return jax.tree.map(lambda x: np.nan_to_num(x) if x.dtype == np.float32 else x,
                      {k: v for k, v in batch.items() if k != 'gram'})


@pytest.mark.parametrize('name, model', [(name, 'channel_vit_micro/4') for name in METHODS] + [
  (name, 'vit_micro/4') for name in ('mae', 'simmim', 'ijepa', 'data2vec', 'dinov3')])
def test_only_what_lies_within_an_image_counts(name, model):
  """Not what lies beyond it; and images as large as their arrays are those without sizes."""
  objective, _, variables, batch = devices.start(name, (model, SIZE, dict(embed_dim=16, depth=1, num_heads=2)))
  if name in ('dinov2', 'dinov3'):  # KoLeo's logarithm of small distances magnifies rounding, otherwise on each processor
    objective = dataclasses.replace(objective, koleo_weight=0.0)
  variables, batch = jax.tree.map(jnp.asarray, variables), clean(batch)
  batch.get('global', batch).pop('sizes', None)
  within = devices.sized(np.random.default_rng(1), batch, (8, 12, 16))

  def beyond(value):
    fill = lambda x: np.where(np.isnan(x), np.float32(value), x) if x.dtype == np.float32 else x
    return jax.tree.map(fill, within)

  @jax.jit
  @jax.value_and_grad
  def loss(params, batch):
    return objective.loss(variables | {'params': params}, batch, jax.random.key(3), devices.STEP)[0]

  one, other, nothing = (loss(variables['params'], beyond(value)) for value in (0.0, 7.0, np.nan))
  assert np.isfinite(one[0]) and devices.largest(one[1]) > 0
  assert apart(other, one) < 1e-5 and apart(nothing, one) < 1e-5
  full = loss(variables['params'], devices.sized(np.random.default_rng(1), batch, (16,)))
  assert apart(one, full) > 1e-3  # there is something to see
  if name in DRAW:
    assert apart(full, loss(variables['params'], batch)) < 1e-4


def apart(a, b):
  """The larger of the losses' relative difference and that of the gradients by the largest one."""
  return max(abs(float(a[0] / b[0]) - 1), devices.largest(jax.tree.map(jnp.subtract, a[1], b[1])) / devices.largest(b[1]))


def test_what_is_drawn_for_the_grid_in_smaller_ones():
  """About the same share of the cells, never more of them; by a loop over cells."""
  rng = np.random.default_rng(0)
  own = np.array([[4, 6], [2, 3], [3, 6], [1, 1]])
  drawn = rng.random((4, 2, 24)) < 0.4
  have = np.asarray(on_own_grids(jnp.asarray(drawn), (4, 6), jnp.asarray(own)))
  for b, (rows, columns) in enumerate(own):
    there = np.asarray(inside(jnp.asarray(own[b : b + 1]), (4, 6)))[0].reshape(4, 6)
    assert there.sum() == rows * columns and there[:rows, :columns].all()
    for i in range(rows):
      for j in range(columns):
        np.testing.assert_array_equal(have[b, :, i * 6 + j], drawn[b, :, i * 4 // rows * 6 + j * 6 // columns])
    assert (have[b, :, there.ravel()].sum(axis=0) <= drawn[b].sum(axis=1)).all()
  np.testing.assert_array_equal(have[0], drawn[0])


def test_tokens_beyond_an_image_are_no_pairs():
  rng = np.random.default_rng(2)
  tokens = np.float32(rng.normal(size=(1, 2, 6, 5)))
  cells, there = np.array([[True, True, False, True, False, False]]), np.ones((1, 2), bool)
  alone = token_diversity(tokens[:, :, [0, 1, 3]], there, 0.5, 4.0)
  assert float(token_diversity(tokens, there, 0.5, 4.0, None, cells)) == pytest.approx(float(alone), rel=1e-5)


def test_mixed_images_have_one_size():
  objective, _, variables, batch = devices.start('supervised', devices.TRANSFORMER)
  objective = dataclasses.replace(objective, mixup=0.8)
  variables = jax.tree.map(jnp.asarray, variables)
  with pytest.raises(UserError, match='mixup and cutmix mix images of one size'):
    objective.loss(variables, batch, jax.random.key(0), 0)
