"""Decoders of dense outputs: the linear one by hand, and maps of channel tokens averaged over the channels there."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models.decoders.dense import create_decoder, maps_of
from jaxmed.models.layers.tokens import Features, Level
from jaxmed.models.registry import create_model
from tests.models.common import normal

KEY = jax.random.key(0)


def test_the_linear_decoder_is_a_norm_a_product_and_a_resize():
  encoder = create_model('vit_micro/4', (8, 8), 3, depth=2, embed_dim=16)
  decoder = create_decoder('linear', encoder, 5)
  assert decoder.levels(encoder) == (2,)
  image, x = normal((2, 8, 8, 3)), normal((2, 2, 2, 16))
  params = nn.unbox(decoder.init(KEY, image, (x,)))['params']
  (got,) = decoder.apply({'params': params}, image, (x,))
  unit = (np.asarray(x) - np.mean(x, -1, keepdims=True)) / np.sqrt(np.var(x, -1, keepdims=True) + 1e-6)
  coarse = unit @ np.asarray(params['out']['kernel']) + np.asarray(params['out']['bias'])
  assert got.shape == (2, 8, 8, 5)
  np.testing.assert_allclose(got[:, 0, 0], coarse[:, 0, 0], atol=1e-5)  # the border is repeated
  np.testing.assert_allclose(got[:, 3:5, 3:5].mean(axis=(1, 2)), coarse.mean(axis=(1, 2)), atol=1e-5)


def test_maps_of_channel_tokens_are_means_over_the_channels_there():
  encoder = create_model('channel_vit_micro/4', (8, 4), 3)
  patches = np.array(normal((1, 3 * 2, 4)))
  features = Features(None, None, jnp.asarray(patches), levels=(Level(jnp.asarray(patches), (3, 2, 1)),))
  by_channel = patches.reshape(1, 3, 2, 1, 4)
  np.testing.assert_allclose(maps_of(encoder, features)[0], by_channel.mean(axis=1), rtol=1e-6)
  by_channel[:, 1] = np.nan  # whatever a missing channel holds
  features = Features(None, None, jnp.asarray(patches), levels=(Level(jnp.asarray(by_channel.reshape(1, 6, 4)), (3, 2, 1)),))
  got = maps_of(encoder, features, jnp.asarray([[True, False, True]]))[0]
  np.testing.assert_allclose(got, by_channel[:, [0, 2]].mean(axis=1), rtol=1e-6)


def test_unknown_decoders_and_options_are_named():
  encoder = create_model('vit_micro/4', (8, 8), 3)
  with pytest.raises(UserError, match='linear'):
    create_decoder('liner', encoder, 2)
  with pytest.raises(UserError, match='option of the decoder linear'):
    create_decoder('linear', encoder, 2, width=3)
