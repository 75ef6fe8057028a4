"""Text transformers: padding, causality, pooling, projections, sizes by name."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models.layers import kernels
from jaxmed.models.text import registry as text

TINY = dict(embed_dim=16, depth=2, num_heads=2)
IDS = np.array([[5, 0, 9, 3, 0, 0], [7, 1, 2, 8, 4, 6], [0, 0, 0, 0, 0, 0]])  # an id 0 that is none of padding


@functools.partial(jax.jit, static_argnums=0)
def applied(model, params, ids):
  return model.apply({'params': params}, ids)


def start(name, context=6, **options):
  """A model with random parameters."""
  model = text.create_text(name, context, **TINY, **options)
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, context), jnp.int32))['params'])
  rng = np.random.default_rng(1)
  return model, jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), jnp.float32), shapes)


@pytest.mark.parametrize('pool, causal', [('eot', True), ('mean', False)])
def test_padding_changes_nothing(pool, causal):
  model, params = start('text_micro', pool=pool, causal=causal)
  whole, short = applied(model, params, IDS), applied(model, params, IDS[:, :4])
  np.testing.assert_allclose(whole.mean[0], short.mean[0], atol=1e-5)
  np.testing.assert_allclose(whole.patches[0, :4], short.patches[0], atol=1e-5)
  assert whole.valid.sum(axis=1).tolist() == [4, 6, 0] and np.isfinite(whole.mean).all()
  assert np.abs(whole.mean[1] - short.mean[1]).max() > 1e-2


@pytest.mark.parametrize('causal', [True, False])
def test_causality(causal):
  model, params = start('text_micro', causal=causal)
  other = IDS[1:2].copy()
  other[0, 3] = 11
  before, after = (np.asarray(applied(model, params, x).patches[0]) for x in (IDS[1:2], other))
  changed = np.abs(before - after).max(axis=1) > 1e-5
  assert changed.tolist() == ([False] * 3 + [True] * 3 if causal else [True] * 6)


def test_pools():
  model, params = start('text_micro')
  tokens = applied(model, params, IDS).patches
  vector = lambda pool: np.asarray(applied(model.clone(pool=pool), params, IDS).mean)
  np.testing.assert_allclose(vector('eot'), tokens[jnp.arange(3), jnp.array([3, 5, 0])], atol=1e-6)
  np.testing.assert_allclose(vector('last'), tokens[:, 5], atol=1e-6)
  np.testing.assert_allclose(vector('mean')[:2], [tokens[0, :4].mean(axis=0), tokens[1].mean(axis=0)], atol=1e-6)


def test_siglip_looks_at_padding():
  model, params = start('text_siglip_micro')
  assert not model.causal and model.pool == 'last'
  masked = applied(model.clone(mask_padding=True), params, IDS).mean
  plain = applied(model, params, IDS).mean
  np.testing.assert_allclose(plain[1], masked[1], atol=1e-5)
  assert np.abs(plain[0] - masked[0]).max() > 1e-2


def test_shapes_of_published_sizes():
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  for name, context, options, want in (
      # transformer.resblocks, ln_final, token_embedding, positional_embedding, text_projection of open_clip's ViT-B-32
      ('text_clip_base', 77, dict(vocab_size=49408), 12 * (12 * 512**2 + 13 * 512) + 2 * 512 + (49408 + 77) * 512 + 512**2),
      ('text_siglip_base', 64, dict(vocab_size=32000), 12 * (12 * 768**2 + 13 * 768) + 2 * 768 + (32000 + 64) * 768
       + 768**2 + 768)):
    model = text.create_text(name, context, **options)
    model = model.clone(out_dim=model.embed_dim, out_bias='siglip' in name)
    ids = jnp.zeros((2, context), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), ids)['params'])
    assert count(shapes) == want
    assert jax.eval_shape(model.apply, {'params': shapes}, ids).pool.shape == (2, model.embed_dim)


def test_keys_of_each_query():
  """A mask of queries is one of keys where all have the same, whole and some queries at a time, and segments are one."""
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(2, 9, 2, 4)), jnp.float32) for _ in range(3))
  keys, segments = jnp.asarray(rng.random((2, 9)) < 0.6), jnp.asarray(rng.integers(0, 3, (2, 9)), jnp.int32)
  same = (segments[:, :, None] == segments[:, None]) & (segments[:, None] != 0)
  for mask, each in ((keys, jnp.broadcast_to(keys[:, None], (2, 9, 9))), (segments, same)):
    value = lambda mask: jax.value_and_grad(
        lambda q, k, v: jnp.sin(kernels.attention(q, k, v, mask)).sum(), (0, 1, 2))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), value(mask), value(each))
  np.testing.assert_allclose(kernels.weights_of(q, k, keys), kernels.weights_of(q, k, jnp.broadcast_to(
      keys[:, None], (2, 9, 9))), atol=1e-6)
  few = kernels._attend_chunks(*(x.swapaxes(1, 2) for x in (q, k, v)), (same[:, None],))[0].swapaxes(1, 2)
  np.testing.assert_allclose(few, kernels.attention(q, k, v, segments), atol=1e-5)


def test_wrong_options():
  for options, words in ((dict(pool='first'), "unknown pool 'first'"), (dict(widht=3), 'unknown option of a model of texts'),
                         (dict(embed_dim=10, num_heads=4), 'num_heads 4 does not divide embed_dim 10')):
    with pytest.raises(UserError, match=words):
      text.create_text('text_micro', 8, **options)
  with pytest.raises(UserError, match="unknown model of texts 'text_mirco': did you mean 'text_micro'"):
    text.create_text('text_mirco', 8)
  model, params = start('text_micro')
  with pytest.raises(UserError, match='a text of 7 ids is longer than the 6'):
    model.apply({'params': params}, jnp.zeros((1, 7), jnp.int32))
