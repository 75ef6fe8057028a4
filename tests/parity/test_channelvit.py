"""Exported ChannelViTs in the official class (stated again in channelvit_torch): channel subsets, sizes."""

import functools
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed import interop
from jaxmed.interop import verify
from jaxmed.interop.channelvit import to_channelvit
from jaxmed.models import create_model

from . import common
from .common import assert_same, image, tokens

MODELS = {
  'tiny/8, 5 channels': ('channel_vit_tiny/8', 32, 5, dict(depth=4)),
  'small/16, 3 channels': ('channel_vit_small/16', 96, 3, dict(depth=3)),
  '1 channel': ('channel_vit_tiny/8', 32, 1, dict(depth=3)),
  'fixed positions': ('channel_vit_tiny/8', 40, 4, dict(depth=3, pos='sincos')),
  'no positions, no qkv bias': ('channel_vit_tiny/8', 40, 4, dict(depth=3, pos='none', qkv_bias=False)),
  'no class position': ('channel_vit_tiny/8', 40, 4, dict(depth=2, no_embed_class=True, mlp_ratio=3.0)),
}


@functools.cache
def build(name):
  model_name, size, channels, options = MODELS[name]
  return common.build(model_name, size, channels, **options)


def in_torch(model, params, folder, monkeypatch):
  """The encoder that the printed code makes of the exported file, our statement of the class in its place."""
  from . import channelvit_torch

  official = 'channelvit.backbone.hcs_channel_vit'
  for name in ('channelvit', 'channelvit.backbone', official):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  sys.modules[official].ChannelVisionTransformer = channelvit_torch.ChannelVisionTransformer
  file = folder / 'm.safetensors'
  interop.export_file(file, 'channelvit', model, params, {})
  scope = {}
  exec(verify.pytorch_snippet('channelvit', model, str(file)), scope)
  return scope['encoder']


def torch_tokens(encoder, x, ids):
  import torch

  with torch.no_grad():
    images, ids = torch.from_numpy(np.moveaxis(x, -1, 1).copy()), torch.from_numpy(ids)
    out = encoder.tokens(images, ids).numpy()
    np.testing.assert_array_equal(encoder(images, {'channels': ids}).numpy(), out[:, 0])
  return out


@pytest.mark.parametrize('name', MODELS)
def test_features_are_the_official_ones(name, tmp_path, monkeypatch):
  model, params = build(name)
  encoder = in_torch(model, params, tmp_path, monkeypatch)
  native, patch, count = model.image_size[0], model.patch_size[0], model.in_channels
  subsets = [list(range(count)), list(range(count))[::-1], [count - 1], list(range(count))[1:3] or [0]]
  sizes = [
    (native, native),
    (native + patch, native + patch),
    (native - patch, native),
    (2 * native, native + patch),
  ]
  cases = [(sizes[0], subsets[0]), (sizes[0], subsets[2]), (sizes[2], subsets[3])]
  if name == 'tiny/8, 5 channels':
    cases = [(sizes[0], s) for s in subsets] + [(s, subsets[-1]) for s in sizes[1:]] + [(sizes[1], [0])]
  for size, subset in cases:
    ids = np.tile(np.asarray(subset, np.int64), (2, 1))
    x = image((2, *size, len(subset)))
    assert_same(tokens(model, params, x, jnp.asarray(ids, jnp.int32)), torch_tokens(encoder, x, ids))


def test_each_sample_its_own_channels(tmp_path, monkeypatch):
  model, params = build('tiny/8, 5 channels')
  encoder = in_torch(model, params, tmp_path, monkeypatch)
  ids = np.array([[0, 3], [4, 1], [2, 0]])
  x = image((3, 32, 32, 2))
  assert_same(tokens(model, params, x, jnp.asarray(ids, jnp.int32)), torch_tokens(encoder, x, ids))


def test_masked_channels_are_the_official_subset(tmp_path, monkeypatch):
  model, params = build('tiny/8, 5 channels')
  encoder = in_torch(model, params, tmp_path, monkeypatch)
  x = image((1, 32, 32, 5))
  for subset in ([1, 4], [3], [0, 2, 4]):
    mask = np.zeros((1, 5), bool)
    mask[:, subset] = True
    have = common.features(model, params, jnp.asarray(x), None, jnp.asarray(mask))
    want = torch_tokens(encoder, x[..., subset], np.asarray([subset]))
    assert_same(np.asarray(have.cls), want[:, 0])
    assert_same(np.asarray(have.patches.reshape(1, 5, -1, 192)[:, subset].reshape(1, -1, 192)), want[:, 1:])


