"""U-Nets <-> nnU-Net's PlainConvUNet and ResidualEncoderUNet (dynamic-network-architectures 0.4.4), by tensor names.

A state dict there names a layer several times: `conv` and `norm` are `all_modules.0` and `.1` too, and the decoder
holds the encoder. All of these names are written, and of those that are read the first. Axes of images stay in their
order; nnU-Net itself puts the coarsest first.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from jaxmed.errors import UserError
from jaxmed.interop import state_dict
from jaxmed.interop.state_dict import Params, StateDict
from jaxmed.models.decoders import unet as decoders
from jaxmed.models.decoders.dense import create_decoder
from jaxmed.models.encoders.unet import UNet
from jaxmed.models.layers.unet_blocks import each_stage

PLAIN, STEM = 'encoder.stages.0.0.convs.0.conv.weight', 'encoder.stem.convs.0.conv.weight'
_AGAIN = (('.conv.', '.all_modules.0.'), ('.norm.', '.all_modules.1.'))


@dataclasses.dataclass(frozen=True)
class Network:
  """An encoder, and where there is one a decoder, each a Flax module with its parameters."""

  encoder: UNet
  params: Params
  decoder: decoders.UNet | None = None
  decoder_params: Params = dataclasses.field(default_factory=dict)


def to_nnunet(network: Network) -> dict[str, np.ndarray]:
  """The state dict, strict for the whole network; of an encoder alone its tensors, whose names begin with 'encoder.'.

  Heads of coarser outputs, which the classes always have, are zero where the decoder has none.

  Raises:
    UserError: nnU-Net's classes cannot hold the network; names the option.
  """
  check_nnunet(network.encoder, network.decoder)
  out: dict[str, np.ndarray] = {}
  for path, value in flat(network.params):
    name = encoder_name(network.encoder, path)
    out |= dict.fromkeys([name, *_again(name)], outward(path, value))
  if network.decoder is None:
    return out
  out |= {f'decoder.{name}': value for name, value in out.items()}
  stages = len(network.encoder.depths)
  for path, value in flat(network.decoder_params):
    name = decoder_name(path, stages)
    out |= dict.fromkeys([name, *_again(name)], outward(path, value))
  return out | _missing_heads(network, out)


def _missing_heads(network: Network, have: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  assert network.decoder is not None
  out: dict[str, np.ndarray] = {}
  ones = (1,) * len(network.encoder.image_size)
  for s, dim in enumerate(reversed(network.encoder.dims[:-1])):
    name = f'decoder.seg_layers.{s}'
    if f'{name}.weight' not in have:
      out[f'{name}.weight'] = np.zeros((network.decoder.num_classes, dim, *ones), np.float32)
      out[f'{name}.bias'] = np.zeros(network.decoder.num_classes, np.float32)
  return out


def check_nnunet(encoder: UNet, decoder: decoders.UNet | None = None) -> None:
  """Raises a UserError where nnU-Net's classes cannot hold the networks."""
  if not isinstance(encoder, UNet) or encoder.block == 'residual':
    raise UserError("format 'nnunet' holds plain and ResEnc U-Nets (encoder.block plain or residual_d), not "
                    f'{getattr(encoder, "block", type(encoder).__name__)}: export with --format jaxmed')
  if (encoder.norm, encoder.down, bool(encoder.stem_width)) != ('instance', 'conv', encoder.block == 'residual_d'):
    raise UserError(f"format 'nnunet' holds instance norm, strided convolutions and a stem with residual_d alone, not "
                    f'norm={encoder.norm}, down={encoder.down}, stem_width={encoder.stem_width}: export with --format '
                    'jaxmed')
  if encoder.mask_token:
    raise UserError("format 'nnunet' holds no mask token: train with encoder.masking=sparse, or export with --format "
                    'jaxmed')
  if decoder is not None and (decoder.block, decoder.up, decoder.dims) != ('plain', 'transposed', ()):
    raise UserError(f"format 'nnunet' holds plain decoders with transposed convolutions, not block={decoder.block}, "
                    f'up={decoder.up}, dims={decoder.dims}')


