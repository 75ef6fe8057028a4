"""U-Nets: sizes of the published networks, whole networks against loops in float64, maps of other encoders, what fails."""

import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models import create_model, registry
from jaxmed.models.decoders.dense import create_decoder, maps_of
from jaxmed.models.layers import convolution, unet_blocks
from jaxmed.models.layers.norm import GroupNorm
from tests.models.common import normal

KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def network(encoder, decoder, params, image):
  """Logits of the whole network."""
  features = encoder.apply({'params': params['encoder']}, image, levels=decoder.levels(encoder))
  return decoder.apply({'params': params['decoder']}, image, maps_of(encoder, features))


def shapes(encoder, decoder, image):
  """Shapes of the parameters of both and of the logits."""
  def run(image):
    levels = decoder.levels(encoder)
    first = encoder.init(KEY, image, levels=levels)
    maps = maps_of(encoder, encoder.apply(first, image, levels=levels))
    second = decoder.init(KEY, image, maps)
    return nn.unbox({'encoder': first['params'], 'decoder': second['params']}), decoder.apply(second, image, maps)

  return jax.eval_shape(run, image)


def drawn(tree, seed=0):
  """Parameters away from where they start."""
  rng, flat = np.random.default_rng(seed), flax.traverse_util.flatten_dict(tree)
  for path, s in flat.items():
    scale = np.prod(s.shape[:-1]) ** -0.5 if path[-1] == 'kernel' else 0.2
    flat[path] = jnp.asarray((path[-1] == 'scale') + scale * rng.normal(size=s.shape), jnp.float32)
  return flax.traverse_util.unflatten_dict(flat)


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize('name, classes, parameters', [
    ('stunet_s', 105, 14_596_941), ('stunet_b', 105, 58_262_669), ('stunet_l', 105, 440_302_605),
    ('stunet_h', 105, 1_457_326_221), ('nnunet_plain', 2, 31_195_594), ('resenc_l', 2, 102_349_770)])
def test_parameters_of_the_published_networks(name, classes, parameters):
  """STU-Net's with the 105 classes of TotalSegmentator v1; nnU-Net's with one channel and six stages."""
  encoder = create_model(name, (64, 64, 64), 1)
  params, logits = shapes(encoder, create_decoder('unet', encoder, classes, True), jnp.zeros((1, 64, 64, 64, 1)))
  assert count(params) == parameters
  assert [x.shape for x in logits] == [(1, n, n, n, classes) for n in (64, 32, 16, 8, 4)]


