"""Maps of what an encoder looks at: against a plain computation of the same network, block by block."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmed
from jaxmed.encoder import Encoder
from jaxmed.errors import UserError
from jaxmed.evaluate import attention
from jaxmed.evaluate.attention import attention_maps, relevance, rollout

DEPTH, DIM, HEADS = 3, 16, 2


def encoder_of(family, feature='cls', channels=('DNA', 'ER', 'AGP'), **options):
  model = jaxmed.create_model(f'{family}_micro/8', image_size=16, in_channels=len(channels), embed_dim=DIM, depth=DEPTH,
                              num_heads=HEADS, **options)
  params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 16, 16, len(channels))))['params'])
  params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)
  return Encoder(model, params, tuple({'name': n, 'mean': 100.0, 'std': 50.0} for n in channels), feature=feature)


def plain_blocks(blocks, x, extra):
  """(output, weights [L, B, H, N, N]) of blocks in plain jnp; `extra` is added to the weights."""
  norm = lambda p, y: (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']
  seen = []
  for i in range(DEPTH):
    p = jax.tree.map(lambda a, i=i: a[i], blocks)
    y = norm(p['norm1'], x)
    qkv = jnp.einsum('bnd,dthe->tbhne', y, p['attn']['qkv']['kernel']) + p['attn']['qkv']['bias'][:, None, :, None]
    weights = jax.nn.softmax(qkv[0] @ qkv[1].swapaxes(2, 3) / (DIM // HEADS) ** 0.5) + extra[i]
    seen.append(weights)
    out = (weights @ qkv[2]).swapaxes(1, 2).reshape(*x.shape)
    x = x + out @ p['attn']['proj']['kernel'].reshape(DIM, DIM) + p['attn']['proj']['bias']
    y = norm(p['norm2'], x)
    y = jax.nn.gelu(y @ p['mlp']['fc1']['kernel'] + p['mlp']['fc1']['bias'], approximate=False)
    x = x + y @ p['mlp']['fc2']['kernel'] + p['mlp']['fc2']['bias']
  return norm, x, jnp.stack(seen)


def weights_of(encoder, images):
  """Bytes of the weights that one image has."""
  apply = lambda x: encoder.model.apply({'params': encoder.params}, x, mutable=['attention'])[1]
  shape = jax.eval_shape(apply, jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32))
  return sum(4 * x.size for x in jax.tree.leaves(shape))


@pytest.mark.parametrize('family, feature', [('channel_vit', 'cls'), ('channel_vit', 'mean'), ('vit', 'cls')])
def test_maps_equal_a_plain_computation(family, feature, monkeypatch):
  encoder = encoder_of(family, feature)
  images = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3)).astype(np.uint8)
  target = np.random.default_rng(1).normal(size=DIM).astype(np.float32)
  assert attention.weight_bytes(encoder.model, images.shape[1:]) == weights_of(encoder, images)
  monkeypatch.setattr(attention, 'MOST_BYTES', 2 * attention.weight_bytes(encoder.model, images.shape[1:]))  # two at a time
  have = attention_maps(encoder, images, target=target)
  bound = encoder.model.bind({'params': encoder.params})
  x, _, _ = bound._with_prefix(bound.embed_patches(jnp.asarray((images - 100.0) / 50.0, jnp.float32)), False)

  def product(extra):
    norm, y, seen = plain_blocks(encoder.params['transformer']['blocks'], x, extra)
    y = norm(encoder.params['norm'], y)
    vector = y[:, 0] if feature == 'cls' else y[:, 1:].mean(axis=1)
    return (vector @ target).sum(), seen

  count = x.shape[1]
  slopes, weights = jax.jit(jax.grad(product, has_aux=True))(jnp.zeros((DEPTH, 3, HEADS, count, count)))
  slopes, weights = np.asarray(slopes, np.float64), np.asarray(weights, np.float64)
  rolled, relevant = np.stack([np.eye(count)] * 3), np.stack([np.eye(count)] * 3)
  for a, s in zip(weights, slopes, strict=True):
    rolled = (0.5 * a.mean(axis=1) + 0.5 * np.eye(count)) @ rolled
    relevant = relevant + np.maximum(a * s, 0).mean(axis=1) @ relevant
  relevant -= np.eye(count)
  asked = (lambda m: m[..., 0, 1:]) if feature == 'cls' else (lambda m: m[..., 1:, 1:].mean(axis=-2))
  grid = (3, 2, 2) if family == 'channel_vit' else (2, 2)
  for name, want in (('heads', asked(weights[-1])), ('attention', asked(weights[-1]).mean(axis=1)),
                     ('rollout', asked(rolled)), ('relevance', asked(relevant))):
    assert have[name].shape == (*want.shape[:-1], *grid)
    np.testing.assert_allclose(have[name].reshape(want.shape), want, rtol=2e-4, atol=1e-6, err_msg=name)
  if family == 'channel_vit':
    np.testing.assert_allclose(have['share'].sum(axis=1), 1, rtol=1e-5)
  else:
    assert 'share' not in have


def test_looking_changes_no_feature():
  """The plain form of attention gives the features of the encoder's own form."""
  encoder = encoder_of('channel_vit', pos='rope', num_registers=2)
  image = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
  own = encoder.model.apply({'params': encoder.params}, image)
  seen, state = encoder.model.apply({'params': encoder.params}, image, mutable=['attention'])
  np.testing.assert_allclose(seen.cls, own.cls, atol=1e-5)
  weights = jax.tree.leaves(state)[0]
  assert weights.shape == (DEPTH, 2, HEADS, 15, 15)
  np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
  assert set(encoder.model.init(jax.random.key(0), image)) == {'params'}


def test_a_channel_that_no_block_attends_to_has_no_share():
  """With weights that never look beyond the prefix and the first channel, others are in no map."""
  weights = np.zeros((2, 1, 1, 4, 4))
  weights[..., :2] = 0.5  # tokens: class, channels 0, 1, 2
  slopes = np.ones_like(weights)
  assert np.asarray(rollout(jnp.asarray(weights)))[0, 0, 2:].max() == 0
  found = np.asarray(relevance(jnp.asarray(weights), jnp.asarray(slopes)))[0, 0]
  np.testing.assert_allclose(found, [0.5 + 0.5 + 0.25 + 0.25, 1.5, 0, 0])
  assert np.asarray(relevance(jnp.asarray(weights), -jnp.asarray(slopes))).max() == 0  # only positive slopes count


def test_bad_input():
  images = np.zeros((1, 16, 16, 3), np.uint8)
  with pytest.raises(UserError, match='channel_attention=joint'):
    attention_maps(encoder_of('channel_vit', channel_attention='pooled'), images)
  with pytest.raises(UserError, match='did you mean'):
    attention_maps(encoder_of('channel_vit'), images, channels=['DNA', 'ER', 'AGB'])
  with pytest.raises(UserError, match='do not divide into patches'):
    attention_maps(encoder_of('channel_vit'), images[:, :12])
  resnet = dataclasses.replace(encoder_of('vit'), model=jaxmed.create_model('resnet_micro', image_size=16))
  with pytest.raises(UserError, match='vit or channel_vit'):
    attention_maps(resnet, images)
