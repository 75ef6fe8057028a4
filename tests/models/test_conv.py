"""Convolutional and hierarchical encoders: layers against NumPy in float64, masks, channels, sizes; no PyTorch."""

import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models import create_model, registry
from jaxmed.models.encoders.convnext import ResponseNorm
from jaxmed.models.encoders.resnet import max_pool
from jaxmed.models.layers import convolution as cv

RNG = np.random.default_rng(5)
SMALL = dict(depths=(1, 2, 1), dims=(8, 32, 64))  # three stages: the total stride is 8
TINY = {
  'resnet_micro': dict(depths=(1, 1, 1), dims=(8, 16, 64), stem_width=8),
  'convnextv2_micro': SMALL,
  'caformer_micro': SMALL,
  'pvt_v2_micro': SMALL | dict(num_heads=(1, 2, 4), mlp_ratios=(2, 2, 2), reductions=(4, 2, 1)),
  'swin_micro': SMALL | dict(num_heads=(1, 2, 4)),
  'resenc_micro': SMALL | dict(stem_width=8, strides=(2, 2, 2)),
}
HIDDEN = np.zeros((2, 12), bool)
HIDDEN[0, [0, 2, 3, 7, 10, 11]] = HIDDEN[1, [1, 5, 6, 8]] = True


def build(name, channels=3, **options):
  """A small model whose parameters are all away from where they start."""
  model = create_model(name, 32, channels, **TINY[name] | options)
  return model, _draw(model)


@functools.cache
def _draw(model):
  image = jax.ShapeDtypeStruct((1, *model.image_size, model.in_channels), jnp.float32)
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), image)['params'])
  flat = flax.traverse_util.flatten_dict(shapes)
  rng = np.random.default_rng(1)
  for path, s in flat.items():
    noise = rng.normal(size=s.shape)
    if path[-1] == 'kernel':
      noise /= np.prod(s.shape[1:-1] if 'blocks' in path else s.shape[:-1]) ** 0.5
    elif path[-1] == 'var':
      noise = 1 + 0.2 * np.abs(noise)
    else:
      noise = (path[-1] == 'scale' or path[-1].startswith('res_scale')) + 0.2 * noise
    flat[path] = jnp.asarray(noise, jnp.float32)
  return flax.traverse_util.unflatten_dict(flat)


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0, static_argnames='train')
def features(model, params, image, mask=None, hidden=None, train=False):
  return model.apply({'params': params}, image, None, mask, train, hidden, mutable=['stats'])


