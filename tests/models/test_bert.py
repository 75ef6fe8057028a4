"""BERT: the whole network in float64 NumPy, padding, poolings, dropout, its sizes by name."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax

from jaxmed.errors import UserError
from jaxmed.models.layers.adapters import Adapter
from jaxmed.models.text import registry as text
from jaxmed.models.text.pooling import POOLS, Pool

TINY = dict(vocab_size=11, embed_dim=8, depth=3, num_heads=2)
IDS = np.array([[5, 0, 9, 3, 0, 0], [7, 1, 2, 8, 4, 6], [0, 0, 0, 0, 0, 0]])
TYPES = np.array([[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0] * 6])
COUNT = np.array([4, 6, 0])


@functools.partial(jax.jit, static_argnums=0)
def applied(model, params, ids, types=None):
  return model.apply({'params': params}, ids, **({} if types is None else {'types': types}))


def start(**options):
  """A model with random parameters."""
  model = text.create_text('bert_base', 6, **TINY | options)
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 6), jnp.int32))['params'])
  rng = np.random.default_rng(1)
  draw = lambda path, x: jnp.asarray((path[-1].key == 'scale') + 0.5 * rng.normal(size=x.shape), jnp.float32)
  return model, jax.tree_util.tree_map_with_path(draw, shapes)


def reference(params, ids, types, layers):
  """Tokens [B, L, D] as of the paper, a sample, a block and a head at a time; those of padding mean nothing."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  norm = lambda x, n: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * n['scale'] + n['bias']
  linear = lambda x, d: np.tensordot(x, d['kernel'], 1) + d['bias']
  out = []
  for row, kinds in zip(ids, types, strict=True):
    count = np.flatnonzero(row)[-1] + 1 if row.any() else 0
    x = norm(p['token_embed'][row] + p['pos_embed'] + p['type_embed'][kinds], p['embed_norm'])
    kept = []
    for i in range(3):
      b = jax.tree.map(lambda a, i=i: a[i], p['transformer']['blocks'])
      qkv, heads = linear(x, b['attn']['qkv']), []
      for h in range(2):
        q, k, v = (qkv[:, j, h] for j in range(3))
        seen = slice(count or None)
        heads.append(softmax(q @ k[seen].T / 2, axis=-1) @ v[seen])  # heads of 4
      x = norm(x + linear(np.concatenate(heads, axis=-1), b['attn']['proj']), b['norm1'])
      hidden = linear(x, b['mlp']['fc1'])
      x = norm(x + linear(hidden * (1 + erf(hidden / 2**0.5)) / 2, b['mlp']['fc2']), b['norm2'])
      kept.append(x)
    out.append(sum(kept[-layers:]))
  return np.stack(out)


@pytest.mark.parametrize('layers', [1, 2])
def test_the_whole_network(layers):
  model, params = start(layers=layers)
  found, want = applied(model, params, IDS, TYPES), reference(params, IDS, TYPES, layers)
  for i, count in enumerate(COUNT):
    np.testing.assert_allclose(found.patches[i, :count], want[i, :count], atol=3e-5)
  np.testing.assert_allclose(found.mean[:2], want[:2, 0], atol=3e-5)  # 'cls'
  assert found.valid.sum(axis=1).tolist() == COUNT.tolist() and np.isfinite(found.mean).all()
  plain = applied(model, params, IDS)
  assert np.abs(plain.patches[1] - found.patches[1]).max() > 1e-2  # types count
  np.testing.assert_allclose(plain.patches, applied(model, params, IDS, np.zeros_like(TYPES)).patches, atol=1e-6)


def test_padding_changes_nothing():
  model, params = start()
  whole, short = applied(model, params, IDS[:1]), applied(model, params, IDS[:1, :4])
  np.testing.assert_allclose(whole.patches[0, :4], short.patches[0], atol=1e-5)
  np.testing.assert_allclose(whole.mean, short.mean, atol=1e-5)


