"""Losses of images and texts against float64 double loops, values and gradients, whole and some at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.objectives.losses import paired
from tests.objectives.siamese_fakes import check_gradient, unit

RNG = np.random.default_rng(0)
COUNTS = np.array([True, True, False, True, True])


def clip_reference(u, v, s, b, counts, weight):
  """Pair by pair; `b` has no part."""
  del b
  u, v, total, real = unit(u), unit(v), 0.0, np.flatnonzero(counts)
  for i in real:
    there = np.log(sum(np.exp(np.exp(s) * u[i] @ v[j]) for j in real))
    back = np.log(sum(np.exp(np.exp(s) * u[j] @ v[i]) for j in real))
    total += weight * there + (1 - weight) * back - np.exp(s) * u[i] @ v[i]
  return total / len(real)


def siglip_reference(u, v, s, b, counts, weight):
  del weight
  u, v, total, real = unit(u), unit(v), 0.0, np.flatnonzero(counts)
  for i in real:
    for j in real:
      total += np.log1p(np.exp(-(1 if i == j else -1) * (np.exp(s) * u[i] @ v[j] + b)))
  return total / len(real)


@functools.partial(jax.jit, static_argnums=6)
def clip(u, v, s, b, counts, weight, chunk):
  return paired.clip(u, v, s + 0 * b, counts, weight, chunk)


@functools.partial(jax.jit, static_argnums=6)
def siglip(u, v, s, b, counts, weight, chunk):
  return paired.siglip(u, v, s, b, counts, chunk)


KINDS = {'clip': (clip, clip_reference), 'siglip': (siglip, siglip_reference)}


def given(seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(5, 7)), rng.normal(size=(5, 7)), np.float64(1.3), np.float64(-2.0)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('counts', [None, COUNTS], ids=['all', 'some'])
def test_loss_and_gradient_are_those_of_a_double_loop(kind, counts):
  loss, reference = KINDS[kind]
  real = np.ones(5, bool) if counts is None else counts
  f32 = lambda xs: [jnp.asarray(x, jnp.float32) for x in xs]
  one = lambda *args: loss(*args, counts, 0.75, 0)[0]
  want = lambda *args: reference(*args, real, 0.75)
  assert float(one(*f32(given()))) == pytest.approx(want(*given()), rel=2e-6)
  check_gradient(one, want, *given())


@pytest.mark.parametrize('kind', KINDS)
def test_some_at_a_time_is_all_at_once(kind):
  loss, args = KINDS[kind][0], [jnp.asarray(x, jnp.float32) for x in given()]

  @jax.jit
  def all_of(*args):
    one = lambda chunk: jax.value_and_grad(lambda *a: loss(*a, COUNTS, 0.75, chunk), (0, 1, 2, 3), has_aux=True)
    return {chunk: one(chunk)(*args) for chunk in (0, 1, 2, 3, 5, -1)}

  found = all_of(*args)
  for chunk, other in found.items():
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(other), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6, err_msg=str(chunk))
  for x in found[0][1][:2]:
    assert not np.any(x[2]) and np.all(np.any(x, axis=1) == COUNTS)  # what does not count has no gradient


@pytest.mark.parametrize('kind', KINDS)
def test_the_order_of_pairs_says_nothing_and_towers_are_alike(kind):
  loss, (u, v, s, b) = KINDS[kind][0], given(1)
  order = RNG.permutation(5)
  want = float(loss(u, v, s, b, None, 0.5, 2)[0])
  assert float(loss(u[order], v[order], s, b, None, 0.5, 2)[0]) == pytest.approx(want, rel=1e-5)
  assert float(loss(v, u, s, b, None, 0.5, 2)[0]) == pytest.approx(want, rel=1e-5)


def test_lambda_is_a_weight_of_directions():
  u, v, s, b = given(2)
  ends = [float(clip(u, v, s, b, None, w, 0)[0]) for w in (0.0, 1.0)]
  assert float(clip(u, v, s, b, None, 0.75, 0)[0]) == pytest.approx(0.25 * ends[0] + 0.75 * ends[1], rel=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_accuracies(kind):
  loss, eye = KINDS[kind][0], np.eye(6)
  other = eye[[0, 1, 2, 4, 3, 5]].copy()
  for chunk in (0, 4):
    assert [float(x) for x in loss(eye, other, 1.0, 0.0, None, 0.5, chunk)[1]] == pytest.approx([4 / 6, 4 / 6])
    some = np.array([True, True, True, False, True, True])  # of two that were taken for each other one is left
    assert [float(x) for x in loss(eye, other, 1.0, 0.0, some, 0.5, chunk)[1]] == pytest.approx([4 / 5, 4 / 5])
  same = np.ones((6, 3))
  assert [float(x) for x in loss(same, same, 1.0, 0.0, None, 0.5, 0)[1]] == [0, 0]  # a collapse is no success


def test_siglip_in_the_beginning():
  """Random vectors at a temperature of 0.1: with a bias of -10 positives cost 10 each, with another far more."""
  u, v = np.random.default_rng(0).normal(size=(2, 256, 512))
  at = lambda bias: float(siglip(u, v, jnp.log(10.0), bias, None, 0.5, 0)[0])
  assert at(-10.0) == pytest.approx(10.02, abs=0.1) and at(-2.71) > 15
