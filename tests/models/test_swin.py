"""Windows, their attention and merging by brute force; the encoders' regimes, masks and levels."""

import functools
import itertools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.models.decoders.dense import create_decoder, maps_of
from jaxmed.models.encoders import swin
from jaxmed.models.layers import kernels, windows
from tests.models import test_conv

RNG = np.random.default_rng(3)
SMALL = dict(depths=(2, 1), dims=(8, 16), num_heads=(2, 4), window_size=4)


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def build(name, size, channels=2, **options):
  model = create_model(name, size, channels, **SMALL | options)
  return model, test_conv._draw(model)


@functools.partial(jax.jit, static_argnums=0, static_argnames=('levels', 'train'))
def apply(model, params, x, hidden=None, levels=(), train=False):
  return model.apply({'params': params}, x, hidden=hidden, levels=levels, train=train)


@pytest.mark.parametrize('order', swin.MERGINGS)
def test_merging_by_gather(order):
  """Octants at (d, h, w); the published order leaves two of them out and takes two twice."""
  x = normal(2, 4, 6, 2, 3)
  got = np.asarray(swin.merge(jnp.asarray(x), swin.MERGINGS[order]))
  seen = set()
  for b, d, h, w in np.ndindex(2, 2, 3, 1):
    for i, corner in enumerate(swin.MERGINGS[order]):
      place = tuple(2 * n + int(c) for n, c in zip((d, h, w), corner, strict=True))
      np.testing.assert_array_equal(got[b, d, h, w, 3 * i : 3 * i + 3], x[b, *place])
      seen.add(corner)
  assert len(seen) == (6 if order == 'legacy' else 8)
  assert swin.MERGINGS['v2'] == tuple(map(''.join, itertools.product('01', repeat=3)))
  assert swin.MERGINGS['corrected'] == ('000', '100', '010', '001', '110', '101', '011', '111')
  assert swin.MERGINGS['legacy'] == ('000', '100', '010', '001', '101', '010', '001', '111')


