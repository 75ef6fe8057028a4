"""GEMINI: local correlation pixel by pixel, the terms of pairs in float64, who gets gradients, flows that fold."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmed.augment import warp
from jaxmed.errors import UserError
from jaxmed.evaluate.health import diagnose
from jaxmed.models import create_model
from jaxmed.objectives.losses import ncc
from jaxmed.objectives.volumes.gemini import GEMINI
from tests.objectives import siamese_fakes as fakes

SMALL = dict(feature_dim=8, flow_dims=(8, 8), ncc_window=3)
WEIGHTS = ('visual_weight', 'semantic_weight', 'smooth_weight', 'restore_weight')


def correlation(a, b, counts, window):
  """Squared correlation at each pixel of planes by a loop over windows; 0 where one is constant."""
  out, r = np.zeros(a.shape), window // 2
  for i, j in np.ndindex(*a.shape):
    box = np.s_[max(i - r, 0):i + r + 1, max(j - r, 0):j + r + 1]
    x, y = (z[box][counts[box]] for z in (a, b))
    if len(x):
      x, y = x - x.mean(), y - y.mean()
      out[i, j] = (x * y).sum() ** 2 / ((x * x).sum() * (y * y).sum() + 1e-5)
  return out


def test_windows_at_the_border_have_the_pixels_there_are():
  rng = np.random.default_rng(0)
  a, b = rng.random((2, 2, 7, 6, 2))
  counts = rng.random((2, 7, 6)) < 0.8
  have = ncc.ncc(jnp.asarray(a), jnp.asarray(b), jnp.asarray(counts, jnp.float32)[..., None], 3)
  want = [[correlation(a[n, ..., c], b[n, ..., c], counts[n], 3) for c in range(2)] for n in range(2)]
  np.testing.assert_allclose(have, np.moveaxis(np.asarray(want), 1, -1), atol=2e-4)


def test_published_numbers():
  """An image and its multiple plus a constant: alike here; there only where no window meets the border."""
  image = jnp.asarray(np.random.default_rng(0).random((1, 12, 12, 12, 1)), jnp.float32)
  loss = lambda other, zero_pad: 1 - float(ncc.ncc(image, other, jnp.ones_like(image), zero_pad=zero_pad).mean())
  assert loss(2 * image + 3, True) == pytest.approx(0.219, abs=0.01) and loss(image, True) == pytest.approx(0, abs=1e-4)
  assert loss(2 * image + 3, False) == pytest.approx(0, abs=1e-4)


def test_smoothness_of_an_affine_flow_is_its_squared_slopes():
  slopes = np.asarray([[0.5, -1.0, 0.0], [0.2, 0.1, 2.0], [0.0, 0.3, -0.4]], np.float32)
  flow = jnp.einsum('ij,...j->...i', slopes, warp.centres((4, 5, 6)))[None]
  counts = jnp.ones((1, 4, 5, 6, 1))
  want = np.square(slopes).mean()
  assert float(ncc.smoothness(flow, counts)[0]) == pytest.approx(want, rel=1e-5)
  spoilt = flow.at[:, 3].set(99.0)  # beyond the image
  assert float(ncc.smoothness(spoilt, counts.at[:, 3].set(0))[0]) == pytest.approx(want, rel=1e-5)


def test_whole_displacements_and_none():
  image = jnp.asarray(np.random.default_rng(0).random((6, 7, 2)), jnp.float32)
  np.testing.assert_array_equal(warp.displaced(image, jnp.zeros((6, 7, 2))), image)
  moved = warp.displaced(image, jnp.broadcast_to(jnp.asarray([1.0, -2.0]), (6, 7, 2)))
  np.testing.assert_array_equal(moved[:-1, 2:], jnp.roll(image, (-1, 2), (0, 1))[:-1, 2:])


def test_squarings_integrate_a_velocity_and_do_not_fold():
  constant, integrated = jnp.broadcast_to(jnp.asarray([1.5, -0.5]), (24, 24, 2)), jax.jit(lambda v: warp.integrated(v, 7))
  np.testing.assert_allclose(integrated(constant), constant, atol=1e-5)
  velocity = warp.smooth_flow(jax.random.key(0), (24, 24), jnp.full(2, 2.0), jnp.full(2, 6.0))
  folds = jax.jit(lambda flow: (warp.jacobian_determinant(flow) <= 0).mean())
  assert float(folds(velocity)) > 0.05 and float(folds(integrated(velocity))) < 0.01


def start(kind, count=3, **options):
  """(objective, variables, batch) on a tiny encoder."""
  if kind == 'unet':
    encoder = create_model('stunet_micro', (4, 4, 8), 2, depths=(1, 1), dims=(8, 16), strides=(1, 2))
  else:
    encoder = fakes.encoder(kind)
  rng = np.random.default_rng(0)
  batch = {k: v[:, 0] for k, v in fakes.group(rng, count, 1, encoder.image_size, kind.startswith('channel')).items()}
  objective = GEMINI(encoder, **SMALL | options)
  shapes = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0), batch))
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * (0.3 if x.ndim > 1 else 0.1) + (x.ndim == 1), jnp.float32)
  return objective, jax.tree.map(draw, shapes) | {'extra': {}}, batch


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=(2, 4), has_aux=True)
def of_pairs(objective, images, features, shown, flow, own):
  return objective.pairs(images, features, shown, flow, own)


def inputs(shape=(3, 6, 7)):
  rng = np.random.default_rng(1)
  own = jnp.asarray([[6, 7], [5, 7], [6, 4]])
  shown = jnp.asarray([[True, True], [True, False], [False, True]])
  real = lambda last, size=1.0: jnp.asarray(size * rng.normal(size=(*shape, last)), jnp.float32)
  return real(2), real(4), shown, real(2, 0.7), own


def place(image, at, own):
  """The value of an image [H, W, D] at a place, linear, the border repeated."""
  at = np.clip(at, 0, np.asarray(own) - 1)
  low = np.floor(at).astype(int)
  high, share = np.minimum(low + 1, np.asarray(own) - 1), at - low
  return sum(w * image[i, j] for i, wi in ((low[0], 1 - share[0]), (high[0], share[0]))
             for j, wj in ((low[1], 1 - share[1]), (high[1], share[1])) for w in [wi * wj])


def test_the_terms_of_pairs_are_the_reference():
  """In float64, pair by pair and pixel by pixel; the third pair shows no channel in both."""
  objective = GEMINI(fakes.encoder('vit'), **SMALL)
  given = inputs()
  (loss, (metrics)), _ = of_pairs(objective, *given)
  images, features, shown, flow, own = (np.asarray(x, np.float64 if x.dtype == np.float32 else None) for x in given)
  total, parts = [], []
  for a in range(3):
    b = (a + 1) % 3
    h, w = own[b]
    at = np.stack(np.meshgrid(np.arange(6), np.arange(7), indexing='ij'), -1) + flow[a]
    warped = lambda x: np.asarray([[place(x[a], at[i, j], own[a]) for j in range(7)] for i in range(6)])
    rounded = np.round(at)
    counts = ((rounded >= 0) & (rounded < own[a])).all(-1)
    counts[h:], counts[:, w:] = False, False
    image = warped(images)
    both = [c for c in range(2) if shown[a, c] and shown[b, c]]
    alike = [correlation(image[..., c], images[b, ..., c], counts, 3)[counts].mean() for c in both]
    cosine = (fakes.unit(warped(features)) * fakes.unit(features[b])).sum(-1)[counts].mean()
    smooth = (np.square(np.diff(flow[a, :h, :w], axis=0)).mean() + np.square(np.diff(flow[a, :h, :w], axis=1)).mean()) / 2
    visual = 1 - np.mean(alike) if both else 0
    parts.append((visual, cosine, smooth, counts[:h, :w].mean()))
    total.append(2 * (visual + 0.8 * 1.1 * (1 - cosine) + 0.4 * smooth))
  fakes.close(loss, np.mean(total), 1e-4)
  for name, want in zip(('visual', 'feature_cosine', 'smoothness', 'overlap'), np.mean(parts, axis=0)):
    fakes.close(metrics[name], want, 1e-4)


def test_features_follow_features_alone_and_flows_follow_the_flow():
  given = inputs()
  off = dict(visual_weight=0.0, smooth_weight=0.0)
  slow, fast = (GEMINI(fakes.encoder('vit'), **SMALL, **off, feature_weight=f, flow_weight=1 - f) for f in (1.0, 0.0))
  _, (features, flow) = of_pairs(slow, *given)
  assert np.any(features) and not np.any(flow)
  _, (features, flow) = of_pairs(fast, *given)
  assert not np.any(features) and np.any(flow)


def test_a_known_warp_is_found_and_signs_show():
  """Descent on a flow alone; then what a folding flow and features that are the same everywhere look like."""
  objective = GEMINI(fakes.encoder('vit'), **SMALL | {'ncc_window': 5, 'smooth_weight': 0.1})
  grid = warp.centres((16, 16))
  wave = lambda at: jnp.stack([jnp.sin(at[..., 0] / 2) + jnp.cos(at[..., 1] / 2.5), jnp.sin((at[..., 0] + at[..., 1]) / 3)], -1)
  known = warp.smooth_flow(jax.random.key(1), (16, 16), jnp.full(2, 4.0), jnp.full(2, 1.5))
  images = jnp.stack([wave(grid), wave(grid + known)])
  shown, own, rule = jnp.ones((2, 2), bool), jnp.full((2, 2), 16), optax.adam(0.1)

  @jax.jit
  def descend(flow):
    def step(_, carry):
      flow, state = carry
      grads = jax.grad(lambda f: objective.pairs(images, images, shown, f, own)[0])(flow)
      updates, state = rule.update(grads, state)
      return flow + updates, state
    return jax.lax.fori_loop(0, 60, step, (flow, rule.init(flow)))[0]

  apart = lambda flow: float(jnp.linalg.norm((flow[0] - known)[2:-2, 2:-2], axis=-1).mean())
  first = jnp.zeros((2, 16, 16, 2))
  assert apart(descend(first)) < 0.4 * apart(first)
  turned = jnp.broadcast_to(-2.0 * (grid - 7.5), first.shape)  # a mirror image along both axes in each pixel's place
  turned = turned.at[..., 1].set(0)
  metrics = of_pairs(objective, images, jnp.ones_like(images), shown, turned, own)[0][1]
  assert float(metrics['folded_share']) == 1 and float(metrics['cosine_elsewhere']) == pytest.approx(1, abs=1e-5)
  assert 'fold' in diagnose({k: float(v) for k, v in metrics.items()}, 64, 64, {}).sign
  metrics = of_pairs(objective, images, images, shown, first, own)[0][1]
  assert float(metrics['folded_share']) == 0 and float(metrics['cosine_elsewhere']) < 0.9
  assert diagnose({k: float(v) for k, v in metrics.items()}, 64, 64, {}) is None


@pytest.mark.parametrize('kind', ['channel', 'unet'])
def test_every_part_learns(kind):
  """Images, volumes, channels that miss; in evaluation two records may change places."""
  objective, variables, batch = start(kind, 2)

  @functools.partial(jax.jit, static_argnames='train')
  def step(params, batch, train):
    return jax.value_and_grad(lambda p: objective.loss(variables | {'params': p}, batch, jax.random.key(0), 0, train),
                              has_aux=True)(params)

  (loss, (metrics, _)), grads = step(variables['params'], batch, True)
  assert np.isfinite(loss) and all(np.isfinite(x) for x in jax.tree.leaves(metrics))
  for name in ('encoder', 'decoder', 'deformer', 'restorer'):
    assert any(np.any(x) for x in jax.tree.leaves(grads[name])), name
  assert float(metrics['restoration']) > 0 and float(metrics['flow_length']) > 0


def test_distortion_and_pose():
  objective = GEMINI(fakes.encoder('vit'), **SMALL)
  unit = jnp.asarray(np.random.default_rng(0).random((4, 40, 40, 1)), jnp.float32)
  distort = jax.jit(lambda o: o.distorted(jax.random.key(0), unit, jnp.ones(unit.shape, bool)), static_argnums=0)
  plain = distort(dataclasses.replace(objective, shuffle=0.0, curve=0.0, paint=0.0))
  np.testing.assert_array_equal(plain, unit)
  boxes = np.asarray(distort(dataclasses.replace(objective, shuffle=0.0, curve=0.0)) != unit)
  assert 0.05 < boxes.mean() < 0.6
  curved = np.asarray(distort(dataclasses.replace(objective, shuffle=0.0, curve=1.0, paint=0.0)))
  order = np.argsort(np.asarray(unit[0]).ravel())
  assert (np.diff(curved[0].ravel()[order]) >= 0).all() and 0 <= curved.min() < curved.max() <= 1
  shuffled = np.asarray(distort(dataclasses.replace(objective, shuffle=1.0, curve=0.0, paint=0.0)))
  assert (shuffled != unit).mean() > 0.3 and np.isin(shuffled, unit).all()
  still = dataclasses.replace(objective, rotation=0.0, zoom=(1.0, 1.0))
  np.testing.assert_allclose(still.posed(jax.random.key(0), {'image': unit})['image'], unit, atol=1e-5)


def test_wrong_options():
  objective, variables, batch = start('vit')
  with pytest.raises(UserError, match='batch_size must be at least 2'):
    objective.loss(variables, jax.tree.map(lambda x: x[:1], batch), jax.random.key(0), 0)
  for options, words in (({'ncc_window': 4}, 'objective.ncc_window 4'), ({'flow_dims': (12,)}, 'flow_dims'),
                         ({'paint': 1.5}, 'paint'), ({'zoom': (2.0, 1.0)}, 'zoom'), ({'decoder': 'unett'}, 'unet'),
                         ({'smooth_weight': -1.0}, 'smooth_weight'), ({'feature_dim': 1}, 'feature_dim')):
    with pytest.raises(UserError, match=words):
      GEMINI(objective.encoder, **SMALL | options)