def from_nnunet(tensors: Mapping[str, np.ndarray], image_size: tuple[int, ...] | None = None,
                strides: Any = '') -> Network:
  """The network of a state dict; the decoder too, where its tensors are there.

  Args:
    image_size: native size; None for four times the total stride, as no tensor tells it.
    strides: of the stages, see the encoder; '' for those of the decoder's transposed convolutions, or 1 and then 2.
  Raises:
    UserError: a tensor is missing, has another shape, or belongs to another network.
  """
  once = {k: v for k, v in tensors.items() if 'all_modules.' not in k and 'decoder.encoder.' not in k}
  anchor = next((a for a in (STEM, PLAIN) if is_nnunet(once, a)), PLAIN)
  state = StateDict(once, 'nnunet', anchor)
  encoder = _encoder(state, anchor == STEM, strides)
  decoder, stages = _decoder(state, encoder), len(encoder.depths)

  def name(path: str) -> str:
    found = encoder_name(encoder, path)
    return found if found in state else found.replace('.skip.1.', '.skip.0.')  # a stage without a stride

  params = read_params(state, state_dict.shapes_of(native(encoder)), name)
  paths = [path_of(n, stages) for n in state.tensors] if decoder else []
  shapes = {p: shape_inward(p, state.shape(decoder_name(p, stages))) for p in paths if p}
  decoder_params = read_params(state, shapes, lambda path: decoder_name(path, stages))
  state.finish('a U-Net of nnU-Net')
  return Network(native(encoder, image_size), params, decoder, decoder_params)


def native(encoder: UNet, image_size: tuple[int, ...] | None = None) -> UNet:
  """The encoder with this native size; None for four times the total stride, which suits any strides."""
  return encoder.clone(image_size=image_size or tuple(4 * n for n in encoder.patch_size))


def is_nnunet(tensors: Mapping[str, Any], *anchors: str) -> bool:
  """Whether tensors are named as in one of the classes."""
  return any(name == a or name.endswith('.' + a) for name in tensors for a in anchors or (STEM, PLAIN))


def with_untold(model: UNet, read: UNet) -> UNet:
  """A model read from tensors, with the fields of the exported one that no tensor of an encoder tells."""
  return read.clone(strides=model.strides, slope=model.slope)


def _encoder(state: StateDict, residual: bool, strides: Any) -> UNet:
  first = 'encoder.stages.{}.blocks.{}.conv1.conv.weight' if residual else 'encoder.stages.{}.0.convs.{}.conv.weight'
  depths: list[int] = []
  dims: list[int] = []
  kernels: list[tuple[int, ...]] = []
  while first.format(len(depths), 0) in state:
    stage, depth = len(depths), 0
    while first.format(stage, depth) in state:
      depth += 1
    out, _, *kernel = state.shape(first.format(stage, 0))
    depths.append(depth)
    dims.append(out)
    kernels.append(tuple(kernel))
  if not depths:
    raise UserError(f'not weights in the nnunet layout: tensor {first.format(0, 0)!r} is missing')
  width, channels = state.shape(STEM if residual else PLAIN)[:2]
  known = [state.shape(f'decoder.transpconvs.{s}.weight')[2:] for s in reversed(range(len(depths) - 1))
           if f'decoder.transpconvs.{s}.weight' in state]
  if not strides and known:
    strides = ((1,) * len(kernels[0]), *known)
  fields = {'block': 'residual_d', 'stem_width': width, 'zero_init_residual': True} if residual else {}
  return UNet(image_size=(0,) * len(kernels[0]), in_channels=channels, depths=tuple(depths), dims=tuple(dims),
              kernels=tuple(kernels), strides=strides, **fields)


