"""Files that give back what went in, and layouts checked entry by entry against hand-written indexing."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxmed import interop
from jaxmed.interop import safetensors_io, state_dict, verify, weight_formats
from jaxmed.interop.channelvit import from_channelvit, to_channelvit
from jaxmed.interop.timm import from_timm, to_timm
from jaxmed.models import create_model

INFO = {
  'channels': [{'name': 'T1', 'mean': 103.5, 'std': 41.25}, {'name': 'grey', 'mean': 0.5, 'std': 0.25}],
  'normalize': 'corpus',
  'feature': 'mean',
  'method': 'mae',
}
MODELS = {
  ('timm', 'plain'): ('vit_micro/8', 16, dict()),
  ('timm', 'registers'): (
    'vit_micro/8',
    (16, 24),
    dict(num_registers=3, no_embed_class=True, layer_scale=0.3),
  ),
  ('timm', 'swiglu'): ('vit_micro/8', 16, dict(mlp='swiglu', mlp_ratio=8 / 3, qkv_bias=False)),
  ('timm', 'sincos'): ('vit_micro/4x8', (16, 32), dict(pos='sincos', class_token=False)),
  ('timm', 'none'): ('vit_micro/8', 16, dict(pos='none', dtype='bfloat16')),
  ('channelvit', 'plain'): ('channel_vit_micro/8', 24, dict()),
  ('channelvit', 'sincos'): ('channel_vit_micro/8', 24, dict(pos='sincos', remat='full', drop_path=0.1)),
  ('channelvit', 'bare class token'): ('channel_vit_micro/8', 24, dict(no_embed_class=True, qkv_bias=False)),
  ('jaxmed', 'volume'): ('vit_micro/4x8x8', (8, 16, 16), dict(pos='rope')),
  ('jaxmed', 'channels'): ('channel_vit_micro/8', (16, 24), dict(num_registers=2, mlp='swiglu')),
}


@functools.cache
def shapes_of(model):
  image = jax.ShapeDtypeStruct((1, *model.image_size, model.in_channels), jnp.float32)
  return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), image)['params'])


def build(name, size, options, channels=2, seed=0):
  model = create_model(name, size, channels, **({'depth': 2} | options))
  shapes = shapes_of(model)
  rng = np.random.default_rng(seed)
  return model, jax.tree.map(lambda s: (0.1 * rng.normal(size=s.shape)).astype(np.float32), shapes)


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('key', MODELS, ids='/'.join)
def test_file_gives_back_model_params_and_info(key, tmp_path):
  model, params = build(*MODELS[key])
  path = tmp_path / 'new folder' / 'm.safetensors'
  interop.export_file(path, key[0], model, params, INFO)
  again = interop.load_file(path)
  assert again[0] == model and again[2] == INFO
  same(again[1], params)
  first = path.read_bytes()
  interop.export_file(path, key[0], *again)
  assert path.read_bytes() == first
  assert [p.name for p in path.parent.iterdir()] == ['m.safetensors']  # nothing left beside it


@pytest.mark.parametrize('key', [k for k in MODELS if k[0] != 'jaxmed'], ids='/'.join)
def test_tensors_alone_give_back_an_equal_encoder(key):
  write, read = {'timm': (to_timm, from_timm), 'channelvit': (to_channelvit, from_channelvit)}[key[0]]
  model, params = build(*MODELS[key])
  tensors = write(model, params)
  size = model.image_size if len(set(model.image_size)) > 1 else None
  other, other_params = read(tensors, None, size)
  again = write(other, other_params)
  assert again.keys() == tensors.keys()
  for name in tensors:
    np.testing.assert_array_equal(again[name], tensors[name])
  for field in (
    'image_size',
    'patch_size',
    'in_channels',
    'embed_dim',
    'qkv_bias',
    'mlp',
    'class_token',
    'num_registers',
    'depth',
  ):
    assert getattr(other, field) == getattr(model, field), field
  assert int(128 * other.mlp_ratio) == int(128 * model.mlp_ratio)
  assert bool(other.layer_scale) == bool(model.layer_scale)
  assert other.num_heads == 2  # 128 // 64; (128, 6) alone is the registered 'micro' with 4


def test_timm_layout_entry_by_entry():
  model, params = build(
    'vit_micro/4x8', (8, 16), dict(mlp='swiglu', num_registers=2, layer_scale=1.0), channels=3
  )
  t = to_timm(model, params)
  blocks, hidden = params['transformer']['blocks'], 512
  assert t['patch_embed.proj.weight'].shape == (128, 3, 4, 8)
  for d, c, y, x in ((0, 0, 0, 0), (5, 2, 3, 1), (127, 1, 2, 7)):
    assert t['patch_embed.proj.weight'][d, c, y, x] == params['patch_embed']['kernel'][(y * 8 + x) * 3 + c, d]
  for part, head, e, d in ((0, 0, 0, 0), (1, 3, 5, 7), (2, 1, 31, 127)):
    row = part * 128 + head * 32 + e
    assert t['blocks.1.attn.qkv.weight'][row, d] == blocks['attn']['qkv']['kernel'][1, d, part, head, e]
    assert t['blocks.0.attn.qkv.bias'][row] == blocks['attn']['qkv']['bias'][0, part, head, e]
  for which, j, d in ((0, 3, 9), (1, 511, 2)):  # the gate first, then the value
    assert (
      t['blocks.1.mlp.fc1.weight'][which * hidden + j, d] == blocks['mlp']['fc1']['kernel'][1, d, which, j]
    )
  np.testing.assert_array_equal(t['blocks.0.attn.proj.weight'], blocks['attn']['proj']['kernel'][0].T)
  np.testing.assert_array_equal(t['blocks.1.ls2.gamma'], blocks['ls2'][1])
  np.testing.assert_array_equal(t['reg_token'][0], params['register_tokens'])
  assert t['pos_embed'].shape == (1, 3 + 2 * 2, 128) and t['cls_token'].shape == (1, 1, 128)


def test_channelvit_layout_entry_by_entry():
  model, params = build('channel_vit_micro/8', 24, {}, channels=5)
  t = to_channelvit(model, params)
  assert t['patch_embed.proj.weight'].shape == (128, 1, 1, 8, 8) and t['pos_embed'].shape == (1, 10, 128)
  assert t['patch_embed.proj.weight'][17, 0, 0, 2, 5] == params['patch_embed']['kernel'][2 * 8 + 5, 17]
  np.testing.assert_array_equal(t['patch_embed.channel_embed.weight'], params['channel_embed'])


def test_fixed_positions_are_written_out():
  """Row 1 + 4 y + x of MAE's table: sine and cosine of x, then of y."""
  model, params = build('vit_micro/8', (24, 32), dict(pos='sincos'))
  table = to_timm(model, params)['pos_embed'][0]
  omega = 10000.0 ** -(np.arange(32) / 32)
  y, x = 2, 3
  want = np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)])
  np.testing.assert_allclose(table[1 + 4 * y + x], want, atol=1e-6)
  assert not table[0].any()


