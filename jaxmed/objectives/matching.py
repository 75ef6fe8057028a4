"""Graph matching on the device: a solver of quadratic assignments, and a gradient through it, as pure functions.

An instance matches the N vertices of a left graph to those of a right one, each with K edges to neighbours:
  vertex: [N, N] affinity of left vertex i to right vertex a.
  edge: [N, K, N, K] affinity of left edge (i, left[i, r]) to right edge (a, right[a, q]).
  left, right: [N, K] int, the neighbours; a vertex is none of its own and has none twice.
An assignment [N] gives each left vertex its right one. Its value is the sum of the vertex affinities and of the affinities
of the pairs of edges that it maps onto each other; it is maximised (Lawler 1963). Everything is float32, of static
shape, and loops run for fixed counts, so that a batch of instances (jax.vmap) can be cut over devices without a word
between them.
"""

import functools

import jax
import jax.numpy as jnp

FAR = 1e30  # longer than any path: finite, so that differences are not NaN
STEPS, ROUNDS, COLD = 16, 6, 30.0  # annealing: steps, normalisations at each, the last inverse temperature

_dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


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
  form = _dot('iraq,irj,aqb->iajb', edge, jax.nn.one_hot(left, size), jax.nn.one_hot(right, size))
  return form + form.transpose(2, 3, 0, 1)


def value(vertex: jax.Array, form: jax.Array, assignment: jax.Array) -> jax.Array:
  """What an assignment [N] is worth, a scalar; `form` as `lift` gives it."""
  x = jax.nn.one_hot(assignment, vertex.shape[0])
  return (vertex * x).sum() + 0.5 * (x * _apply(form, x)).sum()


def _apply(form: jax.Array, x: jax.Array) -> jax.Array:
  """What each match [N, N] gains from its neighbours' being matched as x [N, N] says."""
  return _dot('iajb,jb->ia', form, x)


def assign(score: jax.Array) -> jax.Array:
  """The permutation [N] that maximises the sum of score [N, N]: exact, by shortest augmenting paths.

  The Hungarian method with potentials (Kuhn 1955; Jonker, Volgenant 1987), O(N^3): rows enter one by one, each along
  the shortest path of reduced costs to a free column.
  """
  size = score.shape[0]
  cost = -score.astype(jnp.float32)

  def enter(row, state):
    """State: potentials of rows [N] and columns [N], and the row that owns each column [N], -1 for none."""
    u, v, owner = state

    def visit(_, path):
      """Takes the nearest column into the tree, unless the path has ended in a free one."""
      distance, before, done, here, length, end = path
      reach = length + cost[here] - u[here] - v
      closer = ~done & (reach < distance) & (end < 0)
      distance, before = jnp.where(closer, reach, distance), jnp.where(closer, here, before)
      column = jnp.argmin(jnp.where(done, 2 * FAR, distance))
      open_ = end < 0
      free = open_ & (owner[column] < 0)
      grow = open_ & ~free
      return (distance, before, done.at[column].set(done[column] | grow), jnp.where(grow, owner[column], here),
              jnp.where(open_, distance[column], length), jnp.where(free, column, end))

    start = (jnp.full(size, FAR), jnp.full(size, -1), jnp.zeros(size, bool), row, jnp.float32(0), jnp.int32(-1))
    distance, before, done, _, length, end = jax.lax.fori_loop(0, row + 1, visit, start)
    slack = jnp.where(done, length - distance, 0.0)
    u = u.at[jnp.where(done, owner, size)].add(slack, mode='drop').at[row].add(length)

    def flip(_, walk):
      """Gives a column of the path to the row before it."""
      owner, column = walk
      parent = before[column]
      previous = jnp.where(parent == row, -1, jnp.argmax(owner == parent))
      owner = jnp.where(column < 0, owner, owner.at[column].set(parent))
      return owner, jnp.where(column < 0, -1, previous)

    owner, _ = jax.lax.fori_loop(0, row + 1, flip, (owner, end))
    return u, v - slack, owner

  owner = jax.lax.fori_loop(
      0, size, enter, (jnp.zeros(size), jnp.zeros(size), jnp.full(size, -1, jnp.int32)))[2]
  return jnp.zeros(size, jnp.int32).at[owner].set(jnp.arange(size, dtype=jnp.int32))


def solve(vertex: jax.Array, form: jax.Array) -> jax.Array:
  """An assignment [N] of high value; exact where the form is 0, else a heuristic that is mostly exact for small N.

  Graduated assignment (Gold, Rangarajan 1996) finds a region, an exact linear assignment of its gradient a
  permutation there, exchanges of two matches a local optimum; beside it the linear assignment of the vertices alone is
  improved in the same way, and the better of the two is taken. Vertices have no names: relabelling them relabels the
  result, unless two assignments are worth the same.

  Args:
    vertex: [N, N]. form: [N, N, N, N], see `lift`.
  """
  soft = _anneal(vertex, form)
  starts = jnp.stack([assign(vertex), assign(vertex + _apply(form, soft))])
  found = jax.vmap(functools.partial(_exchange, vertex, form))(starts)
  return found[jnp.argmax(jax.vmap(functools.partial(value, vertex, form))(found))]


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
    gain = (vertex + _apply(form, jax.nn.one_hot(p, size)))[:, p]  # of giving i what j has
    own = jnp.diagonal(gain)
    i, j = row[:, None], row[None]
    both = form[i, p[j], j, p[i]] + form[i, p[i], j, p[j]]  # what two changes at once are worth beyond each
    gain = gain + gain.T - own[:, None] - own[None] + both
    best = jnp.argmax(gain)
    i, j = best // size, best % size
    better = gain[i, j] > 1e-6 * (jnp.abs(own).max() + 1)
    return jnp.where(better, p.at[i].set(p[j]).at[j].set(p[i]), p)

  return jax.lax.fori_loop(0, 2 * size, swap, assignment)
