"""Uni4Eye: targets, masks and loss by hand in float64, whose kernel is trained, what images and volumes share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jaxmed.errors import UserError
from jaxmed.objectives.volumes.uni4eye import Uni4Eye, entropy, sobel
from tests.objectives import siamese_fakes as fakes

COUNT, SLICES, DEEP = 4, 4, 2
OWN = np.array([4, 3, 1, 1])  # slices; the last two are images
SMALL = dict(patch_slices=DEEP, decoder_dim=16, decoder_depth=1, decoder_heads=2)


def windows(kind='vit', own=OWN):
  """Windows of noise with a flat corner; what lies beyond the slices of one is NaN."""
  group = fakes.batch(kind, COUNT * SLICES, 1)['global']
  data = jax.tree.map(lambda x: np.array(x).reshape(COUNT, SLICES, *x.shape[2:]), group)
  data = {k: np.repeat(v[:, :1], SLICES, axis=1) if k != 'image' else v for k, v in data.items()}  # channels of a volume
  data['image'] = np.nan_to_num(data['image'])
  data['image'][:, :, :4, :4] = 0.3
  there = np.arange(SLICES) < own[:, None]
  if 'channel_mask' in data:
    data['image'] = np.where(data['channel_mask'][:, :, None, None], data['image'], np.nan)
  data['image'] = np.where(there[:, :, None, None, None], data['image'], np.nan).astype(np.float32)
  return jax.tree.map(jnp.asarray, data) | {'index': jnp.where(there, jnp.arange(COUNT * SLICES).reshape(there.shape), -1)}


@functools.cache
def started(kind='vit'):
  return fakes.start(Uni4Eye, kind, windows(kind), **SMALL)


@functools.partial(jax.jit, static_argnums=0)
def step(objective, params, data):
  run = lambda params: objective.loss({'params': params, 'target': {}, 'extra': {}}, data, jax.random.key(3), 0)
  return jax.value_and_grad(run, has_aux=True)(params)


def test_sobel_is_scipys():
  x = np.random.default_rng(0).normal(size=(2, 5, 6, 7, 2))
  taps, smooth = (-1, -2, 0, 2, 1), np.array([1, 4, 6, 4, 1]) / 16
  want = 0
  for axis in (1, 2, 3):
    one = x
    for other in (1, 2, 3):
      one = scipy.ndimage.correlate1d(one, taps if other == axis else smooth, axis=other, mode='mirror')
    want = want + np.abs(one) / 3
  found = jax.jit(sobel)(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(found, want, atol=2e-5)
  assert not np.any(sobel(jnp.full((1, 5, 5, 5, 1), 0.7)) > 1e-6)


def test_entropy_counts_kinds():
  x = np.random.default_rng(0).integers(0, 5, (3, 2, 64))
  shares = [[np.unique(row, return_counts=True)[1] / 64 for row in part] for part in x]
  np.testing.assert_allclose(entropy(jnp.asarray(x, jnp.float32)), [[-(s * np.log2(s)).sum() for s in part] for part in shares],
                             rtol=1e-5, atol=1e-6)


def cut(x, patch):
  """Patches [B, N, P] of [B, *grid, C], by loops."""
  places = np.ndindex(*(n // p for n, p in zip(x.shape[1:-1], patch)))
  box = lambda place: tuple(slice(i * p, (i + 1) * p) for i, p in zip(place, patch))
  return np.stack([x[(slice(None), *box(place))].reshape(len(x), -1) for place in places], axis=1)


def test_the_loss_by_hand():
  """Decoders that say the same of each token leave targets and masks, which are recomputed."""
  objective, variables, data = started()
  rng, params = np.random.default_rng(1), variables['params']
  said = {name: rng.normal(size=params[f'{name}_decoder']['predict']['bias'].shape) for name in ('image', 'gradient')}
  constant = params | {f'{name}_decoder': params[f'{name}_decoder'] | {'predict': {
      'kernel': jnp.zeros_like(params[f'{name}_decoder']['predict']['kernel']), 'bias': jnp.asarray(b, jnp.float32)}}
                       for name, b in said.items()}
  (loss, (metrics, _)), _ = step(objective, constant, data)
  image = np.asarray(data['image'], np.float64)
  image = np.stack([x[np.minimum(np.arange(SLICES), n - 1)] for x, n in zip(image, OWN)])
  noise = np.asarray(jax.random.uniform(jax.random.split(jax.random.key(3))[0], (COUNT, 8)), np.float64)
  span = lambda f: f(image, axis=(1, 2, 3), keepdims=True)
  eight = np.round((image - span(np.min)) / (span(np.max) - span(np.min)) * 255)
  edges = np.asarray(sobel(jnp.asarray(image, jnp.float32)), np.float64)
  total, deep = {'image': [], 'gradient': []}, said['image'].size * DEEP // (DEEP + 1)
  for i, n in enumerate(OWN):
    tokens = 4 * -(-n // DEEP)
    bits = np.zeros(8)
    for c in range(2):
      for t, patch in enumerate(cut(eight[i:i + 1, ..., c:c + 1], (DEEP, 4, 4))[0]):
        share = np.unique(patch, return_counts=True)[1] / patch.size
        bits[t] -= (share * np.log2(share)).sum()
    bits = bits[:tokens]
    score = noise[i, :tokens] * (bits - bits.min()) / (bits.max() - bits.min())
    hidden = np.argsort(score)[-(tokens // 2):]
    assert not set(hidden) & {t for t in range(tokens) if bits[t] == bits.min()}  # flat ones are shown
    for name, x in (('image', image), ('gradient', edges)):
      target = cut(x[i:i + 1], (DEEP, 4, 4))[0] if n > 1 else cut(x[i:i + 1, 0], (4, 4))[0]
      target = (target - target.mean(1, keepdims=True)) / np.sqrt(target.var(1, ddof=1, keepdims=True) + 1e-6)
      b = said[name][:deep] if n > 1 else said[name][deep:]
      total[name] += list(np.square(b - target[hidden]).mean(axis=1))
  for name, errors in total.items():
    fakes.close(metrics[f'{name}_loss'], np.mean(errors), 1e-4)
  fakes.close(loss, np.mean(total['image']) + np.mean(total['gradient']), 1e-4)
  assert metrics['images'] == 0.5 and metrics['hidden_tokens'] == np.mean([4, 4, 2, 2])


def test_whose_kernel_is_trained_and_that_nothing_is_seen():
  objective, variables, data = started()
  params = variables['params']
  any_of = lambda tree: any(np.any(x) for x in jax.tree.leaves(tree))
  (loss, _), both = step(objective, params, data)
  assert np.isfinite(loss) and any_of(both['encoder']['patch_embed']) and any_of(both['volume_embed'])
  for own, trained, rests in (([1, 1, 1, 1], 'encoder', 'volume_embed'), ([4, 3, 2, 4], 'volume_embed', 'encoder')):
    grads = step(objective, params, windows(own=np.array(own)))[1]
    kernel = lambda name, g=grads: g['encoder']['patch_embed'] if name == 'encoder' else g['volume_embed']
    assert any_of(kernel(trained)) and not any_of(kernel(rests)) and any_of(grads['encoder']['transformer'])
  silent = params | {f'{n}_decoder': params[f'{n}_decoder'] | {'predict': jax.tree.map(
      jnp.zeros_like, params[f'{n}_decoder']['predict'])} for n in ('image', 'gradient')}
  metrics = step(objective, silent, data)[0][1][0]
  assert abs(metrics['image_gain']) < 1e-5 and abs(metrics['gradient_gain']) < 1e-5


def test_a_volume_of_equal_slices_is_the_image_where_kernels_are_inflated():
  encoder = fakes.encoder('channel')
  objective, data = Uni4Eye(encoder, inflated=True, window=SLICES, **SMALL), windows('channel')
  params = nn.unbox(jax.jit(objective.init)(jax.random.key(0), data))['params']
  image = jnp.repeat(jnp.nan_to_num(data['image'][:, :1]), SLICES, axis=1)

  @jax.jit
  def tokens(flat):
    return objective._tokens(params, image, data, jnp.ones((COUNT, 16), bool), flat).x.reshape(COUNT, 2, 2, 4, -1)

  volumes, images = tokens(jnp.zeros(COUNT, bool)), tokens(jnp.ones(COUNT, bool))
  np.testing.assert_allclose(volumes[:, :, 0], images[:, :, 0], atol=1e-5)  # the first layer
  assert np.abs(volumes[:, :, 1] - volumes[:, :, 0]).max() > 0.1  # the second one has another place
  alone = objective.model_of('volume')
  weights = objective.products({'params': params})['volume']
  seen = jax.jit(lambda x, c: alone.apply({'params': weights}, x, c, method='embed_patches'))(image, data['channels'][:, 0])
  both = np.asarray(data['channel_mask'][:, 0]).all(axis=1)  # a ChannelViT moves its positions where there are several
  assert both.sum() == 2
  np.testing.assert_allclose(seen.x.reshape(volumes.shape)[both], volumes[both], atol=1e-5)
  assert jax.tree.map(jnp.shape, weights) == jax.tree.map(lambda x: x.shape, nn.unbox(jax.eval_shape(
      alone.init, jax.random.key(0), image, data['channels'][:, 0])['params']))


def test_wrong_options():
  vit, data = fakes.encoder('vit'), windows()
  for options, match in (({'mask_ratio': 0.0}, 'objective.mask_ratio 0.0'), ({'patch_slices': 0}, 'patch_slices 0'),
                         ({'decoder_dim': 16, 'decoder_heads': 3}, 'decoder_heads 3 does not divide')):
    with pytest.raises(UserError, match=match):
      Uni4Eye(vit, **options)
  for encoder, options, batch, match in (
      (fakes.encoder('conv'), {}, data, 'needs a vit or a channel_vit'),
      (vit, {}, {k: v[:, 0] for k, v in data.items()}, 'takes windows of slices: set loader.window'),
      (vit, {'patch_slices': 3}, data, 'loader.window=4 does not divide into objective.patch_slices=3')):
    with pytest.raises(UserError, match=match):
      Uni4Eye(encoder, **options).init(jax.random.key(0), batch)
