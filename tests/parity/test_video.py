"""ResNets of videos in torchvision's classes and back."""

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed import interop
from jaxmed.interop import torchvision, verify
from jaxmed.interop.state_dict import shapes_of
from jaxmed.models import create_model

from . import common
from .common import assert_same, image


def build(name, channels):
  model = create_model(name, (8, 16, 16), channels)
  rng, flat = np.random.default_rng(0), {}
  for path, shape in shapes_of(model).items():
    noise, leaf = rng.normal(size=shape), path.split('/')[-1]
    flat[path] = noise / np.prod(shape[:-1]) ** 0.5 if leaf == 'kernel' else (
        1 + 0.2 * np.abs(noise) if leaf == 'var' else (leaf == 'scale') + 0.2 * noise)
  flat = {k: jnp.asarray(v, jnp.float32) for k, v in flat.items()}
  return model, flax.traverse_util.unflatten_dict(flat, sep='/')


@pytest.mark.parametrize('name, channels', [('r3d_18', 1), ('mc3_18', 3), ('r2plus1d_18', 3)])
def test_features_are_torchvisions(name, channels, tmp_path):
  import torch

  model, params = build(name, channels)
  file = tmp_path / 'm.safetensors'
  interop.export_file(file, 'torchvision', model, params, {})
  scope = {}
  exec(verify.pytorch_snippet('torchvision', model, str(file)), scope)
  x = image((1, 8, 16, 32, channels))
  with torch.no_grad():
    want = scope['encoder'](torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()
  assert_same(np.asarray(common.features(model, params, jnp.asarray(x)).mean), want)


@pytest.mark.parametrize('name', ['r3d_18', 'mc3_18', 'r2plus1d_18'])
def test_torchvisions_weights_here(name, tmp_path):
  import safetensors.torch
  import torch
  import torchvision as vision

  torch.manual_seed(0)
  encoder = getattr(vision.models.video, name)().eval()
  safetensors.torch.save_file(encoder.state_dict(), tmp_path / 'm.safetensors')
  model, params, _ = interop.load_file(tmp_path / 'm.safetensors', 'torchvision', image_size=(8, 16, 16))
  back = torchvision.to_torchvision(model, params)
  kept = {k: v.numpy() for k, v in encoder.state_dict().items() if not k.startswith('fc.')}
  assert back.keys() == kept.keys() and model == create_model(name, (8, 16, 16), 3)
  for key in back:
    if not key.endswith(torchvision.COUNT):
      np.testing.assert_array_equal(back[key], kept[key])
