"""The solver of quadratic assignments against exact ones, and the gradient through it against its definition."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jaxmed.objectives.losses import matching

solve = jax.jit(jax.vmap(lambda vertex, *edges: matching.solve(vertex, matching.lift(*edges))))
value = jax.jit(jax.vmap(matching.value))


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def graphs(rng, count, size, edges, noise, margin=1.0, weight=0.5):
  """Instances as training makes them: noisy views of the same vectors; the truth is held back by a margin."""
  x = rng.normal(size=(count, size, 16))
  a, b = (unit(x + noise * rng.normal(size=x.shape)) for _ in range(2))
  left, right = (np.argsort(np.square(y[:, :, None] - y[:, None]).sum(-1) + 9 * np.eye(size))[..., :edges] for y in (a, b))
  ends = [unit(y[:, :, None] - np.stack([one[n] for one, n in zip(y, near)])) for y, near in ((a, left), (b, right))]
  vertex = a @ b.transpose(0, 2, 1) - margin * np.eye(size)
  return (*(x.astype(np.float32) for x in (vertex, weight * np.einsum('girk,gaqk->giraq', *ends))), left, right)


def noise(rng, count, size, edges):
  """Instances without structure, whose edges outweigh their vertices."""
  near = lambda: np.stack([[rng.permutation(np.delete(np.arange(size), i))[:edges] for i in range(size)]
                           for _ in range(count)])
  draw = lambda *shape: rng.normal(size=(count, *shape)).astype(np.float32)
  return draw(size, size), draw(size, edges, size, edges), near(), near()


def numpy_form(vertex, edge, left, right):
  """The matrix over pairs of matches whose quadratic form with a permutation is its value, entry by entry."""
  size, edges = left.shape
  form = np.zeros((size,) * 4)
  for i, a in np.ndindex(size, size):
    form[i, a, i, a] += vertex[i, a]
    for r, q in np.ndindex(edges, edges):
      form[i, a, left[i, r], right[a, q]] += edge[i, r, a, q]
  return form


def numpy_value(vertex, edge, left, right, assignment):
  form = numpy_form(vertex, edge, left, right)
  return sum(form[i, a, j, b] for (i, a), (j, b) in itertools.product(enumerate(assignment), repeat=2))


def exact(vertex, edge, left, right):
  """The highest value over all permutations."""
  size = len(vertex)
  form, every = numpy_form(vertex, edge, left, right), np.array(list(itertools.permutations(range(size))))
  return sum(form[i, every[:, i], j, every[:, j]] for i, j in np.ndindex(size, size)).max()


@pytest.mark.parametrize('size', [1, 2, 7, 32])
def test_linear_assignments_are_exact(size):
  rng = np.random.default_rng(size)
  score = rng.normal(size=(24, size, size)).astype(np.float32)
  score[:8] = rng.integers(0, 3, size=score[:8].shape)  # ties
  score[8:12] *= 1e3
  score[12] = 0
  found = np.asarray(jax.jit(jax.vmap(matching.assign))(score))
  for s, p in zip(score.astype(np.float64), found, strict=True):
    assert sorted(p) == list(range(size))
    best = s[linear_sum_assignment(s, maximize=True)].sum()
    assert abs(s[np.arange(size), p].sum() - best) <= 1e-5 * max(abs(s).max() * size, 1)


@pytest.mark.parametrize('kind,share,gap', [('views', 0.95, 2e-3), ('far views', 0.9, 5e-3), ('noise', 0.6, 0.05)])
def test_quadratic_assignments_are_mostly_exact(kind, share, gap):
  rng, optimal, gaps = np.random.default_rng(0), [], []
  for size, count in ((5, 40), (6, 40), (7, 20)):
    made = {'views': functools.partial(graphs, noise=0.5), 'far views': functools.partial(graphs, noise=2.0),
            'noise': noise}[kind](rng, count, size, min(5, size - 1))
    found = solve(*made)
    best = np.array([exact(*one) for one in zip(*made, strict=True)])
    have = np.asarray(value(*made, found), np.float64)
    np.testing.assert_allclose(have, [numpy_value(*one) for one in zip(*made, np.asarray(found), strict=True)], atol=1e-4)
    assert (have <= best + 1e-4).all()
    optimal += list(have > best - 1e-3)
    gaps += list((best - have) / abs(best))
  print(f'{kind}: {np.mean(optimal):.3f} solved to optimality, mean relative gap {np.mean(gaps):.2e}')
  assert np.mean(optimal) >= share and np.mean(gaps) <= gap


def test_large_graphs_are_no_worse_than_the_truth():
  made = graphs(np.random.default_rng(1), 6, 20, 5, 0.5)
  identity = np.tile(np.arange(20), (6, 1))
  found = solve(*made)
  assert (np.asarray(value(*made, found)) >= np.asarray(value(*made, identity)) - 1e-4).all()
  easy = graphs(np.random.default_rng(1), 6, 20, 5, 0.2, margin=0.0)
  np.testing.assert_array_equal(solve(*easy), identity)


def test_relabelling_the_vertices_relabels_the_solution():
  rng = np.random.default_rng(2)
  vertex, edge, left, right = graphs(rng, 12, 7, 3, 1.0)
  names, others = rng.permutation(7), rng.permutation(7)  # the new name of an old vertex
  back, hence = np.argsort(names), np.argsort(others)
  moved = (vertex[:, back][:, :, hence], edge[:, back][:, :, :, hence], names[left][:, back], others[right][:, hence])
  first, second = np.asarray(solve(vertex, edge, left, right)), np.asarray(solve(*moved))
  np.testing.assert_array_equal(others[first][:, back], second)


def test_the_hamming_distance_counts_entries_that_differ():
  rng = np.random.default_rng(3)
  for _ in range(5):
    p = rng.permutation(9)
    v, truth = np.eye(9)[p], np.eye(9)
    assert float(matching.hamming(jnp.asarray(p))) == (v * (1 - truth) + (1 - v) * truth).sum()
  assert float(matching.hamming(jnp.arange(9))) == 0


def numpy_estimate(made, strength, weight):
  """Gradients of weight . loss by the definition: two solutions, of which this takes only the assignments."""
  vertex, edge, left, right = made
  size = vertex.shape[1]
  first = np.asarray(solve(*made))
  slope = 1 - 2 * np.eye(size)
  second = np.asarray(solve((vertex - strength * slope).astype(np.float32), edge, left, right))
  by_vertex, by_edge = np.zeros(vertex.shape), np.zeros(edge.shape)
  for g in range(len(vertex)):
    for sign, p in ((1, first[g]), (-1, second[g])):
      for i in range(size):
        by_vertex[g, i, p[i]] += sign * weight[g] / strength / size
        for r, q in np.ndindex(*left.shape[2:], *right.shape[2:]):
          if p[left[g, i, r]] == right[g, p[i], q]:
            by_edge[g, i, r, p[i], q] += sign * weight[g] / strength / size
  return by_vertex, by_edge, 2 * (first != np.arange(size)).mean(axis=1)


@pytest.mark.parametrize('strength', [0.3, 80.0])
def test_the_gradient_is_the_blackbox_estimate(strength):
  rng = np.random.default_rng(4)
  made, weight = graphs(rng, 10, 6, 3, 1.0), rng.normal(size=10).astype(np.float32)

  def loss(vertex, edge):
    each, _ = jax.vmap(functools.partial(matching.mismatch, strength=strength))(vertex, edge, *made[2:])
    return (weight * each).sum(), each

  run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  (by_vertex, by_edge), each = run(*made[:2])
  want = numpy_estimate(made, strength, weight)
  np.testing.assert_allclose(each, want[2], rtol=1e-6)
  np.testing.assert_allclose(by_vertex, want[0], rtol=1e-5, atol=1e-9)
  np.testing.assert_allclose(by_edge, want[1], rtol=1e-5, atol=1e-9)
  assert np.abs(want[0]).max() > 0 and np.abs(want[1]).max() > 0


def test_a_clear_truth_has_no_loss_and_no_gradient():
  made = graphs(np.random.default_rng(5), 4, 6, 3, 3.0)
  loss = lambda v, e: jax.vmap(functools.partial(matching.mismatch, strength=80.0))(v, e, *made[2:])[0].sum()
  run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  assert float(run(*made[:2])[0]) > 0
  total, grads = run(made[0] + 100 * np.eye(6, dtype=np.float32), made[1])
  assert float(total) == 0 and not any(np.abs(g).max() for g in grads)


def test_neighbours_are_the_nearest_others():
  rng = np.random.default_rng(6)
  x = rng.normal(size=(9, 4)).astype(np.float32)
  distance = np.square(x[:, None] - x[None]).sum(-1) + 1e9 * np.eye(9)
  np.testing.assert_array_equal(matching.neighbors(jnp.asarray(x), 3), np.argsort(distance)[:, :3])
  same = np.asarray(matching.neighbors(jnp.ones((4, 2)), 3))
  assert all(sorted([i, *row]) == [0, 1, 2, 3] for i, row in enumerate(same))
