"""DINOv3: its loss with Gram anchoring against float64 NumPy, the Gram teacher's life, the norm of local crops, RoPE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models.layers import positions
from jaxmed.objectives.distillation.dinov3 import DINOv3
from jaxmed.objectives.distillation.self_distillation import resized
from tests.objectives import distillation_fakes as fakes
from tests.objectives.distillation_fakes import evaluate, gradients, largest
from tests.objectives.siamese_fakes import close
from tests.objectives.test_dinov2 import reference
from tests.objectives.test_ibot import masks

OPTIONS = {'pos': 'rope', 'num_registers': 1, 'local_norm': True, 'mask_token': True}


def start(kind='vit', data=None, options=None, **fields):
  return fakes.start(DINOv3, kind, data, options=OPTIONS | (options or {}), **fields)


@pytest.mark.parametrize('kind, gram', [('vit', 2), ('channel', 2), ('channel 3D', 0)])
def test_loss_with_gram_is_the_numpy_reference(kind, gram):
  objective, variables, data = start(kind, fakes.batch(kind, gram=gram), gram_weight=2.0)
  hidden = masks(objective, data)
  loss, (metrics, extra) = evaluate(objective, variables, data, step=40)
  dino, ibot, koleo, _ = reference(objective, variables, data, 40, hidden, local=True)
  _, student = fakes.views(objective, variables['params'], data['global'], hidden=hidden)
  weights = {'encoder': variables['extra']['gram']}
  if gram:
    _, teacher = fakes.views(objective, weights, data['gram'])
  else:
    _, teacher = fakes.views(objective, weights, data['global'], 'teacher_mask')
  size, patch = np.array(objective.encoder.image_size), np.array(objective.encoder.patch_size)
  new = tuple(size // patch)
  old = (*new[:-2], *(np.array(new[-2:]) * max(gram, 1)))
  channels = 2 if objective.encoder.per_channel else 1
  grid = jnp.asarray(teacher.reshape(-1, *teacher.shape[2:]), jnp.float32)
  teacher = np.asarray(resized(grid, (channels, *old), (channels, *new)), np.float64)
  there = fakes.valid(objective, data['global']).reshape(-1, student.shape[2])
  want = fakes.gram(student.reshape(-1, *student.shape[2:]), teacher, there)
  close(metrics['gram_loss'], want, 2e-5)
  close(metrics['dino_loss'], dino, 2e-5)
  close(metrics['ibot_loss'], ibot, 2e-5)
  close(loss, dino + ibot + 0.1 * koleo + 2 * want, 2e-5)
  jax.tree.map(np.testing.assert_array_equal, extra['gram'], variables['extra']['gram'])  # no refresh at step 40


def test_gram_teacher_begins_and_is_refreshed():
  objective, variables, data = start(gram_weight=2.0, gram_start=6, gram_every=5, gram_updates=2)
  steps = [s for s in range(40) if bool(objective.refreshes(jnp.asarray(s)))]
  assert steps == [6, 11, 16]
  once = DINOv3(objective.encoder, gram_every=0, gram_start=3)
  assert [s for s in range(40) if bool(once.refreshes(jnp.asarray(s)))] == [3]
  same = lambda a, b: all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
  at = {s: evaluate(objective, variables, data, step=s)[1] for s in (5, 6, 7)}
  assert float(at[5][0]['gram_loss']) == 0 and float(at[6][0]['gram_loss']) > 0
  assert same(at[5][1]['gram'], variables['extra']['gram']) and same(at[7][1]['gram'], variables['extra']['gram'])
  assert same(at[6][1]['gram'], variables['target']['encoder'])
  held_out = evaluate(objective, variables, data, step=6, train=False)[1][1]
  assert same(held_out['gram'], variables['extra']['gram'])


def test_gradients_of_gram_reach_the_student_only():
  objective, variables, data = start(data=fakes.batch(gram=2), gram_weight=2.0, dino_weight=0.0, ibot_weight=0.0,
                                     koleo_weight=0.0)
  value, grads = gradients(objective, variables, data)
  assert float(value) > 0 and np.isfinite(largest(grads))
  assert largest(grads['target']) == largest(grads['extra']) == 0.0
  assert largest(grads['params']['encoder']) > 0 and largest(grads['params']['head']) == 0.0


def test_without_gram_nothing_is_kept_for_it():
  objective, variables, data = start()
  assert variables['extra'] == {}
  _, (metrics, extra) = evaluate(objective, variables, data)
  assert extra == {} and 'gram_loss' not in metrics
  assert objective.heads['head'].last == objective.heads['patch_head'].last == 'linear'


def test_every_masked_crop_hides_the_upper_end_of_its_bin():
  objective = DINOv3(fakes.encoder('vit', **OPTIONS))
  sizes = np.asarray(objective.masks(jax.random.key(1), 8, (14, 14), 1)).sum(axis=1)
  most = np.floor(196 * np.linspace(0.1, 0.5, 5)[1:])
  got = np.sort(sizes)[4:]
  assert (got <= most).all() and (got >= most - 2).all()


def test_local_norm_is_of_local_class_tokens_alone():
  """It changes class token and registers of local crops, not patches, nor anything of global crops."""
  model = fakes.encoder('vit', **OPTIONS)
  image = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 2)), jnp.float32)
  params = jax.jit(model.init)(jax.random.key(0), image)['params']
  params['norm_local'] = jax.tree.map(lambda x: x + 0.5, params['norm_local'])
  apply = jax.jit(lambda p, local: model.apply({'params': p}, image, local=local), static_argnums=1)
  whole, local = apply(params, False), apply(params, True)
  np.testing.assert_array_equal(whole.patches, local.patches)
  assert np.abs(whole.cls - local.cls).mean() > 0.1 and np.abs(whole.registers - local.registers).mean() > 0.1
  product = {k: v for k, v in params.items() if k not in ('mask_token', 'norm_local')}
  plain = model.clone(mask_token=False, local_norm=False)
  same = jax.jit(lambda p: plain.apply({'params': p}, image))(product)
  jax.tree.map(np.testing.assert_array_equal, same, whole)


def test_rotary_coordinates_are_augmented_in_training_only():
  position = jnp.asarray(positions.coordinates((4, 4)))[None]
  change = lambda **o: np.asarray(positions.augment(jax.random.key(0), position, 500, **(
      dict(shift=0.0, jitter=0.0, rescale=0.0) | o)))
  np.testing.assert_array_equal(change(), np.broadcast_to(position, (500, 16, 2)))
  moved = change(shift=0.3) - np.asarray(position)
  assert np.ptp(moved, axis=1).max() < 1e-6 and np.abs(moved).max() <= 0.3 and moved.std() == pytest.approx(0.3 / 3**0.5, rel=0.1)
  scale = change(rescale=2.0) / np.asarray(position)
  assert np.ptp(scale, axis=(1, 2)).max() < 1e-5 and scale.min() >= 0.5 and scale.max() <= 2.001
  assert np.log(scale).std() == pytest.approx(np.log(2) / 3**0.5, rel=0.1)
  apart = change(jitter=2.0) / np.asarray(position)
  assert np.ptp(apart, axis=1).max() < 1e-5 and np.abs(apart[..., 0] - apart[..., 1]).max() > 0.5
  objective, variables, data = start(options={'rope_rescale': 2.0})
  value = lambda seed, train: float(evaluate(objective, variables, data, train=train, seed=seed)[1][0]['dino_loss'])
  entropy = lambda seed: float(evaluate(objective, variables, data, seed=seed)[1][0]['teacher_entropy'])
  assert entropy(1) == entropy(2)  # the teacher sees the plain coordinates
  assert value(1, True) != value(2, True)


def test_bad_options():
  with pytest.raises(UserError, match='gram_every -1'):
    DINOv3(fakes.encoder('vit', **OPTIONS), gram_every=-1)


def official(start, peak, end, warmup, total, bend):
  """The published schedule as an array: linear, then half a cosine over `bend` steps, then constant."""
  turn = (1 + np.cos(np.linspace(0, np.pi, bend))) / 2
  parts = np.linspace(start, peak, warmup, endpoint=False), end + (peak - end) * turn
  return np.concatenate([*parts, np.full(total - warmup - bend, end)])


def test_weights_ramp_as_published():
  """Both of the Gram stage, whose steps begin at 20 here: 0 to 2, and 1 to a half, in 10 steps."""
  objective = DINOv3(fakes.encoder('vit', **OPTIONS), gram_weight=2.0, gram_start=20, gram_warmup=10,
                     local_weight=0.5, start_local_weight=1.0, local_warmup=10)
  steps = jnp.arange(40)
  gram = objective.since_start(steps, 0.0, 2.0, 10)
  np.testing.assert_allclose(gram, official(0, 0, 2.0, 20, 40, 10), atol=2e-6)
  np.testing.assert_allclose(objective.local_factor(steps), official(1, 1, 0.5, 20, 40, 10), atol=1e-6)
  assert DINOv3(objective.encoder, local_weight=0.5).local_factor(0) == 0.5
  np.testing.assert_array_equal(objective.since_start(steps[19:23], 0.0, 2.0, 1), [0, 0, 2, 2])


def test_ramped_weights_are_those_of_the_loss():
  """At a step within both ramps the loss is the weighted sum of its parts."""
  ramps = dict(gram_weight=2.0, gram_warmup=10, local_weight=0.5, local_warmup=10)
  objective, variables, data = start(data=fakes.batch(gram=2), **ramps)
  loss, (metrics, _) = evaluate(objective, variables, data, step=3)
  share = official(0, 0, 1, 0, 10, 10)[3]
  close(metrics['gram_weight'], 2 * share, 1e-5)
  parts = metrics['dino_loss'] + metrics['ibot_loss'] + 0.1 * 2 * metrics['koleo_loss'] + 2 * share * metrics['gram_loss']
  close(loss, parts, 2e-5)
  hidden = masks(objective, data)
  dino = [reference(DINOv3(**(vars(objective) | {'local_weight': w, 'local_warmup': 0})), variables, data, 3, hidden, local=True)[0]
          for w in (1.0, 0.5)]
  assert abs(dino[0] - dino[1]) > 0.05
  close(metrics['dino_loss'], dino[0] + share * (dino[1] - dino[0]), 2e-5)
