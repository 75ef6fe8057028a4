"""The losses and targets of self-distillation against float64 NumPy, their gradients, and what they do at the limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.objectives import IBOT, DINOv2, DINOv3
from jaxmed.objectives.distillation import self_distillation as lib
from jaxmed.objectives.networks import Clock
from tests.objectives import distillation_fakes as fakes
from tests.objectives.siamese_fakes import check_gradient, close

RNG = np.random.default_rng(5)


def f32(x):
  return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize('local_weight', [1.0, 0.5])
@pytest.mark.parametrize('students', [5, 2])
def test_cross_view_is_the_mean_over_pairs(students, local_weight):
  student, teacher = RNG.normal(size=(3, students, 7)), fakes.softmax(3 * RNG.normal(size=(3, 2, 7)))
  have = jax.jit(lib.cross_view, static_argnums=(2, 3))(f32(student), f32(teacher), 0.1, local_weight)
  close(have, fakes.dino(student, teacher, 0.1, local_weight))
  check_gradient(lambda s: lib.cross_view(s, f32(teacher), 0.1, local_weight),
                 lambda s: fakes.dino(s, teacher, 0.1, local_weight), student)


def test_cross_view_without_pairs_is_zero():
  assert float(lib.cross_view(jnp.ones((2, 1, 4)), jnp.ones((2, 1, 4)) / 4, 0.1)) == 0.0


def test_centred_and_its_centre():
  logits, centre = RNG.normal(size=(4, 6, 9)), RNG.normal(size=9)
  have = lib.centred(f32(logits), f32(centre), 0.05)
  np.testing.assert_allclose(have, fakes.softmax((logits - centre) / 0.05), rtol=2e-5, atol=1e-7)
  want = 0.9 * centre + 0.1 * logits.reshape(-1, 9).mean(axis=0)
  np.testing.assert_allclose(lib.update_centre(f32(centre), f32(logits), 0.9), want, rtol=1e-5, atol=1e-6)
  weights = RNG.random((4, 6)) < 0.5
  want = 0.9 * centre + 0.1 * logits[weights].mean(axis=0)
  np.testing.assert_allclose(lib.update_centre(f32(centre), f32(logits), 0.9, jnp.asarray(weights)), want, rtol=1e-5,
                             atol=1e-6)
  nothing = lib.update_centre(f32(centre), f32(logits), 0.9, jnp.zeros((4, 6), bool))
  np.testing.assert_array_equal(nothing, f32(centre))


def test_entropy():
  p = fakes.softmax(RNG.normal(size=(3, 2, 8)))
  close(lib.entropy(f32(p)), -(p * np.log(p)).sum(axis=-1).mean())
  assert float(lib.entropy(jnp.eye(3))) == 0.0  # 0 log 0
  close(lib.entropy(jnp.ones((2, 8)) / 8), np.log(8))


def test_patch_loss_and_chosen_tokens():
  student, teacher = RNG.normal(size=(3, 2, 10, 7)), fakes.softmax(3 * RNG.normal(size=(3, 2, 10, 7)))
  mask = RNG.random((3, 2, 10)) < 0.3
  mask[0, 0] = False
  index, marked = lib.chosen(jnp.asarray(mask).reshape(6, 10), int(mask.sum(axis=-1).max()))
  pick = lambda x: jnp.take_along_axis(f32(x).reshape(6, 10, 7), index[..., None], axis=1)
  want = fakes.ibot(student, teacher, mask)
  close(lib.patch_loss(pick(student), pick(teacher), marked, 0.1), want)
  check_gradient(lambda s: lib.patch_loss(pick(s), pick(teacher), marked, 0.1), lambda s: fakes.ibot(s, teacher, mask),
                 student)
  assert float(lib.patch_loss(pick(student), pick(teacher), marked & False, 0.1)) == 0.0
  nothing = jnp.where(marked[..., None], pick(student), jnp.nan)  # what other tokens hold does not matter
  close(lib.patch_loss(nothing, pick(teacher), marked, 0.1), want)


def test_koleo_value_and_gradient():
  x = RNG.normal(size=(9, 5))
  close(jax.jit(lib.koleo)(f32(x)), fakes.koleo(x))
  check_gradient(lib.koleo, fakes.koleo, x)
  assert float(lib.koleo(f32(3 * x))) == pytest.approx(float(lib.koleo(f32(x))), rel=1e-6)


def test_koleo_in_groups():
  x = RNG.normal(size=(9, 5))
  close(lib.koleo(f32(x), 3), np.mean([fakes.koleo(x[i : i + 3]) for i in (0, 3, 6)]))
  with pytest.raises(UserError, match='koleo_group 4 does not divide the batch of 9'):
    lib.koleo(f32(x), 4)


@pytest.mark.parametrize('dim', [4, 768])
def test_koleo_of_duplicates_and_of_one_sample(dim):
  x = RNG.normal(size=(6, dim))
  x[1] = x[0]
  value, gradient = jax.jit(jax.value_and_grad(lib.koleo))(f32(x))
  rounded = np.asarray(f32(x), np.float64)
  close(value, fakes.koleo(rounded), 1e-4)  # the official value, of the order of 18 / 3 here
  assert np.isfinite(gradient).all() and np.abs(gradient).max() < 10
  assert np.abs(gradient[2:]).max() > 0 and not np.abs(gradient[:2]).any()
  value, gradient = jax.jit(jax.value_and_grad(lib.koleo))(f32(x[:1]))
  assert float(value) == 0 and not np.asarray(gradient).any()
  value, gradient = jax.jit(jax.value_and_grad(lib.koleo))(jnp.zeros((3, dim)))
  assert np.isfinite(value) and np.isfinite(gradient).all()


def test_gram_loss_with_missing_tokens():
  student, teacher = RNG.normal(size=(3, 6, 5)), RNG.normal(size=(3, 6, 5))
  everything = np.ones((3, 6), bool)
  some = RNG.random((3, 6)) < 0.6
  close(lib.gram_loss(f32(student), f32(teacher)), fakes.gram(student, teacher, everything))
  close(lib.gram_loss(f32(student), f32(teacher), jnp.asarray(some)), fakes.gram(student, teacher, some))
  check_gradient(lambda s: lib.gram_loss(s, f32(teacher), jnp.asarray(some)), lambda s: fakes.gram(s, teacher, some),
                 student)
  turn, _ = np.linalg.qr(RNG.normal(size=(5, 5)))  # the loss sees similarities only
  assert float(lib.gram_loss(f32(student), f32(2 * student @ turn))) < 1e-10
  assert not np.asarray(jax.grad(lib.gram_loss, argnums=1)(f32(student), f32(teacher))).any()
  assert float(lib.gram_loss(f32(student), f32(teacher), jnp.zeros((3, 6), bool))) == 0


def test_resized_patches():
  x = f32(RNG.normal(size=(2, 3 * 4, 5)))
  np.testing.assert_array_equal(lib.resized(x, (3, 4), (3, 4)), x)
  ramp = np.stack(np.meshgrid(np.arange(8.0), np.arange(6.0), indexing='ij'), axis=-1).reshape(1, 48, 2)
  half = np.asarray(lib.resized(f32(ramp), (8, 6), (4, 3))).reshape(4, 3, 2)
  np.testing.assert_allclose(half[1:-1, 1:-1, 0], np.array([[2.5], [4.5]]), rtol=1e-5)  # linear inside, half-pixel centres
  np.testing.assert_allclose(half[1:-1, 1, 1], [2.5, 2.5], rtol=1e-5)
  channels = RNG.normal(size=(2, 3, 8 * 8, 5))
  together = lib.resized(f32(channels.reshape(2, -1, 5)), (3, 8, 8), (3, 4, 4)).reshape(2, 3, 16, 5)
  for c in range(3):
    np.testing.assert_allclose(together[:, c], lib.resized(f32(channels[:, c]), (8, 8), (4, 4)), rtol=1e-5, atol=1e-6)


def test_prototypes_by_the_number_of_images():
  want = {0: 65536, 1: 1024, 19_999: 1024, 20_000: 2048, 50_000: 4096, 100_000: 16384, 200_000: 32768, 499_999: 32768,
          500_000: 65536}
  assert {rows: lib.prototypes(rows) for rows in want} == want


def test_schedules():
  net = fakes.encoder('vit')
  long = lib.SelfDistillation(net, Clock(steps=10_000, epoch=100))
  at = lambda step: float(long.temperature(step))
  assert at(0) == pytest.approx(0.04) and at(1500) == pytest.approx(0.055) and at(3000) == at(9000) == pytest.approx(0.07)
  short = lib.SelfDistillation(net, Clock(steps=1000, epoch=100))  # 30 epochs would be three runs
  assert float(short.temperature(150)) == pytest.approx(0.055) and float(short.temperature(300)) == pytest.approx(0.07)
  assert float(long.momentum(0)) == pytest.approx(0.996) and float(long.momentum(5000)) == pytest.approx(0.998)
  assert float(long.momentum(10_000)) == 1.0
  constant = lib.SelfDistillation(net, start_momentum=0.999, final_momentum=0.999, start_temperature=0.07)
  assert {float(constant.momentum(s)) for s in (0, 400, 1000)} == {float(np.float32(0.999))}
  assert float(constant.temperature(0)) == float(constant.temperature(999)) == pytest.approx(0.07)


@pytest.mark.parametrize('field', [{'teacher_temperature': -0.1}, {'start_temperature': 0.0}, {'start_momentum': 1.5}, {'student_temperature': -1.0}])
def test_bad_options(field):
  with pytest.raises(UserError, match=next(iter(field))):
    lib.SelfDistillation(fakes.encoder('vit'), **field)


@pytest.mark.parametrize('rows, momentum, temperature', [
    (0, 0.996, 0.07), (5000, 0.99, 0.02), (510_000, 0.993, 0.045), (2_000_000, 0.996, 0.07)])
def test_small_data_gets_a_faster_and_sharper_teacher(rows, momentum, temperature):
  method = lib.SelfDistillation(None, Clock(1000, 100.0), rows=rows)
  assert float(method.momentum(jnp.asarray(0))) == pytest.approx(momentum, rel=1e-6)
  assert float(method.temperature(jnp.asarray(1000))) == pytest.approx(temperature, rel=1e-6)
  assert float(method.temperature(jnp.asarray(0))) == pytest.approx(min(0.04, temperature), rel=1e-6)


@pytest.mark.parametrize('method', [DINOv2, DINOv3, IBOT])
def test_patches_too(method):
  """On small data a teacher at 0.07 is all but uniform, and its student learns nothing."""
  small = method(fakes.encoder('vit', mask_token=True), clock=Clock(1000, 100.0), rows=5000)
  late = jnp.asarray(1000)
  assert float(small.temperature(late)) == pytest.approx(0.02)
  if method is IBOT:
    assert float(small._patch_temperature(late)) == pytest.approx(0.02)
    given = dataclasses.replace(small, patch_temperature=0.05)
    assert float(given._patch_temperature(late)) == pytest.approx(0.05)
