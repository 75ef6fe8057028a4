"""U-Nets <-> STU-Net (uni-medical/STU-Net, STUNetTrainer.py: class STUNet), by tensor names."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmed.errors import UserError
from jaxmed.interop import nnunet, state_dict
from jaxmed.interop.nnunet import Network, outward, read_params, shape_inward, with_untold
from jaxmed.interop.state_dict import StateDict
from jaxmed.models.decoders.dense import create_decoder
from jaxmed.models.encoders.unet import UNet
from jaxmed.models.layers.unet_blocks import each_stage

ANCHOR = 'conv_blocks_context.0.0.conv1.weight'
_PARTS = {'conv_blocks_localization': 'stage', 'upsample_layers': 'up', 'seg_outputs': 'head'}
__all__ = ['call_lines', 'from_stunet', 'snippet', 'to_stunet', 'with_untold']


def to_stunet(network: Network) -> dict[str, np.ndarray]:
  """The state dict, strict for the whole network; of an encoder alone the tensors of `conv_blocks_context`.

  Raises:
    UserError: STU-Net's class cannot hold the network; names the option.
  """
  encoder, decoder = network.encoder, network.decoder
  if not isinstance(encoder, UNet) or encoder.block != 'residual' or len(encoder.image_size) != 3:
    raise UserError("format 'stunet' holds STU-Nets of three axes (encoder.block=residual): export with --format "
                    'jaxmed')
  if encoder.norm != 'instance' or encoder.down != 'conv' or encoder.stem_width or encoder.mask_token:
    raise UserError("format 'stunet' holds instance norm, strided convolutions and neither stem nor mask token, not "
                    f'norm={encoder.norm}, down={encoder.down}, stem_width={encoder.stem_width}: export with --format '
                    'jaxmed')
  if decoder is not None and (decoder.block, decoder.up, decoder.dims) != ('residual', 'nearest', ()):
    raise UserError(f"format 'stunet' holds decoders of residual blocks with nearest interpolation, not block="
                    f'{decoder.block}, up={decoder.up}, dims={decoder.dims}')
  out = {encoder_name(path): outward(path, value) for path, value in nnunet.flat(network.params)}
  if decoder is None:
    return out
  stages = len(encoder.depths)
  out |= {decoder_name(path, stages): outward(path, value) for path, value in nnunet.flat(network.decoder_params)}
  for s, dim in enumerate(reversed(encoder.dims[:-1])):
    zero = {f'seg_outputs.{s}.weight': np.zeros((decoder.num_classes, dim, 1, 1, 1), np.float32),
            f'seg_outputs.{s}.bias': np.zeros(decoder.num_classes, np.float32)}
    out = zero | out  # of a decoder without deep supervision
  return out


def from_stunet(tensors: Mapping[str, np.ndarray], image_size: tuple[int, ...] | None = None,
                strides: Any = '') -> Network:
  """The network of a state dict; the decoder too, where its tensors are there.

  Args:
    image_size: native size; None for 128 along each axis, as it was trained. strides: of the stages, which no tensor
      tells; '' for 1 and then 2.
  Raises:
    UserError: a tensor is missing, has another shape, or belongs to another network.
  """
  state = StateDict(tensors, 'stunet', ANCHOR)
  depths: list[int] = []
  dims: list[int] = []
  kernels: list[tuple[int, ...]] = []
  while (name := 'conv_blocks_context.{}.{}.conv1.weight').format(len(depths), 0) in state:
    stage, depth = len(depths), 0
    while name.format(stage, depth) in state:
      depth += 1
    dim, _, *kernel = state.shape(name.format(stage, 0))
    depths.append(depth)
    dims.append(dim)
    kernels.append(tuple(kernel))
  encoder = UNet(image_size=image_size or (128,) * 3, in_channels=state.shape(ANCHOR)[1], depths=tuple(depths),
                 dims=tuple(dims), block='residual', kernels=tuple(kernels), strides=strides)
  params = read_params(state, state_dict.shapes_of(nnunet.native(encoder)), encoder_name)
  if 'seg_outputs.0.weight' not in state:
    state.finish('an encoder of STU-Net')
    return Network(encoder, params)
  stages = len(depths)
  decoder: Any = create_decoder('unet', encoder, state.shape('seg_outputs.0.weight')[0], True)
  shapes = {path: shape_inward(path, state.shape(name)) for name, path in _paths(state, stages).items()}
  decoder_params = read_params(state, shapes, lambda path: decoder_name(path, stages))
  state.finish('a STU-Net')
  return Network(encoder, params, decoder, decoder_params)


def is_stunet(tensors: Mapping[str, Any]) -> bool:
  """Whether tensors are named as in the class."""
  return any(name == ANCHOR or name.endswith('.' + ANCHOR) for name in tensors)


def encoder_name(path: str) -> str:
  """The class's name of a parameter of the encoder, as 'conv_blocks_context.1.0.norm2.weight'."""
  module, leaf = nnunet.split(path)
  stage, block, layer = nnunet.numbered(module)
  return f'conv_blocks_context.{stage - 1}.{block}.{"conv3" if layer == "skip_conv" else layer}.{leaf}'


