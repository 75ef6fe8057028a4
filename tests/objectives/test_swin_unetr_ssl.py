"""Swin UNETR's pretraining: what is shown of copies, its losses in float64, who gets gradients, signs of collapse."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.objectives.dense import decoding
from jaxmed.objectives.volumes.swin_unetr_ssl import SwinUNETRSSL
from tests.objectives.siamese_fakes import close, log_softmax, unit

COUNT = 3
MODELS = {'swin_unetr': ('swin_unetr_micro', (16, 16, 16), dict(depths=(1, 1), dims=(8, 16), num_heads=(1, 2))),
          'channel_vit': ('channel_vit_micro/2x4x4', (4, 8, 8), dict(embed_dim=16, depth=1, num_heads=2))}


def encoder(family):
  name, size, options = MODELS[family]
  return create_model(name, size, 2, **options)


def batch(family):
  """Noise; the channel ViT's records lack a channel and end early, what is beyond is NaN."""
  rng, size = np.random.default_rng(0), MODELS[family][1]
  image = rng.normal(size=(COUNT, *size, 2)).astype(np.float32)
  out = {'channels': np.broadcast_to(np.arange(2), (COUNT, 2))}
  if family == 'channel_vit':
    mask, sizes = np.asarray([[1, 1], [1, 0], [1, 1]], bool), np.asarray([[4, 8, 8], [4, 8, 8], [2, 4, 8]])
    inside = np.stack([np.all(np.moveaxis(np.indices(size), 0, -1) < own, axis=-1) for own in sizes])
    known = inside[..., None] & mask[:, None, None, None]
    out |= {'channel_mask': mask, 'sizes': sizes}
    image = np.where(known, image, np.nan)
  return jax.tree.map(jnp.asarray, out | {'image': image})


@functools.cache
def start(family, **options):
  objective, data = SwinUNETRSSL(encoder(family), out_dim=6, **options), batch(family)
  variables = nn.unbox(jax.jit(objective.init)(jax.random.key(0), data))

  @functools.partial(jax.jit, static_argnums=0)
  def everything(objective, params, data, key):
    """(loss, metrics), gradients, copies, and the outputs that the loss is made of."""
    loss = lambda p: objective.loss(variables | {'params': p}, data, key, 0)
    (value, (metrics, _)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    first, second = jax.random.split(key)
    copies = objective.copies(first, data)
    restored, features, *_ = decoding.decode(objective.encoder, objective.network, params, copies[0], True, {'dropout': second})
    return value, metrics, grads, copies, restored[0], features.pooled('mean')

  return objective, variables, data, everything


def reference(params, restored, clean, there, vectors, turns):
  """(restoration, rotation, NT-Xent) in float64."""
  head = lambda name: vectors @ np.asarray(params[name]['kernel'], np.float64) + np.asarray(params[name]['bias'], np.float64)
  restoration = np.abs(restored - clean)[there].mean()
  rotation = -log_softmax(head('rotation'))[np.arange(len(turns)), turns].mean()
  z = unit(head('contrast'))
  score = z @ z.T / 0.5
  np.fill_diagonal(score, -np.inf)
  pairs = np.arange(len(z)) ^ 1
  return restoration, rotation, -log_softmax(score)[np.arange(len(z)), pairs].mean()


@pytest.mark.parametrize('family', MODELS)
def test_the_loss_and_what_it_is_made_of(family):
  objective, variables, data, everything = start(family)
  value, metrics, grads, copies, *outputs = everything(objective, variables['params'], data, jax.random.key(4))
  shown, clean, there, turns = copies
  restored, vectors = (np.asarray(x, np.float64) for x in outputs)
  clean, there, turns = np.asarray(clean, np.float64), np.asarray(there), np.asarray(turns)
  want = reference(variables['params'], restored, clean, there, vectors, turns)
  for name, number in zip(('restoration', 'rotation', 'nt_xent'), want):
    close(metrics[name], number, 3e-5)
  close(value, sum(want), 3e-5)
  assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(
      [grads['rotation'], grads['contrast'], grads['decoder']['out']])) and len(set(turns)) > 1
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
  shown, image = np.asarray(shown['image']), np.nan_to_num(np.asarray(data['image'], np.float64))
  whole = np.asarray(data['sizes'] if 'sizes' in data else [clean.shape[1:-1]] * COUNT)
  other = np.roll(clean, 2, axis=0)
  for i, turn in enumerate(turns):
    own = tuple(slice(n) for n in whole[i // 2])
    record = np.rot90(image[i // 2][own], turn, (1, 2))
    np.testing.assert_array_equal(clean[i][tuple(map(slice, record.shape[:-1]))], record)
    assert (there[i].sum() == np.isfinite(data['image'][i // 2]).sum()) and not np.any(shown[i][~there[i]])
    cut = (shown[i] != clean[i]).mean()
    assert cut < 0.6 and shown[i][there[i]].max() <= max(clean[i].max(), other[i].max())
  assert np.any((shown == other) & (shown != clean))


def test_terms_train_their_own_parts_and_collapse_shows():
  objective, variables, data, everything = start('swin_unetr')
  alone = SwinUNETRSSL(objective.encoder, out_dim=6, restoration_weight=0.0, contrast_weight=0.0)
  zeros = lambda *names: {name: jax.tree.map(jnp.zeros_like, x) if name in names else x
                          for name, x in variables['params'].items()}
  _, metrics, grads, *_ = everything(alone, zeros('rotation', 'contrast', 'decoder'), data, jax.random.key(4))
  assert not any(np.any(x) for x in jax.tree.leaves([grads['decoder'], grads['contrast']]))
  assert np.any(grads['rotation']['kernel'])
  close(metrics['rotation'], math.log(4))  # what a blind head has
  close(metrics['nt_xent'], math.log(2 * COUNT - 1))  # what equal vectors have
  assert metrics['restored'] < 0  # grey is worse than the input


def test_wrong_options_and_sizes():
  swin = encoder('swin_unetr')
  for options, words in ((dict(axis='w'), 'objective.axis'), (dict(cut=1.0), 'objective.cut'),
                         (dict(decoder='vae'), 'objective.decoder'), (dict(temperature=0.0), 'objective.temperature'),
                         (dict(rotation_weight=-1.0), r'objective.\*_weight')):
    with pytest.raises(UserError, match=words):
      SwinUNETRSSL(swin, **options)
  with pytest.raises(UserError, match='corner_tokens'):
    SwinUNETRSSL(encoder('channel_vit'), corner_tokens=True)
  with pytest.raises(UserError, match='objective.axis'):
    SwinUNETRSSL(create_model('vit_micro/4', (8, 8), 2), axis='x')
  data = batch('channel_vit')
  with pytest.raises(UserError, match='square'):
    SwinUNETRSSL(encoder('channel_vit'), axis='x').init(jax.random.key(0), data)
  with pytest.raises(UserError, match='batch_size must be at least 2'):
    SwinUNETRSSL(encoder('channel_vit')).init(jax.random.key(0), jax.tree.map(lambda x: x[:1], data))


def test_published_heads_read_two_corner_tokens():
  objective, variables, data, _ = start('swin_unetr')
  released = SwinUNETRSSL(objective.encoder, out_dim=6, axis='x', corner_tokens=True)
  assert released.plane == (-4, -3)
  shapes = jax.eval_shape(released.loss, variables, data, jax.random.key(0), 0)
  assert shapes[0].shape == ()
