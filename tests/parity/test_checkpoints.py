"""Files that torch.save writes, in both of its containers, read without torch: published layouts, and damaged ones."""

import argparse
import pickle

import numpy as np
import pytest

from jaxmed import interop
from jaxmed.errors import UserError
from jaxmed.interop import safetensors_io
from jaxmed.interop.channelvit import to_channelvit
from jaxmed.interop.pickle_io import read_pickle
from jaxmed.interop.timm import to_timm

from . import common
from .common import assert_same, image, tokens


def state_of(name, size, channels, **options):
  import torch

  model, params = common.build(name, size, channels, depth=2, **options)
  write = to_channelvit if model.per_channel else to_timm
  return model, params, {k: torch.from_numpy(np.array(v)) for k, v in write(model, params).items()}


def same(have, want):
  assert sorted(have) == sorted(want)
  for name, value in want.items():
    np.testing.assert_array_equal(have[name], value.float().numpy(), err_msg=name)


@pytest.mark.parametrize('zipped', [True, False])
def test_every_kind_of_tensor(zipped, tmp_path):
  import torch

  rng = torch.Generator().manual_seed(0)
  x = torch.randn(6, 8, generator=rng)
  state = {'plain': x, 'turned': x.T[1:5, ::2], 'half': x.half(), 'brain': x.bfloat16(), 'double': x.double(),
           'scalar': torch.tensor(2.5), 'parameter': torch.nn.Parameter(x[2:].clone()), 'none': torch.zeros(0, 3)}
  file = tmp_path / 'a.pth'
  torch.save(state | {'steps': torch.tensor(7), 'epoch': 3}, file, _use_new_zipfile_serialization=zipped)
  same(read_pickle(file), {k: v.detach() for k, v in state.items()})


@pytest.mark.parametrize('zipped', [True, False])
def test_a_whole_dino_checkpoint(zipped, tmp_path):
  """As main_dino.py saves it: student and teacher, optimizer, arguments; the teacher's backbone is what is read."""
  import torch

  model, params, state = state_of('vit_tiny/8', 32, 3)
  weight = torch.nn.Parameter(torch.randn(4, 4))
  optimizer = torch.optim.AdamW([weight])
  weight.sum().backward()
  optimizer.step()
  whole = {
      'student': {f'module.backbone.{k}': v + 1 for k, v in state.items()} | {'module.head.mlp.0.weight': weight},
      'teacher': {f'backbone.{k}': v for k, v in state.items()} | {'head.mlp.0.weight': weight.detach()},
      'optimizer': optimizer.state_dict(), 'epoch': 99, 'args': argparse.Namespace(arch='vit_tiny', lr=np.float64(0.1)),
      'dino_loss': {'center': torch.zeros(1, 8)}, 'fp16_scaler': None}
  torch.save(whole, tmp_path / 'checkpoint.pth', _use_new_zipfile_serialization=zipped)
  have, have_params, _ = interop.load_file(tmp_path / 'checkpoint.pth', 'timm')
  x = image((2, 32, 32, 3))
  np.testing.assert_array_equal(tokens(have, have_params, x), tokens(model, params, x))


def test_channelvit_of_a_lightning_run(tmp_path):
  """'state_dict' with a prefix, and the file goes on as one of ours."""
  import torch

  model, params, state = state_of('channel_vit_tiny/8', 32, 3)
  torch.save({'state_dict': {f'backbone.{k}': v for k, v in state.items()}, 'epoch': 1}, tmp_path / 'a.ckpt')
  interop.import_file(tmp_path / 'a.ckpt', 'channelvit', tmp_path / 'b.safetensors', channels=['R', 'G', 'B'])
  have, have_params, info = interop.load_file(tmp_path / 'b.safetensors')
  x = image((2, 32, 32, 3))
  np.testing.assert_array_equal(tokens(have, have_params, x), tokens(model, params, x))
  assert [c['name'] for c in info['channels']] == ['R', 'G', 'B']


def test_mae_with_its_decoder(tmp_path):
  import torch

  model, params, state = state_of('vit_tiny/8', 32, 3)
  more = {'mask_token': torch.zeros(1, 1, 192), 'decoder_embed.weight': torch.zeros(64, 192),
          'decoder_blocks.0.norm1.weight': torch.ones(64), 'decoder_pos_embed': torch.zeros(1, 17, 64)}
  torch.save({'model': state | more, 'epoch': 1}, tmp_path / 'mae.pth')
  have, have_params, _ = interop.load_file(tmp_path / 'mae.pth', 'timm')
  x = image((2, 32, 32, 3))
  np.testing.assert_array_equal(tokens(have, have_params, x), tokens(model, params, x))


