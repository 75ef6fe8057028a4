"""iBOT's losses, centres and masks against float64 NumPy, with missing channels and both kinds of heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.objectives.distillation.ibot import IBOT
from tests.objectives import distillation_fakes as fakes
from tests.objectives.distillation_fakes import evaluate, gradients, largest
from tests.objectives.siamese_fakes import close

MASKING = {'mask_token': True}


def start(kind='vit', data=None, **fields):
  return fakes.start(IBOT, kind, data, options=MASKING, **fields)


def masks(objective, data, seed=3):
  """What the loss of key `seed` hides, [B, V, N]."""
  hidden = objective.hide(jax.random.split(jax.random.key(seed))[0], data['global'])
  return np.asarray(hidden).reshape(*data['global']['image'].shape[:2], -1)


def reference(objective, variables, data, step, hidden):
  """The two losses and the two new centres."""
  params, target, extra = variables['params'], variables['target'], variables['extra']
  last, patch = objective.last(), objective.patch_name
  vectors, patches = fakes.views(objective, params, data['global'], hidden=hidden)
  vectors = np.concatenate([vectors, fakes.views(objective, params, data['local'])[0]], axis=1)
  taught = fakes.views(objective, target, data['global'], 'teacher_mask')
  logits, patch_logits = fakes.head(target['head'], taught[0], last), fakes.head(target[patch], taught[1], last)
  heat = lambda start, end: start + (end - start) * step / 300
  sharp = lambda x, name, t: fakes.softmax((x - np.asarray(extra[name], np.float64)) / t)
  dino = fakes.dino(fakes.head(params['head'], vectors, last), sharp(logits, 'centre', heat(0.2, 0.3)))
  ibot = fakes.ibot(fakes.head(params[patch], patches, last), sharp(patch_logits, 'patch_centre', heat(0.15, 0.25)),
                    hidden & fakes.valid(objective, data['global']))
  there = np.ones(patch_logits.shape[:3], bool)
  if objective.encoder.per_channel:
    there = np.repeat(np.asarray(data['global']['teacher_mask']), there.shape[-1] // 2, axis=-1)
  follow = lambda name, m, mean: m * np.asarray(extra[name], np.float64) + (1 - m) * mean
  return dino, ibot, {'centre': follow('centre', 0.9, logits.mean(axis=(0, 1))),
                      'patch_centre': follow('patch_centre', 0.8, patch_logits[there].mean(axis=0))}


@pytest.mark.parametrize('kind, separate, channels', [
    ('vit', False, 'shared'), ('vit', True, 'shared'), ('channel', False, 'independent'), ('channel 3D', True, 'shared')])
def test_losses_and_centres_are_the_numpy_reference(kind, separate, channels):
  objective, variables, data = start(kind, separate_head=separate, mask_channels=channels, mask_probability=0.7,
                                     start_patch_temperature=0.15, patch_temperature=0.25, ibot_weight=0.5,
                                     patch_centre_momentum=0.8, norm_last_layer=separate)
  hidden = masks(objective, data)
  assert hidden.any() and not hidden.all()
  loss, (metrics, extra) = evaluate(objective, variables, data, step=40)
  dino, ibot, centres = reference(objective, variables, data, 40, hidden)
  close(metrics['dino_loss'], dino)
  close(metrics['ibot_loss'], ibot)
  close(loss, dino + 0.5 * ibot)
  for name, want in centres.items():
    np.testing.assert_allclose(extra[name], want, rtol=1e-4, atol=1e-5, err_msg=name)
  assert ('patch_head' in variables['params']) == separate


def test_masks_are_the_readmes():
  """Half of the crops; of a masked crop at most half, at least most of a tenth; 0.3 in the mean."""
  objective = IBOT(fakes.encoder('vit', **MASKING))
  got = np.asarray(objective.masks(jax.random.key(0), 3000, (14, 14), 1)).sum(axis=1)
  masked = got[got > 0]
  assert abs(len(masked) / 3000 - 0.5) < 0.04
  assert masked.max() <= 98 and abs(masked.mean() / 196 - 0.3) < 0.02


@pytest.mark.parametrize('channels', ['shared', 'independent'])
def test_masks_of_channels(channels):
  objective = IBOT(fakes.encoder('channel', **MASKING), mask_channels=channels, mask_probability=1.0)
  data = fakes.batch('channel', count=16)
  hidden = masks(objective, data).reshape(32, 2, 16)
  assert hidden.any()
  assert (hidden[:, 0] == hidden[:, 1]).all() == (channels == 'shared')


def test_tokens_that_one_of_both_lacks_do_not_count():
  """Without any common channel there is no patch loss; a missing channel's pixels do not matter (they are NaN)."""
  objective, variables, data = start('channel', mask_probability=1.0)
  group = data['global']
  image = jnp.nan_to_num(group['image'])
  apart = jnp.broadcast_to(jnp.array([True, False]), group['channel_mask'].shape)
  never = data | {'global': group | {'image': image, 'channel_mask': apart, 'teacher_mask': ~apart}}
  loss, (metrics, extra) = evaluate(objective, variables, never)
  assert float(metrics['ibot_loss']) == 0 and float(metrics['hidden_tokens']) == 0 and np.isfinite(loss)
  assert all(np.isfinite(x).all() for x in extra.values())


def test_order_of_the_batch_does_not_matter():
  objective, variables, data = start(mask_probability=0.0)  # masks are drawn by place
  there, back = (evaluate(objective, variables, d)[0] for d in (data, fakes.permuted(data, np.array([2, 0, 3, 1]))))
  close(back, float(there), 1e-6)


def test_held_out_loss_changes_nothing():
  objective, variables, data = start()
  loss, (_, extra) = evaluate(objective, variables, data, train=False)
  assert np.isfinite(loss)
  jax.tree.map(np.testing.assert_array_equal, extra, variables['extra'])


def test_frozen_last_layers():
  objective, variables, _ = start(separate_head=True)
  still = objective.frozen(jnp.asarray(0))
  assert set(still) == {'head/last', 'patch_head/last'} and all(bool(x) for x in still.values())
  assert all('last' in variables['params'][name.split('/')[0]] for name in still)


@pytest.mark.parametrize('fields, options, word', [
    ({}, {}, 'mask_token'), ({'mask_channels': 'shard'}, MASKING, "mean 'shared'"),
    ({'mask_ratio': (0.5, 0.1)}, MASKING, 'mask_ratio'), ({'mask_ratio': (0.3,)}, MASKING, 'mask_ratio'),
    ({'mask_probability': 2.0}, MASKING, 'mask_probability'), ({'patch_out_dim': 9}, MASKING, 'separate_head')])
def test_bad_options(fields, options, word):
  with pytest.raises(UserError, match=word):
    IBOT(fakes.encoder('vit', **options), **fields)


def test_too_few_patches_to_hide_any():
  objective, variables, data = start(mask_ratio=(0.01, 0.05))
  with pytest.raises(UserError, match='hides none of 16 patches'):
    jax.eval_shape(objective.loss, variables, data, jax.random.key(0), 0)


def test_defaults_have_the_published_number_of_prototypes_at_most():
  make = lambda rows: IBOT(fakes.encoder('vit', **MASKING), rows=rows).heads['head'].out_dim
  assert make(5000) == 1024 and make(10**6) == 8192


def test_a_batch_of_one_is_finite_and_the_teacher_gets_no_gradient():
  objective, variables, data = start(data=fakes.batch(count=1))
  value, grads = gradients(objective, variables, data)
  assert np.isfinite(value) and np.isfinite(largest(grads['params']))
  assert largest(grads['target']) == largest(grads['extra']) == 0.0
