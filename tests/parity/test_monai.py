"""Swin UNETR, UNETR and ViT beside MONAI's classes, in evaluation mode, through the state dicts of `interop.monai`."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch

from jaxmed import interop
from jaxmed.interop import monai, monai_networks, verify
from jaxmed.models import create_model
from jaxmed.models.decoders.dense import maps_of

from .common import assert_same, features, image

pytest.importorskip('monai', reason="monai not installed: pip install 'jaxmed[parity]'")


def legacy():
  """The merging of releases before 1.5, stated again: two of the eight corners twice, two never."""
  import torch
  from monai.networks.nets.swin_unetr import PatchMergingV2

  class Legacy(PatchMergingV2):
    def forward(self, x):
      corners = ('000', '100', '010', '001', '101', '010', '001', '111')
      parts = [x[:, int(d)::2, int(h)::2, int(w)::2] for d, h, w in corners]
      return self.reduction(self.norm(torch.cat(parts, -1)))

  return Legacy


MERGINGS = {'corrected': lambda: 'merging', 'v2': lambda: 'mergingv2', 'legacy': legacy}
TINY = dict(dims=(12, 24, 48, 96), bias_slice='monai', pad_mask=False)


def shaken(net, share=0.05):
  """The network with all weights away from where they start, in evaluation mode."""
  import torch

  torch.manual_seed(0)
  with torch.no_grad():
    for p in net.parameters():
      p.add_(share * torch.randn_like(p))
  return net.eval()


def swinunetr(merging, **options):
  import torch
  from monai.networks.nets.swin_unetr import SwinUNETR

  torch.manual_seed(1)
  return shaken(SwinUNETR(in_channels=2, out_channels=3, feature_size=12, downsample=MERGINGS[merging](), **options))


def state_of(net):
  return {k: v.numpy() for k, v in net.state_dict().items()}


def in_torch(call, x):
  import torch

  with torch.no_grad():
    return call(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))


def last(x):
  return np.moveaxis(x.numpy(), 1, -1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(encoder, decoder, params, x):
  """Maps of the levels, and the logits."""
  features = encoder.apply({'params': params['encoder']}, x, levels=decoder.levels(encoder))
  maps = maps_of(encoder, features)
  return maps, decoder.apply({'params': params['decoder']}, x, maps)[0], features.patches


# At least four places are left at the bottleneck: an instance norm of two is a sign, where rounding decides.
CASES = [('corrected', (64, 32, 32), {}), ('legacy', (32, 64, 64), dict(use_v2=True, patch_norm=True)),
         ('v2', (32, 96, 64), dict(depths=(1, 2, 3, 2)))]


@pytest.mark.parametrize('merging, size, options', CASES, ids=[c[0] for c in CASES])
def test_swin_unetr_is_monais(merging, size, options):
  """Maps, logits and the state dict back; windows that cover a map, that divide it, and that stick out of it."""
  net = swinunetr(merging, **options)
  network = monai_networks.from_monai(state_of(net), size, merging)
  x = image((1, *size, 2))
  maps, logits, patches = run(network.encoder, network.decoder, network.params, x)
  for have, want in zip(maps, in_torch(net.swinViT, x), strict=True):
    assert_same(np.asarray(have), last(want))
  assert_same(np.asarray(logits), last(in_torch(net, x)))
  np.testing.assert_array_equal(patches.reshape(maps[-1].shape), maps[-1])
  back, want = monai_networks.to_monai(network), state_of(net)
  assert back.keys() == want.keys()
  for key in back:
    np.testing.assert_array_equal(back[key], want[key])


@functools.partial(jax.jit, static_argnums=0)
def levels(model, params, x):
  return [level.map for level in model.apply({'params': params}, x, levels=(0, 1, 2, 3, 4)).levels]


@pytest.mark.parametrize('side', [32, 64, 96])
def test_maps_of_cubes(side):
  net = swinunetr('corrected', depths=(2, 1, 1, 1))
  encoder, params = monai.from_swinunetr(state_of(net), None, (side,) * 3)
  x = image((1, side, side, side, 2))
  for have, want in zip(levels(encoder, params, x), in_torch(net.swinViT, x), strict=True):
    assert np.abs(np.asarray(have) - last(want)).max() < 1e-4


def test_images_are_monais():
  net = swinunetr('corrected', spatial_dims=2, depths=(1, 2, 1, 1))
  network = monai_networks.from_monai(state_of(net), (96, 64))
  x = image((2, 96, 64, 2))
  assert_same(np.asarray(run(network.encoder, network.decoder, network.params, x)[1]), last(in_torch(net, x)))


def test_what_the_defaults_change():
  """The intended windows differ from MONAI's where maps are padded or smaller than a window, and only there."""
  net = swinunetr('corrected', window_size=4, depths=(2, 1, 1, 1))
  encoder, params = monai.from_swinunetr(state_of(net), None, (32, 32, 32))
  intended = encoder.clone(bias_slice='exact', pad_mask=True)
  x = image((1, 32, 32, 32, 2))  # maps of 16, 8 and 4, which windows of 4 divide
  plain, moved = levels(encoder, params, x), levels(intended, params, x)
  for a, b in zip(plain[:4], moved[:4], strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  assert np.abs(plain[4] - moved[4]).max() > 1e-3  # the last stage is of 2: another bias


@pytest.mark.parametrize('size', [(32, 32, 32), (32, 48)], ids=['volume', 'image'])
def test_unetr_is_monais(size):
  import torch
  from monai.networks.nets.unetr import UNETR

  torch.manual_seed(2)
  net = shaken(UNETR(2, 3, size, feature_size=4, hidden_size=24, mlp_dim=48, num_heads=3, spatial_dims=len(size)))
  network = monai_networks.from_monai(state_of(net), size, num_heads=3)
  assert network.decoder.levels(network.encoder) == (4, 7, 10, 12)
  x = image((2, *size, 2))
  _, logits, patches = run(network.encoder, network.decoder, network.params, x)
  assert_same(np.asarray(logits), last(in_torch(net, x)))
  assert_same(np.asarray(patches), in_torch(net.vit, x)[0].numpy())
  back, want = monai_networks.to_monai(network), state_of(net)
  assert back.keys() == want.keys()
  for key in back:
    np.testing.assert_array_equal(back[key], want[key]) if 'cross' not in key else None


EXPORTS = {
    'swin': ('monai_swinunetr', 'swin_unetr_micro', (32, 64, 32), TINY | dict(depths=(1, 2, 1, 1))),
    'swin mergingv2': ('monai_swinunetr_mergingv2', 'swin_unetr_micro', (64, 32), TINY | dict(
        depths=(1, 1, 1, 1), merging='v2', use_v2=True, patch_norm=True, qkv_bias=False)),
    'vit': ('monai_vit', 'vit_micro/8', (16, 32, 16), dict(depth=2, embed_dim=24, num_heads=3, norm_epsilon=1e-5)),
    'vit of patches alone': ('monai_vit', 'vit_micro/8x4', (16, 16), dict(
        depth=2, embed_dim=24, num_heads=3, class_token=False, pos='sincos', norm_epsilon=1e-5)),
}


@pytest.mark.parametrize('case', EXPORTS)
def test_exported_files_in_monai(case, tmp_path):
  """By the lines of the card, strict; and the file gives the model back."""
  fmt, name, size, options = EXPORTS[case]
  model = create_model(name, size, 2, **options)
  shapes = interop.state_dict.shapes_of(model)
  rng = np.random.default_rng(0)
  params = {}
  for path, shape in shapes.items():
    value = rng.normal(size=shape) * (0.1 if path.endswith('kernel') else 0.3) + path.endswith('scale')
    node = params
    for part in path.split('/')[:-1]:
      node = node.setdefault(part, {})
    node[path.rsplit('/', 1)[-1]] = jnp.asarray(value, jnp.float32)
  file, x, scope = str(tmp_path / 'm.safetensors'), image((1, *size, 2)), {}
  interop.export_file(file, fmt, model, params, {})
  assert verify.verify_export(file, model, params, x) < 1e-5
  exec(verify.pytorch_snippet(fmt, model, file), scope)
  got = features(model, params, x)
  out = in_torch(scope['encoder'], x)
  want = out[0].numpy() if fmt == 'monai_vit' else last(out[-1])
  assert_same(np.asarray(got.cls if model.class_token else got.patches).reshape(want.shape), want)


def voco_head(kept):
  """As models/voco_head.py of Luffy03/Large-Scale-Medical is saved: encoder beside two projectors and its other blocks."""
  one = kept['patch_embed.proj.bias']
  beside = ('student.layer1.0.weight', 'teacher.layer1.0.weight', 'backbone.encoder1.layer.conv1.conv.weight')
  return {f'backbone.swinViT.{k}': v for k, v in kept.items()} | {name: one.clone() for name in beside}


def pretraining(kept):
  """As SwinUNETR/Pretrain of Project-MONAI/research-contributions: another wrapper, `fc1`, heads beside the encoder."""
  renamed = {f'module.{k.replace("linear", "fc")}': v for k, v in kept.items()}
  return renamed | {f'module.{k}': kept['patch_embed.proj.bias'].clone() for k in ('norm.weight', 'rotation_head.bias')}


@pytest.mark.parametrize('layout, v2', [(pretraining, False), (voco_head, True)])
def test_public_names_are_understood(tmp_path, layout, v2):
  """Names of pretraining; `jaxmed import` takes the file, and maps are those of MONAI's class."""
  net = swinunetr('legacy', depths=(1, 1, 1, 1), use_v2=v2)
  kept = {k: v.contiguous() for k, v in net.swinViT.state_dict().items() if 'relative_position_index' not in k}
  safetensors.torch.save_file(layout(kept), tmp_path / 'ssl.safetensors')
  out = tmp_path / 'ours.safetensors'
  model = interop.import_file(tmp_path / 'ssl.safetensors', 'monai_swinunetr_legacy', out, image_size=(32, 32, 32))
  assert (model.merging, model.bias_slice, model.pad_mask, model.in_channels, model.use_v2) == (
      'legacy', 'monai', False, 2, v2)
  again, params, info = interop.load_file(out)
  assert again == model and json.dumps(info)
  x = image((1, 32, 32, 32, 2))
  have = np.asarray(levels(again, params, x)[4])
  assert np.abs(have - last(in_torch(net.swinViT, x)[4])).max() < 1e-4
  assert list(monai.swin_names({'swin_vit.layers1.0.0.blocks.0.mlp.fc1.bias': 0})) == [
      'swinViT.layers1.0.blocks.0.mlp.linear1.bias']
