"""Swin transformers beside timm's class, both ways."""

import numpy as np
import pytest

from jaxmed import interop
from jaxmed.errors import UserError
from jaxmed.interop import conv, verify
from jaxmed.models import create_model

from .common import assert_same, features, image

OPTIONS = dict(depths=(1, 2, 1, 2), dims=(8, 16, 32, 64), num_heads=(1, 2, 4, 4), window_size=2)


def test_exported_files_in_timm(tmp_path):
  """By the lines of the card, strict: several windows, shifted, and at last one that covers the map."""
  import torch

  model = create_model('swin_micro', 32, 3, **OPTIONS)
  rng, params = np.random.default_rng(0), {}
  for path, shape in interop.state_dict.shapes_of(model).items():
    *folders, leaf = path.split('/')
    node = params
    for part in folders:
      node = node.setdefault(part, {})
    node[leaf] = (rng.normal(size=shape) * 0.2 + (leaf == 'scale')).astype(np.float32)
  file, x, scope = str(tmp_path / 'm.safetensors'), image((2, 32, 32, 3)), {}
  interop.export_file(file, 'timm', model, params, {})
  assert verify.verify_export(file, model, params, x) < 1e-5
  exec(verify.pytorch_snippet('timm', model, file), scope)
  got = features(model, params, x)
  with torch.no_grad():
    images = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    last, vector = scope['encoder'].forward_features(images).numpy(), scope['encoder'](images).numpy()
  assert_same(np.asarray(got.patches).reshape(last.shape), last)
  assert_same(np.asarray(got.mean), vector)
  back, again = conv.from_timm(conv.to_timm(model, params), image_size=(32, 32))
  assert back.num_heads == model.num_heads and back.window_size == 2
  np.testing.assert_array_equal(again['stage1']['blocks']['attn']['bias_table'], params['stage1']['blocks']['attn']['bias_table'])


def test_timms_weights_here(tmp_path):
  import safetensors.torch
  import timm

  net = timm.create_model('swin_tiny_patch4_window7_224', num_classes=3)
  safetensors.torch.save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / 'm.safetensors')
  model = interop.load_file(tmp_path / 'm.safetensors', 'timm')[0]
  assert model == create_model('swin_tiny', 224)


def test_models_that_timm_does_not_hold():
  with pytest.raises(UserError, match='windows of 4 do not divide'):
    conv.check_timm(create_model('swin_micro', 48))
  with pytest.raises(UserError, match='SwinUNETR'):
    conv.check_timm(create_model('swin_unetr_micro', 64))