def _decoder(state: StateDict, encoder: UNet) -> Any:
  stages = len(encoder.depths)
  if 'decoder.seg_layers.0.weight' not in state:
    return None
  depths = []
  for s in reversed(range(stages - 1)):
    depths.append(0)
    while f'decoder.stages.{s}.convs.{depths[-1]}.conv.weight' in state:
      depths[-1] += 1
  classes = state.shape('decoder.seg_layers.0.weight')[0]
  return create_decoder('unet', encoder, classes, True, depths=tuple(depths))


def encoder_name(encoder: UNet, path: str) -> str:
  """The class's name of a parameter of the encoder, as 'encoder.stages.0.blocks.1.conv2.norm.weight'."""
  module, leaf = split(path)
  if module.startswith('stem/'):
    return f'encoder.stem.convs.0.{module[5:]}.{leaf}'
  stage, block, layer = numbered(module)
  if encoder.block == 'plain':
    return f'encoder.stages.{stage - 1}.0.convs.{block}.{layer}.{leaf}'
  kind, number = (layer[:4], layer[4:]) if not layer.startswith('skip') else (layer[5:], 'skip')
  if number != 'skip':
    return f'encoder.stages.{stage - 1}.blocks.{block}.conv{number}.{kind}.{leaf}'
  pooled = int(any(n > 1 for n in encoder.stage_strides[stage - 1]))  # a pooling comes before the convolution
  return f'encoder.stages.{stage - 1}.blocks.{block}.skip.{pooled}.{kind}.{leaf}'


def decoder_name(path: str, stages: int) -> str:
  """The class's name of a parameter of the decoder; its stages are counted from the coarsest."""
  module, leaf = split(path)
  match = re.fullmatch(r'(up|head)(\d+)', module)
  if match:
    kind = {'up': 'transpconvs', 'head': 'seg_layers'}[match[1]]
    return f'decoder.{kind}.{stages - 1 - int(match[2])}.{leaf}'
  stage, block, layer = numbered(module)
  return f'decoder.stages.{stages - 1 - stage}.convs.{block}.{layer}.{leaf}'


def path_of(name: str, stages: int) -> str | None:
  """Our path of a tensor of the decoder; None for another tensor."""
  own = lambda kind: 'kernel' if kind == 'weight' else kind
  match = re.fullmatch(r'decoder\.(transpconvs|seg_layers)\.(\d+)\.(weight|bias)', name)
  if match:
    kind = {'transpconvs': 'up', 'seg_layers': 'head'}[match[1]]
    return f'{kind}{stages - 1 - int(match[2])}/{own(match[3])}'
  match = re.fullmatch(r'decoder\.stages\.(\d+)\.convs\.(\d+)\.(conv|norm)\.(weight|bias)', name)
  if match:
    leaf = 'scale' if (match[3], match[4]) == ('norm', 'weight') else own(match[4])
    return f'stage{stages - 1 - int(match[1])}_{match[2]}/{match[3]}/{leaf}'
  return None


def split(path: str) -> tuple[str, str]:
  """The module of a parameter, and the name of its tensor in PyTorch."""
  module, _, leaf = path.rpartition('/')
  return module, {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}.get(leaf, leaf)


def numbered(module: str) -> tuple[int, int, str]:
  """'stage2_0/conv1' -> (2, 0, 'conv1')."""
  match = re.fullmatch(r'stage(\d+)_(\d+)/(\w+)', module)
  if not match:
    raise UserError(f'parameter {module!r} has no place in this format')
  return int(match[1]), int(match[2]), match[3]


def _again(name: str) -> list[str]:
  """The second name of a layer."""
  return [name.replace(old, new) for old, new in _AGAIN if old in name]


def flat(params: Params) -> list[tuple[str, np.ndarray]]:
  return list(flax.traverse_util.flatten_dict(state_dict.host(params), sep='/').items())


def outward(path: str, value: np.ndarray) -> np.ndarray:
  """A parameter as PyTorch has it: kernels [*k, I, O] as [O, I, *k], transposed ones as [I, O, *k]."""
  if not path.endswith('kernel'):
    return value
  return np.moveaxis(value, (-2, -1) if _transposed(path) else (-1, -2), (0, 1))


