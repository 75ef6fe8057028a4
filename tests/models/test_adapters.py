"""Adapters: nothing at first, something after a step of theirs, merged where they are linear, against NumPy."""

import dataclasses

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from scipy.special import erf

from jaxmed.config import CHOICES, SECTIONS
from jaxmed.errors import UserError
from jaxmed.interop.weight_formats import export_file, load_file
from jaxmed.models import registry
from jaxmed.models.encoders.vit import as_volume
from jaxmed.models.layers import adapters
from jaxmed.models.layers.adapters import Adapter
from tests.models.common import build, features, normal

ALL = {
    'lora': Adapter('lora', 3, 6.0, ('q', 'v', 'proj', 'fc1', 'fc2')), 'houlsby': Adapter('houlsby', 4),
    'adaptformer': Adapter('adaptformer', 4), 'vpt': Adapter('vpt', prompts=3, fan_in=48),
    'vpt_deep': Adapter('vpt_deep', prompts=3, fan_in=48), 'dvpt': Adapter('dvpt', 4, prompts=3, share=3),
    'depthwise': Adapter('depthwise', 4)}
MODELS = {'vit': ('vit_micro/4', (8, 12), 3), 'channel_vit': ('channel_vit_micro/4', (8, 12), 3),
          'volume': ('vit_micro/2x4x4', (4, 8, 8), 1)}


def of(path):
  return adapters.is_adapter(tuple(path.split('/')))


def adapted(model, params, adapter):
  """The model with adapters and its parameters, with all of the adapter's away from their first values."""
  model = model.clone(adapter=adapter)
  image = jax.ShapeDtypeStruct((1, *model.image_size, model.in_channels), jnp.float32)
  shapes = flat(nn.unbox(jax.eval_shape(model.init, jax.random.key(0), image)['params']))
  old, rng = flat(params), np.random.default_rng(3)
  assert set(shapes) - set(old) == {k for k in shapes if of(k)} and set(shapes) > set(old)
  return model, tree({k: jnp.asarray(0.2 * rng.normal(size=s.shape), jnp.float32) if of(k) else old[k]
                      for k, s in shapes.items()})


def first(model, params, seed=3):
  """The parameters with those of the adapter as they begin."""
  image = jnp.zeros((1, *model.image_size, model.in_channels))
  return tree(flat(nn.unbox(jax.jit(model.init)(jax.random.key(seed), image)['params'])) | flat(params))


def flat(params):
  return flax.traverse_util.flatten_dict(params, sep='/')


def tree(params):
  return flax.traverse_util.unflatten_dict(params, sep='/')


def images(model, seed=1, batch=2):
  return normal((batch, *model.image_size, model.in_channels), seed)


def both(f):
  return np.concatenate([np.ravel(f.cls), np.ravel(f.patches)])


def test_the_config_has_the_kinds_and_their_keys():
  assert CHOICES['adapter.name'] == ('', *adapters.KINDS) and tuple(adapters.ABOUT) == tuple(adapters.KINDS)
  assert CHOICES['adapter.targets'] == tuple(adapters.TARGETS)
  assert {key for keys in adapters.KINDS.values() for key in keys} | {'name', 'also'} == set(SECTIONS['adapter'])


@pytest.mark.parametrize('family, kind', [*(('vit', kind) for kind in ALL if kind != 'depthwise'),
                                          ('channel_vit', 'depthwise'), ('channel_vit', 'dvpt'), ('volume', 'depthwise')])
def test_features_begin_as_they_were_and_every_parameter_counts(family, kind):
  model, params = build(*MODELS[family])
  image = images(model)
  want = both(features(model, params, image))
  model, moved = adapted(model, params, ALL[kind])
  begun = both(features(model, first(model, params), image))
  np.testing.assert_allclose(begun, want, atol=0 if kind in ('lora', 'houlsby') else 2e-6)
  have = both(features(model, moved, image))
  assert np.abs(have - want).max() > 1e-3
  for name, value in flat(moved).items():
    if of(name):
      assert not np.array_equal(both(features(model, tree(flat(moved) | {name: value + 0.1}), image)), have), name


