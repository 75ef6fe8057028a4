"""Bag of channels: each channel as its one-channel ViT alone sees it, in training, in a product and in a file."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.encoder import Encoder
from jaxmed.errors import UserError
from jaxmed.interop import verify, weight_formats
from jaxmed.interop.inflate import inflate, to_channel_vit, to_vit
from jaxmed.models import create_model
from jaxmed.models.registry import describe, rebuild
from tests.models.common import build, features, normal

MASK = np.array([[True, True, True], [True, False, True], [False, False, True]])
CASES = {  # image size, patch, options
    'plain': ((8, 12), '4', {}), 'registers': ((8, 12), '4', dict(num_registers=2, no_embed_class=True)),
    'rope': ((8, 12), '4', dict(pos='rope')), 'sincos 3D': ((4, 8, 8), '2x4x4', dict(pos='sincos')),
    'no class': ((8, 12), '4', dict(class_token=False)),
}


def bag(case='plain', **more):
  size, patch, options = CASES[case]
  model, params = build(f'bag_micro/{patch}', size, 3, **(options | more))
  return model, params, normal((3, *size, 3))


def alone(model, params, image):
  """Features [B, C, ...] of each channel by the one-channel ViT."""
  each = [features(model.single, params, image[..., c : c + 1]) for c in range(image.shape[-1])]
  return jax.tree.map(lambda *x: np.stack(x, axis=1), *each)


@pytest.mark.parametrize('case', CASES)
def test_each_channel_is_seen_by_itself(case):
  model, params, image = bag(case)
  image = jnp.where(MASK.reshape(3, *[1] * (image.ndim - 2), 3), image, jnp.nan)  # what is missing may hold anything
  got = features(model, params, image, None, MASK)
  want = alone(model, params, jnp.nan_to_num(image))
  np.testing.assert_allclose(got.patches.reshape(want.patches.shape)[MASK], want.patches[MASK], atol=2e-5)
  assert got.grid == (3, *want.grid) and np.isfinite(got.patches).all()
  for name in ('cls', 'registers', 'mean'):
    one = getattr(want, name) if name != 'mean' else want.patches.mean(axis=2)
    if one is not None:
      mean = np.stack([one[b][MASK[b]].mean(axis=0) for b in range(3)])
      np.testing.assert_allclose(getattr(got, name), mean, atol=2e-5, err_msg=name)
  assert (got.cls is None) == (case == 'no class')


@pytest.mark.parametrize('case', ['plain', 'rope', 'no class'])
def test_tokens_alone_are_those_of_each_channel_with_the_same_ones_hidden(case):
  """A method that shows some tokens: as if each channel's row had only those, whatever their order."""
  model, params, image = bag(case)
  index = jnp.asarray([[7, 0, 13, 2], [5, 1, 4, 3], [17, 12, 6, 0]])  # the second one shows the first channel alone
  shown = jnp.asarray([[True] * 4, [True] * 4, [True, True, True, False]])

  def run(image):
    tokens = model.apply({'params': params}, image, method='embed_patches').take(index)
    tokens = type(tokens)(tokens.x, shown, tokens.position, tokens.place, tokens.grid)
    return model.apply({'params': params}, tokens, method='encode')

  got = jax.jit(run)(image)
  one = model.single

  def channel(row, places):  # by the one-channel ViT, which takes its tokens too
    tokens = one.apply({'params': params}, row, method='embed_patches').take(jnp.asarray([places]))
    return one.apply({'params': params}, tokens, method='encode')

  for b in range(3):
    places = [int(i) for i, s in zip(index[b], shown[b]) if s]
    vectors = []
    for c in {p // 6 for p in places}:
      own = channel(image[b : b + 1, ..., c : c + 1], [p % 6 for p in places if p // 6 == c])
      slots = [i for i, p in enumerate(places) if p // 6 == c]
      np.testing.assert_allclose(got.patches[b, jnp.asarray(slots)], own.patches[0], atol=2e-5)
      vectors.append(own.cls)
    if got.cls is not None:
      np.testing.assert_allclose(got.cls[b], np.mean(vectors, axis=0)[0], atol=2e-5)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


def test_views_of_different_sizes_in_one_pass():
  model, params, image = bag()
  small = image[:, :4, :8]
  groups = [{'image': image, 'channels': None, 'channel_mask': jnp.asarray(MASK)},
            {'image': small, 'channels': None, 'channel_mask': None}]
  got = jax.jit(lambda p: model.apply({'params': p}, groups, 3, method='one_pass'))(params)
  for out, group in zip(got, groups, strict=True):
    want = features(model, params, **group)
    np.testing.assert_allclose(out.cls, want.cls, atol=2e-5)
    np.testing.assert_allclose(out.patches, want.patches, atol=2e-5)


def test_the_order_and_the_names_of_channels_make_no_difference():
  model, params, image = bag()
  want = features(model, params, image)
  got = features(model, params, image[..., ::-1], jnp.asarray([[5, 0, 2]] * 3))
  np.testing.assert_allclose(got.cls, want.cls, atol=2e-5)
  np.testing.assert_allclose(features(model, params, jnp.tile(image[..., :1], 2)).cls,
                             features(model.single, params, image[..., :1]).cls, atol=2e-5)


def stats(count):
  return tuple({'name': f'c{i}', 'mean': 0.0, 'std': 1.0} for i in range(count))


def test_concatenated_features_by_the_places_of_channels():
  model, params, image = bag(pooling='concat')
  each = alone(model, params, image)
  encoder = Encoder(model, params, stats(3))
  got = encoder.embed(np.asarray(image[..., [2, 0]]), ['c2', 'c0'])
  zero = np.zeros((3, 48))
  np.testing.assert_allclose(got['cls'], np.concatenate([each.cls[:, 0], zero, each.cls[:, 2]], axis=1), atol=2e-5)
  mean = each.patches.mean(axis=2)
  np.testing.assert_allclose(got['mean'], np.concatenate([mean[:, 0], zero, mean[:, 2]], axis=1), atol=2e-5)
  assert got['patches'].shape == (3, 2, 2, 3, 48) and got['map'].shape == (3, 2, 3, 48)
  assert features(model, params, image).cls.shape == (3, 48)  # what methods train on is the mean
  assert encoder.extended({'c9': {'mean': 0.0, 'std': 1.0}}).embed(np.asarray(image[..., :1]), ['c9'])['cls'].shape == (
      3, 4 * 48)


def test_no_gradient_from_or_to_a_missing_channel():
  model, params, image = bag()
  total = lambda image: jnp.square(features(model, params, image, None, jnp.asarray(MASK)).cls).sum()
  gradient = np.moveaxis(np.asarray(jax.grad(total)(image)), -1, 1)
  assert (gradient[~MASK] == 0).all() and (np.abs(gradient[MASK]).max(axis=(1, 2)) > 0).all()


def test_parameters_do_not_depend_on_channels_and_other_channels_need_none():
  shapes = lambda count: jax.tree.map(jnp.shape, nn.unbox(jax.eval_shape(
      lambda: create_model('bag_micro/4', 8, count).init(jax.random.key(0), jnp.zeros((1, 8, 8, count))))))
  assert shapes(2) == shapes(7)
  model, params, image = bag()
  other, same = inflate(model, params, ['a', 'b', 'c'], ['x', 'y', 'z', 'a', 'w'])
  assert other.in_channels == 5
  np.testing.assert_array_equal(features(other, same, image).cls, features(model, params, image).cls)
  assert rebuild(describe(model)) == model


@pytest.mark.parametrize('fmt', ['timm', 'jaxmed'])
def test_exports(fmt, tmp_path):
  """timm's layout holds the one-channel ViT; read with its metadata it is the bag again."""
  model, params, image = bag('registers')
  file = tmp_path / 'bag.safetensors'
  weight_formats.export_file(file, fmt, model, params, {'channels': list(stats(3)), 'feature': 'cls'})
  assert verify.verify_export(file, model, params, image) < 1e-5
  again, weights, _ = weight_formats.load_file(file)
  assert again == model
  np.testing.assert_allclose(features(again, weights, image).cls, features(model, params, image).cls, atol=1e-6)
  card = verify.model_card(fmt, model, {'channels': list(stats(3)), 'feature': 'cls'})
  assert 'BagOfChannels' in card and (fmt != 'timm' or ('in_chans=1' in card and 'by itself' in card))


def test_what_a_bag_is_not(tmp_path):
  model, params, _ = bag()
  with pytest.raises(UserError, match="pooling 'sum'"):
    create_model('bag_micro/4', 8, 2, pooling='sum')
  with pytest.raises(UserError, match='BagOfChannels: expected a ChannelViT'):
    to_vit(model, params)
  with pytest.raises(UserError, match='BagOfChannels: expected a ViT'):
    to_channel_vit(model, params)
  with pytest.raises(UserError, match='bag of channels'):
    weight_formats.export_file(tmp_path / 'x', 'channelvit', model, params, {})
  with pytest.raises(UserError, match='needs a patch size'):
    create_model('bag_small', 8, 2)
