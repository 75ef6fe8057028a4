"""The encoder: every rank and position scheme, precision, stochastic depth, rematerialisation, the scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.encoders.vit import at_size
from jaxmed.models.layers.initial import initializer
from jaxmed.models.layers.transformer import Block, Transformer, exact_depth, stochastic_depth

from .common import build, features, normal

INPUTS = {'2D': ((8, 12), '4'), '3D': ((4, 8, 8), '2x4x4'), 'video': ((3, 8, 8), '1x4x4')}


CASES = [(kind, pos) for kind in ('2D', '3D') for pos in ('learned', 'sincos', 'rope', 'none')] + [
  ('video', 'rope')
]


@pytest.mark.parametrize('kind,pos', CASES)
@pytest.mark.parametrize('family', ['vit', 'channel_vit'])
def test_every_rank_and_position(family, kind, pos):
  size, patch = INPUTS[kind]
  model, params = build(f'{family}_micro/{patch}', size, 2, pos=pos, num_registers=1, depth=1)
  image = np.array(normal((1, *size, 2)))
  got = features(model, params, jnp.asarray(image))
  count = int(np.prod([n // p for n, p in zip(size, model.patch_size, strict=True)]))
  tokens = count * (2 if family == 'channel_vit' else 1)
  assert (
    got.cls.shape == (1, 48) and got.registers.shape == (1, 1, 48) and got.patches.shape == (1, tokens, 48)
  )
  assert np.isfinite(got.patches).all() and int(np.prod(got.grid)) == tokens
  # swap two patches: without positions tokens swap and the class token stays; with positions it does not
  cut = tuple(slice(0, p) for p in model.patch_size)
  last = tuple(slice(n - p, n) for n, p in zip(size, model.patch_size, strict=True))
  swapped = image.copy()
  swapped[(0, *cut)], swapped[(0, *last)] = image[(0, *last)], image[(0, *cut)]
  moved = np.abs(features(model, params, jnp.asarray(swapped)).cls - got.cls).max()
  assert (moved < 1e-5) if pos == 'none' else (moved > 1e-4)


@pytest.mark.parametrize('pos', ['learned', 'sincos', 'rope'])
def test_other_sizes_than_the_native_one(pos):
  model, params = build('vit_micro/4', (8, 8), 1, pos=pos)
  assert features(model, params, normal((1, 12, 20, 1))).patches.shape == (1, 15, 48)
  with pytest.raises(ValueError, match='does not divide'):
    features(model, params, normal((1, 10, 8, 1)))


def test_bfloat16_is_near_float32_and_keeps_float32_parameters():
  model, params = build('vit_micro/4', 8, 3, layer_scale=0.5, mlp='swiglu')
  low = model.clone(dtype='bfloat16')
  made = jax.eval_shape(low.init, jax.random.key(0), normal((1, 8, 8, 3)))['params']
  assert {a.dtype for a in jax.tree.leaves(made)} == {jnp.dtype('float32')}
  image = normal((4, 8, 8, 3))
  a, b = features(model, params, image), features(low, params, image)
  assert b.patches.dtype == jnp.bfloat16 and b.mean.dtype == jnp.float32
  difference = np.abs(np.asarray(a.patches) - np.asarray(b.patches, np.float32))
  assert 1e-4 < difference.mean() / np.abs(a.patches).mean() < 0.02


def test_stochastic_depth_is_unbiased():
  """One block's residual branches, dropped at rate 0.4 and scaled by 1 / 0.6, have the undropped mean."""
  block = Block(3)
  x = jnp.broadcast_to(normal((1, 2, 48)), (3000, 2, 48))
  params = block.init(jax.random.key(0), x[:1])
  draw = lambda rate, seed: stochastic_depth(jax.random.key(seed), jnp.full((1,), rate), 3000)[0, ..., None]
  step = jax.jit(lambda p, rate, seed: block.apply(p, x, draw(rate, seed))[0])
  added = np.asarray(step(params, 0.4, 2) - x)
  attention = np.unique(added[:, 0, :3].round(4), axis=0)
  assert len(attention) == 4  # both branches, either, none
  rate = (np.abs(added).sum(axis=(1, 2)) == 0).mean()
  assert abs(rate - 0.16) < 5 * (0.16 * 0.84 / 3000) ** 0.5
  # the attention branch reads x itself, so its mean over draws is exactly its undropped value
  mlp = dict(params['params']['mlp'])
  mlp['fc2'] = jax.tree.map(jnp.zeros_like, mlp['fc2'])
  silent = {'params': params['params'] | {'mlp': mlp}}
  whole = np.asarray(block.apply(silent, x[:1])[0] - x[:1])[0]
  drawn = np.asarray(step(silent, 0.4, 3) - x)
  scale = (drawn.mean(axis=0) * whole).sum() / (whole**2).sum()
  assert abs(scale - 1) < 5 * (0.4 / 0.6 / 3000) ** 0.5


