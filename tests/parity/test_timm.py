"""Exported ViTs in the real timm class, loaded by the code that the card prints; timm's weights here."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed import interop
from jaxmed.errors import UserError
from jaxmed.interop import verify
from jaxmed.interop.timm import from_timm, to_timm
from jaxmed.models.layers import positions

from . import common
from .common import assert_same, image, tokens

MODELS = {
  'tiny/8': ('vit_tiny/8', 32, 3, {}),
  'small/16': ('vit_small/16', 64, 3, dict(depth=4)),
  'base/16': ('vit_base/16', 64, 1, dict(depth=2)),
  'registers, LayerScale': ('vit_tiny/8', 32, 5, dict(depth=3, num_registers=4, layer_scale=0.1, norm_epsilon=1e-2)),
  'no_embed_class': ('vit_tiny/8', 32, 1, dict(depth=3, no_embed_class=True, num_registers=4)),
  'SwiGLU': ('vit_tiny/8', 32, 3, dict(depth=3, mlp='swiglu', mlp_ratio=8 / 3)),
  'no class token, no qkv bias': ('vit_tiny/8', 32, 3, dict(depth=3, class_token=False, qkv_bias=False)),
  'anisotropic': ('vit_tiny/4x8', (24, 48), 3, dict(depth=3)),
  'fixed positions': ('vit_tiny/8', 32, 3, dict(depth=3, pos='sincos')),
  'no positions': ('vit_tiny/8', 32, 3, dict(depth=3, pos='none')),
  '4 heads of 32, giant ratio': ('vit_micro/8', 32, 3, dict(depth=2, mlp_ratio=48 / 11)),
}


@functools.cache
def build(name):
  model_name, size, channels, options = MODELS[name]
  return common.build(model_name, size, channels, **options)


def in_torch(model, params, folder):
  """The encoder that the printed code makes of the exported file."""
  file = folder / 'm.safetensors'
  interop.export_file(file, 'timm', model, params, {})
  scope = {}
  exec(verify.pytorch_snippet('timm', model, str(file)), scope)
  return scope['encoder']


def torch_tokens(encoder, x):
  import torch

  with torch.no_grad():
    return encoder(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()


@pytest.mark.parametrize('name', MODELS)
def test_features_are_timms(name, tmp_path):
  model, params = build(name)
  encoder = in_torch(model, params, tmp_path)
  native, patch = model.image_size, model.patch_size
  sizes = [native, (native[0] + patch[0], native[1] - patch[1])]
  if name in ('tiny/8', 'registers, LayerScale'):
    sizes += [tuple(2 * n for n in native), (native[0] // 2, 3 * native[1])]
  for size in sizes:
    x = image((2, *size, model.in_channels))
    assert_same(tokens(model, params, x), torch_tokens(encoder, x))


@pytest.mark.parametrize('name', ['registers, LayerScale', 'no class token, no qkv bias'])
def test_levels_are_timms(name, tmp_path):
  """Outputs of single blocks on their grid, without the final norm."""
  import torch

  model, params = build(name)
  encoder = in_torch(model, params, tmp_path)
  x = image((2, 40, 24, model.in_channels))
  got = model.apply({'params': params}, jnp.asarray(x), levels=(1, 3)).levels
  with torch.no_grad():
    want = encoder.forward_intermediates(
        torch.from_numpy(np.moveaxis(x, -1, 1).copy()), indices=[0, 2], norm=False, intermediates_only=True)
  for level, theirs in zip(got, want, strict=True):
    assert level.grid == (5, 3)
    assert_same(np.asarray(level.map), np.moveaxis(theirs.numpy(), 1, -1))


def test_native_224(tmp_path):
  model, params = common.build('vit_tiny/16', 224, 3, depth=2)
  encoder = in_torch(model, params, tmp_path)
  for size in ((224, 224), (160, 288)):
    x = image((1, *size, 3))
    assert_same(tokens(model, params, x), torch_tokens(encoder, x))


IMPORTS = {
  'small/8': dict(embed_dim=384, num_heads=6, depth=2),
  'dinov2 with registers': dict(
    embed_dim=192, num_heads=3, depth=2, reg_tokens=4, no_embed_class=True, init_values=0.5
  ),
  'packed': dict(embed_dim=192, num_heads=3, depth=2, mlp='SwiGLUPacked', mlp_ratio=16 / 3),
  'split': dict(embed_dim=192, num_heads=3, depth=2, mlp='SwiGLU', mlp_ratio=8 / 3),
  'classifier': dict(embed_dim=192, num_heads=3, depth=2, num_classes=7, global_pool='token'),
}


@pytest.mark.parametrize('name', IMPORTS)
def test_timms_weights_here(name, tmp_path):
  import safetensors.torch
  import timm
  import torch

  options = dict(IMPORTS[name])
  mlp = options.pop('mlp', None)
  options |= {'mlp_layer': getattr(timm.layers, mlp), 'act_layer': 'silu'} if mlp else {}
  options = {'num_classes': 0, 'global_pool': ''} | options
  torch.manual_seed(0)
  encoder = timm.models.vision_transformer.VisionTransformer(
    img_size=32, patch_size=8, dynamic_img_size=True, **options
  ).eval()
  with torch.no_grad():
    for p in encoder.parameters():
      p.add_(0.05 * torch.randn_like(p))
  file = tmp_path / 'foreign.safetensors'
  safetensors.torch.save_file(encoder.state_dict(), file)
  model, params, info = interop.load_file(file, 'timm')
  assert (model.num_heads, model.image_size, info) == (options['num_heads'], (32, 32), {})
  for size in ((32, 32), (48, 24)):
    x = image((2, *size, 3))
    with torch.no_grad():
      want = encoder.forward_features(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()
    assert_same(tokens(model, params, x), want)
  back = to_timm(model, params)
  state = {k: v.numpy() for k, v in encoder.state_dict().items() if not k.startswith('head.')}
  if mlp != 'SwiGLU':
    assert back.keys() == state.keys()
  for key in back.keys() & state.keys():
    np.testing.assert_array_equal(back[key], state[key])


def test_average_pooled_weights_are_refused():
  import timm

  encoder = timm.models.vision_transformer.VisionTransformer(
    img_size=32, patch_size=8, embed_dim=192, depth=1, num_heads=3, num_classes=0, global_pool='avg'
  )
  with pytest.raises(UserError, match=r"tensor 'norm.weight' is missing"):
    from_timm({k: v.numpy() for k, v in encoder.state_dict().items()})


def test_bfloat16_and_half_files(tmp_path):
  import safetensors.torch

  model, params = build('tiny/8')
  state = to_timm(model, params)
  import torch

  mixed = {
    k: torch.from_numpy(v.copy()).to(torch.bfloat16 if i % 2 else torch.float16)
    for i, (k, v) in enumerate(state.items())
  }
  safetensors.torch.save_file(mixed, tmp_path / 'm.safetensors')
  have = to_timm(*interop.load_file(tmp_path / 'm.safetensors', 'timm')[:2])
  for key, value in mixed.items():
    np.testing.assert_array_equal(have[key], value.float().numpy())


@pytest.mark.parametrize(
  'old,new', [((4, 4), (7, 5)), ((14, 14), (6, 20)), ((8, 6), (3, 4)), ((2, 3), (9, 9))]
)
def test_resampled_positions_are_torchs(old, new):
  import torch
  import torch.nn.functional as F

  table = image((old[0] * old[1], 16))
  as_image = torch.from_numpy(table.reshape(1, *old, 16)).permute(0, 3, 1, 2)
  antialias = F.interpolate(as_image, size=new, mode='bicubic', antialias=True)
  scale = tuple((n + 0.1) / o for n, o in zip(new, old, strict=True))
  offset = F.interpolate(as_image, scale_factor=scale, mode='bicubic')
  for mode, want in (('antialias', antialias), ('offset', offset)):
    have = positions.resample(jnp.asarray(table), old, new, mode)
    np.testing.assert_allclose(have, want[0].flatten(1).T, atol=1e-5)