def shape_inward(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of our parameter whose tensor there has `shape`."""
  if not path.endswith('kernel'):
    return tuple(shape)
  return (*shape[2:], *(shape[:2] if _transposed(path) else shape[1::-1]))


def _transposed(path: str) -> bool:
  return re.fullmatch(r'up\d+/kernel', path) is not None


def read_params(state: StateDict, shapes: Mapping[str, tuple[int, ...]], name: Any) -> Params:
  """Parameters of these shapes out of the tensors that `name(path)` tells."""
  flat = {}
  for path, shape in shapes.items():
    if not path.endswith('kernel'):
      flat[path] = state.take(name(path), *shape)
    elif _transposed(path):
      flat[path] = np.moveaxis(state.take(name(path), *shape[-2:], *shape[:-2]), (0, 1), (-2, -1))
    else:
      flat[path] = np.moveaxis(state.take(name(path), shape[-1], shape[-2], *shape[:-2]), (0, 1), (-1, -2))
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def arch_kwargs(encoder: UNet, decoder: decoders.UNet | None = None) -> dict[str, Any]:
  """The arguments of the class in a plan of nnU-Net, classes named by text (see default_experiment_planner.py)."""
  rank, stages = len(encoder.image_size), len(encoder.depths)
  wanted = (decoder.depths if decoder else ()) or encoder.decoder_options['unet']['depths']
  blocks = 'n_conv_per_stage' if encoder.block == 'plain' else 'n_blocks_per_stage'
  out = {
      'n_stages': stages, 'features_per_stage': list(encoder.dims), 'conv_op': f'torch.nn.modules.conv.Conv{rank}d',
      'kernel_sizes': [list(k) for k in each_stage(encoder.kernels, stages, rank, 3)],
      'strides': [list(s) for s in encoder.stage_strides], blocks: list(encoder.depths),
      'n_conv_per_stage_decoder': list(reversed(wanted)), 'conv_bias': True,
      'norm_op': f'torch.nn.modules.instancenorm.InstanceNorm{rank}d', 'norm_op_kwargs': {'eps': 1e-5, 'affine': True},
      'dropout_op': None, 'dropout_op_kwargs': None, 'nonlin': 'torch.nn.LeakyReLU',
      'nonlin_kwargs': {'negative_slope': encoder.slope, 'inplace': True}}
  return out | ({'stem_channels': encoder.stem_width} if encoder.stem_width not in (0, encoder.dims[0]) else {})


def class_of(encoder: UNet) -> str:
  """The full name of nnU-Net's class."""
  name = 'PlainConvUNet' if encoder.block == 'plain' else 'ResidualEncoderUNet'
  return f'dynamic_network_architectures.architectures.unet.{name}'


IMPORTED = ('conv_op', 'norm_op', 'dropout_op', 'nonlin')  # arguments whose texts name classes


def snippet(model: UNet, file: str) -> str:
  """Python that makes nnU-Net's encoder from an exported file: `encoder`, in evaluation mode."""
  module, _, name = class_of(model).rpartition('.')
  return (f'import pydoc, safetensors.torch\nfrom {module} import {name}\n'
          f'arguments = {arch_kwargs(model)!r}\n'
          f'arguments |= {{k: arguments[k] and pydoc.locate(arguments[k]) for k in {IMPORTED!r}}}\n'
          f'network = {name}(input_channels={model.in_channels}, num_classes=2, **arguments)\n'
          f'weights = safetensors.torch.load_file({file!r})\n'
          f"network.encoder.load_state_dict({{k.removeprefix('encoder.'): v for k, v in weights.items()}})\n"
          f'encoder = network.encoder.eval()\n')


def call_lines(model: UNet) -> str:
  """What the class of `snippet` takes and returns."""
  axes = 'D, H, W' if len(model.image_size) == 3 else 'H, W'
  return (f'`encoder(images)` takes float32 images [B, {model.in_channels}, {axes}], normalised as below, and returns '
          f'the maps of its {len(model.depths)} stages, the last of width {model.embed_dim}; its mean over the places '
          'is the vector.')