def test_drop_path_grows_with_depth_and_acts_in_training_only():
  model, params = build('vit_micro/4', 8, 1, depth=3, drop_path=0.5)
  plain = model.clone(drop_path=0.0)
  image = normal((2, 8, 8, 1))
  np.testing.assert_array_equal(features(model, params, image).cls, features(plain, params, image).cls)
  rngs = {'dropout': jax.random.key(0)}
  many = jnp.broadcast_to(image[:1], (64, 8, 8, 1))
  cls = np.asarray(features(model, params, many, train=True, rngs=rngs).cls)
  assert len(np.unique(cls.round(4), axis=0)) > 4  # samples draw independently
  _, shallow = build('vit_micro/4', 8, 1, depth=1, drop_path=0.5)
  one = model.clone(depth=1)  # the first block's rate is 0
  np.testing.assert_allclose(
    features(one, shallow, image, train=True, rngs=rngs).cls, features(one, shallow, image).cls, atol=1e-6
  )


def test_exact_depth_keeps_an_exact_share_of_each_kind_at_every_block():
  """DINOv2's law: floor(count (1 - rate)) crops keep a branch, scaled by count / kept; no block is spared."""
  keep = np.asarray(exact_depth(jax.random.key(0), 5, 0.3, 128))
  assert keep.shape == (5, 2, 128)
  np.testing.assert_array_equal((keep > 0).sum(axis=-1), 89)
  np.testing.assert_allclose(keep.max(axis=-1), 128 / 89, rtol=1e-6)
  np.testing.assert_allclose(keep.mean(axis=-1), 1.0, rtol=1e-6)
  assert len(np.unique(keep.reshape(10, -1) > 0, axis=0)) == 10  # each branch draws its own
  np.testing.assert_array_equal((np.asarray(exact_depth(jax.random.key(1), 2, 0.99, 4)) > 0).sum(axis=-1), 1)
  blocks = Transformer(3, 2, drop_path=0.25, drop_path_law='exact').bind({}, rngs={'dropout': jax.random.key(0)})
  big, small = blocks._factors([jnp.zeros((4 * 2, 5, 4)), jnp.zeros((4 * 3, 2, 4))], 4, True)
  assert big.shape == (3, 2, 8, 1) and small.shape == (3, 2, 12, 1)
  np.testing.assert_array_equal((np.asarray(big) > 0).sum(axis=2), 6)
  np.testing.assert_array_equal((np.asarray(small) > 0).sum(axis=2), 9)


@pytest.mark.parametrize('law, first', [('linear', 0.0), ('uniform', 0.5)])
def test_laws_of_drop_path(law, first):
  blocks = Transformer(2, 2, drop_path=0.5, drop_path_law=law).bind({}, rngs={'dropout': jax.random.key(0)})
  keep = np.asarray(blocks._factors([jnp.zeros((2000, 5, 4))], 2000, True)[0])
  dropped = (keep == 0).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(dropped, [first, 0.5], atol=0.03)


