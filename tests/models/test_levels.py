"""Intermediate maps: blocks applied one by one, stages at their strides, and programs that keep none unless asked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.encoder import Encoder
from jaxmed.errors import UserError
from jaxmed.models.layers.transformer import Block
from tests.models import common, test_conv

KEY = jax.random.key(3)
TRANSFORMERS = {
    'vit': ('vit_micro/4', dict(num_registers=2, layer_scale=0.3, pos='rope')),
    'vit remat': ('vit_micro/4', dict(remat='full', class_token=False)),
    'channel_vit': ('channel_vit_micro/4', dict(mlp='swiglu', packing=0.6)),
    'channel_vit remat': ('channel_vit_micro/4', dict(remat='dots_no_batch', pos='sincos')),
    'bag': ('bag_micro/4', dict(num_registers=1)),
}
MASK = np.array([[True, True, True], [True, False, True]])


@functools.partial(jax.jit, static_argnums=0, static_argnames=('levels', 'train'))
def apply(model, params, image, mask=None, levels=(), train=False, **rngs):
  return model.apply({'params': params}, image, None, mask, train=train, levels=levels, rngs=rngs)


@functools.partial(jax.jit, static_argnums=0)
def begun(model, params, image, mask):
  compute = lambda m: m._with_prefix(m.embed_patches(image, None, mask), False)
  return model.apply({'params': params}, method=compute)


@functools.partial(jax.jit, static_argnums=0)
def through(block, params, x, valid, angles):
  return block.apply({'params': params}, x, None, (valid,), (angles,), capture_intermediates=lambda m, _: m.name == 'mlp')


@functools.partial(jax.jit, static_argnums=0)
def normed(model, params, x):
  return model.apply({'params': params}, x, method=lambda m, x: m.norm(x))


def by_hand(model, params, image, mask):
  """The output of each block [B, N, D] without prefix tokens, and of its MLP."""
  x, valid, angles = begun(model, params, image, mask)
  block = Block(model.num_heads, model.mlp_ratio, model.qkv_bias, model.mlp, model.layer_scale)
  patches = lambda a: np.asarray(a)[:, model.num_prefix_tokens:].reshape(len(image), -1, model.embed_dim)
  outs = []
  for i in range(model.depth):
    own = jax.tree.map(lambda a, i=i: a[i], params['transformer']['blocks'])
    (x, _), state = through(block, own, x, valid, angles)
    outs.append((patches(x), patches(state['intermediates']['mlp']['__call__'][0])))
  return outs


@pytest.mark.parametrize('case', TRANSFORMERS)
def test_a_level_is_the_output_of_its_block(case):
  name, options = TRANSFORMERS[case]
  model, params = common.build(name, (8, 12), 3, depth=3, **options)
  image = common.normal((2, 8, 12, 3))
  got = apply(model, params, image, MASK, levels=(3, 1))
  want = by_hand(model, params, image, jnp.asarray(MASK))
  there = np.ones(got.patches.shape[:2], bool) if got.valid is None else np.asarray(got.valid)
  for level, i in zip(got.levels, (3, 1), strict=True):
    for have, hand in zip((level.patches, level.ffn), want[i - 1], strict=True):
      np.testing.assert_allclose(np.asarray(have)[there], hand[there], atol=2e-5)
    assert level.grid == got.grid == ((3, 2, 3) if model.per_channel else (2, 3))
    np.testing.assert_array_equal(np.asarray(level.map).reshape(level.patches.shape), level.patches)
  plain = apply(model.clone(packing=0.0), params, image, MASK)
  assert plain.levels == ()
  np.testing.assert_allclose(np.asarray(got.patches)[there], np.asarray(plain.patches)[there], atol=2e-5)
  last = normed(model, params, got.levels[0].patches)
  np.testing.assert_allclose(np.asarray(last)[there], np.asarray(got.patches)[there], atol=2e-5)


def test_levels_of_some_tokens_alone():
  """Tokens that are left out are not in a level; a bag's are those of its channels."""
  index = jnp.asarray([[5, 0, 2], [1, 4, 3]])
  for name in ('vit_micro/4', 'bag_micro/4'):
    model, params = common.build(name, 8, 3)
    image = common.normal((2, 8, 8, 3))
    some = lambda m, image=image, index=index % 4: m.encode(m.embed_patches(image).take(index), levels=(2,))
    got = jax.jit(lambda p, model=model, some=some: model.apply({'params': p}, method=some))(params)
    assert got.levels[0].patches.shape == got.patches.shape == (2, 3, 48)
    norm = normed(model, params, got.levels[0].patches)
    np.testing.assert_allclose(norm, got.patches, atol=2e-5)


def test_levels_of_training_are_those_of_its_features_and_have_gradients():
  """Stochastic depth draws what it draws without; a loss on a level trains its block and those before it."""
  model, params = common.build('vit_micro/4', 8, 3, depth=3, drop_path=0.5, remat='full')
  image = common.normal((6, 8, 8, 3))
  a = apply(model, params, image, train=True, dropout=KEY)
  b = apply(model, params, image, levels=(3,), train=True, dropout=KEY)
  np.testing.assert_allclose(a.patches, b.patches, atol=1e-5)
  loss = lambda p: jnp.square(apply(model, p, image, levels=(2,), train=True, dropout=KEY).levels[0].patches).sum()
  slopes = jax.grad(loss)(params)['transformer']['blocks']['mlp']['fc2']['bias']
  assert np.abs(slopes[:2]).max(axis=1).min() > 0 and not np.abs(slopes[2]).any()


