"""Models by name, as timm's users write them: `family_size/patch`, or without a patch where the family has strides."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmed.errors import UserError, choose
from jaxmed.models.encoders import convnext, dformer, metaformer, pvt, resnet, swin, swtr_unet, unet, video
from jaxmed.models.encoders.bag import POOLINGS, BagOfChannels
from jaxmed.models.encoders.channel_vit import ChannelViT
from jaxmed.models.encoders.vit import POSITIONS, ViT
from jaxmed.models.layers import channel_attention, channel_embed, initial
from jaxmed.models.layers.adapters import Adapter
from jaxmed.models.layers.convolution import MASKINGS, Hierarchical
from jaxmed.models.layers.kernels import FORMS
from jaxmed.models.layers.transformer import DROP_LAWS, MLPS, REMAT_POLICIES

Encoder = ViT | Hierarchical
FILLED = ('parent', 'name', 'image_size', 'patch_size', 'in_channels', 'channel_names', 'adapter')  # no options

# embed_dim, depth, num_heads and what else differs; 'giant' is timm's vit_giant_patch14, 'giant2' DINOv2's ViT-g.
SIZES: dict[str, dict[str, Any]] = {
    'micro': dict(embed_dim=128, depth=6, num_heads=4),
    'tiny': dict(embed_dim=192, depth=12, num_heads=3),
    'small': dict(embed_dim=384, depth=12, num_heads=6),
    'base': dict(embed_dim=768, depth=12, num_heads=12),
    'large': dict(embed_dim=1024, depth=24, num_heads=16),
    'huge': dict(embed_dim=1280, depth=32, num_heads=16),
    'giant': dict(embed_dim=1408, depth=40, num_heads=16, mlp_ratio=48 / 11),
    'giant2': dict(embed_dim=1536, depth=40, num_heads=24, mlp='swiglu', mlp_ratio=8 / 3, layer_scale=1e-5),
}

FAMILIES: dict[str, type[Encoder]] = {
    'vit': ViT, 'channel_vit': ChannelViT, 'bag': BagOfChannels, 'resnet': resnet.ResNet,
    'convnextv2': convnext.ConvNeXt, 'caformer': metaformer.CAFormer, 'pvt_v2': pvt.PVT,
    'unet': unet.UNet, 'video_resnet': video.VideoResNet, 'swin': swin.Swin, 'swin_unetr': swin.SwinUNETR,
    'dformer': dformer.DFormer, 'swtr_unet': swtr_unet.SWTRUNet}

# Every name, without a patch: its family, and the fields that differ from the family's defaults.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    f'{family}_{size}': (family, fields) for family in ('vit', 'channel_vit', 'bag') for size, fields in SIZES.items()}
for _family, _sizes in (('resnet', resnet.SIZES), ('convnextv2', convnext.SIZES), ('caformer', metaformer.SIZES),
                        ('pvt_v2', pvt.SIZES), ('unet', unet.SIZES), ('video_resnet', video.SIZES),
                        ('swin', swin.SIZES), ('swin_unetr', swin.UNETR_SIZES),
                        ('dformer', dformer.SIZES), ('swtr_unet', swtr_unet.SIZES)):
  MODELS |= {name: (_family, fields) for name, fields in _sizes.items()}

CHOICES = {
    'pos': POSITIONS, 'remat': REMAT_POLICIES, 'attention': FORMS, 'mlp': MLPS,
    'dtype': ('float32', 'bfloat16'), 'drop_path_law': DROP_LAWS,
    'kernel_init': initial.KERNELS, 'patch_init': initial.PATCHES,
    'pos_interpolation': ('antialias', 'offset', 'plain'),
    'masking': MASKINGS, 'channel_attention': channel_attention.KINDS,
    'merging': tuple(swin.MERGINGS), 'bias_slice': swin.BIAS_SLICES,
    'channel_embedding': channel_embed.KINDS, 'channel_init': channel_embed.INITS, 'pooling': POOLINGS,
}


def list_models() -> list[str]:
  """Names of all models, without the patch size."""
  return list(MODELS)


def default_options(name: str) -> dict[str, Any]:
  """The fields of the named model that a config may set, with their defaults for that size."""
  family, sizes, _ = _split(name)
  return family_options(family) | sizes


def family_options(family: str) -> dict[str, Any]:
  """The same of a family, with the defaults of its class."""
  return {f.name: f.default for f in dataclasses.fields(FAMILIES[family]) if f.name not in FILLED}


def create_model(name: str, image_size: int | tuple[int, ...] = 224, in_channels: int = 3,
                 channel_names: tuple[str, ...] = (), **options: Any) -> Any:
  """Makes an encoder, e.g. `create_model('channel_vit_small/16', image_size=(96, 96, 96), in_channels=4)`.

  Args:
    name: 'family_size/patch' for vit and channel_vit; patch is one number, or one for each axis: 'vit_base/2x16x16'.
      timm's name for the others: 'resnet50', 'convnextv2_tiny'.
    image_size: native size; a single number means a square. Its rank is the rank of the inputs.
    in_channels: input channels, for channel_vit the size of the channel vocabulary.
    channel_names: of these, for a channel_vit whose embeddings are hashed.
    **options: any other field of the class, see `default_options`.
  Raises:
    UserError: unknown name or option, or sizes that do not fit together.
  """
  family, _, patch = _split(name)
  image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
  fields = default_options(name)
  for key, value in options.items():
    choose('model option', key, fields)
    if key in CHOICES:
      choose(key, value, CHOICES[key])
    fields[key] = tuple(value) if isinstance(value, list) else value
  if patch and fields['embed_dim'] % fields['num_heads']:
    raise UserError(f'num_heads {fields["num_heads"]} does not divide embed_dim {fields["embed_dim"]}')
  if patch:
    fields['patch_size'] = patch * len(image_size) if len(patch) == 1 else patch
  if fields.get('channel_embedding') == 'hashed':
    fields['channel_names'] = channel_names or channel_embed.unnamed(in_channels)
    channel_embed.check(fields['channel_names'], fields['hash_rows'], fields['hashes'], fields['hash_width'],
                        fields['hash_prune'], fields['hash_widths'])
  if not 0 <= fields.get('packing', 0) <= 1:
    raise UserError(f'encoder.packing {fields["packing"]} is no share of rows: expected 0 (padded) to 1')
  if fields.get('packing') and fields.get('channel_attention', 'joint') != 'joint':
    raise UserError(f'encoder.packing needs channel_attention=joint, not {fields["channel_attention"]}')
  model = FAMILIES[family](image_size=image_size, in_channels=in_channels, **fields)
  _check_size(name, image_size, model.patch_size)
  return model


def _check_size(name: str, image_size: tuple[int, ...], patch: tuple[int, ...]) -> None:
  if len(patch) != len(image_size) or any(n % p or n < p for n, p in zip(image_size, patch, strict=False)):
    near = 'x'.join(str(max(p, round(n / p) * p)) for n, p in zip(image_size, patch, strict=False))
    raise UserError(f'image_size {image_size} does not divide into the patches of {name}: nearest is {near}')


def family_of(model: Any) -> str:
  """The family of a model, a key of FAMILIES."""
  return next(name for name, cls in FAMILIES.items() if type(model) is cls)


def describe(model: Encoder) -> dict[str, Any]:
  """All fields of a model as plain data, which `rebuild` turns back into it."""
  fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in ('parent', 'name')}
  adapter = fields.pop('adapter', None)
  beside = {} if adapter is None else {'adapter': _plain(dataclasses.asdict(adapter))}
  return {'family': family_of(model)} | _plain(fields) | beside


def rebuild(description: dict[str, Any]) -> Any:
  """The model that `describe` described."""
  fields = dict(description)
  family = choose('model family', fields.pop('family'), FAMILIES)
  adapter = fields.pop('adapter', None)
  beside = {} if adapter is None else {'adapter': Adapter(**_tuples(adapter))}
  return FAMILIES[family](**_tuples(fields), **beside)


def named(model: Encoder, name: str = '') -> dict[str, Any]:
  """A model as a config says it: {'model': name, 'encoder': options that differ from that name's}.

  Args:
    name: of the model where it is known; '' finds the one that differs least.
  """
  patch = '/' + _by_axis(model.patch_size) if isinstance(model, ViT) else ''

  def differs(name: str) -> dict[str, Any]:
    return {k: _worded(getattr(model, k)) for k, v in default_options(name).items()
            if _worded(getattr(model, k)) != _worded(v)}

  names = [name] if name else [base + patch for base, (family, _) in MODELS.items() if family == family_of(model)]
  best = min(names, key=lambda name: len(differs(name)))
  return {'model': best, 'encoder': differs(best)}


def _by_axis(sizes: tuple[int, ...]) -> str:
  return 'x'.join(map(str, sizes if len(set(sizes)) > 1 else sizes[:1]))


def _worded(value: Any) -> Any:
  """An option as a config holds it: entries of several axes as 1x3x3."""
  if not isinstance(value, (tuple, list)):
    return value
  return tuple('x'.join(map(str, v)) if isinstance(v, (tuple, list)) else v for v in value)


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
  return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
  return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _split(name: str) -> tuple[str, dict[str, Any], tuple[int, ...]]:
  """'channel_vit_small/16' -> ('channel_vit', the fields of 'small', (16,)); () for families with strides."""
  base, slash, patch = name.partition('/')
  family, sizes = MODELS[choose('model', base, MODELS)]
  if not issubclass(FAMILIES[family], ViT):
    if slash:
      raise UserError(f'model {name!r} takes no patch size, its strides are fixed: write {base}')
    return family, sizes, ()
  if not slash or not all(p.isdigit() and int(p) > 0 for p in patch.split('x')):
    raise UserError(f'model {name!r} needs a patch size, for example {base}/16')
  return family, sizes, tuple(int(p) for p in patch.split('x'))
