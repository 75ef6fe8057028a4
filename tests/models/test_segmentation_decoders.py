"""Decoders of transformers and pyramids: by hand in NumPy, by shapes, and a loss that falls; MONAI's are in tests/parity."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.models.decoders import primus
from jaxmed.models.decoders.dense import create_decoder, maps_of
from jaxmed.models.layers import pyramid
from tests.models.common import normal

KEY = jax.random.key(0)
VIT = dict(depth=3, embed_dim=16, num_heads=2)
SWIN = dict(depths=(1, 1, 1), dims=(8, 16, 32), num_heads=(1, 2, 4), window_size=4)


def network(name, encoder, classes=3, **options):
  """(decoder, random parameters, image, maps) with random maps of the encoder's shapes."""
  decoder = create_decoder(name, encoder, classes, **options)
  image = normal((2, *encoder.image_size, encoder.in_channels))
  shapes = jax.eval_shape(lambda: maps_of(encoder, encoder.init_with_output(
      KEY, image, levels=decoder.levels(encoder))[0]))
  maps = tuple(normal(s.shape, seed=i) for i, s in enumerate(shapes))
  rng = np.random.default_rng(0)

  def draw(path, s):
    value = rng.normal(size=s.shape) * (np.prod(s.shape[:-1]) ** -0.5 if path[-1].key == 'kernel' else 0.2)
    return jnp.asarray(1 + np.abs(value) if path[-1].key in ('scale', 'var') else value, jnp.float32)

  params = nn.unbox(jax.eval_shape(decoder.init, KEY, image, maps))['params']
  return decoder, jax.tree_util.tree_map_with_path(draw, params), image, maps


def shapes_of(*args, **options):
  decoder, params, image, maps = network(*args, **options)
  return [x.shape for x in jax.eval_shape(lambda: decoder.apply({'params': params}, image, maps))]


def unit(x, axes):
  x = np.float64(x)
  return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)


