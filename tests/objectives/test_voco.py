"""VoCo: overlap by counting pixels, its losses in float64, who gets gradients, both releases, tiles of views."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.augment import geometry
from jaxmed.augment.views import ViewMaker
from jaxmed.errors import UserError
from jaxmed.objectives import networks
from jaxmed.objectives.losses import overlap
from jaxmed.objectives.volumes.voco import VoCo
from tests.objectives import siamese_fakes as fakes

RELEASES = {'second': {}, 'first': dict(teacher='whole', both_ways=True, negative='square', inter_weight=0.0)}


def boxes(rng, count, rank, most=6):
  start = rng.integers(0, most, (2, count, rank))
  return np.concatenate([start, start + rng.integers(1, 5, start.shape)], axis=-1)


@pytest.mark.parametrize('rank', [2, 3])
def test_shares_are_counted_pixels(rank):
  crops, bases = boxes(np.random.default_rng(0), 3, rank), boxes(np.random.default_rng(1), 4, rank)
  places = np.indices((12,) * rank)
  paint = lambda box: np.all([(lo <= x) & (x < hi) for x, lo, hi in zip(places, box, box[rank:])], axis=0)
  want = [[[(paint(q) & paint(k)).sum() / paint(q).sum() for k in b] for q in c] for c, b in zip(crops, bases)]
  np.testing.assert_allclose(overlap.shares(jnp.asarray(crops), jnp.asarray(bases)), want, atol=1e-6)


def test_tiles_cover_and_windows_slide():
  """Shares sum to 1, at most four bases are touched, a tile is itself alone, and every place but the last comes."""
  draw = jax.jit(lambda place: geometry.random_tile(jax.random.key(0), place, 400, (4, 9, 12), (1, 3, 3)))
  tiles = [np.asarray(draw(i)[0])[0] for i in range(9)]
  np.testing.assert_array_equal(tiles, [(0, 3 * y, 4 * x) for y, x in itertools.product(range(3), range(3))])
  start, length = map(np.asarray, draw(9))
  assert (length == (4, 3, 4)).all() and (start[:, 0] == 0).all()
  assert set(start[:, 1]) == set(range(6)) and set(start[:, 2]) == set(range(8))
  base = np.stack([np.concatenate([t, t + length[0]]) for t in tiles])
  windows = jnp.asarray(np.concatenate([start, start + length], -1))[None]
  y = np.asarray(overlap.shares(windows, jnp.asarray(base)[None]))[0]
  np.testing.assert_allclose(y.sum(axis=1), 1, atol=1e-6)
  assert ((y > 0).sum(axis=1) <= 4).all() and {1, 4} <= set((y > 0).sum(axis=1))
  own = overlap.shares(jnp.asarray(base)[None], jnp.asarray(base)[None])[0]
  np.testing.assert_array_equal(own, np.eye(9))


def test_published_numbers():
  """Values computed once with the official functions."""
  wanted = jnp.asarray([[[.5, .25, .25, 0], [1, 0, 0, 0]]])
  predicted = jnp.asarray([[[.4, .3, .1, .2], [.9, .05, 0, .5]]])
  near, far = overlap.position(predicted, wanted)
  assert float(near[0]) == pytest.approx(.105746, abs=2e-6) and float(far[0]) == pytest.approx(.241895, abs=2e-6)
  assert float(overlap.position(predicted, wanted, 'square')[1][0]) == pytest.approx(.073125, abs=2e-6)
  assert float(overlap.position(wanted, wanted)[0][0]) == pytest.approx(0, abs=2e-6)
  bases = jnp.asarray([[[1, 0], [.6, .8], [0, 1.]]])
  assert float(overlap.alike(bases)[0]) == pytest.approx(1 / 3, abs=1e-6)
  one = jax.grad(lambda b: overlap.alike(b).sum())(bases)[0]
  assert not np.any(one[2]) and np.any(one[0]) and np.any(one[1])  # the last base has no gradient
  alone = overlap.alike(bases, jnp.asarray([[True, False, True]]))
  assert float(alone[0]) == 0


def reference(params, target, batch, bases, first):
  """The loss in float64, record by record and pair by pair."""
  image = np.asarray(batch['global']['image'], np.float64)
  head = lambda tree, x: fakes_head(tree['projector'], x)
  vectors = lambda tree: np.asarray(_features(tree['encoder'], batch['global']), np.float64)
  x = vectors(params)
  student = head(params, x)
  teacher = head(target, vectors(target) if first else x)
  unit = lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True)
  like = lambda a, b: np.maximum(unit(a) @ unit(b).T, 0)
  box, total = np.asarray(batch['global']['view_box'], np.float64), []

  def loss(have, y):
    near = -(y * np.log(1 - np.abs(y - have) + 1e-6)).sum() / (y.sum() + 1e-6)
    away = y == 0
    return near + (np.square(have) if first else -np.log(1 - have + 1e-6))[away].sum() / (away.sum() + 1e-6)

  for i in range(len(image)):
    s, t, n = student[i], teacher[i], bases
    y = np.zeros((len(s) - n, n))
    for q, k in np.ndindex(*y.shape):
      a, b = box[i, n + q], box[i, k]
      sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
      y[q, k] = sides.prod() / (a[2:] - a[:2]).prod()
    have = like(s[n:], t[:n])
    have = (have + like(t[n:], s[:n])) / 2 if first else have
    j = (i + 1) % len(image)
    inter = 0 if first else loss(like(s[n:], student[j][:n]), like(t[n:], teacher[j][:n]))
    pairs = [max(0, unit(s[a]) @ unit(s[b])) ** 2 for a in range(n) for b in range(a + 1, n)]
    total.append(loss(have, y) + inter + np.mean(pairs))
  return np.mean(total)


def fakes_head(params, x):
  flat = x.reshape(-1, x.shape[-1])
  for i in range(3):
    p = params[f'dense{i}']
    flat = flat @ np.asarray(p['kernel'], np.float64) + np.asarray(p['bias'], np.float64)
    if i < 2:
      flat = np.maximum((flat - flat.mean(axis=0)) / np.sqrt(flat.var(axis=0) + 1e-5), 0)
  return flat.reshape(*x.shape[:2], -1)


@jax.jit
def _features(params, group):
  encoder = fakes.encoder('vit')
  out, _ = networks.run(encoder, params, **networks.flat(group), train=False)
  return networks.views(out.pooled('mean'), group['image'].shape[1])


def start(release):
  data = fakes.batch('vit', count=3, views=6)
  rng = np.random.default_rng(5)
  box = rng.integers(0, 6, (3, 6, 2))
  data['global']['view_box'] = jnp.asarray(np.concatenate([box, box + 8], -1), jnp.float32)
  return fakes.start(VoCo, 'vit', data, bases=4, hidden_dim=12, out_dim=8, **{'dropout': 0.0} | RELEASES[release])


@pytest.mark.parametrize('release', RELEASES)
def test_the_loss_and_who_is_trained(release):
  objective, variables, data = start(release)
  moved = lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
  variables['target'] = jax.tree.map(moved, variables['target'])

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def step(params, target, data):
    return objective.loss(variables | {'params': params, 'target': target}, data, jax.random.key(0), 0)

  (loss, (metrics, _)), (grads, still) = step(variables['params'], variables['target'], data)
  want = reference(variables['params'], variables['target'], data, 4, release == 'first')
  assert float(loss) == pytest.approx(want, rel=2e-5) and metrics['empty_crops'] == 0
  assert not any(np.any(x) for x in jax.tree.leaves(still))
  assert any(np.any(x) for x in jax.tree.leaves(grads['encoder']))
  assert set(variables['target']) == ({'projector'} if release == 'second' else {'encoder', 'projector'})
  turned = jax.tree.map(lambda x: x[:, jnp.asarray([2, 0, 3, 1, 4, 5])] if x.ndim > 1 and x.shape[1] == 6 else x, data)
  same = step(variables['params'], variables['target'], turned)[0][1][0]
  for name in ('position_near', 'position_far', 'inter'):  # the order of bases says nothing
    assert float(same[name]) == pytest.approx(float(metrics[name]), rel=1e-5, abs=1e-7)


def test_air_is_counted_and_left_out():
  objective, variables, data = start('second')
  image = data['global']['image'].at[:, :2].set(-1.0)
  data['global']['image'] = image
  _, (metrics, _) = jax.jit(objective.loss)(variables, data, jax.random.key(0), 0)
  assert float(metrics['empty_crops']) == pytest.approx(0.5)


def test_dropout_of_samples_and_features():
  for kind, shape in (('features', (3, 6, 16)), ('samples', (3, 6, 1))):
    objective = VoCo(fakes.encoder('vit'), bases=4, dropout=0.5, dropout_of=kind)
    kept = np.asarray(objective._dropped(jax.random.key(1), jnp.ones((3, 6, 16)), True))
    assert set(np.unique(kept)) == {0, 2} and (kept.std(axis=-1).max() == 0) == (shape[-1] == 1)


def test_wrong_options():
  with pytest.raises(UserError, match=r'augment.tiles \(3, 3\) needs .* more views than the 9 tiles'):
    ViewMaker((8, 8), (0.0,), (1.0,), views=9, tiles=(3, 3))
  with pytest.raises(UserError, match='objective.teacher'):
    VoCo(fakes.encoder('vit'), teacher='heads')
  objective, variables, data = start('second')
  with pytest.raises(UserError, match='batch_size must be at least 2'):
    objective.loss(variables, {'global': jax.tree.map(lambda x: x[:1], data['global'])}, jax.random.key(0), 0)
