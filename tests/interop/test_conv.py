"""Files of convolutional and hierarchical encoders: what goes in comes back, and what a foreign file tells."""

import functools

import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxmed import interop
from jaxmed.errors import UserError
from jaxmed.interop import conv, safetensors_io, state_dict, verify, weight_formats
from jaxmed.models import create_model

INFO = {'feature': 'mean', 'method': 'simclr'}
TINY = dict(depths=(1, 1, 2, 1), dims=(8, 16, 32, 64))
MODELS = {
  'resnet': ('resnet_micro', TINY | dict(stem_width=8)),
  'bottleneck': ('resnet50', TINY | dict(stem_width=8)),
  'convnext': ('convnextv2_micro', TINY | dict(dtype='bfloat16')),
  'pointwise': ('convnextv2_atto', {}),
  'caformer': ('caformer_micro', TINY | dict(drop_path=0.1)),
  'pvt': ('pvt_v2_micro', TINY | dict(num_heads=(1, 2, 4, 4), mlp_ratios=(2, 2, 2, 2))),
}


@functools.cache
def build(case):
  name, options = MODELS[case]
  model = create_model(name, 32, 2, **options)
  rng = np.random.default_rng(0)
  flat = {k: (0.1 * rng.normal(size=s) + (k.endswith('var'))).astype(np.float32)
          for k, s in state_dict.shapes_of(model).items()}
  return model, flax.traverse_util.unflatten_dict(flat, sep='/')


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('fmt', ['timm', 'jaxmed'])
@pytest.mark.parametrize('case', MODELS)
def test_file_gives_back_model_and_params(case, fmt, tmp_path):
  model, params = build(case)
  path = tmp_path / 'm.safetensors'
  interop.export_file(path, fmt, model, params, INFO)
  have, have_params, info = interop.load_file(path)
  assert (have, info) == (model, INFO)
  same(have_params, params)
  tensors = safetensors_io.read_tensors(path)[0]
  assert weight_formats.guess_format(tensors) == fmt


@pytest.mark.parametrize('case', MODELS)
@pytest.mark.parametrize('prefix', ['', 'module.', 'teacher.backbone.'])
def test_the_model_follows_from_the_tensors(case, prefix):
  model, params = build(case)
  tensors = {prefix + k: v for k, v in conv.to_timm(model, params).items()} | {prefix + 'head.fc.weight': np.zeros((3, 64))}
  have, have_params = weight_formats.FORMATS['timm'].read(tensors, getattr(model, 'num_heads', None), (32, 32))
  unseen = {'drop_path': model.drop_path, 'dtype': model.dtype}
  assert conv.with_untold(model, have).clone(**unseen) == model
  same(have_params, params)


def test_layout_entry_by_entry():
  model, params = build('convnext')
  out = conv.to_timm(model, params)
  kernel = params['stage2']['blocks']['conv_dw']['kernel']
  assert out['stages.2.blocks.1.conv_dw.weight'].shape == (32, 1, 7, 7)
  assert out['stages.2.blocks.1.conv_dw.weight'][5, 0, 2, 3] == kernel[1, 2, 3, 0, 5]
  assert out['stages.1.downsample.1.weight'][9, 3, 0, 1] == params['down1_conv']['kernel'][0, 1, 3, 9]
  assert out['stages.0.blocks.0.mlp.fc1.weight'][7, 3] == params['stage0']['blocks']['fc1']['kernel'][0, 3, 7]
  model, params = build('caformer')
  out = conv.to_timm(model, params)
  qkv = params['stage2']['blocks']['mixer']['qkv']['kernel']
  assert out['stages.2.blocks.1.token_mixer.qkv.weight'][32 + 5, 3] == qkv[1, 3, 1, 0, 5]
  assert out['stages.0.blocks.0.token_mixer.pwconv1.weight'].shape == (16, 8, 1, 1)
  assert out['stages.2.blocks.0.mlp.act.scale'].shape == (1,)
  out = conv.to_timm(*build('pointwise'))
  assert out['stages.0.blocks.0.mlp.fc1.weight'].shape == (160, 40, 1, 1)
  out = conv.to_timm(*build('resnet'))
  assert out['bn1.running_var'].shape == (8,) and out['layer2.0.downsample.1.num_batches_tracked'].shape == ()