def both_(f):
  return jnp.concatenate([jnp.ravel(f.cls), jnp.ravel(f.patches)]) * jnp.linspace(-1, 1, f.cls.size + f.patches.size)


def test_merged_weights_have_the_features():
  model, params = build('vit_micro/4', (8, 8), mlp='swiglu')
  every = dataclasses.replace(ALL['lora'], targets=tuple(adapters.TARGETS))
  model, moved = adapted(model, params, every)
  begun = first(model, params)
  image = images(model)
  merged = adapters.merged(every, moved)
  plain = model.clone(adapter=None)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  np.testing.assert_allclose(both(features(plain, merged, image)), both(features(model, moved, image)), atol=2e-5)
  jax.tree.map(np.testing.assert_array_equal, adapters.merged(every, begun), params)
  # W + (alpha / rank) A B by hand, of one block's keys
  blocks = lambda tree: tree['transformer']['blocks']['attn']
  low = blocks(moved)['adapter_k']
  by_hand = np.float64(blocks(params)['qkv']['kernel'][1, :, 1]).reshape(48, -1) + 2.0 * (
      np.float64(low['down']['kernel'][1]) @ np.float64(low['up']['kernel'][1]).reshape(3, -1))
  np.testing.assert_allclose(np.asarray(blocks(merged)['qkv']['kernel'][1, :, 1]).reshape(48, -1), by_hand, atol=1e-6)
  with pytest.raises(ValueError, match='houlsby is not linear'):
    adapters.merged(ALL['houlsby'], moved)


def dense(p, x):
  return x @ np.float64(p['kernel']) + (np.float64(p['bias']) if 'bias' in p else 0)


def gelu(x):
  return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def run(module, *args):
  """A module's variables, all away from their first values, and what it gives of the arguments."""
  variables = nn.unbox(module.init(jax.random.key(0), *args))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: jnp.asarray(x + 0.5 * rng.normal(size=x.shape), jnp.float32), variables['params'])
  return params, np.asarray(module.apply({'params': params}, *args))


def test_modules_against_numpy():
  x = normal((2, 8, 6))
  p, got = run(adapters.LowRank(Adapter('lora', 3, 12.0), (2, 5), ('embed', None, None), jnp.float32), x)
  down, up = np.float64(p['down']['kernel']), np.float64(p['up']['kernel'])
  np.testing.assert_allclose(got, 4.0 * np.einsum('bnd,dr,rhf->bnhf', x, down, up), rtol=1e-5, atol=1e-5)
  for act, f in (('gelu', gelu), ('relu', lambda a: np.maximum(a, 0))):
    p, got = run(adapters.Bottleneck(Adapter('houlsby', 3), act, jnp.float32), x)
    np.testing.assert_allclose(got, dense(p['up'], f(dense(p['down'], np.float64(x)))), rtol=1e-4, atol=1e-5)
  valid = jnp.arange(8)[None] < jnp.array([[8], [7]])
  p, got = run(adapters.Depthwise(Adapter('depthwise', 3), jnp.float32), x, (2, 2, 2), valid)
  hidden = np.maximum(dense(p['down'], np.float64(x)), 0) * np.asarray(valid)[..., None]
  maps = hidden.reshape(2, 2, 2, 2, 3)
  conv = np.stack([[ndimage.correlate(maps[b, ..., c], np.float64(p['kernel'])[..., 0, c], mode='constant')
                    for c in range(3)] for b in range(2)])
  conv = np.moveaxis(conv, 1, -1) + np.float64(p['bias'])
  np.testing.assert_allclose(got, dense(p['up'], np.maximum(conv, 0).reshape(2, 8, 3)), rtol=1e-4, atol=1e-5)