def test_remat_policies_give_the_same_gradients():
  model, params = build('vit_micro/4', 8, 2)
  image = normal((2, 8, 8, 2))

  def gradient(policy):
    other = model.clone(remat=policy)
    return jax.jit(jax.grad(lambda p: (other.apply({'params': p}, image).mean ** 2).sum()))(params)

  want = gradient('none')
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want)) > 0.1
  for policy in ('full', 'dots_no_batch', 'dots'):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient(policy), want)


@pytest.mark.parametrize('options', [{}, dict(mlp='swiglu', layer_scale=0.3, qkv_bias=False, pos='rope')])
def test_scan_is_a_loop_of_the_block_written_in_numpy(options):
  """The whole encoder again in float64 numpy, block after block."""
  model, params = build('vit_micro/4', 8, 2, depth=3, num_registers=1, **options)
  image = normal((2, 8, 8, 2))
  got = features(model, params, image)
  want = encoder(
    model, jax.tree.map(lambda a: np.asarray(a, np.float64), params), np.asarray(image, np.float64)
  )
  np.testing.assert_allclose(
    np.concatenate([got.cls[:, None], got.registers, got.patches], 1), want, atol=2e-5
  )


def encoder(model, p, image):
  from jaxmed.models.layers import positions

  b = len(image)
  cut = image.reshape(b, 2, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4, 5).reshape(b, 4, 32)
  x = cut @ p['patch_embed']['kernel'] + p['patch_embed']['bias']
  x = np.concatenate(
    [np.tile(p['cls_token'], (b, 1, 1)), np.tile(p['register_tokens'], (b, 1, 1)), x], axis=1
  )
  angles = np.zeros((6, 8))
  if model.pos == 'learned':
    x = x + p['pos_embed']
  else:
    angles[2:] = positions.rotary_angles(positions.coordinates((2, 2))[None], 16, model.rope_base)[0]
  for i in range(model.depth):
    x = numpy_block(jax.tree.map(lambda a, i=i: a[i], p['transformer']['blocks']), x, angles)
  return norm(x, p['norm'])


def norm(x, p):
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']


def numpy_block(p, x, angles):
  from scipy.special import erf

  y = norm(x, p['norm1'])
  qkv = np.einsum('bnd,dshe->sbhne', y, p['attn']['qkv']['kernel'])
  if 'bias' in p['attn']['qkv']:
    qkv = qkv + p['attn']['qkv']['bias'][:, None, :, None]
  turn = np.exp(1j * angles)
  turned = [(a[..., :8] + 1j * a[..., 8:]) * turn for a in qkv[:2]]
  q, k = (np.concatenate([z.real, z.imag], -1) for z in turned)
  logits = np.einsum('bhne,bhme->bhnm', q, k) / 4
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  out = np.einsum('bhnm,bhme->bnhe', weights / weights.sum(-1, keepdims=True), qkv[2]).reshape(x.shape)
  x = x + (out @ p['attn']['proj']['kernel'] + p['attn']['proj']['bias']) * p.get('ls1', 1.0)
  y = norm(x, p['norm2'])
  up = np.einsum('bnd,d...->bn...', y, p['mlp']['fc1']['kernel']) + p['mlp']['fc1']['bias']
  if up.ndim == 4:
    hidden = up[:, :, 0] / (1 + np.exp(-up[:, :, 0])) * up[:, :, 1]
  else:
    hidden = up * 0.5 * (1 + erf(up / 2**0.5))
  return x + (hidden @ p['mlp']['fc2']['kernel'] + p['mlp']['fc2']['bias']) * p.get('ls2', 1.0)