@pytest.mark.parametrize(
  'prefix', ['module.', 'backbone.', 'model.', 'teacher.backbone.', 'module.student.backbone.']
)
def test_wrappers_are_stripped(prefix, caplog):
  model, params = build('vit_micro/8', 16, {})
  wrapped = {prefix + k: v for k, v in to_timm(model, params).items()}
  wrapped |= {f'{prefix}head.weight': np.ones((7, 128)), 'dino_loss.center': np.ones(3)}
  same(from_timm(wrapped, 4)[1], params)
  assert 'head.weight' in caplog.text and '1 tensors outside' in caplog.text


def test_of_student_and_teacher_the_teacher():
  model, params = build('vit_micro/8', 16, {})
  t = to_timm(model, params)
  both = {f'student.backbone.{k}': v + 1 for k, v in t.items()} | {
    f'teacher.backbone.{k}': v for k, v in t.items()
  }
  taken = from_timm(both, 4)[1]
  assert (taken['cls_token'] == params['cls_token']).all()
  same(taken, params)


def test_heads():
  assert [state_dict.infer_heads(d, n, None) for d, n in ((192, 12), (384, 12), (768, 12), (1024, 24))] == [
    3,
    6,
    12,
    16,
  ]
  assert [state_dict.infer_heads(d, n, None) for d, n in ((1280, 32), (1408, 40), (1536, 40))] == [16, 16, 24]
  assert state_dict.infer_heads(768, 6, None) == 12 and state_dict.infer_heads(768, 6, 8) == 8


def test_import_makes_a_file_that_needs_no_argument(tmp_path):
  model, params = build('vit_micro/8', (16, 32), {})
  foreign, ours = tmp_path / 'foreign.safetensors', tmp_path / 'ours.safetensors'
  safetensors.numpy.save_file(to_contiguous(to_timm(model, params)), foreign)
  interop.import_file(foreign, 'timm', ours, num_heads=4, image_size=(16, 32), channels=INFO['channels'])
  got, got_params, info = interop.load_file(ours)
  assert (got.num_heads, got.image_size) == (4, (16, 32))
  same(got_params, params)
  assert info == {'channels': INFO['channels'], 'normalize': 'corpus', 'feature': 'cls', 'method': 'imported'}
  interop.import_file(foreign, 'timm', ours, 4, (16, 32), ['red', 'green'])
  assert interop.load_file(ours)[2]['channels'][1] == {'name': 'green', 'mean': 0.0, 'std': 1.0}
  assert interop.load_file(ours)[2]['normalize'] == 'none'
  again = tmp_path / 'again.safetensors'
  interop.import_file(ours, None, again)  # a file of ours stays as it is
  assert again.read_bytes() == ours.read_bytes()


