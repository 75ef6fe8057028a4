"""U-Nets of nnU-Net and STU-Net beside PyTorch: logits of every output, state dicts both ways, nnU-Net's own fine-tuning."""

import importlib.util

import jax
import numpy as np
import pytest

from jaxmed.interop import nnssl, nnunet, pickle_io, stunet
from jaxmed.interop.nnunet import Network
from jaxmed.models import create_model
from jaxmed.models.decoders.dense import create_decoder
from tests.models.test_unet import drawn, network, shapes

from .common import assert_same, image

KERNELS, STRIDES = ((1, 3, 3), (3, 3, 3), (3, 3, 3)), ((1, 1, 1), (1, 2, 2), (2, 2, 2))
SIZE, CLASSES = (4, 12, 16), 3
CASES = {
    'plain': ('nnunet_micro', dict(depths=(2, 2, 2), dims=(8, 12, 16)), 0),
    'resenc': ('resenc_micro', dict(depths=(1, 3, 2), dims=(8, 12, 12)), 8),
    'stunet': ('stunet_micro', dict(depths=(1, 2, 1), dims=(8, 12, 16)), 0)}
OFFICIAL = importlib.util.find_spec('dynamic_network_architectures') is not None


def build(case):
  """Our network with random weights, and an image."""
  name, options, stem = CASES[case]
  encoder = create_model(name, SIZE, 2, kernels=KERNELS, strides=STRIDES, stem_width=stem, **options)
  decoder = create_decoder('unet', encoder, CLASSES, True)
  x = image((2, *SIZE, 2))
  params = drawn(shapes(encoder, decoder, x)[0])
  return Network(encoder, params['encoder'], decoder, params['decoder']), x


def restated(case):
  from . import unet_torch

  _, options, stem = CASES[case]
  common = dict(channels=2, classes=CLASSES, dims=options['dims'], depths=options['depths'], kernels=KERNELS,
                strides=STRIDES)
  return unet_torch.STUNet(**common) if case == 'stunet' else unet_torch.NNUNet(
      **common, residual=case == 'resenc', stem=stem)


def outward(case, net):
  return stunet.to_stunet(net) if case == 'stunet' else nnunet.to_nnunet(net)


def inward(case, tensors, **options):
  return stunet.from_stunet(tensors, **options) if case == 'stunet' else nnunet.from_nnunet(tensors, **options)


def logits(module, x):
  import torch

  with torch.no_grad():
    outs = module.eval()(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))
  return [np.moveaxis(out.numpy(), 1, -1) for out in outs]


@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_pytorch(case):
  import torch

  net, x = build(case)
  module = restated(case)
  module.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in outward(case, net).items()})  # strict
  ours = network(net.encoder, net.decoder, {'encoder': net.params, 'decoder': net.decoder_params}, x)
  for have, want in zip(ours, logits(module, x), strict=True):
    assert_same(np.asarray(have), want)


@pytest.mark.parametrize('case', CASES)
def test_a_network_of_pytorch_here(case, tmp_path):
  """From a checkpoint of `torch.save`, the weights under a key beside other things."""
  import torch

  torch.manual_seed(0)
  module = restated(case)
  path = tmp_path / 'checkpoint.pth'
  torch.save({'network_weights': module.state_dict(), 'current_epoch': 3, 'trainer_name': 'x'}, path)
  net = inward(case, pickle_io.read_pickle(path), image_size=SIZE, strides=STRIDES)
  x = image((1, *SIZE, 2))
  ours = network(net.encoder, net.decoder, {'encoder': net.params, 'decoder': net.decoder_params}, x)
  for have, want in zip(ours, logits(module, x), strict=True):
    assert np.abs(np.asarray(have) - want).max() <= 1e-4
  state = module.state_dict()
  back = outward(case, net)
  assert back.keys() == state.keys()
  for name, value in back.items():
    np.testing.assert_array_equal(value, state[name].numpy())


@pytest.mark.parametrize('case', ['plain', 'resenc'])
def test_a_checkpoint_for_nnunets_fine_tuning(case, tmp_path):
  """torch.load(weights_only=True) reads it; its plan builds the class; encoder and stem load by its keys, strictly."""
  import torch

  net, _ = build(case)
  path = tmp_path / 'checkpoint.pth'
  nnssl.write_checkpoint(path, net.encoder, net.params, spacing=(1.0, 0.5, 0.5))
  loaded = torch.load(path, weights_only=True)
  plan, weights = loaded['nnssl_adaptation_plan'], loaded['network_weights']
  module = restated(case)
  inside = lambda key: {k[len(key) + 1:]: v for k, v in weights.items() if k.startswith(key)}
  for key in (plan['key_to_encoder'], plan['key_to_stem']):  # as nnU-Net's PretrainedTrainer
    module.get_submodule(key).load_state_dict(inside(key))
  assert all(f'{key}.weight' in weights for key in plan['keys_to_in_proj']) and plan['key_to_lpe'] is None
  (configuration,) = plan['pretrain_plan']['configurations'].values()
  assert configuration == {'spacing': [1.0, 0.5, 0.5], 'patch_size': list(SIZE)}
  assert (plan['pretrain_num_input_channels'], plan['recommended_downstream_patchsize']) == (2, list(SIZE))
  assert plan['architecture_plans']['arch_kwargs']['features_per_stage'] == list(net.encoder.dims)
  own = nnunet.to_nnunet(Network(net.encoder, net.params))
  assert own.keys() == weights.keys()
  jax.tree.map(np.testing.assert_array_equal, own, {k: v.numpy() for k, v in weights.items()})


@pytest.mark.skipif(not OFFICIAL, reason='dynamic-network-architectures is not installed (it asks for an older timm)')
@pytest.mark.parametrize('case', ['plain', 'resenc'])
def test_the_official_class(case):
  import pydoc

  import torch

  net, x = build(case)
  arguments = nnunet.arch_kwargs(net.encoder, net.decoder)
  arguments |= {k: arguments[k] and pydoc.locate(arguments[k]) for k in nnunet.IMPORTED}
  module = pydoc.locate(nnunet.class_of(net.encoder))(input_channels=2, num_classes=CLASSES, deep_supervision=True,
                                                      **arguments)
  module.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in nnunet.to_nnunet(net).items()})
  ours = network(net.encoder, net.decoder, {'encoder': net.params, 'decoder': net.decoder_params}, x)
  for have, want in zip(ours, logits(module, x), strict=True):
    assert_same(np.asarray(have), want)
