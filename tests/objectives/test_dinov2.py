"""DINOv2's three losses with both centrings against float64 NumPy, their weights, and its masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.objectives.distillation.dinov2 import DINOv2
from tests.objectives import distillation_fakes as fakes
from tests.objectives.distillation_fakes import evaluate, gradients, largest
from tests.objectives.siamese_fakes import close
from tests.objectives.test_ibot import masks

MASKING = {'mask_token': True}


def start(kind='vit', data=None, **fields):
  return fakes.start(DINOv2, kind, data, options=MASKING, **fields)


def targets(objective, variables, data, step, hidden):
  """The teacher's distributions of class tokens [B, V, K] and of patches [B, V, N, K], and the new centres."""
  target, extra = variables['target'], variables['extra']
  last, heat = objective.last(), 0.2 + 0.1 * step / 300
  vectors, patches = fakes.views(objective, target, data['global'], 'teacher_mask')
  logits = fakes.head(target['head'], vectors, last)
  patch_logits = fakes.head(target[objective.patch_name], patches, last)
  used = hidden & fakes.valid(objective, data['global'])
  if objective.centering == 'softmax':
    centre, patch_centre = (np.asarray(extra[k], np.float64) for k in ('centre', 'patch_centre'))
    new = {'centre': 0.9 * centre + 0.1 * logits.mean(axis=(0, 1)),
           'patch_centre': 0.9 * patch_centre + 0.1 * patch_logits[used].mean(axis=0)}
    return fakes.softmax((logits - centre) / heat), fakes.softmax((patch_logits - patch_centre) / heat), new
  teacher = fakes.sinkhorn(logits.reshape(-1, logits.shape[-1]), heat).reshape(logits.shape)
  patch_teacher = np.zeros(patch_logits.shape)
  patch_teacher[used] = fakes.sinkhorn(patch_logits[used], heat)
  return teacher, patch_teacher, {}


def reference(objective, variables, data, step, hidden, **local):
  """DINO's loss, iBOT's, KoLeo's sum, and the new centres."""
  params, last = variables['params'], objective.last()
  teacher, patch_teacher, centres = targets(objective, variables, data, step, hidden)
  vectors, patches = fakes.views(objective, params, data['global'], hidden=hidden)
  small = fakes.views(objective, params, data['local'], **local)[0]
  student = fakes.head(params['head'], np.concatenate([vectors, small], axis=1), last)
  dino = fakes.dino(student, teacher, local_weight=objective.local_weight)
  ibot = fakes.ibot(fakes.head(params[objective.patch_name], patches, last), patch_teacher,
                    hidden & fakes.valid(objective, data['global']))
  return dino, ibot, sum(fakes.koleo(vectors[:, v]) for v in range(2)), centres


@pytest.mark.parametrize('kind, centering, fields', [
    ('vit', 'softmax', {}),
    ('vit', 'sinkhorn', dict(separate_head=True, patch_out_dim=10, patch_bottleneck_dim=5, patch_hidden_dim=7,
                             local_weight=0.5)),
    ('channel', 'softmax', dict(separate_head=True, mask_channels='independent')),
    ('channel 3D', 'sinkhorn', {})])
def test_losses_and_centres_are_the_numpy_reference(kind, centering, fields):
  objective, variables, data = start(kind, centering=centering, dino_weight=0.7, ibot_weight=1.3, **fields)
  hidden = masks(objective, data)
  loss, (metrics, extra) = evaluate(objective, variables, data, step=40)
  dino, ibot, koleo, centres = reference(objective, variables, data, 40, hidden)
  close(metrics['dino_loss'], dino, 2e-5)
  close(metrics['ibot_loss'], ibot, 2e-5)
  close(metrics['koleo_loss'], koleo / 2, 2e-5)
  close(loss, 0.7 * dino + 1.3 * ibot + 0.1 * koleo, 2e-5)
  assert set(extra) == set(centres)
  for name, want in centres.items():
    np.testing.assert_allclose(extra[name], want, rtol=1e-4, atol=1e-5, err_msg=name)


def test_half_of_the_batchs_crops_is_masked_one_in_each_bin():
  objective = DINOv2(fakes.encoder('vit', **MASKING))
  sizes = np.stack([np.asarray(objective.masks(jax.random.key(s), 16, (14, 14), 1)).sum(axis=1) for s in range(20)])
  assert ((sizes > 0).sum(axis=1) == 8).all()
  edges = 196 * np.linspace(0.1, 0.5, 9)
  ranked = np.sort(sizes, axis=1)[:, 8:]
  assert (ranked <= edges[1:]).all() and np.mean(ranked >= np.floor(edges[:-1]) - 2) > 0.95
  first = np.flatnonzero((sizes > 0).any(axis=0))
  assert len(first) == 16  # any crop of the batch may be one of them


def test_masks_of_channels_hide_as_many_places_in_each():
  objective = DINOv2(fakes.encoder('channel', **MASKING), mask_channels='independent', mask_probability=1.0)
  data = fakes.batch('channel', count=8)
  hidden = masks(objective, data).reshape(16, 2, 16)
  assert (hidden[:, 0] != hidden[:, 1]).any()
  assert np.abs(hidden[:, 0].sum(axis=1) - hidden[:, 1].sum(axis=1)).max() <= 3  # blocks may fall short of the count


@pytest.mark.parametrize('centering', ['softmax', 'sinkhorn'])
def test_a_batch_of_one_is_finite_and_the_teacher_gets_no_gradient(centering):
  objective, variables, data = start(data=fakes.batch(count=1), centering=centering)
  value, grads = gradients(objective, variables, data)
  assert np.isfinite(value) and np.isfinite(largest(grads['params']))
  assert largest(grads['target']) == 0.0
  assert centering == 'sinkhorn' or largest(grads['extra']) == 0.0


def test_equal_samples_are_finite():
  objective, variables, data = start()
  same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), data)
  same['global']['image'] = jnp.broadcast_to(same['global']['image'][:, :1], same['global']['image'].shape)
  value, grads = gradients(objective, variables, same)
  assert np.isfinite(value) and largest(grads['params']) < 1e3


def test_without_masks_the_order_does_not_matter():
  objective, variables, data = start(mask_probability=0.0, centering='sinkhorn')
  order = np.array([2, 0, 3, 1])
  there, back = (evaluate(objective, variables, d) for d in (data, fakes.permuted(data, order)))
  close(back[0], float(there[0]), 1e-5)
  assert float(there[1][0]['ibot_loss']) == 0.0


def test_held_out_loss_changes_nothing():
  objective, variables, data = start()
  _, (_, extra) = evaluate(objective, variables, data, train=False)
  jax.tree.map(np.testing.assert_array_equal, extra, variables['extra'])


def test_bad_options():
  with pytest.raises(UserError, match="did you mean 'sinkhorn'"):
    DINOv2(fakes.encoder('vit', **MASKING), centering='sinkhorm')
  objective, variables, data = start(koleo_group=3)
  with pytest.raises(UserError, match='koleo_group 3 does not divide the batch of 4'):
    jax.eval_shape(objective.loss, variables, data, jax.random.key(0), 0)
