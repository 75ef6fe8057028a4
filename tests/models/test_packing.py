"""Packed rows against padded ones, against each sample alone, and against the same rules written out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu

from jaxmed.data.feed import sampling
from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.models.layers import flash, kernels, packing, positions

from .common import build, features, normal
from .test_kernels import attend, backward, close, path, vjp  # noqa: F401

COUNTS = (1, 2, 4, 4, 1, 2, 3, 3)  # channels of eight samples: five rows of four with prefix


def lists(seed, samples=8, tokens=11):
  rng = np.random.default_rng(seed)
  return rng.random((samples, tokens)) < rng.random((samples, 1))


@pytest.mark.parametrize('seed, share, count', [(0, 0.75, 1), (1, 0.75, 2), (2, 0.5, 1), (3, 0.3, 1), (4, 1.0, 4)])
def test_the_longest_go_first_into_the_first_row_with_room(seed, share, count):
  valid = lists(seed)
  plan = packing.plan(jnp.asarray(valid), count, share, spare=2)
  own, rows, length = 8 // count, plan.rows[0] // count, plan.rows[1]
  assert (rows, length) == (np.ceil(share * own), 13)
  all_fit = True
  for g in range(count):
    free, starts = [length] * rows, {}
    sizes = valid[g * own:(g + 1) * own].sum(axis=1)
    for i in sorted(range(own), key=lambda i: -sizes[i]):
      row = next((r for r in range(rows) if free[r] >= sizes[i]), None)
      if row is not None:
        starts[i] = row * length + length - free[row]
        free[row] -= sizes[i]
    all_fit &= len(starts) == own
    slots = np.asarray(plan.slot[g]).reshape(own, 11)
    for i, there in enumerate(valid[g * own:(g + 1) * own]):
      want = starts[i] + np.arange(sizes[i]) if i in starts else np.full(sizes[i], rows * length)
      np.testing.assert_array_equal(slots[i][there], want)
      assert (slots[i][~there] == rows * length).all()
  assert bool(plan.fits) == all_fit
  if all_fit:
    x = normal((8, 11, 3))
    rows = plan.pack(x)
    np.testing.assert_array_equal(plan.unpack(rows), np.where(valid[..., None], x, 0))
    np.testing.assert_array_equal((np.asarray(rows) != 0).all(axis=-1), np.asarray(plan.segments()) > 0)
    assert np.asarray(rows).any(axis=-1).sum() == valid.sum()
    names = jnp.arange(1.0, 9.0)
    spread = plan.spread(jnp.stack([names, 2 * names]))
    np.testing.assert_array_equal(plan.unpack(spread[1]), 2 * np.where(valid, np.arange(1, 9)[:, None], 0))


def test_moving_is_differentiated_by_moving_back():
  plan = packing.plan(jnp.asarray(lists(0)), 2, 1.0)
  x, g = normal((8, 11, 3)), normal((*plan.rows, 3), 2)
  np.testing.assert_array_equal(jax.vjp(plan.pack, x)[1](g)[0], plan.unpack(g))
  g = normal((8, 11, 3), 3)
  np.testing.assert_array_equal(jax.vjp(plan.unpack, normal((*plan.rows, 3)))[1](g)[0], plan.pack(g))


SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [3, 1, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0]], np.int32)


def by_segment(f, operands, segments):
  """f of each segment alone, put together; zeros elsewhere."""
  several = f is backward
  out = [np.zeros_like(a) for a in operands[:3 if several else 1]]
  for b, s in sorted({(b, int(s)) for b, row in enumerate(segments) for s in row if s}):
    at = np.flatnonzero(segments[b] == s)
    found = f(*(a[b:b + 1, at] for a in operands), None)
    for whole, part in zip(out, found if several else [found], strict=True):
      whole[b, at] = part[0]
  return out if several else out[0]


@pytest.mark.parametrize('repeat', [1, 10])
def test_attention_within_segments(path, repeat):  # noqa: F811
  """In one piece and in chunks of queries, forwards and back."""
  segments = np.repeat(SEGMENTS, repeat, axis=1)
  q, k, v, g = (normal((3, 7 * repeat, 2, 4), i) for i in range(4))
  value, grads = vjp(lambda *a: kernels.attention(*a, jnp.asarray(segments)), (q, k, v), g)
  wide = [np.asarray(a, np.float64) for a in (q, k, v, g)]
  close(value, by_segment(attend, wide[:3], segments), 1e-6)
  for got, want in zip(grads, by_segment(backward, wide, segments), strict=True):
    close(got, want, 1e-5)
  one = kernels.self_attention(jnp.stack([q, k, v], 2), jnp.asarray(segments))
  close(one, value, 1e-6)


@pytest.mark.parametrize('form', ['pallas', 'library'])
def test_kernels_of_accelerators_within_segments(form):
  segments = np.repeat(SEGMENTS, 20, axis=1)  # 140 tokens, more than a block and no multiple of it
  operands = [2 * normal((3, 2, 140, 16), i) for i in range(4)]
  ids = jnp.asarray(segments)
  if form == 'pallas':
    f = lambda q, k, v: flash.by_pallas(q, k, v, ids, ids)
  else:
    f = lambda q, k, v: flash.by_library(q, k, v, ids, 'xla')
  with tpu.force_tpu_interpret_mode():
    value, back = jax.vjp(jax.jit(f), *operands[:3])
    grads = back(operands[3])
  turn = lambda x: np.asarray(x, np.float64).swapaxes(1, 2)
  wide = [turn(a) for a in operands]
  close(turn(value), by_segment(attend, wide[:3], segments), 1e-5)
  for got, want in zip(grads, by_segment(backward, wide, segments), strict=True):
    close(turn(got), want, 1e-5)


def channels(counts=COUNTS, total=4, seed=0):
  """Masks [B, C] of so many channels, at random places."""
  rng = np.random.default_rng(seed)
  return np.stack([rng.permutation(np.arange(total) < n) for n in counts])


@functools.partial(jax.jit, static_argnums=0)
def outcome(model, params, image, mask):
  """Features, and the gradient of a function of all of them that are there."""
  def loss(params, image):
    f = model.apply({'params': params}, image, None, mask, True, rngs={'dropout': jax.random.key(1)})
    patches = jnp.where(f.valid[..., None], f.patches, 0)
    total = (f.cls**2).sum() + (f.mean * jnp.arange(48)).sum() + (patches**3).sum()
    return total + (0 if f.registers is None else (f.registers**3).sum()), (f.cls, patches, f.patches)

  return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, image)


OPTIONS = {'registers': dict(num_registers=2, pos='rope', rope_jitter=1.5),
           'dropped': dict(drop_path=0.4, layer_scale=0.5, remat='dots')}


@pytest.mark.parametrize('options', OPTIONS)
def test_packed_is_padded(options):
  """Values and gradients, where the batch fits its rows, and where it does not and goes the other way."""
  model, params = build('channel_vit_micro/4', 8, 4, **OPTIONS[options])
  image, mask = normal((8, 8, 8, 4)), jnp.asarray(channels())
  (_, (cls, patches, _)), grads = outcome(model, params, image, mask)
  for share in (0.75, 0.5):
    (_, (cls2, patches2, raw)), grads2 = outcome(model.clone(packing=share), params, image, mask)
    close(cls2, cls, 1e-5)
    close(patches2, patches, 1e-5)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), grads2, grads)
    blind = np.asarray(raw)[~np.repeat(np.asarray(mask), 4, axis=1)]
    assert (np.ptp(blind, axis=0) == 0).all() == (share == 0.75)  # all alike: nothing was computed for them


def test_packed_is_each_sample_alone():
  model, params = build('channel_vit_micro/4', 8, 4, num_registers=1)
  image, mask = np.asarray(normal((8, 8, 8, 4))), channels()
  holes = jnp.asarray(np.where(mask[:, None, None], image, np.nan))
  got = features(model.clone(packing=0.625), params, holes, None, jnp.asarray(mask))
  for i in (0, 3, 6):
    at = np.flatnonzero(mask[i])
    one = features(model, params, jnp.asarray(image[i:i + 1][..., at]), jnp.asarray(at)[None])
    close(got.cls[i], one.cls[0], 1e-5)
    close(got.patches[i].reshape(4, 4, -1)[at].reshape(-1, 48), one.patches[0], 1e-5)
    close(got.mean[i], one.mean[0], 1e-5)


@pytest.mark.parametrize('masked', [(True, True), (True, False)])
def test_crops_of_two_kinds_in_one_pass(masked):
  """Views of two sizes share the pass, each kind in rows of its own; a kind without a mask stays as it is."""
  model, params = build('channel_vit_micro/4', 8, 3, drop_path=0.3)
  sizes, views = (8, 4), (2, 3)
  groups = []
  for size, count, there in zip(sizes, views, masked, strict=True):
    mask = channels(np.random.default_rng(size).integers(1, 3, 4 * count), 3, size)
    seen = {'channel_mask': jnp.asarray(mask)} if there else {}
    groups.append({'image': normal((4 * count, size, size, 3), size)} | seen)

  @functools.partial(jax.jit, static_argnums=0)
  def run(model, params):
    def loss(params):
      out = model.apply({'params': params}, groups, 4, True, method='one_pass', rngs={'dropout': jax.random.key(2)})
      return sum((f.cls**3).sum() + (f.mean**2).sum() for f in out), [f.cls for f in out]
    return jax.value_and_grad(loss, has_aux=True)(params)

  want, got = run(model, params), run(model.clone(packing=0.75), params)
  jax.tree.map(lambda a, b: close(a, b, 1e-5), got, want)


def test_a_mask_of_a_method_and_no_mask():
  """Any tokens may be missing, as those a method hides; without a mask, and for a ViT, packing does nothing."""
  model, params = build('channel_vit_micro/4', 8, 2)
  packed = model.clone(packing=1.0)
  image = normal((3, 8, 8, 2))

  @functools.partial(jax.jit, static_argnums=0)
  def encode(model, params):
    tokens = model.apply({'params': params}, image, method='embed_patches')
    valid = jnp.asarray(lists(5, 3, 8))
    tokens = type(tokens)(tokens.x, valid, tokens.position)
    return model.apply({'params': params}, tokens, method='encode').cls

  close(encode(packed, params), encode(model, params), 1e-5)
  np.testing.assert_array_equal(features(packed, params, image).cls, features(model, params, image).cls)


@pytest.mark.parametrize('options, match', [
    ({'packing': 1.2}, r'encoder.packing 1.2 .* 0 \(padded\) to 1'), ({'packing': -0.1}, 'encoder.packing -0.1'),
    ({'packing': 0.5, 'channel_attention': 'pooled'}, 'encoder.packing needs channel_attention=joint, not pooled')])
def test_bad_options(options, match):
  with pytest.raises(UserError, match=match):
    create_model('channel_vit_micro/4', 8, 2, **options)


class Records:
  """As much of a source as mixtures ask for: records of 1 to 8 channels."""

  path = 'records'

  def __init__(self, count):
    self.sets = [[f'c{i}' for i in range(n)] for n in range(1, 9)]
    self.codes = np.random.default_rng(0).integers(0, 8, count)

  def __len__(self):
    return len(self.codes)

  def distinct(self, name):
    assert name == 'channels'
    return self.codes, self.sets


@pytest.mark.parametrize('cells, prefix', [(36, 1), (196, 5)])
def test_little_is_wasted_on_one_to_eight_channels(cells, prefix):
  """200 batches of 64 in 37 rows of eight channels: hardly one does not fit, and at most 1 in 20 slots is empty."""
  source = Records(5000)
  sampler = sampling.make(source, sampling.Mixture(balance='n_channels'), 3)
  counts = np.array([1 + source.codes[sampler(i)] for i in range(200 * 64)]).reshape(200, 64)
  mask = np.arange(8) < counts[..., None]
  valid = jnp.asarray(np.concatenate([np.ones((200, 64, prefix), bool), np.repeat(mask, cells, axis=2)], axis=2))
  plan = lambda v: packing.plan(v, 1, 0.57, 2 * prefix)
  fits = np.asarray(jax.jit(lambda v: jax.lax.map(lambda x: plan(x).fits, v))(valid))
  slots, padded = np.prod(jax.eval_shape(lambda v: plan(v).segments(), valid[0]).shape), valid[0].size
  assert slots == 37 * (8 * cells + 3 * prefix)
  assert fits.mean() >= 0.98
  tokens = valid.sum(dtype=int)
  assert 1 - tokens / np.where(fits, slots, padded).sum() < 0.05
  assert 1 - tokens / (200 * padded) > 0.4  # what padding wastes


SIZES = [(8, 8), (4, 12), (16, 16)]  # pixels, of arrays of 16 x 16
KINDS = [('vit_micro/4', dict(pos='learned')), ('vit_micro/4', dict(pos='rope')),
         ('vit_micro/4', dict(pos='sincos', pos_interpolation='offset')),
         ('channel_vit_micro/4', dict(pos='learned', pos_interpolation='antialias')),
         ('channel_vit_micro/4', dict(pos='learned')), ('channel_vit_micro/4', dict(pos='rope', num_registers=2))]


def several_sizes(name, options):
  """A model, images of which what lies outside is NaN, and channels of each."""
  model, params = build(name, 8, 3, depth=1, **options)
  image = np.array(normal((6, 16, 16, 3)))
  for x, (h, w) in zip(image, SIZES * 2, strict=True):
    x[h:], x[:, w:] = np.nan, np.nan
  return model, params, image, channels((1, 3, 2, 3, 1, 2), 3) if name.startswith('channel') else np.ones((6, 3), bool)


@pytest.mark.parametrize('name, options', KINDS)
def test_each_image_has_the_tokens_of_its_own_size(name, options):
  """Of the native size (8 x 8), smaller and larger, with one and more channels."""
  model, params, image, mask = several_sizes(name, options)
  embed = jax.jit(lambda *args, **kwargs: model.apply({'params': params}, *args, **kwargs, method='embed_patches'))
  got = embed(jnp.asarray(image), None, jnp.asarray(mask), sizes=jnp.asarray(SIZES * 2))
  for i, (h, w) in enumerate(SIZES * 2):
    at, there = np.flatnonzero(mask[i]), np.asarray(got.valid[i])
    one = embed(jnp.asarray(image[i:i + 1, :h, :w, at]), jnp.asarray(at)[None])
    assert there.sum() == h * w // 16 * (len(at) if model.per_channel else 1)
    close(got.x[i][there], one.x[0], 1e-5)
    if got.position is not None:
      close(got.position[i][there], one.position[0], 1e-5)


@pytest.mark.parametrize('name, options', [KINDS[0], KINDS[5]])
def test_each_image_has_the_features_of_its_own_size(name, options):
  """Padded, packed, and one by one."""
  model, params, image, mask = several_sizes(name, options)
  run = lambda model: features(model, params, jnp.asarray(image), None, jnp.asarray(mask), sizes=jnp.asarray(SIZES * 2))
  got, packed = run(model), run(model.clone(packing=0.8))
  for i, (h, w) in enumerate(SIZES):
    at, there = np.flatnonzero(mask[i]), np.asarray(got.valid[i])
    one = features(model, params, jnp.asarray(image[i:i + 1, :h, :w, at]), jnp.asarray(at)[None])
    for many in (got, packed):
      close(many.patches[i][there], one.patches[0], 1e-5)
      close(many.cls[i], one.cls[0], 1e-5)
      close(many.mean[i], one.mean[0], 1e-5)


resample = jax.jit(positions.resample, static_argnums=(1, 2, 3))


@pytest.mark.parametrize('mode', ['antialias', 'offset', 'plain'])
@pytest.mark.parametrize('old, most', [((7,), (20,)), ((14, 3), (5, 9)), ((4, 5, 3), (6, 6, 6))])
def test_positions_of_grids_that_are_not_known_before(mode, old, most):
  rng = np.random.default_rng(0)
  table = normal((int(np.prod(old)), 8))
  grids = np.stack([rng.integers(1, n + 1, 6) for n in most], axis=1)
  grids[0], grids[1] = most, np.minimum(old, most)
  got = np.asarray(jax.jit(lambda g: positions.resample_each(table, old, g, most, mode))(grids))
  where = positions.own_coordinates(jnp.asarray(grids), most)
  for x, at, grid in zip(got, where, grids, strict=True):
    inside = tuple(slice(n) for n in grid)
    close(x.reshape(*most, 8)[inside].reshape(-1, 8), resample(table, old, tuple(map(int, grid)), mode), 1e-5)
    np.testing.assert_allclose(np.asarray(at).reshape(*most, -1)[inside].reshape(-1, len(most)),
                               positions.coordinates(tuple(grid)), atol=1e-6)


def test_gradients_of_images_of_several_sizes():
  """Nothing from outside of an image reaches a parameter, and no gradient goes there."""
  model, params = build('channel_vit_micro/4', 8, 2, depth=1)
  image, sizes = normal((2, 16, 16, 2)), jnp.asarray([(8, 8), (4, 16)])

  @jax.jit
  def slope(params, image, sizes):
    def loss(params, image):
      f = model.apply({'params': params}, image, sizes=sizes)
      return (f.cls**3).sum() + (f.mean**2).sum()
    return jax.grad(loss, (0, 1))(params, image)

  grads, pixels = slope(params, image, sizes)
  inside = (np.arange(16)[:, None] < sizes[:, :1, None]) & (np.arange(16) < sizes[:, 1:, None])
  assert (np.asarray(pixels)[~inside] == 0).all() and (np.abs(pixels).sum(axis=-1)[inside] > 0).all()
  alone = [slope(params, image[i:i + 1, :h, :w], None)[0] for i, (h, w) in enumerate(sizes.tolist())]
  jax.tree.map(lambda a, *b: close(a, sum(b), 1e-5), grads, *alone)


def test_segments_reach_the_kernel_of_a_tpu(monkeypatch):
  """Over a mesh, forwards and backwards."""
  mesh = jax.make_mesh((1, 1), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  qkv, ids = jax.ShapeDtypeStruct((2, 300, 3, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 300), jnp.int32)
  slope = jax.grad(lambda x, ids: kernels.self_attention(x, ids, 'flash').astype(jnp.float32).sum())
  monkeypatch.setattr(flash, 'platform', lambda: 'tpu')
  with jax.set_mesh(mesh):
    text = jax.jit(slope).trace(qkv, ids).lower(lowering_platforms=('tpu',)).as_text()
  assert text.count('tpu_custom_call') >= 3
