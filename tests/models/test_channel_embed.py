"""Hashed channel embeddings against NumPy, how evenly names spread, and what does not depend on the vocabulary."""

import hashlib

import flax.linen
import jax
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.models.layers import channel_embed
from jaxmed.models.layers.channel_embed import FEATURES, HashedChannels, rows_of

NAMES = ('DNA|stain=Hoechst|modality=fluorescence', 'T1', 'ER|modality=fluorescence')
TINY = dict(embed_dim=16, depth=1, num_heads=2, channel_embedding='hashed', hash_rows=64, hash_width=8)


def test_the_vectors_are_numpys():
  module = HashedChannels(NAMES, dim=6, rows=50, hashes=3, width=4)
  params = jax.tree.map(lambda x: x.astype(np.float32), jax.device_get(
      jax.jit(module.init)(jax.random.key(0))['params']))
  table, kernel = (np.asarray(jax.tree.leaves(params[k])[0], np.float64) for k in ('rows', 'kernel'))
  for i, channel in enumerate(NAMES):
    want = np.zeros(6)
    parts = dict([('name', channel.split('|')[0])] + [p.split('=') for p in channel.split('|')[1:]])
    for feature, value in parts.items():
      digests = [hashlib.blake2b(f'{feature}/{k}/{value}'.encode(), digest_size=8).digest() for k in range(3)]
      rows = [sum(b << 8 * j for j, b in enumerate(d)) % 50 for d in digests]
      want += np.concatenate([table[r] for r in rows]) @ kernel[FEATURES.index(feature)]
    np.testing.assert_allclose(module.apply({'params': params})[i], want, rtol=1e-5, atol=1e-7)


def test_names_spread_as_chance_would_have_it():
  """Rows that n names leave empty, and pairs of names that share all their rows, beside the expectation."""
  count, rows = 20_000, 4096
  have = np.array([rows_of(f'marker {i}', rows, 2)[0] for i in range(count)])
  for column in have.T:
    free = rows * (1 - 1 / rows) ** count
    assert abs((np.bincount(column, minlength=rows) == 0).sum() - free) < 5 * free**0.5
  pairs = np.unique(have, axis=0, return_counts=True)[1]
  same = (pairs * (pairs - 1) // 2).sum()
  expected = count * (count - 1) / 2 / rows**2  # about 12 of 2e8
  assert abs(same - expected) < 5 * expected**0.5 + 1
  # Each feature has hash functions of its own: one value under two of them shares rows by chance alone.
  shared = sum(np.intersect1d(rows_of(f'x|stain={i}|marker={i}', rows, 1)[2], rows_of(f'x|marker={i}', rows, 1)[3]).size
               for i in range(2000))
  assert shared < 10


def test_other_channels_need_no_other_parameters():
  """An encoder of two names embeds a third one, alone or beside them, and what it made of the two stays the same."""
  image = np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype(np.float32)
  small = create_model('channel_vit_micro/8', 16, 2, ('DNA', 'ER'), **TINY)
  params = jax.jit(small.init)(jax.random.key(0), image[..., :2])['params']
  wide = create_model('channel_vit_micro/8', 16, 3, ('ER', 'never seen', 'DNA'), **TINY)
  a, b = (m.apply({'params': params}, method='channel_vectors') for m in (small, wide))
  np.testing.assert_array_equal(a, b[np.array([2, 0])])
  assert np.abs(b[1] - a).max() > 1e-3
  ids = lambda *i: np.array([i], np.int32)
  np.testing.assert_allclose(small.apply({'params': params}, image[..., :2], ids(0, 1)).cls,
                             wide.apply({'params': params}, image[..., :2], ids(2, 0)).cls, atol=1e-6)


def test_features_in_any_order():
  np.testing.assert_array_equal(rows_of('a|stain=x|site=y', 99, 2), rows_of('a|site=y|stain=x', 99, 2))


def test_a_table_may_begin_orthogonal():
  model = create_model('channel_vit_micro/8', 16, 5, embed_dim=16, depth=1, num_heads=2, channel_init='orthogonal')
  params = model.init(jax.random.key(0), np.zeros((1, 16, 16, 5), np.float32))['params']
  table = np.asarray(params['channel_embed'].value)
  np.testing.assert_allclose(table @ table.T, np.eye(5), atol=1e-5)


def test_bad_names():
  with pytest.raises(UserError, match="unknown feature of channel 'DNA' 'stian': did you mean 'stain'"):
    create_model('channel_vit_micro/8', 16, 1, ('DNA|stian=x',), **TINY)
  with pytest.raises(UserError, match="'stain' twice"):
    channel_embed.parse('DNA|stain=x|stain=y')


def pruned(**options):
  return HashedChannels(NAMES, dim=6, rows=50, hashes=2, width=4, **options)


def test_pruning_and_widths_are_numpys():
  """Rows whose mean magnitude is below their feature's threshold are zero, and so are numbers beyond a width."""
  widths = (4, 2, 1, 4, 4, 3, 4, 4)
  module = pruned(prune=True, widths=widths)
  params = flax.linen.unbox(module.init(jax.random.key(1))['params'])
  params['threshold'] = np.linspace(0.7, 1.0, len(FEATURES)).astype(np.float32)
  have = module.apply({'params': params})
  table, kernel = (np.asarray(params[k], np.float64) for k in ('rows', 'kernel'))
  want, cut = np.zeros((3, 6)), 0
  for v, channel in enumerate(NAMES):
    for f in range(len(FEATURES)):
      for k, row in enumerate(rows_of(channel, 50, 2)[f]):
        if row < 0:
          continue
        if np.abs(table[row]).mean() <= params['threshold'][f]:
          cut += 1
          continue
        want[v] += table[row, :widths[f]] @ kernel[f, 4 * k:4 * k + widths[f]]
  assert 0 < cut < 12
  np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-7)
  found = channel_embed.census(params, NAMES, widths)
  assert found['modality'] == {'rows': 2, 'kept': found['modality']['kept'], 'width': 2}  # both have one modality
  assert found['name']['rows'] == len(np.unique([rows_of(c, 50, 2)[0] for c in NAMES]))
  few, many = channel_embed.numbers(found, 4)
  assert few == sum(c['kept'] * c['width'] for c in found.values()) < many == 4 * sum(c['rows'] for c in found.values())