def convolve(x, kernel):
  """[B, H, W, C] with [3, 3, C, D] or [1, 1, C, D], zero-padded, float64."""
  k = kernel.shape[0]
  wide = np.pad(np.float64(x), ((0, 0), (k // 2,) * 2, (k // 2,) * 2, (0, 0)))
  return sum(wide[:, i : i + x.shape[1], j : j + x.shape[2]] @ np.float64(kernel[i, j]) for i, j in np.ndindex(k, k))


def residual(x, p):
  leak = lambda y: np.where(y > 0, y, 0.01 * y)
  y = leak(unit(convolve(x, p['conv1']['kernel']), (1, 2)))
  y = unit(convolve(y, p['conv2']['kernel']), (1, 2))
  return leak(y + (unit(convolve(x, p['conv3']['kernel']), (1, 2)) if 'conv3' in p else x))


def test_swin_unetr_by_hand():
  """h3 of a U-Net's last step is a skip as it is; the rest go through residual blocks."""
  encoder = create_model('swin_unetr_micro', (16, 8), 2, depths=(1, 1), dims=(8, 16), num_heads=(1, 2), window_size=4)
  decoder, p, image, maps = network('swin_unetr', encoder, feature_size=4)
  assert decoder.levels(encoder) == (0, 1, 2) and [m.shape[1:] for m in maps] == [(8, 4, 8), (4, 2, 16), (2, 1, 32)]

  def up(x, skip, p):
    raised = np.einsum('bhwd,ijdf->bhiwjf', np.float64(x), p['up']['kernel'])
    raised = raised.reshape(*skip.shape[:-1], -1)
    return residual(np.concatenate([raised, skip], -1), p['conv'])

  x = up(residual(maps[2], p['bottom']), maps[1], p['up_1'])
  x = up(x, residual(maps[0], p['skip0']), p['up_0'])
  x = up(x, residual(image, p['skip_image']), p['up_image'])
  want = x @ np.float64(p['out_image']['kernel']) + np.float64(p['out_image']['bias'])
  got, = jax.jit(lambda p: decoder.apply({'params': p}, image, maps))(p)
  np.testing.assert_allclose(got, want, atol=2e-4)


def test_swin_unetr_takes_any_encoder_of_stages():
  swin = create_model('swin_micro', (32, 32), 1, **SWIN)
  assert shapes_of('swin_unetr', swin, deep_supervision=True) == [(2, 32, 32, 3), (2, 16, 16, 3), (2, 8, 8, 3)]
  resnet = create_model('resnet_micro', (8, 16, 8), 1, depths=(1, 1), dims=(8, 16), stem_width=8)
  assert shapes_of('swin_unetr', resnet) == [(2, 8, 16, 8, 3)]
  with pytest.raises(UserError, match='decoder unetr'):
    create_decoder('swin_unetr', create_model('vit_micro/8', 16), 3).levels(create_model('vit_micro/8', 16))


def test_unetr_takes_blocks_at_equal_distances():
  deep = create_model('vit_tiny/16', (32, 32, 32), 1)
  assert create_decoder('unetr', deep, 3).levels(deep) == (3, 6, 9, 12)
  assert create_decoder('unetr', deep, 3, taps='monai').levels(deep) == (4, 7, 10, 12)
  small = create_model('vit_micro/8', (16, 16), 1, depth=6)
  assert create_decoder('unetr', small, 3).levels(small) == (2, 4, 6)
  flat = create_model('vit_micro/2x8x8', (4, 16, 16), 1, **VIT)
  outs = shapes_of('unetr', flat, deep_supervision=True, feature_size=4)
  assert outs == [(2, 4, 16, 16, 3), (2, 2, 8, 8, 3)]
  channels = create_model('channel_vit_micro/4', (8, 8), 3, **VIT)
  assert shapes_of('unetr', channels, feature_size=4) == [(2, 8, 8, 3)]
  for model, words in ((create_model('vit_micro/6', 12), 'powers of two'), (create_model('swin_micro', 32, **SWIN), 'grid')):
    with pytest.raises(UserError, match=words):
      create_decoder('unetr', model, 3).levels(model)
  with pytest.raises(UserError, match="did you mean 'monai'"):
    create_decoder('unetr', small, 3, taps='mona')


def test_primus_by_hand():
  """Widths of the published sizes; steps tile, the thin axis doubles in the finest one."""
  assert primus.channels(864, 14, 3) == [272, 88, 14] and primus.channels(396, 2, 3) == [88, 16, 2]
  encoder = create_model('vit_micro/2x4', (4, 8), 1, **VIT)
  decoder, p, image, (x,) = network('primus', encoder, 2)
  assert p['up0']['kernel'].shape == (1, 2, 16, 8) and p['up1']['kernel'].shape == (2, 2, 8, 2)
  norm = lambda y, p, e: ((y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + e)) * p['scale'] + p['bias']
  y = norm(np.float64(x), p['norm'], 1e-5)
  y = np.einsum('bhwd,ijdf->bhiwjf', y, p['up0']['kernel']).reshape(2, 2, 4, 8) + p['up0']['bias']
  y = norm(np.float64(y), p['norm1'], 1e-6)
  y = np.asarray(jax.nn.gelu(jnp.asarray(y, jnp.float32), approximate=False))
  y = np.einsum('bhwd,ijdf->bhiwjf', y, p['up1']['kernel']).reshape(2, 4, 8, 2) + p['up1']['bias']
  np.testing.assert_allclose(decoder.apply({'params': p}, image, (x,))[0], y, atol=1e-5)


def test_resizing_and_pooling_by_hand():
  x = normal((1, 3, 4, 2))
  line = np.asarray(x)[0, :, 0, 0]
  np.testing.assert_allclose(pyramid.resize_corners(x, (5, 4))[0, :, 0, 0],
                             np.interp(np.arange(5) / 2, np.arange(3), line), rtol=1e-5)
  centres = np.interp((np.arange(6) + 0.5) / 2 - 0.5, np.arange(3), line)
  np.testing.assert_allclose(pyramid.resize(x, (6, 4))[0, :, 0, 0], centres, rtol=1e-5)
  np.testing.assert_array_equal(pyramid.nearest(x, (5, 4))[0, :, 0, 0], line[[0, 0, 1, 1, 2]])
  np.testing.assert_allclose(pyramid.pool(x, 2)[0, :, 0, 0], [np.mean(x[0, :2, :2, 0]), np.mean(x[0, 1:, :2, 0])], rtol=1e-5)
  np.testing.assert_allclose(pyramid.pool(x, 1)[0, 0, 0], np.mean(x[0], (0, 1)), rtol=1e-5)
  assert pyramid.doublings((16, 64), (8, 8)) == [(2, 2), (1, 2), (1, 2)]
  assert pyramid.resize_corners(x[:, :1], (3, 4)).shape == (1, 3, 4, 2)


def test_fpn_has_the_published_size():
  """1,886,976 parameters on CAFormer's maps, and 4,609 for each class in the last layer."""
  encoder = create_model('caformer_s18', 64)
  decoder = create_decoder('fpn', encoder, 7)
  assert decoder.levels(encoder) == (1, 2, 3, 4)
  maps = tuple(jax.ShapeDtypeStruct((1, n, n, d), jnp.float32) for n, d in ((16, 64), (8, 128), (4, 320), (2, 512)))
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = nn.unbox(jax.eval_shape(decoder.init, KEY, image, maps))['params']
  assert sum(np.prod(s.shape) for s in jax.tree.leaves(shapes)) == 1_886_976 + 7 * 4609
  assert shapes['conv3_2']['kernel'].shape == (3, 3, 128, 128) and 'conv0_1' not in shapes


def test_fpn_by_hand():
  """Two stages: the coarser is enlarged by its nearest place, convolved, and enlarged between its corners."""
  encoder = create_model('convnextv2_micro', (16, 16), 1, depths=(1, 1), dims=(8, 16))
  decoder, p, image, (fine, coarse) = network('fpn', encoder, pyramid_width=6, width=4, groups=2)
  bias = lambda name, x: convolve(x, p[name]['kernel']) + np.float64(p[name]['bias'])
  top = bias('lateral1', coarse)
  low = bias('lateral0', fine) + top.repeat(2, 1).repeat(2, 2)

  def block(x, name):
    x = convolve(x, p[f'conv{name}']['kernel'])
    x = unit(x.reshape(*x.shape[:-1], 2, 2), (1, 2, 4)).reshape(x.shape)
    return np.maximum(x * p[f'norm{name}']['scale'] + p[f'norm{name}']['bias'], 0)

  corners = lambda x, size: np.float64(pyramid.resize_corners(jnp.asarray(x, jnp.float32), size))
  x = np.concatenate([block(low, '0_0'), corners(block(top, '1_0'), (8, 8))], axis=-1)
  np.testing.assert_allclose(decoder.apply({'params': p}, image, (fine, coarse))[0], corners(bias('out', x), (16, 16)),
                             atol=1e-4)
  with pytest.raises(UserError, match='groups'):
    create_decoder('fpn', encoder, 2, width=20)


@pytest.mark.parametrize('name', ['upernet', 'fpn'])
@pytest.mark.parametrize('model', ['stages', 'blocks'])
def test_pyramids_learn(name, model):
  """A few steps of gradient descent lower the loss; running statistics are handed out, not trained."""
  encoder = create_model('swin_micro', 32, 1, **SWIN) if model == 'stages' else create_model('vit_micro/8', 32, 1, **VIT)
  options = dict(width=8, dropout=0.0, pool_scales=(1, 2)) if name == 'upernet' else dict(width=8, groups=2, pyramid_width=8)
  decoder, params, image, maps = network(name, encoder, 2, **options)
  target = (image[..., 0] > 0).astype(int)

  @jax.jit
  def step(params):
    def loss(p):
      (logits,), state = decoder.apply({'params': p}, image, maps, True, mutable=['stats'])
      return -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], -1).mean(), state
    (value, state), slopes = jax.value_and_grad(loss, has_aux=True)(params)
    return value, jax.tree.map(lambda p, g: p - 0.01 * g, params, slopes), state

  first, params, state = step(params)
  for _ in range(3):
    value, params, state = step(params)
  assert value < first and np.isfinite(value)
  assert bool(state) == (name == 'upernet' or model == 'blocks')


def test_upernet_drops_channels_in_training_alone():
  encoder = create_model('vit_micro/8', 32, 1, **VIT)
  decoder, params, image, maps = network('upernet', encoder, 2, width=8, dropout=0.5)
  assert decoder.levels(encoder) == (1, 2, 2, 3)
  run = jax.jit(lambda train, key: decoder.apply({'params': params}, image, maps, train, mutable=['stats'], rngs={
      'dropout': jax.random.key(key)})[0][0], static_argnums=0)
  assert np.abs(run(True, 0) - run(True, 1)).max() > 0
  np.testing.assert_array_equal(run(False, 0), run(False, 1))


def test_progressive_by_hand():
  """Convolution, instance norm, leaky ReLU and linear interpolation, until the map is as large as the image."""
  encoder = create_model('vit_micro/4', (8, 8), 2, **VIT)
  decoder, p, image, (x,) = network('progressive', encoder)
  got = np.asarray(decoder.apply({'params': p}, image, (x,))[0])
  x = np.float64(x)
  for i in (1, 2):
    x = unit(convolve(x, p[f'conv{i}']['kernel']) + np.float64(p[f'conv{i}']['bias']), (1, 2))
    x = np.where(x > 0, x, 0.01 * x)
    for axis in (1, 2):  # places between the centres, the border repeated
      place = np.arange(2 * x.shape[axis])
      beside = np.clip(place // 2 + np.where(place % 2, 1, -1), 0, x.shape[axis] - 1)
      x = 0.75 * np.take(x, place // 2, axis) + 0.25 * np.take(x, beside, axis)
  want = convolve(x, p['out']['kernel']) + np.float64(p['out']['bias'])
  assert p['conv1']['kernel'].shape == (3, 3, 16, 8) and p['conv2']['kernel'].shape == (3, 3, 8, 4)
  np.testing.assert_allclose(got, want, atol=1e-4)
  volume = create_model('resenc_micro', (16, 8, 8), 1)
  assert shapes_of('progressive', volume) == [(2, 16, 8, 8, 3)]
  with pytest.raises(UserError, match='one place'):
    shapes_of('progressive', create_model('vit_micro/8', (8, 8), 2, **VIT))