def test_the_default_program_keeps_no_level():
  model, params = common.build('vit_micro/4', 8, 3, depth=3)
  image = common.normal((2, 8, 8, 3))
  stacked = lambda levels: [v.aval.shape for eqn in jax.make_jaxpr(
      lambda p: model.apply({'params': p}, image, levels=levels))(params).eqns if eqn.primitive.name == 'scan'
      for v in eqn.outvars]
  assert stacked(()) == [(2, 5, 48)]
  assert sorted(stacked((1,))) == [(2, 5, 48), (3, 2, 5, 48), (3, 2, 5, 48)]


STAGES = {'resnet_micro': 'layer{}_0', 'convnextv2_micro': 'stage{}', 'caformer_micro': 'stage{}', 'pvt_v2_micro': 'norm{}',
          'swin_micro': 'stage{}', 'resenc_micro': 'stage{}_0'}


@pytest.mark.parametrize('name', STAGES)
def test_a_level_is_the_output_of_its_stage_at_its_own_stride(name):
  model, params = test_conv.build(name, depths=(1, 1, 1))
  image, hidden = common.normal((2, 32, 48, 3)), np.arange(48).reshape(2, 24) % 3 == 0
  levels = (3, 0, 1, 2)
  captured = functools.partial(model.apply, levels=levels, capture_intermediates=lambda m, _: len(m.path) == 1)
  got, state = jax.jit(captured)({'params': params}, image, hidden=jnp.asarray(hidden))
  stem = (32, 48) if name == 'resenc_micro' else (16, 24)
  assert [level.grid for level in got.levels] == [(4, 6), stem, (16, 24), (8, 12)]
  seen = {k: v['__call__'][0] for k, v in state['intermediates'].items() if k != '__call__'}
  places = hidden.reshape(2, 4, 6)
  for i, level in zip(levels, got.levels, strict=True):
    counted = name in ('resnet_micro', 'resenc_micro')  # from 1
    first = jax.nn.relu(seen['bn1']) if 'bn1' in seen else seen['stem' if counted else 'stem_norm']
    want = np.asarray(first if i == 0 else seen[STAGES[name].format(i if counted else i - 1)])
    where = np.kron(places, np.ones([n // p for n, p in zip(level.grid, (4, 6), strict=True)], bool)).astype(bool)
    assert not np.asarray(level.map)[where].any() and level.ffn is None
    np.testing.assert_allclose(np.asarray(level.map)[~where], want[~where], atol=1e-5)
  assert jax.eval_shape(lambda: model.apply({'params': params}, image)).levels == ()


def test_no_such_level():
  for name, last, build in (('vit_micro/4', 'ViT has no level 3: expected 1 to 2', common.build),
                            ('bag_micro/4', 'BagOfChannels has no level 0', common.build)):
    model, params = build(name, 8, 3)
    with pytest.raises(UserError, match=last):
      model.apply({'params': params}, common.normal((1, 8, 8, 3)), levels=(int(last.split('level ')[1][0]),))
  model, params = test_conv.build('pvt_v2_micro')
  with pytest.raises(UserError, match='PVT has no level 4: expected 0 to 3'):
    model.apply({'params': params}, common.normal((1, 32, 32, 3)), levels=(4,))


def product(model, params):
  channels = tuple({'name': n, 'mean': 1.0, 'std': 2.0} for n in 'abc')
  return Encoder(model, params, channels, info={'mixed': True})


@pytest.mark.parametrize('name', ['channel_vit_micro/4', 'bag_micro/4', 'pvt_v2_micro'])
def test_levels_of_an_encoder(name):
  """Images in batches of stored intensities; a bag that puts vectors side by side has them too."""
  options = {'pooling': 'concat'} if name == 'bag_micro/4' else {}
  model, params = test_conv.build(name) if name == 'pvt_v2_micro' else common.build(name, 32, 3, **options)
  encoder, images = product(model, params), np.asarray(common.normal((5, 32, 32, 3)))
  got = encoder.embed(images, batch_size=2, levels=(2, 1))
  want = apply(model, params, jnp.asarray((images - 1) / 2), levels=(2, 1))
  assert list(got['levels']) == [1, 2]
  for i, level in zip((2, 1), want.levels, strict=True):
    np.testing.assert_allclose(got['levels'][i], level.map, atol=1e-5)
  without = encoder.embed(images, batch_size=2)
  assert set(got) - set(without) == {'levels'}
  for key in without:
    np.testing.assert_allclose(without[key], got[key], atol=1e-5)


def test_levels_of_a_source(trained, corpus):
  import jaxmed
  from jaxmed.data.corpus.open import open_source
  encoder, source = jaxmed.load(trained), open_source(corpus).select(split='val')
  got = encoder.embed_source(source, batch_size=5, levels=(1, 2))
  assert got['levels'][1].shape == (16, 3, 2, 2, 32) and set(got) == {'cls', 'mean', 'levels'}
  norm = lambda x: encoder.model.apply({'params': encoder.params}, x, method=lambda m, x: m.norm(x))
  np.testing.assert_allclose(norm(got['levels'][2]).reshape(16, -1, 32).mean(axis=1), got['mean'], atol=1e-5)