def reference(x, kernel, stride, padding, groups=1):
  """Convolution of [B, H, W, C] with [k, k, C / groups, D] by loops over places, float64."""
  x = np.pad(np.float64(x), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
  k = kernel.shape[0]
  high, wide = ((n - k) // stride + 1 for n in x.shape[1:3])
  out = np.zeros((x.shape[0], high, wide, kernel.shape[-1]))
  for i, j in np.ndindex(high, wide):
    window = x[:, i * stride : i * stride + k, j * stride : j * stride + k]
    if groups == 1:
      out[:, i, j] = np.einsum('bhwc,hwcd->bd', window, np.float64(kernel))
    else:
      out[:, i, j] = np.einsum('bhwc,hwc->bc', window, np.float64(kernel[:, :, 0]))
  return out


@pytest.mark.parametrize('kernel,stride,padding', [(3, 1, 1), (3, 2, 1), (7, 4, 2), (2, 2, 0), (1, 2, 0), (1, 1, 0)])
def test_convolution_is_the_reference(kernel, stride, padding):
  x, w = normal(2, 12, 16, 3), normal(kernel, kernel, 3, 5)
  have = cv.convolve(jnp.asarray(x), jnp.asarray(w), stride, padding)
  np.testing.assert_allclose(have, reference(x, w, stride, padding), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape,k', [((2, 6, 5, 4), 7), ((3, 1, 4, 2), 3), ((2, 8, 8, 3), 3)])
def test_depthwise_and_its_gradients_are_the_reference(shape, k):
  x, w, g = normal(*shape), normal(k, k, 1, shape[-1]), normal(*shape)
  out, back = jax.vjp(cv.depthwise, jnp.asarray(x), jnp.asarray(w))
  np.testing.assert_allclose(out, reference(x, w, 1, k // 2, shape[-1]), rtol=1e-5, atol=1e-5)
  dx, dw = back(jnp.asarray(g))
  np.testing.assert_allclose(dx, reference(g, w[::-1, ::-1], 1, k // 2, shape[-1]), rtol=1e-4, atol=1e-5)
  wide = np.pad(np.float64(x), ((0, 0), (k // 2,) * 2, (k // 2,) * 2, (0, 0)))
  for i, j in np.ndindex(k, k):
    want = (wide[:, i : i + shape[1], j : j + shape[2]] * g).sum((0, 1, 2))
    np.testing.assert_allclose(dw[i, j, 0], want, rtol=1e-4, atol=1e-5)


def test_depthwise_forms_agree():
  """What other platforms compute, and volumes."""
  x, w, g = normal(2, 4, 5, 3), normal(3, 3, 1, 3), normal(2, 4, 5, 3)
  want, back = jax.vjp(cv._grouped, jnp.asarray(x), jnp.asarray(w))
  have, own = jax.vjp(cv.depthwise, jnp.asarray(x), jnp.asarray(w))
  for a, b in zip((have, *own(g)), (want, *back(g)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  flat, deep = jnp.asarray(x)[:, None], jnp.zeros((3, 3, 3, 1, 3)).at[1].set(w)
  np.testing.assert_allclose(cv.depthwise(flat, deep)[:, 0], want, rtol=1e-5, atol=1e-5)


def test_max_pool_and_response_norm():
  x = normal(2, 6, 4, 8)
  wide = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
  want = np.stack([np.stack([wide[:, i : i + 3, j : j + 3].max((1, 2)) for j in (0, 2)], 1) for i in (0, 2, 4)], 1)
  np.testing.assert_array_equal(max_pool(jnp.asarray(x)), want)
  p = {'scale': normal(8), 'bias': normal(8)}
  norm = np.sqrt(np.square(np.float64(x)).sum((1, 2), keepdims=True))
  want = x + p['scale'] * x * norm / (norm.mean(-1, keepdims=True) + 1e-6) + p['bias']
  np.testing.assert_allclose(ResponseNorm(jnp.float32).apply({'params': p}, x), want, rtol=1e-5, atol=1e-5)
  slope = jax.grad(lambda x: ResponseNorm(jnp.float32).apply({'params': p}, x).sum())(jnp.zeros((1, 2, 2, 8)))
  assert np.isfinite(slope).all()


@pytest.mark.parametrize('name', TINY)
def test_shapes_and_other_sizes(name):
  model, params = build(name)
  assert (model.patch_size, model.embed_dim, model.num_prefix_tokens) == ((8, 8), 64, 0)
  assert not model.per_channel and not model.class_token
  f, _ = features(model, params, normal(2, 32, 24, 3))
  assert (f.cls, f.registers, f.valid, f.grid) == (None, None, None, (4, 3))
  assert f.patches.shape == (2, 12, 64) and f.mean.shape == f.pooled('cls').shape == (2, 64)
  assert (f.pool is None) == name.startswith(('resnet', 'pvt', 'resenc', 'swin'))
  if f.pool is None:
    np.testing.assert_allclose(f.mean, f.patches.mean(1), rtol=1e-5, atol=1e-6)


def test_missing_channels_are_zero_and_the_rest_scaled():
  model, params = build('resnet_micro')
  x = jnp.asarray(normal(2, 32, 24, 3))
  mask = jnp.asarray([[True, False, True], [True, True, True]])
  have = features(model, params, x.at[0, ..., 1].set(jnp.nan), mask)[0].patches
  want = features(model, params, x.at[0].multiply(jnp.asarray([1.5, 0, 1.5])))[0].patches
  np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['convnextv2_micro', 'caformer_micro'])
def test_pooled_vector_is_normalised_after_pooling(name):
  """With one place it is that place's; with more it is no mean of the places."""
  model, params = build(name)
  f, _ = features(model, params, normal(2, 8, 8, 3))
  np.testing.assert_allclose(f.mean, f.patches[:, 0], rtol=1e-5, atol=1e-5)
  f, _ = features(model, params, normal(2, 32, 24, 3))
  scale, bias = params['norm']['scale'], params['norm']['bias']
  normed = (np.float64(f.mean) - bias) / scale
  np.testing.assert_allclose(normed.mean(-1), 0, atol=1e-5)
  np.testing.assert_allclose(normed.std(-1), 1, rtol=1e-3)


@pytest.mark.parametrize('name,masking', [*((name, 'sparse') for name in TINY), ('resnet_micro', 'token'),
                                          ('convnextv2_micro', 'token')])
def test_nothing_of_hidden_patches_is_seen(name, masking):
  model, params = build(name, masking=masking, mask_token=masking == 'token')
  x, hidden = jnp.asarray(normal(2, 32, 24, 3)), jnp.asarray(HIDDEN)

  @jax.jit
  def run(params, x):
    def total(params, x):
      f, stats = model.apply({'params': params}, x, None, None, True, hidden, mutable=['stats'])
      return jnp.square(f.patches).sum() + f.mean.sum() + sum(s.sum() for s in jax.tree.leaves(stats)), f

    return jax.grad(total, (0, 1), has_aux=True)(params, x)

  (slopes, pixels), f = run(params, x)
  where = np.kron(HIDDEN.reshape(2, 4, 3), np.ones((8, 8))).astype(bool)
  assert not np.asarray(pixels)[where].any()
  assert np.abs(np.asarray(pixels)[~where]).max() > 0
  if masking == 'sparse':
    assert not np.asarray(f.patches)[HIDDEN].any()
    np.testing.assert_array_equal(f.valid, ~HIDDEN)
  else:
    assert np.abs(f.patches).max(axis=-1).min() > 0 and f.valid is None
    assert np.abs(slopes['mask_token']).max() > 0


@pytest.mark.parametrize('name', TINY)
def test_sparse_limits(name):
  """Nothing hidden is the plain network; all of a sample hidden, which may hold anything, is finite."""
  model, params = build(name)
  x = jnp.asarray(normal(2, 32, 24, 3))
  plain = features(model, params, x)[0]
  shown = features(model, params, x, hidden=jnp.zeros((2, 12), bool))[0]
  np.testing.assert_allclose(shown.patches, plain.patches, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(shown.mean, plain.mean, rtol=1e-4, atol=1e-4)
  hidden = jnp.asarray(HIDDEN).at[1].set(True)
  f = features(model, params, x.at[1].set(jnp.nan), hidden=hidden)[0]
  assert np.isfinite(f.patches).all() and np.isfinite(f.mean).all()


@pytest.mark.parametrize('name', TINY)
def test_samples_do_not_mix(name):
  model, params = build(name)
  x, hidden = jnp.asarray(normal(2, 32, 24, 3)), jnp.asarray(HIDDEN)
  f, g = features(model, params, x, hidden=hidden)[0], features(model, params, x[::-1], hidden=hidden[::-1])[0]
  np.testing.assert_allclose(f.patches, g.patches[::-1], rtol=1e-5, atol=1e-5)


def test_token_must_be_there():
  model, params = build('resnet_micro', masking='token')
  with pytest.raises(UserError, match='mask_token=True'):
    features(model, params, normal(2, 32, 24, 3), hidden=jnp.asarray(HIDDEN))


def test_batch_statistics_are_of_the_visible_places():
  model, params = build('resnet_micro')
  x, hidden = normal(2, 32, 24, 3), HIDDEN
  stats = features(model, params, x, hidden=jnp.asarray(hidden), train=True)[1]['stats']
  shown = ~np.kron(hidden.reshape(2, 4, 3), np.ones((4, 4))).astype(bool)
  pixels = x * ~np.kron(hidden.reshape(2, 4, 3), np.ones((8, 8))).astype(bool)[..., None]
  y = reference(pixels, np.asarray(params['conv1']['kernel']), 2, 1)[shown]
  p = params['bn1']
  np.testing.assert_allclose(stats['bn1']['mean'], 0.9 * p['mean'] + 0.1 * y.mean(0), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(stats['bn1']['var'], 0.9 * p['var'] + 0.1 * y.var(0, ddof=1), rtol=1e-4)


@pytest.mark.parametrize('name', TINY)
def test_bfloat16_is_near_float32(name):
  model, params = build(name)
  x = normal(2, 32, 24, 3)
  want = features(model, params, x)[0]
  have = features(model.clone(dtype='bfloat16'), params, x)[0]
  assert have.patches.dtype == jnp.bfloat16 and have.mean.dtype == jnp.float32
  assert np.abs(np.float32(have.patches) - want.patches).mean() < 0.05 * np.abs(want.patches).mean()


@pytest.mark.parametrize('name', ['resnet_micro', 'convnextv2_micro'])
def test_initial_parameters(name):
  model = create_model(name, 16, 3, **TINY[name] | dict(dims=(8, 64, 64)), mask_token=True)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))['params'])
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  for path, value in flat.items():
    assert value.dtype == jnp.float32
    leaf = path.split('/')[-1]
    if leaf in ('bias', 'mean') or 'grn' in path:
      assert not value.any(), path
    elif leaf in ('scale', 'var'):
      assert (value == 1).all(), path
  if name == 'resnet_micro':
    assert flat['layer2_0/conv2/kernel'].std() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
  else:
    kernel = flat['stage1/blocks/fc1/kernel']
    assert 0.0195 < kernel.std() < 0.0205 and np.abs(kernel).max() > 0.05  # 0.02, cut off nowhere
  draw = cv.conv_init('fan_out', groups=64)(jax.random.key(0), (3, 3, 1, 64))
  assert draw.std() == pytest.approx((2 / 9) ** 0.5, rel=0.1)


def test_zero_init_residual_makes_blocks_that_add_nothing():
  """The last norm of each block alone starts at zero, as with torchvision's option of that name."""
  model = create_model('resnet_micro', 16, 3, **TINY['resnet_micro'], zero_init_residual=True)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))['params'])
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  zero = {path for path, value in flat.items() if path.endswith('scale') and not value.any()}
  assert zero == {path for path in flat if path.startswith('layer') and path.endswith('/bn2/scale')} and zero


@pytest.mark.parametrize('name', TINY)
def test_axes_of_parameters(name):
  """The last axis of a strided or full convolution is sharded; every box names all of its axes."""
  model = create_model(name, 64, 3, mask_token=True)
  boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))['params']
  for path, box in flax.traverse_util.flatten_dict(boxed, sep='/').items():
    assert len(box.names) == box.value.ndim, path
    assert (box.names[0] == 'layers') == ('/blocks/' in path), path
    if path.endswith(('_conv/kernel', '/conv1/kernel', '/conv2/kernel')):
      assert box.names == (None, None, None, 'embed'), path


def test_drop_path_drops_samples_of_the_last_blocks():
  x, key = jnp.ones((64, 2, 2, 3)), jax.random.key(0)
  y = np.asarray(cv.drop_path(x, 0.25, key))
  kept = y.reshape(64, -1)
  assert (kept == kept[:, :1]).all() and set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
  rates = cv.path_rates(0.3, (1, 2, 1))
  np.testing.assert_allclose(np.concatenate(rates), [0, 0.1, 0.2, 0.3], atol=1e-6)
  assert [len(r) for r in rates] == [1, 2, 1]
  model, params = build('convnextv2_micro', drop_path=0.5)
  run = jax.jit(lambda key: model.apply({'params': params}, jnp.ones((4, 16, 16, 3)), train=True, rngs={'dropout': key}))
  a, b, again = run(key).patches, run(jax.random.key(1)).patches, run(key).patches
  np.testing.assert_array_equal(a, again)
  assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize('name', ['resnet_micro', 'convnextv2_micro'])
def test_volumes(name):
  model = create_model(name, (8, 16, 8), 2, **TINY[name])
  params = _draw(model)
  hidden = jnp.asarray([[True, False]])
  f, _ = features(model, params, normal(1, 8, 16, 8, 2), hidden=hidden)
  assert model.patch_size == (8, 8, 8) and f.grid == (1, 2, 1) and f.patches.shape == (1, 2, 64)
  assert not np.asarray(f.patches)[0, 0].any()


@pytest.mark.parametrize(
  'name,count',
  [
    ('resnet18', 11_176_512),
    ('resnet34', 21_284_672),
    ('resnet50', 23_508_032),
    ('resnext50_32x4d', 22_979_904),
    ('resnext101_32x8d', 86_742_336),
    ('convnextv2_atto', 3_387_400),
    ('convnextv2_tiny', 27_866_496),
    ('convnextv2_large', 196_419_840),
    ('caformer_s18', 23_237_936),
    ('caformer_s36', 36_193_382),
    ('pvt_v2_b0', 3_409_760),
    ('pvt_v2_b2', 24_849_856),
    ('pvt_v2_b5', 81_443_008),
  ],
)
def test_parameter_counts_are_timms(name, count):
  model = create_model(name)
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))['params'])
  trained = {k: v for k, v in flax.traverse_util.flatten_dict(shapes).items() if k[-1] not in ('mean', 'var')}
  assert sum(s.size for s in trained.values()) == count
  assert registry.rebuild(registry.describe(model)) == model


@pytest.mark.parametrize(
  'args,options,words',
  [
    (('resnet50/16',), {}, 'takes no patch size.*write resnet50'),
    (('resnet5',), {}, "did you mean 'resnet50'"),
    (('resnet50', 100), {}, 'nearest is 96x96'),
    (('convnextv2_micro', 40), {}, 'nearest is 32x32'),
    (('pvt_v2_b2',), dict(masking='spars'), "did you mean 'sparse'"),
    (('pvt_v2_b2',), dict(num_heads=(1, 2, 5, 7)), 'heads that divide'),
    (('pvt_v2_b2',), dict(reductions=(16, 4, 2, 1)), 'must divide the strides'),
    (('caformer_s18',), dict(depths=(1, 1)), 'one for each stage'),
    (('caformer_s18',), dict(embed_dim=3), "unknown model option 'embed_dim'"),
  ],
)
def test_what_does_not_fit(args, options, words):
  with pytest.raises(UserError, match=words) as e:
    create_model(*args, **options)
  assert '\n' not in str(e.value)
