"""Graph matching on the device: a solver of quadratic assignments, and a gradient through it, as pure functions.

An instance matches the N vertices of a left graph to those of a right one, each with K edges to neighbours:
  vertex: [N, N] affinity of left vertex i to right vertex a.
  edge: [N, K, N, K] affinity of left edge (i, left[i, r]) to right edge (a, right[a, q]).
  left, right: [N, K] int, the neighbours; a vertex is none of its own and has none twice.
An assignment [N] gives each left vertex its right one. Its value is the sum of the vertex affinities and of those of
the pairs of edges that it maps onto each other; it is maximised (Lawler 1963). Everything is float32 and of static
shape, and loops run for fixed counts, so that a batch of instances (jax.vmap) can be cut over devices without a word
between them.
"""

import functools

import jax
import jax.numpy as jnp

FAR = 1e30  # longer than any path: finite, so that differences are not NaN
STEPS, ROUNDS, COLD = 16, 6, 30.0  # annealing: steps, normalisations at each, the last inverse temperature

dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def neighbors(x: jax.Array, count: int) -> jax.Array:
  """The `count` nearest other rows of x [N, D] by Euclidean distance: [N, count] int32, nearest first, no gradient.

  Among equals the first row is taken. There must be more rows than `count`.
  """
  x = jax.lax.stop_gradient(x.astype(jnp.float32))
  distance = jnp.square(x[:, None] - x[None]).sum(axis=-1)
  return jax.lax.top_k(-jnp.where(jnp.eye(len(x), dtype=bool), jnp.inf, distance), count)[1]