def test_dynamic_prompts_against_numpy():
  rng = np.random.default_rng(0)
  p = {'down': rng.normal(size=(6, 4)), 'down_bias': rng.normal(size=4), 'up': rng.normal(size=(4, 6)),
       'up_bias': rng.normal(size=6), 'gate': np.array([0.7])}
  x, valid = rng.normal(size=(2, 3 + 5, 6)), np.ones((2, 8), bool)
  valid[1, -2:] = False
  z = x @ p['down'] + p['down_bias']
  z = z / (1 + np.exp(-1.702 * z))
  want = z.copy()
  for b in range(2):
    keys = z[b, 3:][valid[b, 3:]]
    logits = z[b, :3] @ keys.T / 2.0
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    want[b, :3] += weights @ keys
  want = 0.7 * (want @ p['up'] + p['up_bias'])
  as_jax = {k: jnp.asarray(v, jnp.float32) for k, v in p.items()}
  got = adapters.dynamic_prompts(as_jax, jnp.asarray(x, jnp.float32), 3, jnp.asarray(valid))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_prompts_without_a_gate_are_tokens_of_the_first_block():
  """One block whose attention sees prompts as it sees tokens: that of the plain network with registers in their place."""
  model, params = build('vit_micro/4', (8, 8), depth=1, pos='none')
  with_registers, _ = build('vit_micro/4', (8, 8), depth=1, pos='none', num_registers=3)
  for kind in ('vpt', 'vpt_deep'):
    prompted, moved = adapted(model, params, dataclasses.replace(ALL[kind], gate=False))
    inner = moved['transformer'] if kind == 'vpt' else jax.tree.map(lambda x: x[0], moved['transformer']['blocks'])
    want = features(with_registers, params | {'register_tokens': inner['adapter_prompts']}, images(model))
    np.testing.assert_allclose(both(features(prompted, moved, images(model))), both(want), atol=2e-5)


def test_each_block_of_deep_prompts_has_its_own():
  model, params = build('vit_micro/4', (8, 8))
  prompted, moved = adapted(model, params, dataclasses.replace(ALL['vpt_deep'], gate=False))
  blocks = moved['transformer']['blocks']
  assert blocks['adapter_prompts'].shape == (2, 3, 48)
  bound = np.sqrt(6 / (48 + 48))  # KMnP/vpt: of 3 channels of 4x4 pixels
  drawn = np.asarray(first(prompted, params)['transformer']['blocks']['adapter_prompts'])
  assert 0.9 * bound < np.abs(drawn).max() <= bound and np.abs(drawn[0] - drawn[1]).max() > 0.01
  swapped = {'blocks': blocks | {'adapter_prompts': blocks['adapter_prompts'][::-1]}}
  other = features(prompted, moved | {'transformer': swapped}, images(model))
  assert np.abs(both(other) - both(features(prompted, moved, images(model)))).max() > 1e-3


def test_blocks_share_what_dvpt_shares():
  model, params = build('vit_micro/4', (8, 8), depth=5)
  model, moved = adapted(model, params, ALL['dvpt'])
  inner = moved['transformer']
  assert inner['adapter_down'].shape == (2, 48, 4) and inner['adapter_gate'].shape == (2, 1)
  alone = model.clone(adapter=dataclasses.replace(ALL['dvpt'], share=1))
  rows = np.array([0, 0, 0, 1, 1])
  spread = {k: v[rows] if k.startswith('adapter_') and k != 'adapter_prompts' else v for k, v in inner.items()}
  image, total = images(model), lambda m: lambda p: both_(m.apply({'params': p}, image)).sum()
  a = jax.jit(jax.value_and_grad(total(model)))(moved)
  b = jax.jit(jax.value_and_grad(total(alone)))(moved | {'transformer': spread})
  np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
  slopes = lambda out: out[1]['transformer']['adapter_up']
  np.testing.assert_allclose(slopes(a), np.stack([slopes(b)[:3].sum(axis=0), slopes(b)[3:].sum(axis=0)]), rtol=1e-3,
                             atol=1e-4)


@pytest.mark.parametrize('kind', ['vpt_deep', 'dvpt', 'depthwise'])
def test_crops_in_one_pass_are_as_alone(kind):
  model, params = build('vit_micro/4', (8, 8))
  model, moved = adapted(model, params, ALL[kind])
  large, small = normal((4, 8, 8, 3), 1), normal((2, 8, 4, 3), 2)
  apply = jax.jit(lambda p, **kw: model.apply({'params': p}, **kw))
  passes = jax.jit(lambda p, a, b: model.apply({'params': p}, [{'image': a}, {'image': b}], 2, method='one_pass'))
  for got, image in zip(passes(moved, large, small), (large, small), strict=True):
    np.testing.assert_allclose(both(got), both(apply(moved, image=image)), atol=2e-5)


