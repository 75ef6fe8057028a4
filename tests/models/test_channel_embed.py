"""Hashed channel embeddings against NumPy, how evenly names spread, and what does not depend on the vocabulary."""

import hashlib

import jax
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models import channel_embed, create_model
from jaxmed.models.channel_embed import FEATURES, HashedChannels, rows_of

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