@pytest.mark.parametrize('no_embed_class', [False, True])
def test_another_native_size_has_the_same_features_there(no_embed_class):
  fields = dict(num_registers=1, depth=1, no_embed_class=no_embed_class)
  small, params = build('vit_micro/4', (8, 12), 2, **fields)
  large, fresh = build('vit_micro/4', (16, 16), 2, **fields)
  moved = at_size(small, params, large.image_size)
  assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, fresh)
  image = normal((1, 16, 16, 2))
  want, got = features(small, params, image), features(large, moved, image)
  np.testing.assert_allclose(got.patches, want.patches, atol=1e-5)
  np.testing.assert_allclose(got.cls, want.cls, atol=1e-5)
  assert at_size(small, params, small.image_size) is params


@pytest.mark.parametrize('name, fan_out', [('xavier_uniform', 3 * 48), ('xavier_qkv', 48)])
def test_width_of_the_first_weights(name, fan_out):
  """MAE draws queries, keys and values as one matrix, MoCo v3 as three; the other matrices are alike."""
  draw = initializer(name)
  qkv = np.abs(np.asarray(draw(jax.random.key(0), (32, 3, 4, 12))))
  bound = (6 / (32 + fan_out)) ** 0.5
  assert 0.97 * bound < qkv.max() <= bound
  assert np.abs(np.asarray(draw(jax.random.key(0), (32, 100)))).max() == pytest.approx((6 / 132) ** 0.5, rel=0.02)


@pytest.mark.parametrize('name', ['vit_micro/4', 'channel_vit_micro/4'])
def test_crops_together_are_each_kind_alone(name):
  """Features and gradients of two kinds of crops in one pass; masks, registers, rotary positions, local norms too."""
  pos = 'rope' if name.startswith('vit') else 'learned'
  model, params = build(name, 12, 2, depth=2, pos=pos, num_registers=1, mask_token=True, local_norm=True)
  params = jax.tree.map(lambda x: x + 0.3 * normal(x.shape, seed=x.size % 97), params)
  big, small = normal((6, 12, 12, 2)), normal((9, 8, 8, 2), seed=1)  # 3 samples of 2 and 3 views
  ids = lambda n: jnp.broadcast_to(jnp.arange(2), (n, 2))
  there = jnp.array([[True, True], [True, False], [False, True]])
  hidden = jax.random.bernoulli(jax.random.key(0), 0.4, (6, 9 * (2 if model.per_channel else 1)))
  groups = [
    dict(image=big, channels=ids(6), channel_mask=jnp.repeat(there, 2, axis=0), hidden=hidden),
    dict(image=small, channels=ids(9), channel_mask=jnp.repeat(there[::-1], 3, axis=0), local=True)]

  def together(p):
    return model.apply({'params': p}, groups, 3, method='one_pass')

  def apart(p):
    return [model.apply({'params': p}, **group) for group in groups]

  def loss(p, how):
    return sum(jnp.sin(x).sum() for f in how(p) for x in (f.cls, f.registers, f.mean))

  for a, b in zip(jax.tree.leaves(jax.jit(together)(params)), jax.tree.leaves(jax.jit(apart)(params)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)  # values of 3; some processors sum in another order
  grads = [jax.jit(jax.grad(lambda p, how=how: loss(p, how)))(params) for how in (together, apart)]
  for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_crops_of_a_row_are_dropped_one_by_one():
  """Stochastic depth draws for each crop, not for the row that crops stand in."""
  model, params = build('vit_micro/4', 8, 1, depth=2, drop_path=0.5)
  many = jnp.broadcast_to(normal((1, 8, 8, 1)), (64, 8, 8, 1))
  group = dict(image=many, channels=None, channel_mask=None)
  a, b = model.apply({'params': params}, [group, group], 4, True, method='one_pass', rngs={'dropout': jax.random.key(0)})
  whole = np.asarray(jnp.concatenate([a.patches, b.patches]))
  kinds = np.unique(whole.reshape(128, -1).round(4), axis=0)
  assert len(kinds) == 4  # both branches of the second block, either, none; the first block drops nothing