@pytest.mark.parametrize('kind', ['dvpt', 'depthwise'])
def test_missing_channels_change_nothing(kind):
  model, params = build('channel_vit_micro/4', (8, 8))
  model, moved = adapted(model, params, ALL[kind])
  image, mask = images(model), jnp.array([[True, False, True]] * 2)
  ids = jnp.array([[0, 2]] * 2)
  got = features(model, moved, image.at[..., 1].set(jnp.nan), None, mask)
  want = features(model, moved, image[..., jnp.array([0, 2])], ids)
  np.testing.assert_allclose(got.cls, want.cls, atol=2e-5)
  kept = np.asarray(got.patches).reshape(2, 3, 4, -1)[:, [0, 2]].reshape(2, 8, -1)
  np.testing.assert_allclose(kept, want.patches, atol=2e-5)


def test_levels_have_no_prompts():
  model, params = build('vit_micro/4', (8, 8))
  model, moved = adapted(model, params, ALL['dvpt'])
  found = features(model, moved, images(model))
  levels = jax.jit(lambda p, x: model.apply({'params': p}, x, levels=(1, 2)))(moved, images(model))
  np.testing.assert_allclose(levels.patches, found.patches, atol=2e-5)
  assert [level.map.shape for level in levels.levels] == [(2, 2, 2, 48)] * 2


def test_dropout_needs_its_stream():
  model, params = build('vit_micro/4', (8, 8))
  for kind in ('lora', 'vpt_deep'):
    model_, moved = adapted(model, params, dataclasses.replace(ALL[kind], dropout=0.5))
    apply = jax.jit(lambda p, x, key, m=model_: m.apply({'params': p}, x, train=True, rngs={'dropout': key}).cls)
    a, b = (apply(moved, images(model), jax.random.key(i)) for i in range(2))
    assert np.abs(a - b).max() > 1e-4
    np.testing.assert_array_equal(features(model_, moved, images(model)).cls, features(model_, moved, images(model)).cls)


def test_a_volume_of_equal_slices_has_the_features_of_its_slice():
  model, params = build('vit_micro/4', (8, 12), class_token=False)
  volume = registry.create_model('vit_micro/2x4x4', (6, 8, 12), 3, depth=2, embed_dim=48, num_heads=3, class_token=False)
  lifted = as_volume(model, params, volume)
  image = images(model)
  want = features(model, params, image)
  got = features(volume, lifted, jnp.repeat(image[:, None], 6, axis=1))
  np.testing.assert_allclose(np.asarray(got.patches).reshape(2, 3, 6, -1),
                             np.repeat(np.asarray(want.patches)[:, None], 3, axis=1), atol=2e-5)
  with pytest.raises(UserError, match='patches of 2x4x4, not of'):
    as_volume(model, params, registry.create_model('vit_micro/2x8x8', (6, 8, 16), 3))
  with pytest.raises(UserError, match='learned'):
    as_volume(model, params, registry.create_model('vit_micro/2x4x4', (6, 8, 12), 3, pos='rope', embed_dim=48, num_heads=2))


def test_files_hold_adapters_and_formats_of_pytorch_refuse_them(tmp_path):
  model, params = build('vit_micro/4', (8, 8))
  model, moved = adapted(model, params, ALL['dvpt'])
  export_file(tmp_path / 'a.safetensors', 'jaxmed', model, moved, {})
  again, read, _ = load_file(tmp_path / 'a.safetensors')
  assert again == model
  np.testing.assert_array_equal(both(features(again, read, images(model))), both(features(model, moved, images(model))))
  with pytest.raises(UserError, match='no place for adapters of dvpt'):
    export_file(tmp_path / 'b.safetensors', 'timm', model, moved, {})
  assert 'adapter' not in registry.describe(model.clone(adapter=None))