@pytest.mark.parametrize('size, window', [((8, 6), 4), ((5, 9, 3), 4)])
def test_partition_and_roll_come_back(size, window):
  x = jnp.asarray(normal(2, *size, 3))
  clipped, shift = windows.regime(size, window)
  assert shift == tuple(0 if n <= window else window // 2 for n in size)
  full = windows.pad(x, clipped)
  parts = windows.partition(windows.roll(full, shift), clipped)
  back = windows.roll(windows.joined(parts, full.shape[1:-1], clipped), shift, back=True)
  np.testing.assert_array_equal(back[(slice(None), *map(slice, size))], x)
  first = np.asarray(full)[(0, *(slice(w) for w in clipped))].reshape(-1, 3)
  np.testing.assert_array_equal(windows.partition(full, clipped)[0, 0], first)


@pytest.mark.parametrize('window, table', [((3, 3), 3), ((2, 3), 3), ((2, 3, 1), 4)])
def test_bias_rows_are_offsets(window, table):
  rows = windows.bias_rows(window, table)
  places = list(np.ndindex(*window))
  for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
    offset = tuple(p - q + table - 1 for p, q in zip(a, b, strict=True))
    assert rows[i, j] == np.ravel_multi_index(offset, (2 * table - 1,) * len(window))


@pytest.mark.parametrize('window, share', [((6, 6, 6), 0.02), ((3, 3, 3), 0.1)])
def test_monai_reads_other_offsets(window, share):
  """Only so many pairs of a clipped window get their own (2.0 and 10.0 %)."""
  same = windows.bias_rows(window, 7) == windows.bias_rows(window, 7, exact=False)
  assert same.mean() == pytest.approx(share, abs=2e-3)
  np.testing.assert_array_equal(windows.bias_rows((7,) * 3, 7), windows.bias_rows((7,) * 3, 7, exact=False))


def reference(x, params, window, shift, size, heads):
  """Attention of each token of x [*size, D] to those of its window and region, by loops in float64."""
  at = lambda name: {k: np.float64(v) for k, v in params[name].items()}
  dim, qkv, proj = x.shape[-1], at('qkv'), at('proj')
  q, k, v = np.moveaxis(np.einsum('...d,dchk->...chk', x, qkv['kernel']) + qkv['bias'], -3, 0)
  table, places = np.float64(params['bias_table']), list(np.ndindex(*size))
  group = lambda p: tuple((n - s) // w for n, s, w in zip(p, shift, window, strict=True))  # of a window before the roll
  out = np.zeros(x.shape)
  for a in places:
    near = [b for b in places if group(b) == group(a)]
    offsets = [tuple(m - n + 3 for m, n in zip(a, b, strict=True)) for b in near]
    rows = [np.ravel_multi_index(o, (7,) * len(size)) for o in offsets]
    for h in range(heads):
      logits = np.array([q[a][h] @ k[b][h] for b in near]) * (dim // heads) ** -0.5 + table[rows, h]
      weights = np.exp(logits - logits.max())
      out[a] += (weights / weights.sum()) @ np.stack([v[b][h] for b in near]) @ proj['kernel'].reshape(heads, -1, dim)[h]
  return out + proj['bias']


@pytest.mark.parametrize('size', [(8, 8), (3, 9), (5, 3, 6)])
@pytest.mark.parametrize('shifted', [False, True])
def test_attention_is_that_of_each_region(size, shifted, monkeypatch):
  """Masked and shifted windows equal attention within each region; padding has no part. Also in chunks of windows."""
  x = normal(1, *size, 8)
  module = swin.WindowAttention(2, 4, True, 'exact', True, 'trunc_normal', jnp.float32)
  shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x, True, None)['params'])
  params = jax.tree.map(lambda s: jnp.asarray(0.5 * RNG.normal(size=s.shape), jnp.float32), shapes)
  window, shift = windows.regime(size, 4)
  want = reference(x[0], params, window, shift if shifted else (0,) * len(size), size, 2)
  run = jax.jit(lambda p, chunk: module.apply({'params': p}, x, jnp.asarray(shifted), None), static_argnums=1)
  slope = jax.jit(jax.grad(lambda p, chunk: jnp.square(run(p, chunk)).sum()), static_argnums=1)
  np.testing.assert_allclose(run(params, 0)[0], want, atol=1e-5)
  slopes = slope(params, 0)
  monkeypatch.setattr(kernels, 'CHUNK_BYTES', 1)
  np.testing.assert_allclose(run(params, 1)[0], want, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), slopes,
               slope(params, 1))


def test_padding_is_seen_only_without_its_mask():
  """A map of 5 is one window of 4 and one of which three quarters are padding."""
  x = normal(1, 4, 5, 8)
  make = lambda pad_mask: swin.WindowAttention(2, 4, True, 'exact', pad_mask, 'trunc_normal', jnp.float32)
  params = nn.unbox(make(True).init(jax.random.key(0), x, False, None)['params'])
  params['qkv']['bias'] = jnp.asarray(normal(3, 2, 4))
  alone = make(True).apply({'params': params}, x[:, :, 4:], False, None)
  outs = [make(mask).apply({'params': params}, x, False, None)[:, :, 4:] for mask in (True, False)]
  np.testing.assert_allclose(outs[0], alone, atol=1e-6)
  assert np.abs(outs[1] - alone).max() > 1e-3


def count(encoder, classes):
  decoder = create_decoder('swin_unetr', encoder, classes)
  image = jax.ShapeDtypeStruct((1, *encoder.image_size, encoder.in_channels), jnp.float32)

  def initial(image):
    features, first = encoder.init_with_output(jax.random.key(0), image, levels=decoder.levels(encoder))
    return first, decoder.init(jax.random.key(0), image, maps_of(encoder, features))

  return sum(np.prod(a.shape) for a in jax.tree.leaves(nn.unbox(jax.eval_shape(initial, image)))) / 1e6