def test_the_derivative_of_a_step_has_the_published_tail():
  x = np.array([-2.0, -0.9, -0.3, 0.0, 0.1, 0.4, 0.7, 1.5])
  step = channel_embed.above(jax.numpy.asarray(x, jax.numpy.float32))
  np.testing.assert_array_equal(step, [0, 0, 0, 0, 1, 1, 1, 1])
  slopes = jax.vmap(jax.grad(channel_embed.above))(jax.numpy.asarray(x, jax.numpy.float32))
  np.testing.assert_allclose(slopes, [0, 0.4, 0.8, 2.0, 1.6, 0.4, 0.4, 0], rtol=1e-6)


def test_thresholds_rise_by_their_penalty_and_by_what_rows_are_worth():
  """The penalty's slope is that of its formula; a feature that no channel has feels nothing of the vectors."""
  model = create_model('channel_vit_micro/8', 16, 3, NAMES, **TINY, hash_prune=0.5)
  image = np.zeros((1, 16, 16, 3), np.float32)
  params = flax.linen.unbox(model.init(jax.random.key(0), image)['params'])
  params['channel_hash']['threshold'] = np.full(len(FEATURES), 0.25, np.float32)
  slope = jax.grad(model.penalty)(params)['channel_hash']['threshold']
  np.testing.assert_allclose(slope, -0.5 * np.exp(-0.25), rtol=1e-6)
  worth = jax.grad(lambda p: (model.apply({'params': p}, method='channel_vectors') ** 2).sum())(params)
  there = np.array([f in ('name', 'modality', 'stain') for f in FEATURES])
  np.testing.assert_array_equal(np.asarray(worth['channel_hash']['threshold'])[~there], 0)
  assert (np.asarray(worth['channel_hash']['threshold'])[there] < 0).all()  # fewer rows, shorter vectors
  assert create_model('channel_vit_micro/8', 16, 3).penalty({}) is None


def test_widths_are_drawn_in_training_alone():
  model = create_model('channel_vit_micro/8', 16, 3, NAMES, **TINY, hash_draw=True)
  params = model.init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))['params']
  vectors = lambda key=None: model.apply({'params': params}, method='channel_vectors',
                                         rngs=None if key is None else {'dropout': jax.random.key(key)})
  whole = create_model('channel_vit_micro/8', 16, 3, NAMES, **TINY).apply({'params': params}, method='channel_vectors')
  np.testing.assert_array_equal(vectors(), whole)
  assert np.abs(vectors(0) - whole).max() > 1e-3 and np.abs(vectors(0) - vectors(1)).max() > 1e-3
  np.testing.assert_array_equal(vectors(0), vectors(0))


@pytest.mark.parametrize('options, said', [
    (dict(hash_prune=-1.0), 'hash_prune -1.0 must be at least 0'),
    (dict(hash_widths=(1, 2)), 'must be 8 numbers from 1 to hash_width 8: of name, modality'),
    (dict(hash_widths=(9,) * 8), 'must be 8 numbers from 1 to hash_width 8')])
def test_bad_pruning(options, said):
  with pytest.raises(UserError, match=said):
    create_model('channel_vit_micro/8', 16, 3, NAMES, **TINY, **options)