def lift(edge: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
  """Edge affinities as a symmetric form over pairs of matches, [N, N, N, N].

  Entry (i, a, j, b) is what matching i to a and j to b together is worth, and half the form of an assignment with
  itself is the value of its edges. The memory, N^4, is what bounds the size of a graph.
  """
  size = left.shape[0]
  form = dot('iraq,irj,aqb->iajb', edge, jax.nn.one_hot(left, size), jax.nn.one_hot(right, size))
  return form + form.transpose(2, 3, 0, 1)


def paid(assignment: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
  """Which pairs of edges an assignment [N] maps onto each other, [N, K, N, K] bool."""
  row = jnp.arange(left.shape[0])
  tail = assignment[:, None, None, None] == row[:, None]  # [N, 1, N, 1]
  return tail & (assignment[left][:, :, None, None] == right)


def value(vertex: jax.Array, edge: jax.Array, left: jax.Array, right: jax.Array, assignment: jax.Array) -> jax.Array:
  """What an assignment [N] is worth, a scalar."""
  linear = jnp.take_along_axis(vertex, assignment[:, None], axis=1).sum()
  return linear + jnp.where(paid(assignment, left, right), edge, 0).sum()


def _apply(form: jax.Array, x: jax.Array) -> jax.Array:
  """What each match [N, N] gains from its neighbours' being matched as x [N, N] says."""
  return dot('iajb,jb->ia', form, x)


def assign(score: jax.Array) -> jax.Array:
  """The permutation [N] that maximises the sum of score [N, N]: exact, by shortest augmenting paths.

  The Hungarian method with potentials (Kuhn 1955; Jonker, Volgenant 1987), O(N^3): rows enter one by one, each along
  the shortest path of reduced costs to a free column, and potentials keep these costs from being negative.
  """
  size = score.shape[0]
  cost = -score.astype(jnp.float32)

  def enter(row, state):
    u, v, owner = state  # potentials of rows and columns, and the row that owns each column, -1 for none
    distance, before, done, length, end = _path(cost, u, v, owner, row)
    slack = jnp.where(done, length - distance, 0.0)
    u = u.at[jnp.where(done, owner, size)].add(slack, mode='drop').at[row].add(length)
    return u, v - slack, _flip(owner, before, row, end)

  start = jnp.zeros(size), jnp.zeros(size), jnp.full(size, -1, jnp.int32)
  owner = jax.lax.fori_loop(0, size, enter, start)[2]
  return jnp.zeros(size, jnp.int32).at[owner].set(jnp.arange(size, dtype=jnp.int32))


def _path(cost: jax.Array, u: jax.Array, v: jax.Array, owner: jax.Array, row: jax.Array) -> tuple[jax.Array, ...]:
  """The shortest path of reduced costs from a row that has no column to a column that has no row (Dijkstra).

  Returns:
    Of each column its distance, the row before it, and whether it and the row that owns it are in the tree; the length
    of the path, and the column it ends in. There are `row` rows that own one, so it is found in row + 1 steps.
  """
  size = cost.shape[0]

  def visit(_, path):
    distance, before, done, here, length, end = path
    searching = end < 0
    reach = length + cost[here] - u[here] - v
    closer = ~done & (reach < distance) & searching
    distance, before = jnp.where(closer, reach, distance), jnp.where(closer, here, before)
    column = jnp.argmin(jnp.where(done, 2 * FAR, distance))
    free = searching & (owner[column] < 0)
    grow = searching & ~free
    return (distance, before, done.at[column].set(done[column] | grow), jnp.where(grow, owner[column], here),
            jnp.where(searching, distance[column], length), jnp.where(free, column, end))

  start = (jnp.full(size, FAR), jnp.full(size, -1), jnp.zeros(size, bool), row, jnp.float32(0), jnp.int32(-1))
  distance, before, done, _, length, end = jax.lax.fori_loop(0, row + 1, visit, start)
  return distance, before, done, length, end


def _flip(owner: jax.Array, before: jax.Array, row: jax.Array, end: jax.Array) -> jax.Array:
  """Gives each column of the path that ends in `end` to the row before it, back to `row`: the new owners [N]."""

  def step(_, walk):
    owner, column = walk
    parent = before[column]
    previous = jnp.where(parent == row, -1, jnp.argmax(owner == parent))
    changed = jnp.where(column < 0, owner, owner.at[column].set(parent))
    return changed, jnp.where(column < 0, -1, previous)

  return jax.lax.fori_loop(0, row + 1, step, (owner, end))[0]


def solve(vertex: jax.Array, form: jax.Array) -> jax.Array:
  """An assignment [N] of high value; exact where the form is 0, else a heuristic that is mostly exact for small N.

  Linear assignments, solved exactly, give three permutations: of the vertices alone, of the value's gradient where all
  matches are equal, and of that where graduated assignment (Gold, Rangarajan 1996) ends. Exchanges of two matches
  bring each to a local optimum, and the best is taken. Vertices have no names: relabelling them relabels the result,
  unless two assignments are worth the same.

  Args:
    vertex: [N, N]. form: [N, N, N, N], see `lift`.
  """
  soft = _anneal(vertex, form)
  scores = jnp.stack([vertex, vertex + form.mean(axis=(2, 3)) * len(vertex), vertex + _apply(form, soft)])
  starts = jax.vmap(assign)(scores)
  found = jax.vmap(functools.partial(_exchange, vertex, form))(starts)
  return found[jnp.argmax(jax.vmap(functools.partial(_value, vertex, form))(found))]


def _value(vertex: jax.Array, form: jax.Array, assignment: jax.Array) -> jax.Array:
  """`value`, by the form that `lift` gives."""
  row = jnp.arange(vertex.shape[0])
  return vertex[row, assignment].sum() + 0.5 * form[row, assignment][:, row, assignment].sum()


def _anneal(vertex: jax.Array, form: jax.Array) -> jax.Array:
  """A doubly stochastic matrix [N, N] near a good assignment: softmax of the gradient, ever colder."""
  size = vertex.shape[0]

  def cool(step, x):
    gain = vertex + _apply(form, x)
    gain = gain - gain.mean()
    scale = jnp.sqrt(jnp.maximum(jnp.square(gain).mean(), 1e-12))
    logits = gain / scale * COLD ** (step / (STEPS - 1))

    def normalize(_, y):
      y = y - jax.nn.logsumexp(y, axis=1, keepdims=True)
      return y - jax.nn.logsumexp(y, axis=0, keepdims=True)

    return jnp.exp(jax.lax.fori_loop(0, ROUNDS, normalize, logits))

  return jax.lax.fori_loop(0, STEPS, cool, jnp.full((size, size), 1 / size))


def _exchange(vertex: jax.Array, form: jax.Array, assignment: jax.Array) -> jax.Array:
  """Exchanges the two matches of the pair that gains most, as long as one gains (2-opt), 2 N times at most."""
  size = vertex.shape[0]
  row = jnp.arange(size)

  def swap(_, p):
    gain = (vertex + form[:, :, row, p].sum(axis=-1))[:, p]  # of giving i what j has
    own = jnp.diagonal(gain)
    i, j = row[:, None], row[None]
    both = form[i, p[j], j, p[i]] + form[i, p[i], j, p[j]]  # what two changes at once are worth beyond each
    gain = gain + gain.T - own[:, None] - own[None] + both
    best = jnp.argmax(gain)
    i, j = best // size, best % size
    better = gain[i, j] > 1e-6 * (jnp.abs(own).max() + 1)
    return jnp.where(better, p.at[i].set(p[j]).at[j].set(p[i]), p)

  return jax.lax.fori_loop(0, 2 * size, swap, assignment)


def hamming(assignment: jax.Array) -> jax.Array:
  """Hamming distance of an assignment [N] from the identity, a scalar in [0, 2 N]: twice the vertices matched wrongly.

  The number of entries in which the two permutation matrices differ, sum of v (1 - v*) + (1 - v) v*.
  """
  return 2.0 * (assignment != jnp.arange(assignment.shape[0])).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def mismatch(vertex: jax.Array, edge: jax.Array, left: jax.Array, right: jax.Array,
             strength: float) -> tuple[jax.Array, jax.Array]:
  """Hamming distance of the best assignment from the identity by the number of vertices, and that assignment [N].

  The solver is not differentiated. The gradient is that of a piecewise affine interpolation (Vlastelica et al. 2020,
  eq. 3, algorithm 1): affinities are moved against the distance's gradient 1 - 2 v* by `strength` (lambda), solved
  again, and what the first solution uses and the second does not is pushed down, and the reverse up, by 1 / lambda.
  Edges get their share as in Rolinek et al. 2020. With noise on the affinities, the same in both solutions, it is
  I-MLE's (Niepert et al. 2021, algorithm 1). A weight on the result scales the gradient and not the move.

  Args:
    strength: lambda. Above the spread of the affinities the second solution is the identity: a perceptron's update.
  """
  del strength
  assignment = solve(vertex, lift(edge, left, right))
  return hamming(assignment) / vertex.shape[0], assignment


def _mismatch(vertex, edge, left, right, strength):
  """Solves both instances side by side: the second does not depend on what comes backwards, which only scales."""
  size = vertex.shape[0]
  moved = vertex - strength * (1 - 2 * jnp.eye(size))
  first, second = jax.vmap(solve, (0, None))(jnp.stack([vertex, moved]), lift(edge, left, right))
  return (hamming(first) / size, first), (left, right, first, second)


def _estimate(strength, saved, cotangents):
  left, right, first, second = saved
  size = left.shape[0]
  scale = cotangents[0] / (strength * size)
  used = lambda p: jax.nn.one_hot(p, size)
  pairs = lambda p: paid(p, left, right).astype(jnp.float32)
  return scale * (used(first) - used(second)), scale * (pairs(first) - pairs(second)), None, None


mismatch.defvjp(_mismatch, _estimate)