def test_where_the_official_class_does_not_share_positions(tmp_path, monkeypatch):
  """Four channels at half the native size: the one known difference, stated in the model card."""
  model, params = build('tiny/8, 5 channels')
  encoder = in_torch(model, params, tmp_path, monkeypatch)
  ids, x = np.array([[0, 1, 2, 3]]), image((1, 16, 16, 4))
  assert np.abs(tokens(model, params, x, jnp.asarray(ids)) - torch_tokens(encoder, x, ids)).max() > 1e-2
  assert 'four channels at half the size' in verify.model_card('channelvit', model, {})


@pytest.mark.parametrize('prefix', ['', 'module.', 'teacher.backbone.'])
@pytest.mark.parametrize('hcs', [True, False])
def test_official_weights_here(prefix, hcs, tmp_path):
  import safetensors.torch
  import torch

  from .channelvit_torch import ChannelVisionTransformer

  torch.manual_seed(0)
  norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
  encoder = ChannelVisionTransformer([32], 8, 6, 192, 2, 3, qkv_bias=True, norm_layer=norm).eval()
  with torch.no_grad():
    for p in encoder.parameters():
      p.add_(0.05 * torch.randn_like(p))
  state = {prefix + k: v for k, v in encoder.state_dict().items()}
  if not hcs:
    embed = state.pop(f'{prefix}patch_embed.channel_embed.weight')
    state[f'{prefix}patch_embed.channel_embed'] = embed.T[None, :, :, None, None].contiguous()
  if prefix == 'teacher.backbone.':
    state |= {k.replace('teacher', 'student'): v + 1 for k, v in state.items()}
  safetensors.torch.save_file(state, tmp_path / 'm.safetensors')
  model, params, _ = interop.load_file(tmp_path / 'm.safetensors', 'channelvit')
  assert model == create_model('channel_vit_tiny/8', 32, 6, depth=2)
  ids = np.array([[5, 0, 2]] * 2)
  for size in ((32, 32), (48, 24)):
    x = image((2, *size, 3))
    assert_same(tokens(model, params, x, jnp.asarray(ids, jnp.int32)), torch_tokens(encoder, x, ids))
  for key, value in to_channelvit(model, params).items():
    np.testing.assert_array_equal(value, encoder.state_dict()[key].numpy())


def test_the_lines_of_the_docs_give_our_features(tmp_path):
  """docs/guide/pytorch.md, run as it stands on an exported file: a subset, other sizes, one channel at the native size."""
  import pathlib

  import torch

  import jaxmed
  from jaxmed.encoder import Encoder
  model, params = build('tiny/8, 5 channels')
  names = [f'c{i}' for i in range(5)]
  channels = tuple({'name': n, 'mean': 100.0 + i, 'std': 40.0 + i} for i, n in enumerate(names))
  file = tmp_path / 'encoder.safetensors'
  interop.export_file(file, 'channelvit', model, params, {'channels': list(channels), 'normalize': 'corpus'})
  text = (pathlib.Path(__file__).parents[2] / 'docs' / 'guide' / 'pytorch.md').read_text()
  blocks = [part.split('```')[0] for part in text.split('```python\n')[1:]]
  lines = next(block for block in blocks if 'class ChannelViT' in block).replace("'encoder.safetensors'", repr(str(file)))
  assert sum(bool(line.strip()) for line in lines.splitlines()) <= 36 and 'jaxmed' not in lines.replace("['jaxmed']", '')
  scope = {}
  exec(lines, scope)
  ours = jaxmed.load(file)
  assert isinstance(ours, Encoder)
  rng = np.random.default_rng(0)
  for size, some in ((32, names), (32, ['c3']), (48, ['c4', 'c1']), (24, ['c2', 'c0', 'c1'])):
    images = rng.integers(0, 255, (2, size, size, len(some))).astype(np.uint8)
    with torch.no_grad():
      cls, patches = scope['encoder'](torch.from_numpy(np.moveaxis(images, -1, 1).astype(np.float32)), some)
    want = ours.embed(images, some)
    np.testing.assert_allclose(cls, want['cls'], atol=1e-4)
    np.testing.assert_allclose(patches, want['patches'].reshape(patches.shape), atol=1e-4)
