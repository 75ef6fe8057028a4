"""Swin UNETR's pretraining: what is shown of copies, its losses in float64, who gets gradients, signs of collapse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.objectives.dense import decoding
from jaxmed.objectives.volumes.swin_unetr_ssl import SwinUNETRSSL
from tests.objectives import dense_fakes as fakes
from tests.objectives.dense_fakes import COUNT, batch, encoder
from tests.objectives.siamese_fakes import close, log_softmax, unit


def everything(objective, params, data):
  return fakes.everything(objective, SwinUNETRSSL.copies, params, data, jax.random.key(4))


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


@pytest.mark.parametrize('family', ['swin_unetr', 'channel_vit'])
def test_the_loss_and_what_it_is_made_of(family):
  objective, variables, data = fakes.start(SwinUNETRSSL, family, out_dim=6)
  (value, metrics, grads), (shown, clean, there, turns), *outputs = everything(objective, variables['params'], data)
  outputs[0] = decoding.of_channels(objective.encoder, shown, outputs[0])
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
  objective, variables, data = fakes.start(SwinUNETRSSL, 'swin_unetr', out_dim=6)
  alone = SwinUNETRSSL(objective.encoder, out_dim=6, restoration_weight=0.0, contrast_weight=0.0)
  zeros = lambda *names: {name: jax.tree.map(jnp.zeros_like, x) if name in names else x
                          for name, x in variables['params'].items()}
  (_, metrics, grads), *_ = everything(alone, zeros('rotation', 'contrast', 'decoder'), data)
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
  objective, variables, data = fakes.start(SwinUNETRSSL, 'swin_unetr', out_dim=6)
  released = SwinUNETRSSL(objective.encoder, out_dim=6, axis='x', corner_tokens=True)
  assert released.plane == (-4, -3)
  shapes = jax.eval_shape(released.loss, variables, data, jax.random.key(0), 0)
  assert shapes[0].shape == ()
