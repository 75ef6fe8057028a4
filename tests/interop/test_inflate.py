"""Other channels for an encoder, and ViT and ChannelViT made of each other: what stays the same, to the last digits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed import interop
from jaxmed.errors import UserError
from jaxmed.interop.inflate import inflate, to_channel_vit, to_vit

from .test_roundtrip import build

RNG = np.random.default_rng(3)
IMAGE = RNG.normal(size=(2, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope='module')
def vit():
  return build('vit_micro/8', 16, {}, channels=3)


@pytest.fixture(scope='module')
def channel_vit():
  return build('channel_vit_micro/8', 16, {}, channels=3)


def features(model, params, image, channels=None):
  found = model.apply({'params': params}, jnp.asarray(image), channels)
  return np.concatenate([found.cls[:, None], found.patches], axis=1)


def embedded(model, params, image):
  return np.asarray(model.apply({'params': params}, jnp.asarray(image), method=model.embed_patches).x)


@pytest.mark.parametrize('how', ['name', 'mean', 'repeat'])
def test_gray_is_gray_in_any_number_of_channels(vit, how):
  """A picture that is the same in every channel has the features that it had in three."""
  gray = IMAGE[..., :1]
  want = features(*vit, np.repeat(gray, 3, axis=-1))
  new = ['a', 'b', 'c', 'd', 'e', 'f'] if how != 'name' else ['x', 'y']
  model, params = inflate(*vit, ['R', 'G', 'B'], new, how)
  np.testing.assert_allclose(features(model, params, np.repeat(gray, len(new), axis=-1)), want, atol=2e-5)


def test_names_keep_their_weights(vit):
  """Turned round by name it is the same model; a subset is the baseline that zeroes the others and scales by C / n."""
  model, params = inflate(*vit, ['R', 'G', 'B'], ['B', 'R', 'G'])
  np.testing.assert_allclose(features(model, params, IMAGE[..., [2, 0, 1]]), features(*vit, IMAGE), atol=2e-5)
  model, params = inflate(*vit, ['R', 'G', 'B'], ['G', 'R'])
  shown = jnp.asarray([[True, True, False]] * 2)
  want = vit[0].apply({'params': vit[1]}, jnp.asarray(IMAGE), None, shown)
  np.testing.assert_allclose(features(model, params, IMAGE[..., [1, 0]])[:, 1:], want.patches, atol=2e-5)


def test_channel_embeddings_by_name(channel_vit):
  model, params = inflate(*channel_vit, ['R', 'G', 'B'], ['B', 'new', 'R'])
  old, new = channel_vit[1]['channel_embed'], params['channel_embed']
  np.testing.assert_array_equal(new[[0, 2]], old[[2, 0]])
  np.testing.assert_allclose(new[1], old.mean(axis=0), atol=1e-7)
  ids = jnp.asarray([[2, 0]] * 2)  # R, B
  np.testing.assert_allclose(features(model, params, IMAGE[..., :2], ids),
                             features(*channel_vit, IMAGE[..., :2], jnp.asarray([[0, 2]] * 2)), atol=1e-5)


def test_a_vit_as_channel_vit_sees_gray_alike(vit):
  gray = IMAGE[..., :1]
  model, params = to_channel_vit(*vit)
  want = features(*vit, np.repeat(gray, 3, axis=-1))
  np.testing.assert_allclose(features(model, params, gray), want, atol=2e-5)


def test_collapsed_tokens_are_the_mean_of_the_channels(channel_vit):
  model, params = to_vit(*channel_vit)
  tokens = embedded(*channel_vit, IMAGE).reshape(2, 3, 4, -1)
  # The official class resamples positions for several channels; one channel shows the table that a ViT adds.
  single = [embedded(channel_vit[0], channel_vit[1], IMAGE[..., [0]])] * 1
  shift = tokens[:, 0] - single[0]
  np.testing.assert_allclose(embedded(model, params, IMAGE), tokens.mean(axis=1) - shift, atol=1e-5)


def test_one_channel_collapses_exactly(channel_vit):
  one = inflate(*channel_vit, ['R', 'G', 'B'], ['G'])
  model, params = to_vit(*one)
  np.testing.assert_allclose(features(model, params, IMAGE[..., :1]), features(*one, IMAGE[..., :1]), atol=1e-5)


def test_a_file_is_inflated(vit, tmp_path):
  """RGB weights of elsewhere become a model of five stains by one command, and of ChannelViT by another option."""
  source, out = tmp_path / 'rgb.safetensors', tmp_path / 'out.safetensors'
  interop.export_file(source, 'timm', *vit, {})
  names = ['DNA', 'R', 'ER', 'AGP', 'Mito']
  interop.import_file(source, None, out, channels=names, how='name')
  model, params, info = interop.load_file(out)
  assert model.in_channels == 5 and [c['name'] for c in info['channels']] == names
  kernel = vit[1]['patch_embed']['kernel'].reshape(64, 3, -1)
  np.testing.assert_allclose(params['patch_embed']['kernel'].reshape(64, 5, -1)[:, 1], kernel[:, 0] * 3 / 5, rtol=1e-6)
  interop.import_file(source, 'timm', out, channels=names, how='mean', kind='channel_vit')
  model, params, _ = interop.load_file(out)
  assert model.per_channel and params['channel_embed'].shape == (5, 128)


def test_bad_input(vit, tmp_path):
  with pytest.raises(UserError, match="did you mean 'mean'"):
    inflate(*vit, ['R', 'G', 'B'], ['a'], 'meen')
  with pytest.raises(UserError, match='different names'):
    inflate(*vit, ['R', 'G', 'B'], ['a', 'a'])
  with pytest.raises(UserError, match='is a ViT: expected a ChannelViT'):
    to_vit(*vit)
  interop.export_file(tmp_path / 'a', 'timm', *vit, {})
  with pytest.raises(UserError, match='at least one'):
    interop.import_file(tmp_path / 'a', None, tmp_path / 'b', how='mean')
