"""D-Former, SWTR-Unet and the decoder of multi-scale self-guided attention: groups, masks, levels, sizes, what fails."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.models.decoders import msa
from jaxmed.models.decoders.dense import create_decoder, decoder_for, maps_of
from jaxmed.models.layers import dilated
from tests.models import test_conv
from tests.models.common import normal
from tests.models.test_segmentation_decoders import shapes_of
from tests.models.test_unet import count

KEY = jax.random.key(0)
OPTIONS = {'dformer_micro': dict(depths=(2, 1, 1), dims=(8, 16, 16), num_heads=(1, 2, 2), group_size=(2, 2, 2)),
           'swtr_unet_micro': dict(depths=(1, 1, 1), dims=(8, 16, 16), stem_width=8, window_size=2)}


def test_groups_of_a_map():
  """Group 0 of a map (4, 16, 16) in groups of (2, 8, 8): every second place along each axis, or the first places."""
  size, group = (4, 16, 16), (2, 8, 8)
  places = np.stack(np.meshgrid(*map(np.arange, size), indexing='ij'), -1)[None]
  spread, near = (np.asarray(dilated.divided(jnp.asarray(places), group, jnp.asarray(far))) for far in (True, False))
  assert spread.shape == near.shape == (1, 8, 128, 3)
  assert spread[0, 0, :4].tolist() == [[0, 0, 0], [0, 0, 2], [0, 0, 4], [0, 0, 6]]
  assert near[0, 0, -1].tolist() == [1, 7, 7] and near[0, 1, 0].tolist() == [0, 0, 8]
  for i, start in enumerate(itertools.product(range(2), repeat=3)):
    assert (spread[0, i] % 2 == start).all() and len({tuple(p) for p in spread[0, i]}) == 128
  for far in (True, False):
    parts = dilated.divided(jnp.asarray(places), group, far)
    np.testing.assert_array_equal(dilated.joined(parts, size, group, far), places)
  assert dilated.group_of((1, 9, 8), group) == (1, 8, 8) and dilated.group_of((4, 9, 7), group) == (4, 9, 7)
  assert dilated.group_of((8, 9), (8, 8)) == (8, 8)


@pytest.mark.parametrize('name', OPTIONS)
def test_levels_and_hidden_patches(name):
  """Levels at their strides, the last of them the features; no gradient reaches hidden pixels, hidden places are zero."""
  model = create_model(name, (32, 24), 2, **OPTIONS[name])
  params, hidden = test_conv._draw(model), np.arange(24).reshape(2, 12) % 3 == 0
  levels = tuple(range(model.num_levels + 1))
  assert model.patch_size == (8, 8)

  @jax.jit
  def slopes(params, x):
    def total(params, x):
      f, _ = model.apply({'params': params}, x, train=True, hidden=jnp.asarray(hidden), levels=levels, mutable=['stats'])
      return jnp.square(f.patches[..., 0]).sum(), f

    return jax.grad(total, (0, 1), has_aux=True)(params, x)

  (weights, pixels), f = slopes(params, normal((2, 32, 24, 2)))
  where = np.kron(hidden.reshape(2, 4, 3), np.ones((8, 8))).astype(bool)
  assert not np.asarray(pixels)[where].any() and np.abs(np.asarray(pixels)[~where]).max() > 0
  assert all(np.isfinite(w).all() for w in jax.tree.leaves(weights))
  grids = [(16, 12), (8, 6), (4, 3)] if name == 'dformer_micro' else [(16, 12), (16, 12), (8, 6), (4, 3)]
  assert [level.grid for level in f.levels] == grids
  np.testing.assert_array_equal(f.levels[-1].patches, f.patches)
  for level in f.levels:
    step = 32 // level.grid[0]
    assert not np.asarray(level.map)[where[:, ::step, ::step]].any()


@pytest.mark.parametrize('name, decoder, classes, parameters', [
    ('dformer', 'dformer', 14, 50_557_248), ('resnext101_32x8d', 'msa', 5, 103_556_063)])
def test_parameters_of_the_published_networks(name, decoder, classes, parameters):
  """SegNetwork(14) of D-Former; DAF_stack without its layers that no output goes through, and running statistics."""
  encoder = create_model(name, (64, 128, 128) if name == 'dformer' else (64, 64), 1)
  x = jax.ShapeDtypeStruct((1, *encoder.image_size, 1), jnp.float32)
  decoder = create_decoder(decoder, encoder, classes, True)

  def initial(image):
    features, first = encoder.init_with_output(KEY, image, levels=decoder.levels(encoder))
    logits, second = decoder.init_with_output(KEY, image, maps_of(encoder, features))
    return nn.unbox((first['params'], second['params'])), logits

  params, logits = jax.eval_shape(initial, x)
  still = sum(a.size for path, a in jax.tree_util.tree_leaves_with_path(params) if path[-1].key in ('mean', 'var'))
  assert count(params) - still == parameters
  sides = (64, 32, 16) if name == 'dformer' else (64,) * 9
  assert [a.shape[1] for a in logits] == list(sides) and logits[0].shape == (*x.shape[:-1], classes)


def test_decoders_on_other_encoders():
  """By shapes: images and volumes, stages and blocks."""
  plane = create_model('resnet_micro', (32, 64), 1, depths=(1, 1), dims=(8, 48), stem_width=8)
  assert shapes_of('dformer', plane, deep_supervision=True) == [(2, 32, 64, 3)]
  space = create_model('dformer_micro', (16, 16, 32), 1, **OPTIONS['dformer_micro'])
  assert decoder_for('dformer') == 'dformer' and decoder_for('swtr_unet') == 'unet'
  assert shapes_of('unet', space, deep_supervision=True)[1:] == [(2, 8, 8, 16, 3), (2, 4, 4, 8, 3)]
  assert shapes_of('msa', plane, width=8, deep_supervision=True) == [(2, 32, 64, 3)] * 5
  blocks = create_model('vit_micro/4', (16, 16), 1, depth=4, embed_dim=16, num_heads=2)
  assert create_decoder('msa', blocks, 3).levels(blocks) == (1, 2, 3, 4)
  for make, words in ((lambda: create_decoder('dformer', blocks, 2).levels(blocks), 'dformer needs maps of several'),
                      (lambda: create_decoder('msa', plane, 2, width=12), 'decoder.width 12: expected a multiple of 8'),
                      (lambda: shapes_of('msa', plane.clone(image_size=(4, 8))), 'halves the finest map, .2, 4., twice'),
                      (lambda: shapes_of('dformer', plane, depths=(1, 1)), 'decoder.depths has 2 entries'),
                      (lambda: create_model('dformer_micro', 32, 1, num_heads=(5,) * 4), 'encoder.num_heads'),
                      (lambda: create_model('dformer_micro', (32,) * 3, 1, group_size=(4, 4)), 'encoder.group_size'),
                      (lambda: create_model('swtr_unet_micro', 32, 1, num_heads=7), 'encoder.transformer_depth'),
                      (lambda: create_model('resnet18', 32, 1, cardinality=2), 'encoder.cardinality 2')):
    with pytest.raises(UserError, match=words):
      make()


def test_attention_that_is_new_is_the_identity():
  """Its weight starts at 0: attention over places and over channels are then one, the two units."""
  x, outs = normal((1, 4, 4, 16)), []
  for kind in ('places', 'channels'):
    module = msa.Attended(8, kind)
    params = nn.unbox(module.init(KEY, x, False))['params']
    assert params['gamma'].tolist() == [0.0] and params['before']['slope'].tolist() == [0.25]
    outs.append([module.apply({'params': params | {'gamma': jnp.full(1, g)}}, x, False) for g in (0.0, 1.0)])
  np.testing.assert_array_equal(outs[0][0], outs[1][0])
  assert all(np.abs(a - b).max() > 0.01 for a, b in outs)