@pytest.mark.parametrize('name, classes, options, millions', [
  ('swin_unetr_24', 14, {}, 15.703), ('swin_unetr_48', 14, {}, 62.187),
  ('swin_unetr_48', 14, {'use_v2': True}, 72.763), ('swin_unetr_96', 21, {'use_v2': True}, 290.393)])
def test_parameters_of_the_published_networks(name, classes, options, millions):
  assert count(create_model(name, (64, 64, 64), 1, **options), classes) == pytest.approx(millions, abs=1e-3)


@pytest.mark.parametrize('name, millions', [('swin_tiny', 27.519), ('swin_base', 86.743)])
def test_parameters_of_timms(name, millions):
  model = create_model(name, 224)
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)))
  assert sum(np.prod(a.shape) for a in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=1e-3)


@pytest.mark.parametrize('use_v2', [False, True])
def test_hidden_maps_are_normalised(use_v2):
  """Each level has mean 0 and variance 1 over its channels; what goes on to the next stage does not."""
  model, params = build('swin_unetr_micro', (16, 24, 8), use_v2=use_v2)
  f = apply(model, params, normal(2, 16, 24, 8, 2), levels=(0, 1, 2))
  assert [level.map.shape for level in f.levels] == [(2, 8, 12, 4, 8), (2, 4, 6, 2, 16), (2, 2, 3, 1, 32)]
  for level in f.levels:
    np.testing.assert_allclose(level.map.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(level.map.var(-1), 1, atol=1e-2)
  np.testing.assert_array_equal(f.patches, f.levels[-1].patches)
  assert model.embed_dim == 32 and model.patch_size == (8, 8, 8)


@pytest.mark.parametrize('masking', ['sparse', 'token'])
def test_nothing_of_hidden_patches_is_seen(masking):
  model, params = build('swin_unetr_micro', (16, 24, 8), use_v2=True, masking=masking, mask_token=masking == 'token')
  x, hidden = jnp.asarray(normal(2, 16, 24, 8, 2)), jnp.asarray(np.arange(12).reshape(2, 6) % 3 == 0)

  @jax.jit
  def slope(params, x):
    total = lambda p, x: jnp.square(model.apply({'params': p}, x, hidden=hidden).patches[..., 0]).sum()
    return jax.grad(total, (0, 1))(params, x)

  weights, pixels = slope(params, x)
  where = np.kron(np.asarray(hidden).reshape(2, 2, 3, 1), np.ones((8, 8, 8))).astype(bool)
  assert not np.asarray(pixels)[where].any() and np.abs(np.asarray(pixels)[~where]).max() > 0
  for path, g in flax.traverse_util.flatten_dict(weights, sep='/').items():
    assert np.isfinite(g).all(), path
  f = apply(model, params, x, hidden=hidden, levels=(1,))
  if masking == 'sparse':
    assert not np.asarray(f.patches)[np.asarray(hidden)].any() and (f.valid == ~hidden).all()
    assert not np.asarray(f.levels[0].map)[np.kron(where[:, ::8, ::8, ::8], np.ones((2, 2, 2))).astype(bool)].any()
  else:
    assert f.valid is None and np.abs(weights['mask_token']).max() > 0


def test_remat_gives_the_same():
  model, params = build('swin_micro', (8, 8))
  loss = lambda remat: jax.jit(jax.value_and_grad(
      lambda p, x: jnp.square(model.clone(remat=remat).apply({'params': p}, x).patches).mean()))
  x = normal(2, 8, 8, 2)
  (a, da), (b, db) = (loss(remat)(params, x) for remat in ('none', 'full'))
  np.testing.assert_allclose(a, b, rtol=1e-5)
  jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-3, atol=1e-5), da, db)


@pytest.mark.parametrize('options, words', [
  (dict(num_heads=(3, 3)), 'num_heads'), (dict(window_size=0), 'window_size'),
  (dict(merging='legcy'), "did you mean 'legacy'"), (dict(bias_slice='mona'), "did you mean 'monai'")])
def test_options_that_do_not_exist(options, words):
  with pytest.raises(UserError, match=words):
    create_model('swin_micro', 16, 3, **SMALL | options)