@pytest.mark.parametrize('names, positions', [
    (lambda t: t, 'antialias'), (lambda t: t | {'mask_token': np.zeros((1, 128))}, 'offset'),
    (lambda t: t | {'mask_token': np.zeros((1, 128)), 'decoder_norm.weight': np.ones(8)}, 'antialias'),
    (lambda t: {f'teacher.backbone.{k}': v for k, v in t.items()}, 'offset'),
], ids=['timm', 'DINOv2', 'MAE', 'DINO'])
def test_positions_are_resampled_as_by_the_code_that_trained(names, positions, tmp_path):
  tensors = to_timm(*build('vit_micro/8', (16, 16), {}))
  foreign, ours = tmp_path / 'foreign.safetensors', tmp_path / 'ours.safetensors'
  safetensors.numpy.save_file(to_contiguous(names(tensors)), foreign)
  for given, wanted in ((None, positions), ('offset', 'offset'), ('antialias', 'antialias')):
    interop.import_file(foreign, 'timm', ours, num_heads=4, positions=given)
    assert interop.load_file(ours)[0].pos_interpolation == wanted


def test_verify_tells_a_good_file_from_a_bad_one(tmp_path):
  path = tmp_path / 'm.safetensors'
  rng = np.random.default_rng(0)
  for key in (('timm', 'sincos'), ('channelvit', 'sincos'), ('jaxmed', 'volume')):
    model, params = build(*MODELS[key])
    image = jnp.asarray(rng.normal(size=(2, *model.image_size, 2)), jnp.float32)
    interop.export_file(path, key[0], model, params, {})
    assert verify.verify_export(path, model, params, image) <= 1e-5
    if key[0] == 'jaxmed':
      continue
    changed = jax.tree.map(np.copy, params)
    changed['transformer']['blocks']['mlp']['fc2']['bias'][1, 3] += 1.0
    assert verify.verify_export(path, model, changed, image) > 1e-2
    assert np.isnan(verify.verify_export(path, model, params, image.at[0, 0, 0].set(jnp.nan)))
  # a layout whose tensors were right but whose heads were not recorded would show as well
  model, params = build(*MODELS['timm', 'plain'])
  interop.export_file(path, 'timm', model.clone(num_heads=2), reshape_heads(params, 2), {})
  image = jnp.asarray(rng.normal(size=(2, 16, 16, 2)), jnp.float32)
  assert verify.verify_export(path, model, params, image) > 1e-4


def test_metadata_is_plain_json(tmp_path):
  path = tmp_path / 'm.safetensors'
  model, params = build(*MODELS['channelvit', 'plain'])
  interop.export_file(path, 'channelvit', model, params, INFO)
  _, metadata = safetensors_io.read_tensors(path)
  meta = json.loads(metadata['jaxmed'])
  assert meta['format'] == 'channelvit' and meta['info'] == INFO
  assert meta['model']['family'] == 'channel_vit' and meta['model']['image_size'] == [24, 24]


def test_model_card():
  model, _ = build(*MODELS['channelvit', 'plain'])
  card = interop.model_card(
    'channelvit',
    model,
    INFO,
    file='/somewhere/e.safetensors',
    config={'steps': 10, 'optim': {'lr': 1e-3}},
    data={'images': 1200, 'subjects': 40},
    difference=2.5e-6,
    metrics=[{'method': 'kNN', 'metric': 'accuracy', 'value': 0.912345678, 'low': 0.88, 'high': 0.94}],
  )
  assert '| kNN | accuracy | 0.912346 | 0.88 | 0.94 |' in card
  assert '| 0 | T1 | 103.5 | 41.25 |' in card and '2.5e-06' in card and '- subjects: 40' in card
  assert "load_file('e.safetensors')" in card and '/somewhere' not in card
  assert 'img_size=[24], patch_size=8, in_chans=2, embed_dim=128, depth=2, num_heads=4' in card
  assert '"lr": 0.001' in card


def test_formats_are_listed():
  assert sorted(weight_formats.FORMATS) == [
      'channelvit', 'jaxmed', 'monai_swinunetr', 'monai_swinunetr_legacy', 'monai_swinunetr_mergingv2', 'monai_vit', 'nnunet',
      'stunet', 'timm', 'torchvision']


def to_contiguous(tensors):
  return {k: np.ascontiguousarray(v) for k, v in tensors.items()}


def reshape_heads(params, heads):
  params = jax.tree.map(np.copy, params)
  qkv = params['transformer']['blocks']['attn']['qkv']
  qkv['kernel'] = qkv['kernel'].reshape(2, 128, 3, heads, -1)
  qkv['bias'] = qkv['bias'].reshape(2, 3, heads, -1)
  return params