def test_dinov2_with_registers_is_timms(tmp_path):
  """Its names (chunks of blocks, register_tokens, w12 and w3) and its rule of positions: the class token has one, the
  registers have none. timm's class holds the same model with no_embed_class and the sum in its class token."""
  import timm
  import torch

  torch.manual_seed(0)
  reference = timm.models.VisionTransformer(
      img_size=28, patch_size=14, embed_dim=48, depth=3, num_heads=3, reg_tokens=4, no_embed_class=True, num_classes=0,
      global_pool='', init_values=0.1, mlp_layer=timm.layers.SwiGLUPacked, mlp_ratio=8 / 3 * 2,
      act_layer=torch.nn.SiLU).eval()
  for p in reference.parameters():
    torch.nn.init.normal_(p, std=0.2)
  state = {k: v.detach().clone() for k, v in reference.state_dict().items()}
  first = torch.randn(1, 1, 48)
  official = {'register_tokens': state.pop('reg_token'), 'mask_token': torch.zeros(1, 48),
              'cls_token': state.pop('cls_token') - first,
              'pos_embed': torch.cat([first, state.pop('pos_embed')], dim=1)}
  for name, value in state.items():
    name = name.replace('mlp.fc1', 'mlp.w12').replace('mlp.fc2', 'mlp.w3')
    i = int(name.split('.')[1]) if name.startswith('blocks.') else 0
    official[name.replace('blocks.', f'blocks.{i // 2}.')] = value
  torch.save(official, tmp_path / 'dinov2.pth')
  model, params, _ = interop.load_file(tmp_path / 'dinov2.pth', 'timm', num_heads=3, image_size=(28, 28))
  x = image((2, 28, 28, 3))
  with torch.no_grad():
    want = reference(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
  assert_same(tokens(model, params, x), want)


@pytest.mark.parametrize('swiglu', [False, True])
def test_dinov3_is_timms(swiglu, tmp_path):
  """The official names, as timm's own filter of them has it: rotary positions, storage tokens, masked biases of keys."""
  import functools

  import timm
  import torch
  from timm.models import eva

  torch.manual_seed(0)
  reference = eva.Eva(
      img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=2, qkv_bias=True, init_values=0.1, rope_type='dinov3',
      rope_temperature=100, rope_rotate_half=True, use_rot_pos_emb=True, use_abs_pos_emb=False, num_reg_tokens=4,
      use_fc_norm=False, swiglu_mlp=swiglu, swiglu_align_to=8, norm_layer=functools.partial(timm.layers.LayerNorm, eps=1e-5),
      num_classes=0, global_pool='', dynamic_img_size=True).eval()
  official = {}
  for name, value in reference.state_dict().items():
    name = name.replace('reg_token', 'storage_tokens').replace('gamma_', 'ls').replace('.fc1_g.', '.w1.').replace(
        '.fc1_x.', '.w2.')
    name = name.replace('.fc2.', '.w3.') if swiglu else name
    official[name.replace('.ls1', '.ls1.gamma').replace('.ls2', '.ls2.gamma')] = torch.randn_like(value) * 0.2
  for i in range(3):
    parts = [official.pop(f'blocks.{i}.attn.{k}_bias', torch.ones(64)) for k in 'qkv']
    official[f'blocks.{i}.attn.qkv.bias'] = torch.cat(parts)
    official[f'blocks.{i}.attn.qkv.bias_mask'] = torch.tensor([1.0, 0, 1]).repeat_interleave(64)
  official |= {'mask_token': torch.zeros(1, 64), 'rope_embed.periods': (100 ** (torch.arange(8) / 8)).bfloat16()}
  torch.save(official, tmp_path / 'dinov3.pth')
  missing, unexpected = reference.load_state_dict(eva.checkpoint_filter_fn(dict(official), reference), strict=False)
  assert not unexpected and all('k_bias' in name for name in missing)
  model, params, _ = interop.load_file(tmp_path / 'dinov3.pth', 'timm')
  x = image((2, 32, 48, 3))
  with torch.no_grad():
    want = reference(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
  assert_same(tokens(model, params, x), want)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_pickle_that_runs_code_is_refused_by_name(zipped, tmp_path):
  import torch

  class Evil:
    def __reduce__(self):
      return exec, (f'open({str(tmp_path / "ran")!r}, "w")',)

  file = tmp_path / 'evil.pth'
  torch.save({'weight': torch.zeros(3), 'extra': Evil()}, file, _use_new_zipfile_serialization=zipped)
  with pytest.raises(UserError, match=r'evil.pth names (builtins|__builtin__)\.exec, .* could run code'):
    read_pickle(file)
  torch.save(torch.nn.Linear(2, 2), file, _use_new_zipfile_serialization=zipped)
  with pytest.raises(UserError, match=r'names torch.nn.modules.linear.Linear'):
    read_pickle(file)
  assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('zipped', [True, False])
def test_mutated_files_are_read_or_refused(zipped, tmp_path):
  """Cut, overwritten, or with bits turned: one line, or tensors of the shapes that they say."""
  import torch

  file = tmp_path / 'a.pth'
  torch.save({'a': torch.arange(12.0).reshape(3, 4), 'b': {'c': torch.ones(5)}}, file,
             _use_new_zipfile_serialization=zipped)
  whole = file.read_bytes()
  rng = np.random.default_rng(0)
  refused = 0
  for i in range(300):
    data = bytearray(whole[: int(rng.integers(1, len(whole)))] if i % 3 == 0 else whole)
    for at in rng.integers(0, len(data), int(rng.integers(1, 6))):
      data[at] = int(rng.integers(256))
    file.write_bytes(data)
    try:
      assert all(v.dtype == np.float32 for v in read_pickle(file).values())
    except UserError as e:
      assert '\n' not in str(e)
      refused += 1
  assert refused > 100


def test_a_tensor_outside_its_storage(tmp_path):
  import torch

  x = torch.zeros(4)
  file = tmp_path / 'a.pth'
  torch.save({'a': torch.as_strided(torch.zeros(100), (10, 10), (10, 1)), 'b': x}, file)
  assert read_pickle(file)['a'].shape == (10, 10)
  torch.save({'a': x.expand(1000, 4)}, file)  # a file of bytes that asks for more than it holds
  with pytest.raises(UserError, match="tensor 'a' of shape .* outside its storage"):
    read_pickle(file)


def test_not_a_checkpoint(tmp_path):
  file = tmp_path / 'a.pth'
  for content, words in ((pickle.dumps({'a': 1}), 'damaged|no PyTorch'), (b'PK\x03\x04rest', 'damaged'), (b'', 'damaged')):
    file.write_bytes(content)
    with pytest.raises(UserError, match=words):
      safetensors_io.read_tensors(file) if content else read_pickle(file)
