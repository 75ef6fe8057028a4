"""DINO's whole loss and centre against float64 NumPy, and what its teacher, batch and first epoch must do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.objectives.distillation.dino import DINO
from jaxmed.objectives.networks import Clock
from tests.objectives import distillation_fakes as fakes
from tests.objectives.distillation_fakes import evaluate, gradients, largest
from tests.objectives.siamese_fakes import close


def reference(objective, variables, data, step):
  """(loss, new centre, teacher's entropy)."""
  params, target = variables['params'], variables['target']
  last = 'fixed_norm' if objective.norm_last_layer else 'weight_norm'
  vectors = [fakes.views(objective, params, data[name])[0] for name in ('global', 'local') if name in data]
  student = fakes.head(params['head'], np.concatenate(vectors, axis=1), last)
  logits = fakes.head(target['head'], fakes.views(objective, target, data['global'], 'teacher_mask')[0], last)
  centre = np.asarray(variables['extra']['centre'], np.float64)
  teacher = fakes.softmax((logits - centre) / float(objective.temperature(step)))
  entropy = -(teacher * np.log(teacher)).sum(axis=-1).mean()
  return fakes.dino(student, teacher), 0.9 * centre + 0.1 * logits.mean(axis=(0, 1)), entropy


@pytest.mark.parametrize('kind, local, norm', [
    ('vit', 3, True), ('vit', 0, False), ('channel', 3, True), ('channel 3D', 2, False)])
def test_loss_and_centre_are_the_numpy_reference(kind, local, norm):
  objective, variables, data = fakes.start(DINO, kind, fakes.batch(kind, local=local), norm_last_layer=norm)
  loss, (metrics, extra) = evaluate(objective, variables, data, step=40)
  want, centre, entropy = reference(objective, variables, data, 40)
  close(loss, want)
  np.testing.assert_allclose(extra['centre'], centre, rtol=1e-4, atol=1e-5)
  close(metrics['dino_loss'], want)
  close(metrics['teacher_entropy'], entropy, 1e-4)
  close(metrics['teacher_kl'], want - entropy, 1e-4)
  assert float(metrics['teacher_temperature']) == pytest.approx(0.2 + 0.1 * 40 / 300)


def test_gradient_is_the_difference_quotient_and_the_teacher_gets_none():
  objective, variables, data = fakes.start(DINO)
  _, grads = gradients(objective, variables, data)
  assert largest(grads['target']) == largest(grads['extra']) == 0.0
  norm = np.sqrt(sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(grads['params'])))
  step = 1e-3 / norm
  moved = lambda h: variables | {'params': jax.tree.map(lambda p, g: p + h * g, variables['params'], grads['params'])}
  up, down = (reference(objective, moved(h), data, 0)[0] for h in (step, -step))
  assert abs((up - down) / (2 * step) - norm**2) < 3e-3 * norm**2


def test_order_of_the_batch_does_not_matter():
  objective, variables, data = fakes.start(DINO)
  there = evaluate(objective, variables, data)
  back = evaluate(objective, variables, fakes.permuted(data, np.array([2, 0, 3, 1])))
  close(back[0], float(there[0]), 1e-6)
  np.testing.assert_allclose(back[1][1]['centre'], there[1][1]['centre'], rtol=1e-5, atol=1e-7)


def test_views_belong_to_their_samples():
  """Exchanging two samples' second crops changes the loss; exchanging both samples does not (above)."""
  objective, variables, data = fakes.start(DINO)
  mixed = data['global']['image'].at[:, 1].set(data['global']['image'][::-1, 1])
  other = data | {'global': data['global'] | {'image': mixed}}
  assert abs(float(evaluate(objective, variables, data)[0]) - float(evaluate(objective, variables, other)[0])) > 1e-3


def test_teacher_sees_all_channels_and_global_crops_only():
  objective, variables, data = fakes.start(DINO, 'channel')
  metric = lambda d: float(evaluate(objective, variables, d)[1][0]['teacher_entropy'])
  local = data | {'local': data['local'] | {'image': data['local']['image'] + 1}}
  assert metric(local) == metric(data)
  student = data | {'global': data['global'] | {'channel_mask': data['global']['teacher_mask']}}
  assert metric(student) == metric(data)
  assert float(evaluate(objective, variables, student)[0]) != float(evaluate(objective, variables, data)[0])


def test_held_out_loss_is_not_random_and_changes_nothing():
  objective, variables, data = fakes.start(DINO, options={'drop_path': 0.5, 'depth': 2})
  first, second = (evaluate(objective, variables, data, train=False, seed=s) for s in (1, 2))
  assert float(first[0]) == float(second[0])
  np.testing.assert_array_equal(first[1][1]['centre'], variables['extra']['centre'])
  close(first[0], reference(objective, variables, data, 0)[0])
  drawn = [float(evaluate(objective, variables, data, seed=s)[1][0]['dino_loss']) for s in (1, 2)]
  assert drawn[0] != drawn[1]
  spread = [float(evaluate(objective, variables, data, seed=s)[1][0]['teacher_entropy']) for s in (1, 2)]
  assert spread[0] == spread[1]  # the teacher drops nothing


def test_an_encoder_without_class_token_and_with_batch_norm():
  objective, variables, data = fakes.start(DINO, 'conv', fakes.batch('conv', missing=False))
  loss, (metrics, _) = evaluate(objective, variables, data)
  assert np.isfinite(loss) and set(metrics['stats']) == {'encoder'}
  moved = metrics['stats']['encoder']['norm']['mean']
  assert moved.shape == variables['params']['encoder']['norm']['mean'].shape and np.abs(moved).max() > 0


def test_last_layer_rests_in_the_first_epoch():
  objective, variables, _ = fakes.start(DINO, clock=Clock(steps=1000, epoch=50))
  still = [bool(objective.frozen(jnp.asarray(s))['head/last']) for s in (0, 49, 50, 900)]
  assert still == [True, True, False, False]
  assert 'kernel' in variables['params']['head']['last']  # what the path names
  short = DINO(objective.encoder, Clock(steps=100, epoch=50))
  assert bool(short.frozen(jnp.asarray(9))['head/last']) and not bool(short.frozen(jnp.asarray(10))['head/last'])


def test_teacher_starts_as_the_student_and_is_the_product():
  objective = DINO(fakes.encoder('vit'), **fakes.HEAD)
  variables = jax.jit(objective.init)(jax.random.key(0), fakes.batch())
  jax.tree.map(np.testing.assert_array_equal, variables['params'], variables['target'])
  assert objective.encoder_params(variables) is variables['target']['encoder']
  assert variables['extra']['centre'].shape == (12,)


def test_prototypes_follow_the_data():
  make = lambda rows, **o: DINO(fakes.encoder('vit'), rows=rows, **o).heads['head'].out_dim
  assert make(3000) == 1024 and make(10**6) == 65536 and make(3000, out_dim=77) == 77


def test_a_batch_of_two_is_finite():
  objective, variables, data = fakes.start(DINO, data=fakes.batch(count=2))
  value, grads = gradients(objective, variables, data)
  assert np.isfinite(value) and np.isfinite(largest(grads))