def test_verified_and_described(tmp_path):
  model, params = build('resnet')
  path = tmp_path / 'm.safetensors'
  interop.export_file(path, 'timm', model, params, INFO)
  x = np.random.default_rng(1).normal(size=(2, 32, 48, 2)).astype(np.float32)
  assert interop.verify_export(path, model, params, x) == 0
  card = interop.model_card('timm', model, INFO, file=path, difference=0.0)
  assert verify.pytorch_snippet('timm', model, 'm.safetensors') in card
  assert 'ResNet, 1-1-2-1 blocks of width 8-16-32-64, total stride 16, native size 32x32' in card
  assert 'returns the mean-pooled vector [B, 64]' in card


def test_import_makes_a_file_that_needs_no_argument(tmp_path):
  model, params = build('caformer')
  tensors = {k: np.ascontiguousarray(v) for k, v in conv.to_timm(model, params).items()}
  safetensors.numpy.save_file(tensors, tmp_path / 'foreign.safetensors')
  with pytest.raises(UserError, match='--format timm'):
    interop.load_file(tmp_path / 'foreign.safetensors')
  interop.import_file(tmp_path / 'foreign.safetensors', 'timm', tmp_path / 'own.safetensors', channels=['a', 'b'])
  have, have_params, info = interop.load_file(tmp_path / 'own.safetensors')
  assert have == model.clone(image_size=(112, 112), drop_path=0.0) and info['feature'] == 'mean'
  same(have_params, params)


def without(key):
  return lambda tensors: {k: v for k, v in tensors.items() if k != key}


@pytest.mark.parametrize(
  'case,change,words',
  [
    ('convnext', without('stages.1.blocks.0.mlp.grn.weight'), "'stages.1.blocks.0.mlp.grn.weight' is missing"),
    ('convnext', lambda t: t | {'stages.1.blocks.0.gamma': np.ones(16)}, "'stages.1.blocks.0.gamma'.*plain ConvNeXt"),
    ('resnet', without('bn1.running_mean'), "'bn1.running_mean' is missing"),
    ('resnet', lambda t: t | {'layer1.0.se.fc1.weight': np.ones(4)}, 'plain ResNet'),
    ('pvt', lambda t: t | {'stages.3.norm.bias': np.ones(3)}, r'has shape \[3\], expected \[64\]'),
  ],
)
def test_what_is_another_model(case, change, words):
  model, params = build(case)
  with pytest.raises(UserError, match=words):
    conv.from_timm(change(conv.to_timm(model, params)), getattr(model, 'num_heads', None))


def test_what_timm_cannot_hold(tmp_path):
  volume = create_model('resnet_micro', (16, 16, 16), 1, **TINY)
  with pytest.raises(UserError, match='2D models.*--format jaxmed'):
    conv.check_timm(volume)
  with pytest.raises(UserError, match='four stages'):
    conv.check_timm(create_model('resnet_micro', 32, 1, depths=(1, 1), dims=(8, 16)))
  with pytest.raises(UserError, match='only where dims change'):
    conv.check_timm(create_model('caformer_micro', 32, 1, dims=(32, 32, 64, 96)))
  model, params = build('resnet')
  with pytest.raises(UserError, match='mask_token'):
    interop.export_file(tmp_path / 'm', 'timm', model.clone(mask_token=True), params | {'mask_token': np.zeros((1, 8))}, {})


def test_a_header_that_begins_like_a_pickle(tmp_path):
  path = tmp_path / 'm.safetensors'
  tensor = {'a': np.ones(3, np.float32)}
  for length in range(400):
    safetensors.numpy.save_file(tensor, path, {'note': 'x' * length})
    if path.read_bytes()[:1] == b'\x80':
      break
  assert path.read_bytes()[:1] == b'\x80'
  np.testing.assert_array_equal(safetensors_io.read_tensors(path)[0]['a'], tensor['a'])