def conv(x, layer, kernel_size, stride):
  """Convolution of [D, H, W, C] by loops over the taps, float64."""
  kernel, pad = np.float64(layer['kernel']), [(k - 1) // 2 for k in kernel_size]
  assert kernel.shape[:3] == kernel_size
  x = np.pad(x, [*((n, n) for n in pad), (0, 0)])
  grid = [(n - k) // s + 1 for n, k, s in zip(x.shape, kernel_size, stride, strict=False)]
  out = np.zeros((*grid, kernel.shape[-1]))
  for tap in np.ndindex(*kernel_size):
    part = x[tuple(slice(t, t + s * (n - 1) + 1, s) for t, s, n in zip(tap, stride, grid, strict=True))]
    out += part @ kernel[tap]
  return out + np.float64(layer.get('bias', 0))


def instance_norm(x, layer):
  flat = x.reshape(-1, x.shape[-1])
  return (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5) * np.float64(layer['scale']) + np.float64(layer['bias'])


def leaky(x):
  return np.where(x > 0, x, 0.01 * x)


def block(x, p, kind, kernel, stride):
  """One block of each kind, as its paper writes it."""
  if kind == 'plain':
    return leaky(instance_norm(conv(x, p['conv'], kernel, stride), p['norm']))
  y = leaky(instance_norm(conv(x, p['conv1'], kernel, stride), p['norm1']))
  y = instance_norm(conv(y, p['conv2'], kernel, (1, 1, 1)), p['norm2'])
  if kind == 'residual' and 'skip_conv' in p:
    x = conv(x, p['skip_conv'], (1, 1, 1), stride)
  if kind == 'residual_d':
    parts = [x[tuple(slice(a, None, s) for a, s in zip(at, stride, strict=True))] for at in np.ndindex(*stride)]
    x = np.mean(parts, axis=0)
    if 'skip_conv' in p:
      x = instance_norm(conv(x, p['skip_conv'], (1, 1, 1), (1, 1, 1)), p['skip_norm'])
  return leaky(x + y)


def blocks(x, params, prefix, depth, kind, kernel, stride):
  for j in range(depth):
    x = block(x, params[f'{prefix}_{j}'], kind, kernel, (1, 1, 1) if j else stride)
  return x


def enlarged(x, p, factor):
  if 'conv' in p:  # STU-Net: repeated, then mixed
    for axis, n in enumerate(factor):
      x = np.repeat(x, n, axis=axis)
    return conv(x, p['conv'], (1, 1, 1), (1, 1, 1))
  out = np.zeros((*(n * f for n, f in zip(x.shape, factor, strict=False)), p['kernel'].shape[-1]))
  for at in np.ndindex(*factor):  # every window of the output comes from one place
    where = tuple(slice(a, None, f) for a, f in zip(at, factor, strict=True))
    out[where] = x @ np.float64(p['kernel'][at])
  return out + np.float64(p['bias'])


KERNELS, STRIDES = ((1, 3, 3), (3, 3, 3), (3, 3, 3)), ((1, 1, 1), (1, 2, 2), (2, 2, 2))


@pytest.mark.parametrize('kind', ['plain', 'residual', 'residual_d'])
def test_the_whole_network_in_float64(kind):
  """An anisotropic plan of three stages: encoder, decoder and both outputs, place by place."""
  depths = (2, 1, 2)
  encoder = create_model('nnunet_micro', (4, 8, 12), 2, block=kind, depths=depths, dims=(3, 4, 6), stem_width=3 if kind == 'residual_d' else 0,
                         kernels=('1x3x3', 3, 3), strides=('1', (1, 2, 2), 2))
  decoder = create_decoder('unet', encoder, 5, True)
  image = normal((2, 4, 8, 12, 2))
  params = drawn(shapes(encoder, decoder, image)[0])
  got = network(encoder, decoder, params, image)
  assert encoder.patch_size == (2, 4, 4) and len(got) == 2
  own = 'residual' if kind == 'residual' else 'plain'
  inner = {'plain': (2, 2), 'residual_d': (1, 1), 'residual': depths[:-1]}[kind]
  for b in range(2):
    x, skips = np.float64(image[b]), []
    if kind == 'residual_d':
      x = block(x, params['encoder']['stem'], 'plain', KERNELS[0], (1, 1, 1))
    for i in range(3):
      x = blocks(x, params['encoder'], f'stage{i + 1}', depths[i], kind, KERNELS[i], STRIDES[i])
      skips.append(x)
    p = params['decoder']
    for i in (1, 0):
      x = np.concatenate([enlarged(x, p[f'up{i + 1}'], STRIDES[i + 1]), skips[i]], axis=-1)
      x = blocks(x, p, f'stage{i + 1}', inner[i], own, KERNELS[i], (1, 1, 1))
      want = conv(x, p[f'head{i + 1}'], (1, 1, 1), (1, 1, 1))
      np.testing.assert_allclose(got[i][b], want, atol=1e-4)


@pytest.mark.parametrize('name, finest, options', [
    ('resnet_micro', 2, {}), ('resnet18', 2, dict(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), stem_width=8)),
    ('convnextv2_micro', 2, {}), ('pvt_v2_b0', 4, dict(depths=(1, 1, 1, 1))),
    ('caformer_s18', 4, dict(depths=(1, 1, 1, 1)))])
def test_maps_of_any_encoder_of_stages(name, finest, options):
  """Outputs on the image's grid and on each coarser one, through further stages where the first map is coarse."""
  encoder = create_model(name, (64, 96), 3, **options)
  decoder = create_decoder('unet', encoder, 4, True)
  params, logits = shapes(encoder, decoder, jnp.zeros((2, 64, 96, 3)))
  assert [x.shape for x in logits] == [(2, 64 // 2**i, 96 // 2**i, 4) for i in range(len(logits))]
  assert sum('fine' in name for name in params['decoder'] if name.startswith('head')) == finest // 2
  if name == 'resnet_micro':
    one = create_decoder('unet', encoder, 4)
    assert [x.shape for x in shapes(encoder, one, jnp.zeros((2, 64, 96, 3)))[1]] == [(2, 64, 96, 4)]


@pytest.mark.parametrize('kernel, stride, padding, size', [
    ((3, 3, 3), (1, 1, 1), (1, 1, 1), (5, 6, 7)), ((1, 3, 3), (1, 1, 1), (0, 1, 1), (4, 5, 6)),
    ((3, 3, 3), (2, 2, 2), (1, 1, 1), (8, 7, 5)), ((1, 3, 3), (1, 2, 2), (0, 1, 1), (8, 8, 4)),
    ((3, 7, 7), (1, 2, 2), (1, 3, 3), (8, 8, 4)), ((3, 3, 3), (4, 2, 1), (1, 1, 1), (9, 8, 5)),
    ((2, 2, 2), (1, 1, 1), (1, 0, 2), (4, 5, 6))])
def test_convolutions_of_volumes_and_their_gradients(kernel, stride, padding, size, monkeypatch):
  """What a CPU computes for large ones and, where there is a stride, for small ones, beside sums over places in float64;
  by slabs of one slice or some."""
  rng = np.random.default_rng(0)
  x, k = rng.normal(size=(2, *size, 3)), rng.normal(size=(*kernel, 3, 4))
  wide = np.pad(x, ((0, 0), *((n, n) for n in padding), (0, 0)))
  grid = [(n - w) // step + 1 for n, w, step in zip(wide.shape[1:4], kernel, stride)]
  g, dx, dk, out = rng.normal(size=(2, *grid, 4)), np.zeros_like(wide), np.zeros_like(k), 0
  for tap in np.ndindex(kernel):
    at = (slice(None), *(slice(a, a + (n - 1) * step + 1, step) for a, n, step in zip(tap, grid, stride)))
    out, dk[tap] = out + wide[at] @ k[tap], np.tensordot(wide[at], g, ((0, 1, 2, 3),) * 2)
    dx[at] += g @ k[tap].T
  dx = dx[(slice(None), *(slice(n, n + m) for n, m in zip(padding, size)))]
  for least in (0, convolution.LEAST)[:max(stride)]:
    monkeypatch.setattr(convolution, 'LEAST', least)
    monkeypatch.setattr(convolution, 'SLAB', 3000)

    @jax.jit
    def pulled(x, k, g):
      have, pull = jax.vjp(lambda x, k: convolution.convolve(x, k, stride, padding), x, k)
      return have, *pull(g)

    for a, b in zip(pulled(*map(jnp.float32, (x, k, g))), (out, dx, dk), strict=True):
      assert np.abs(a - b).max() < 1e-6 * np.abs(b).max()


def test_interpolation_and_mixing_commute():
  x = normal((1, 2, 3, 4, 5))
  for how in ('nearest', 'linear'):
    up = unet_blocks.Up(6, (1, 2, 2), how)
    params = drawn(nn.unbox(jax.eval_shape(up.init, KEY, x))['params'])
    if how == 'nearest':
      first = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    else:
      first = jax.image.resize(x, (1, 2, 6, 8, 5), 'linear')
    want = first @ params['conv']['kernel'][0, 0, 0] + params['conv']['bias']
    np.testing.assert_allclose(up.apply({'params': params}, x), want, atol=1e-5)


def test_group_norm_by_hand_and_of_a_constant():
  x, norm = np.array(normal((2, 3, 4, 6))), GroupNorm(3)
  params = drawn(nn.unbox(norm.init(KEY, x))['params'])
  groups = np.float64(x).reshape(2, 12, 2, 3)
  unit = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
  want = unit.reshape(x.shape) * np.float64(params['scale']) + np.float64(params['bias'])
  np.testing.assert_allclose(norm.apply({'params': params}, x), want, atol=1e-5)
  constant = GroupNorm().apply({'params': params}, np.full((1, 2, 2, 6), 7.0))
  np.testing.assert_allclose(constant[0, 0, 0], params['bias'], atol=1e-5)
  there = np.zeros((2, 3, 4, 1), bool)
  there[0, :2] = there[1, 1:, 2:] = True
  got = GroupNorm().apply({'params': params}, x, where=there)
  for b in range(2):
    part = np.float64(x[b])[there[b, ..., 0]]
    want = (part - part.mean(0)) / np.sqrt(part.var(0) + 1e-5) * np.float64(params['scale']) + np.float64(params['bias'])
    np.testing.assert_allclose(np.asarray(got)[b][there[b, ..., 0]], want, atol=1e-5)


def test_first_values():
  """He's law before a leaky ReLU of 0.01, PyTorch's fan of a transposed convolution, blocks of ResEnc that add nothing."""
  encoder = create_model('resenc_micro', (8, 8, 8), 1, depths=(1, 2), dims=(16, 64), strides='1,4')
  params = nn.unbox(jax.jit(encoder.init)(KEY, jnp.zeros((1, 8, 8, 8, 1)))['params'])
  kernel = params['stage2_1']['conv1']['kernel']
  assert kernel.std() == pytest.approx((2 / 1.0001 / (27 * 64)) ** 0.5, rel=0.02)
  assert not params['stage2_0']['norm2']['scale'].any() and (params['stage2_0']['norm1']['scale'] == 1).all()
  up = unet_blocks.Up(64, (2, 2, 2), 'transposed')
  kernel = nn.unbox(up.init(KEY, jnp.zeros((1, 2, 2, 2, 16))))['params']['kernel']
  assert kernel.shape == (2, 2, 2, 16, 64) and kernel.std() == pytest.approx((2 / 1.0001 / (8 * 64)) ** 0.5, rel=0.03)


@pytest.mark.parametrize('options', [dict(norm='group', down='max'), dict(norm='batch', down='mean'), {}])
def test_other_norms_and_ways_down_see_nothing_of_hidden_patches(options):
  encoder = create_model('nnunet_micro', 16, 2, depths=(1, 1), dims=(8, 8), strides=(1, 4), **options)
  params = drawn(nn.unbox(jax.eval_shape(encoder.init, KEY, jnp.zeros((1, 16, 16, 2)))['params']))
  hidden = np.zeros((1, 16), bool)
  hidden[0, [0, 5, 6, 11]] = True

  @jax.jit
  def last(image):
    return encoder.apply({'params': params}, image, hidden=hidden, train=True, mutable=['stats'])[0].patches

  image = np.array(normal((1, 16, 16, 2)))
  other = np.where(np.kron(hidden.reshape(4, 4), np.ones((4, 4)))[None, ..., None] > 0, 9.0, image)
  np.testing.assert_array_equal(last(image), last(other))
  assert not np.asarray(last(image))[hidden].any()


def test_a_description_and_back():
  encoder = create_model('resenc_l', (32, 64, 64), 1, kernels=['1x3x3', 3, 3, 3, 3, 3], strides=[1, [1, 2, 2], 2, 2, 2, 2])
  assert encoder.kernels == '1x3x3,3,3,3,3,3' and encoder.strides == '1,1x2x2,2,2,2,2'
  assert encoder.patch_size == (16, 32, 32)
  assert registry.rebuild(registry.describe(encoder)) == encoder
  assert create_decoder('unet', encoder, 2).kernels == '1x3x3,3,3,3,3'


@pytest.mark.parametrize('name, options, words', [
    ('nnunet_plain', dict(kernels=(3, 3)), 'encoder.kernels has 2 entries.*of 6 stages'),
    ('nnunet_plain', dict(strides=('1x2x2',) * 6), "entry '1x2x2'.*as 3x3"),
    ('nnunet_plain', dict(block='residul'), "did you mean 'residual'"),
    ('nnunet_plain', dict(drop_path=0.1), 'needs a block with a shortcut'),
    ('nnunet_micro', dict(norm='group', dims=(4, 8, 8, 8)), '8 divides'),
    ('nnunet_micro', dict(down='avg'), 'encoder.down')])
def test_what_does_not_fit(name, options, words):
  with pytest.raises(UserError, match=words) as e:
    create_model(name, 64, 1, **options)
  assert '\n' not in str(e.value)


def test_what_does_not_fit_together():
  encoder = create_model('nnunet_micro', 16, 1)
  with pytest.raises(UserError, match='one place.*16x16'):
    jax.eval_shape(encoder.init, KEY, jnp.zeros((1, 8, 8, 1)))
  with pytest.raises(UserError, match='maps of several sizes'):
    vit = create_model('vit_micro/4', 16, 1)
    create_decoder('unet', vit, 2).levels(vit)
  with pytest.raises(UserError, match='decoder.depths has 2 entries'):
    shapes(encoder, create_decoder('unet', encoder, 2, depths=(1, 1)), jnp.zeros((1, 16, 16, 1)))
  with pytest.raises(UserError, match="did you mean 'nearest'"):
    create_decoder('unet', encoder, 2, up='neares')