def decoder_name(path: str, stages: int) -> str:
  """The class's name of a parameter of the decoder; its stages are counted from the coarsest."""
  module, leaf = nnunet.split(path)
  match = re.fullmatch(r'(up|head)(\d+)(/conv)?', module)
  if match:
    kind = {'up': 'upsample_layers', 'head': 'seg_outputs'}[match[1]]
    return f'{kind}.{stages - 1 - int(match[2])}.{"conv." if match[3] else ""}{leaf}'
  stage, block, layer = nnunet.numbered(module)
  layer = 'conv3' if layer == 'skip_conv' else layer
  return f'conv_blocks_localization.{stages - 1 - stage}.{block}.{layer}.{leaf}'


def _paths(state: StateDict, stages: int) -> dict[str, str]:
  """Our paths of the tensors of the decoder, by their names."""
  out = {}
  for name in state.tensors:
    kind, _, rest = name.partition('.')
    number, _, layer = rest.partition('.')
    if kind not in _PARTS or not number.isdigit():
      continue
    module, _, leaf = layer.rpartition('.')
    module = module.replace('conv3', 'skip_conv').replace('.', '/')
    leaf = 'bias' if leaf == 'bias' else 'scale' if 'norm' in module else 'kernel'
    parts = [f'{_PARTS[kind]}{stages - 1 - int(number)}', module, leaf]
    if kind == 'conv_blocks_localization':
      parts[:2] = ['_'.join(parts[:2])]
    out[name] = '/'.join(filter(None, parts))
  return out


def snippet(model: UNet, file: str) -> str:
  """Python that loads an exported file into STU-Net's class: `encoder`, in evaluation mode."""
  stages = len(model.depths)
  kernels = [list(k) for k in each_stage(model.kernels, stages, 3, 3)]
  strides = [list(s) for s in model.stage_strides[1:]]
  return (f'import safetensors.torch\n'
          f'from nnunetv2.training.nnUNetTrainer.STUNetTrainer import STUNet\n'
          f'network = STUNet({model.in_channels}, 2, depth={list(model.depths)}, dims={list(model.dims)},\n'
          f'                 pool_op_kernel_sizes={strides}, conv_kernel_sizes={kernels})\n'
          f'network.load_state_dict(safetensors.torch.load_file({file!r}), strict=False)  # no decoder\n'
          f'encoder = network.conv_blocks_context.eval()\n')


def call_lines(model: UNet) -> str:
  """What the class of `snippet` takes and returns."""
  return (f'The class is in the repository uni-medical/STU-Net. `encoder` is a list of its {len(model.depths)} stages: '
          f'called one after the other they take float32 images [B, {model.in_channels}, D, H, W], normalised as '
          f'below, and the last one returns the map of width {model.embed_dim}; its mean over places is the vector.')
