"""Exported convolutional and hierarchical encoders in timm's classes, made by the code that the card prints, and back."""

import functools

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed import interop
from jaxmed.interop import conv, verify
from jaxmed.interop.state_dict import shapes_of
from jaxmed.models import create_model

from . import common
from .common import assert_same, image

MODELS = {
  'resnet18': ('resnet18', 64, 3, {}),
  'resnet50': ('resnet50', 64, 1, dict(depths=(1, 2, 1, 1))),
  'resnet_micro': ('resnet_micro', 64, 5, {}),
  'resnext': ('resnext50_32x4d', 64, 3, dict(depths=(1, 2, 1, 1))),
  'resnet for small images': ('resnet18', 32, 3, dict(depths=(1, 1, 1, 1), stem_kernel=3, stem_stride=1, max_pool=False)),
  'convnextv2_atto': ('convnextv2_atto', 64, 3, {}),
  'convnextv2_tiny': ('convnextv2_tiny', 64, 5, {}),
  'convnextv2_micro': ('convnextv2_micro', 64, 1, {}),
  'caformer_s18': ('caformer_s18', 64, 3, {}),
  'caformer_micro': ('caformer_micro', 64, 5, {}),
  'pvt_v2_b0': ('pvt_v2_b0', 64, 1, {}),
  'pvt_v2_b5': ('pvt_v2_b5', 64, 3, dict(depths=(1, 1, 2, 1))),
  'pvt_v2_micro': ('pvt_v2_micro', 64, 5, {}),
}


@functools.cache
def build(name):
  """A model with every parameter random around its usual scale, variances positive."""
  model_name, size, channels, options = MODELS[name]
  model = create_model(model_name, size, channels, **options)
  rng, flat = np.random.default_rng(0), {}
  for path, shape in shapes_of(model).items():
    noise, leaf = rng.normal(size=shape), path.split('/')[-1]
    if leaf == 'kernel':
      inward = shape[1:] if '/blocks/' in path else shape
      linear = conv._module(path) in conv._LINEAR
      flat[path] = noise / np.prod(inward[:1] if linear else inward[:-1]) ** 0.5
    elif leaf == 'var':
      flat[path] = 1 + 0.2 * np.abs(noise)
    else:
      flat[path] = (leaf == 'scale' or leaf.startswith('res_scale')) + 0.2 * noise
  flat = {k: jnp.asarray(v, jnp.float32) for k, v in flat.items()}
  return model, flax.traverse_util.unflatten_dict(flat, sep='/')


def in_torch(model, params, folder):
  file = folder / 'm.safetensors'
  interop.export_file(file, 'timm', model, params, {})
  scope = {}
  exec(verify.pytorch_snippet('timm', model, str(file)), scope)
  return scope['encoder']


def torch_features(encoder, x):
  """The last map [B, h * w, D], normalised as ours, and timm's pre-logits [B, D]."""
  import torch

  with torch.no_grad():
    images = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    last = encoder.forward_features(images)
    vector = encoder.forward_head(last, pre_logits=True)
    torch.testing.assert_close(encoder(images), vector)
    norm = getattr(getattr(encoder, 'head', None), 'norm', lambda y: y)
    return norm(last).flatten(2).transpose(1, 2).numpy(), vector.numpy()


@pytest.mark.parametrize('name', ['resnet18', 'resnet_micro', 'convnextv2_micro', 'caformer_micro', 'pvt_v2_micro'])
def test_levels_are_timms(name, tmp_path):
  """Outputs of the stages; timm counts a ResNet's stem, before the max-pool, as its first."""
  import torch

  model, params = build(name)
  encoder = in_torch(model, params, tmp_path)
  x = image((2, 64, 96, model.in_channels))
  levels = (0, 1, 2, 3, 4) if 'resnet' in name else (1, 2, 3, 4)
  got = model.apply({'params': params}, jnp.asarray(x), levels=levels).levels
  with torch.no_grad():
    images = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    want = encoder.forward_intermediates(images, indices=len(levels), norm=False, intermediates_only=True)
  for level, theirs in zip(got, want, strict=True):
    assert_same(np.asarray(level.map), np.moveaxis(theirs.numpy(), 1, -1))


@pytest.mark.parametrize('name', MODELS)
def test_features_are_timms(name, tmp_path):
  model, params = build(name)
  encoder = in_torch(model, params, tmp_path)
  for size in (model.image_size, (model.image_size[0] + model.patch_size[0], model.image_size[1])):
    x = image((2, *size, model.in_channels))
    have, (patches, vector) = common.features(model, params, jnp.asarray(x)), torch_features(encoder, x)
    assert_same(np.asarray(have.patches), patches)
    assert_same(np.asarray(have.mean), vector)


IMPORTS = {
  'resnet18': 'resnet.', 'resnet50': '', 'convnextv2_nano': 'module.', 'convnextv2_tiny': '', 'caformer_s18': '',
  'pvt_v2_b1': 'teacher.backbone.',
}


@pytest.mark.parametrize('name', IMPORTS)
def test_timms_weights_here(name, tmp_path):
  import safetensors.torch
  import timm
  import torch

  torch.manual_seed(0)
  encoder = timm.create_model(name, in_chans=4, num_classes=5).eval()
  with torch.no_grad():
    for p in encoder.parameters():
      p.add_(0.02 * torch.randn_like(p))
    for key, buffer in encoder.named_buffers():
      if 'running' in key:
        buffer.add_(0.1 * torch.rand_like(buffer))
  state = {IMPORTS[name] + k: v.contiguous() for k, v in encoder.state_dict().items()}
  safetensors.torch.save_file(state, tmp_path / 'm.safetensors')
  model, params, _ = interop.load_file(tmp_path / 'm.safetensors', 'timm', image_size=(64, 64))
  x = image((2, 64, 64, 4))
  with torch.no_grad():
    last = encoder.forward_features(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))
    want = encoder.forward_head(last, pre_logits=True).numpy()
  have = np.asarray(common.features(model, params, jnp.asarray(x)).mean)
  assert np.abs(have - want).max() <= 1e-4 * max(np.abs(want).max(), 1)
  back = conv.to_timm(model, params)
  kept = {k: v.numpy() for k, v in encoder.state_dict().items() if not k.startswith(('fc.', 'head.fc', 'head.weight', 'head.bias'))}
  assert back.keys() == kept.keys()
  for key in back:
    if not key.endswith(conv.COUNT):
      np.testing.assert_array_equal(back[key], kept[key])
