"""ResNets of videos <-> torchvision's VideoResNet (torchvision 0.29, models/video/resnet.py), by tensor names."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmed.errors import UserError
from jaxmed.interop import nnunet, state_dict
from jaxmed.interop.conv import COUNT
from jaxmed.interop.state_dict import Params, StateDict
from jaxmed.models.encoders.video import VideoResNet

ANCHOR = 'layer1.0.conv1.0.weight'  # R3D, MC3
APART = 'layer1.0.conv1.0.0.weight'  # R(2+1)D
NAMES = {'all': 'r3d_18', 'first': 'mc3_18', 'separate': 'r2plus1d_18'}


def to_torchvision(model: VideoResNet, params: Params) -> dict[str, np.ndarray]:
  """The state dict of the class with the same features, without classifier.

  Raises:
    UserError: the class cannot hold the model.
  """
  if not isinstance(model, VideoResNet):
    raise UserError(f"format 'torchvision' holds ResNets of videos, not {type(model).__name__}: export with --format "
                    'timm or jaxmed')
  if model.depths != (2, 2, 2, 2) or model.mask_token or model.dims != VideoResNet.dims or model.stem_width != 64:
    raise UserError(f"format 'torchvision' holds two blocks a stage, widths {VideoResNet.dims} after a stem of 64 and "
                    f'no mask token, not depths {model.depths}, {model.dims} after {model.stem_width}: export with '
                    '--format jaxmed')
  out = {tensor_name(model, path): nnunet.outward(path, value) for path, value in nnunet.flat(params)}
  means = [name for name in out if name.endswith('running_mean')]
  return out | {name.replace('running_mean', COUNT): np.zeros((), np.float32) for name in means}


def from_torchvision(tensors: Mapping[str, np.ndarray], num_heads: Any = None,
                     image_size: tuple[int, ...] | None = None) -> tuple[VideoResNet, Params]:
  """The model and parameters of a state dict; the classifier is left out with a note.

  Args:
    image_size: native size; None for (16, 112, 112), on which the weights of Kinetics-400 were trained.
  Raises:
    UserError: a tensor is missing, has another shape, or belongs to another model.
  """
  del num_heads
  plain = {k: v for k, v in tensors.items() if not k.endswith(COUNT)}
  apart = any(name.endswith(APART) for name in plain)
  state = StateDict(plain, 'torchvision', APART if apart else ANCHOR)
  flat = 'layer2.0.conv1.0.weight' in state and state.shape('layer2.0.conv1.0.weight')[2] == 1
  depths = [sum(re.fullmatch(rf'layer{i}\.\d+\.conv1\.1\.weight', name) is not None for name in state.tensors)
            for i in range(1, 5)]
  model = VideoResNet(image_size=image_size or (16, 112, 112), in_channels=state.shape('stem.0.weight')[1],
                      depths=tuple(depths), time='separate' if apart else 'first' if flat else 'all')
  read = nnunet.read_params(state, state_dict.shapes_of(model), lambda path: tensor_name(model, path))
  state.finish("torchvision's VideoResNet")
  return model, read


def is_torchvision(tensors: Mapping[str, Any]) -> bool:
  """Whether tensors are named as in the class."""
  return any(name == a or name.endswith('.' + a) for name in tensors for a in (ANCHOR, APART))


def with_untold(model: VideoResNet, read: VideoResNet) -> VideoResNet:
  """A model read from tensors, with the fields of the exported one that no tensor tells: none."""
  del model
  return read


def tensor_name(model: VideoResNet, path: str) -> str:
  """torchvision's name of a parameter, as 'layer1.0.conv1.0.3.weight'."""
  module, leaf = nnunet.split(path)
  apart = model.time == 'separate'
  if module.startswith('stem'):
    place = {'stem_space_conv': 0, 'stem_space_bn': 1, 'stem_conv': 3 if apart else 0, 'stem_bn': 4 if apart else 1}
    return f'stem.{place[module]}.{leaf}'
  match = re.fullmatch(r'layer(\d+)_(\d+)/(unit\d|down)(_space)?_(conv|bn)', module)
  if not match:
    raise UserError(f'parameter {path!r} has no place in format torchvision')
  at, unit, norm = f'layer{match[1]}.{match[2]}', match[3], match[5] == 'bn'
  if unit == 'down':
    return f'{at}.downsample.{int(norm)}.{leaf}'
  layer = f'{at}.conv{unit[-1]}'
  if match[4]:
    return f'{layer}.0.{int(norm)}.{leaf}'
  return f'{layer}.1.{leaf}' if norm else f'{layer}.0.3.{leaf}' if apart else f'{layer}.0.{leaf}'


def snippet(model: VideoResNet, file: str) -> str:
  """Python that makes torchvision's class from an exported file: `encoder`, in evaluation mode, without classifier."""
  stem = '' if model.in_channels == 3 else (
      'first = encoder.stem[0]\n'
      f'encoder.stem[0] = torch.nn.Conv3d({model.in_channels}, first.out_channels, first.kernel_size, first.stride, '
      'first.padding, bias=False)\n')
  return (f'import safetensors.torch, torch, torchvision\n'
          f'encoder = torchvision.models.video.{NAMES[model.time]}()\n'
          f'encoder.fc = torch.nn.Identity()\n{stem}'
          f'encoder.load_state_dict(safetensors.torch.load_file({file!r}))\nencoder.eval()\n')


def call_lines(model: VideoResNet) -> str:
  """What the class of `snippet` takes and returns."""
  return (f'`encoder(videos)` takes float32 videos or volumes [B, {model.in_channels}, T, H, W], normalised as below, '
          f'and returns the mean-pooled vector [B, {model.embed_dim}].')