@pytest.mark.parametrize('kind', POOLS)
def test_pools(kind):
  rng = np.random.default_rng(0)
  x, query = rng.normal(size=(3, 6, 8)), rng.normal(size=8)
  params = {'query': jnp.asarray(query, jnp.float32)} if kind == 'attention' else {}
  found = Pool(kind).apply({'params': params}, jnp.asarray(x, jnp.float32), jnp.asarray(COUNT))
  for row, count, got in zip(x, COUNT, found, strict=True):
    weights = softmax(row[:count] @ query / 8**0.5) if count else np.zeros(0)
    want = {'eot': row[max(count - 1, 0)], 'last': row[-1], 'cls': row[0],
            'mean': row[:count].sum(axis=0) / max(count, 1), 'attention': weights @ row[:count],
            'max': row[:count].max(axis=0, initial=-np.inf) if count else np.zeros(8)}[kind]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_dropout_is_of_training():
  model, params = start(dropout=0.5)
  run = jax.jit(lambda key: model.apply({'params': params}, IDS, train=True, rngs={'dropout': jax.random.key(key)}).mean)
  one, other, plain = run(0), run(1), applied(model, params, IDS).mean
  assert np.abs(one - other).max() > 1e-2 and np.abs(one - plain).max() > 1e-2
  np.testing.assert_array_equal(one, run(0))


@pytest.mark.parametrize('name', ['bert_micro', 'text_micro'])
def test_low_rank_adapters_begin_at_nothing(name):
  model = text.create_text(name, 6, **TINY)
  adapted = model.clone(adapter=Adapter('lora', 2, 4.0, ('q', 'v', 'fc1')))
  own = nn.unbox(jax.jit(adapted.init)(jax.random.key(0), jnp.asarray(IDS))['params'])
  plain = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(IDS))['params'])
  strip = lambda tree: {k: strip(v) if isinstance(v, dict) else v for k, v in tree.items() if not k.startswith('adapter')}
  assert jax.tree.structure(strip(own)) == jax.tree.structure(plain)
  found = applied(adapted, own, IDS).mean
  np.testing.assert_allclose(found, applied(model, strip(own), IDS).mean, atol=1e-6)
  up = own['transformer']['blocks']['attn']['adapter_q']['up']
  up['kernel'] = up['kernel'] + 5
  assert np.abs(applied(adapted, own, IDS).mean[1] - found[1]).max() > 1e-4


def test_sizes_by_name():
  """The numbers of parameters of the published files, without BertModel's pooler (a dense layer of the width)."""
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  for name, want in (('bert_base', 109_482_240 - 768 * 769), ('bert_base_cased', 108_310_272 - 768 * 769),
                     ('minilm_l6', 22_713_216 - 384 * 385)):
    model = text.create_text(name, 512)
    ids = jnp.zeros((2, 512), jnp.int32)
    assert count(nn.unbox(jax.eval_shape(model.init, jax.random.key(0), ids)['params'])) == want
  assert text.default_options('minilm_l6')['pool'] == 'mean'


def test_a_model_as_plain_data():
  for name, adapter in (('bert_micro', Adapter('lora', 2)), ('text_siglip_micro', None)):
    model = text.create_text(name, 9).clone(out_dim=5, adapter=adapter)
    assert text.rebuild(text.describe(model)) == model


def test_wrong_options():
  for options, words in ((dict(layers=4), 'layers 4 must lie in 1 to the depth 3'), (dict(dropout=1.0), 'dropout must be'),
                         (dict(pool='clss'), "unknown pool 'clss': did you mean 'cls'"),
                         (dict(causal=True), "unknown option of a model of texts 'causal'")):
    with pytest.raises(UserError, match=words):
      text.create_text('bert_base', 6, **TINY | options)
  model, params = start()
  with pytest.raises(UserError, match='a text of 7 ids is longer than the 6'):
    model.apply({'params': params}, jnp.zeros((1, 7), jnp.int32))
