"""Whether an exported file gives the features of the model it came from, and the card that goes with it."""

import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxmed.errors import UserError
from jaxmed.interop import conv, monai, nnunet, stunet, torchvision
from jaxmed.interop.safetensors_io import read_tensors
from jaxmed.interop.state_dict import Params, ratio_of
from jaxmed.interop.weight_formats import FORMATS, METADATA, load_file
from jaxmed.models.encoders.bag import BagOfChannels, bag_of
from jaxmed.models.layers.convolution import Hierarchical
from jaxmed.models.layers.transformer import NORM_EPSILON
from jaxmed.models.registry import Encoder

_DIGITS = 6
TARGETS: dict[str, Any] = {'nnunet': nnunet, 'stunet': stunet, 'torchvision': torchvision}  # of one class each


def verify_export(path: str | os.PathLike, model: Encoder, params: Params, image: jax.Array,
                  channels: jax.Array | None = None) -> float:
  """Reloads an exported file and compares its features with the model's, in float32.

  The file is read twice: as itself, and as a foreign file of its layout, where the model too must follow from
  the tensors (and the number of heads, the image size and the strides of a stem), as it must in PyTorch.

  Args:
    image: [B, *size, C] normalised float.
    channels: [B, C] int channel ids, or None.
  Returns:
    The largest absolute difference over class token and patch features; NaN where a feature is not finite.
  """
  want = _features(model, params, image, channels)
  tensors, metadata = read_tensors(path)
  meta = json.loads(metadata.get(METADATA, '{}'))
  loaded = [load_file(path, meta.get('format'))[:2]]
  read = FORMATS[meta['format']].read if 'format' in meta else None
  if read is not None:
    other, other_params = read(tensors, getattr(model, 'num_heads', None), tuple(model.image_size))
    if isinstance(model, BagOfChannels):
      other = bag_of(other, model.in_channels)
    layout = TARGETS.get(meta['format'], conv)
    loaded.append((layout.with_untold(model, other) if isinstance(model, Hierarchical) else other, other_params))
  pairs = [pair for other, other_params in loaded
           for pair in zip(want, _features(other, other_params, image, channels), strict=True)]
  return float(np.max([np.abs(a - b).max() for a, b in pairs]))  # NaN if any is


def _features(model: Encoder, params: Params, image: jax.Array,
              channels: jax.Array | None) -> list[np.ndarray]:
  """Class token, patch tokens and pooled vector of the model, where it has them, computed in float32."""
  plain = model.clone(dtype='float32', **({} if model.remat == 'none' else {'remat': 'none'}))
  features = _apply(plain, nn.meta.unbox(params), image, channels)
  return [np.asarray(f) for f in (features.cls, features.patches, features.pool) if f is not None]


@functools.partial(jax.jit, static_argnums=0)  # an equal model is not compiled again
def _apply(model: Encoder, params: Params, image: jax.Array, channels: jax.Array | None):
  return model.apply({'params': params}, image, channels)


def pytorch_snippet(fmt: str, model: Encoder, file: str) -> str:
  """Python lines that load the exported `file` with torch (the format `jaxmed`: with jaxmed).

  After it ran, `encoder` is the model in evaluation mode with every tensor of the file in its place (strict).
  """
  if fmt == 'jaxmed':
    return f"import jaxmed\nencoder = jaxmed.load({file!r})\n"
  if fmt in TARGETS:
    return TARGETS[fmt].snippet(model, file)
  if isinstance(model, Hierarchical) and fmt == 'timm':
    return conv.snippet(model, file)
  if fmt.startswith('monai_'):
    return monai.snippet(fmt, model, file)
  if isinstance(model, BagOfChannels):
    model = model.single
  size, patch = tuple(model.image_size), tuple(model.patch_size)
  shape = (f'embed_dim={model.embed_dim}, depth={model.depth}, num_heads={model.num_heads}, '
           f'mlp_ratio={_torch_ratio(model)!r}, qkv_bias={model.qkv_bias}')
  if fmt == 'timm':
    glu, other = model.mlp == 'swiglu', model.norm_epsilon != NORM_EPSILON
    options = {'init_values': 1e-5 if model.layer_scale else None, 'class_token': model.class_token,
               'reg_tokens': model.num_registers, 'no_embed_class': model.no_embed_class} | (
        {'pre_norm': True} if model.pre_norm else {})
    more = ''.join(f', {k}={v!r}' for k, v in options.items())
    pool = 'map' if model.map_head else ''
    if glu:  # a block hands its act_layer on to the packed MLP, whose own default would be right
      more += ",\n    mlp_layer=timm.layers.SwiGLUPacked, act_layer='silu'"
    if other:
      more += f',\n    norm_layer=functools.partial(torch.nn.LayerNorm, eps={model.norm_epsilon!r})'
    return (f'import {"functools, " if other else ""}safetensors.torch, timm{", torch" if other else ""}\n'
            f'encoder = timm.models.vision_transformer.VisionTransformer(\n'
            f'    img_size={size}, patch_size={patch}, in_chans={model.in_channels}, {shape},\n'
            f"    num_classes=0, global_pool={pool!r}, dynamic_img_size=True{more})\n"
            f"encoder.load_state_dict(safetensors.torch.load_file({file!r}))\n"
            f'encoder.eval()\n')
  if fmt == 'channelvit':
    return (f'import functools, safetensors.torch, torch\n'
            f'from channelvit.backbone.hcs_channel_vit import ChannelVisionTransformer\n'
            f'encoder = ChannelVisionTransformer(\n'
            f'    img_size=[{size[0]}], patch_size={patch[0]}, in_chans={model.in_channels}, {shape},\n'
            f'    enable_sample=False, norm_layer=functools.partial(torch.nn.LayerNorm, eps={model.norm_epsilon!r}))\n'
            f"encoder.load_state_dict(safetensors.torch.load_file({file!r}))\n"
            f'encoder.eval()\n')
  raise UserError(f'unknown format {fmt!r}: choose one of {", ".join(sorted(FORMATS))}')


def _torch_ratio(model: Encoder) -> float:
  """The `mlp_ratio` argument for which int(embed_dim * ratio) is the width of the first layer in PyTorch.

  timm's SwiGLUPacked counts gate and value together.
  """
  width = int(model.embed_dim * model.mlp_ratio) * (2 if model.mlp == 'swiglu' else 1)
  return ratio_of(width, model.embed_dim)


def _call_lines(fmt: str, model: Encoder) -> str:
  if fmt in TARGETS:
    return TARGETS[fmt].call_lines(model)
  if isinstance(model, Hierarchical) and fmt == 'timm':
    return conv.call_lines(model)
  if fmt.startswith('monai_'):
    return monai.call_lines(fmt, model)
  if isinstance(model, BagOfChannels) and fmt == 'timm':
    return (f'{_call_lines(fmt, model.single)} Each channel of an image goes through it by itself; the vector of an '
            'image is the mean over its channels, or these one after the other.')
  prefix = model.num_prefix_tokens
  if fmt == 'timm' and model.map_head:
    return (f'`encoder(images)` takes float32 images [B, {model.in_channels}, H, W], normalised as below, and returns '
            f'vectors [B, {model.embed_dim}]; `encoder.forward_features(images)` returns the tokens.')
  if fmt == 'timm':
    return (f'`encoder(images)` takes float32 images [B, {model.in_channels}, H, W], normalised as below, '
            f'and returns tokens [B, {prefix} + N, {model.embed_dim}] after the final norm'
            + (': the class token first' if model.class_token else '')
            + (f', then {model.num_registers} registers' if model.num_registers else '')
            + ', then the patches row by row.')
  if fmt == 'channelvit':
    return (f"`encoder(images, {{'channels': ids}})` takes float32 images [B, C, H, W], normalised as below, "
            'and ids [B, C], the row of each channel in the table below, and returns the class token '
            f'[B, {model.embed_dim}]. The class is in the repository insitro/ChannelViT; '
            '`encoder.get_intermediate_layers` returns all tokens, channel by channel.')
  return '`encoder.embed(images, channels=names)` returns class, mean-pooled and patch features.'


def limits(fmt: str, model: Encoder) -> list[str]:
  """What the PyTorch class does otherwise than the model, one sentence each."""
  out = []
  native = 'x'.join(map(str, model.image_size))
  if fmt == 'timm' and getattr(model, 'pos', 'none') != 'none' and model.pos_interpolation != 'antialias':
    out.append(f'At image sizes other than {native} timm resamples positions with antialiasing; this '
               'model was trained without, so features differ slightly there.')
  if fmt == 'channelvit' and model.pos != 'none':
    out.append(f'With k channels at a square size whose patches times k equal those of {native} '
               '(four channels at half the size), the official class does not share positions between '
               'channels; this model does.')
  if fmt == 'monai_vit' and model.norm_epsilon != monai.EPSILON:
    out.append(f"MONAI's layer norms add {monai.EPSILON:g} to the variance, this model's {model.norm_epsilon:g}: "
               'features differ slightly.')
  if fmt != 'jaxmed' and model.dtype != 'float32':
    out.append(f'The model was trained with {model.dtype} compute; the file and the check are float32.')
  return out


def model_card(fmt: str, model: Encoder, info: Mapping[str, Any], *,
               file: str | os.PathLike = 'model.safetensors', title: str = 'Image encoder',
               config: Mapping[str, Any] | None = None,
               data: Mapping[str, Any] | None = None, metrics: Sequence[Mapping[str, Any]] = (),
               difference: float | None = None) -> str:
  """The Markdown card of an exported file.

  Args:
    info: as in the file's metadata: 'channels', 'normalize', 'feature', 'method'.
    file: the exported file; its name is used in the code.
    config: the resolved config of the run (nested is fine). data: a summary, name to value.
    metrics: rows of one table with the same columns, e.g. {'method', 'metric', 'value', 'low', 'high'}.
    difference: what `verify_export` returned.
  """
  file = pathlib.Path(file).name
  parts = [f'# {title}', _summary_of(f'{fmt!r} ({FORMATS[fmt].about})', model, info, difference),
           '## Use', f'```python\n{pytorch_snippet(fmt, model, file)}```', _call_lines(fmt, model),
           '## Preprocessing', _preprocessing(model, info)]
  if limits(fmt, model):
    parts += ['## Limits', '\n'.join(f'- {line}' for line in limits(fmt, model))]
  if metrics:
    parts += ['## Evaluation', _table(metrics)]
  if data:
    parts += ['## Data', '\n'.join(f'- {k}: {_text(v)}' for k, v in data.items())]
  if config:
    text = json.dumps(dict(config), indent=2, sort_keys=True, default=str)
    parts += ['## Configuration', f'```json\n{text}\n```']
  return '\n\n'.join(parts) + '\n'


def folder_card(snippet: str, model: Encoder, info: Mapping[str, Any], about: str, *, title: str,
                notes: Sequence[str] = (), difference: float | None = None) -> str:
  """The Markdown card of a folder of transformers or open_clip; `notes` are what its preprocessing cannot say."""
  parts = [f'# {title}', _summary_of(about, model, info, difference), '## Use', f'```python\n{snippet}```',
           '## Preprocessing', _preprocessing(model, info)]
  if notes:
    parts += ['## Limits', '\n'.join(f'- {note}' for note in notes)]
  return '\n\n'.join(parts) + '\n'


def architecture(model: Encoder) -> str:
  """The model in a line."""
  if isinstance(model, Hierarchical):
    return conv.architecture(model)
  kind = type(model).__name__
  return (f'{kind}, width {model.embed_dim}, {model.depth} blocks, {model.num_heads} heads, patches '
          f'{"x".join(map(str, model.patch_size))}')


def _summary_of(about: str, model: Encoder, info: Mapping[str, Any], difference: float | None) -> str:
  line = f'{architecture(model)}, native size {"x".join(map(str, model.image_size))}'
  if info.get('method'):
    line += f', trained by {info["method"]}'
  line += f'. Recommended feature: {info["feature"]}.' if info.get('feature') else '.'
  line += f' Tensors are float32 in the layout {about}.'
  if difference is not None:
    line += (f' Reading the file back gives the features of the trained model to within '
             f'{difference:.1e} (largest absolute difference).')
  return line


def _preprocessing(model: Encoder, info: Mapping[str, Any]) -> str:
  how = {'corpus': 'Each channel: (value - mean) / std, with the values below in native units.',
         'image': 'Each channel of each image: (value - its mean) / its standard deviation over the image.',
         'none': 'Images are used as they are.'}
  lines = [how.get(info.get('normalize', ''), f'Normalisation: {info.get("normalize", "not recorded")}.')]
  channels = info.get('channels', [])
  if channels:
    rows = [{'id': i, 'channel': c['name'], 'mean': c.get('mean'), 'std': c.get('std')}
            for i, c in enumerate(channels)]
    lines.append(_table(rows if info.get('normalize') == 'corpus' else
                        [{'id': r['id'], 'channel': r['channel']} for r in rows]))
  return '\n\n'.join(lines)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
  columns = list(dict.fromkeys(k for row in rows for k in row))
  lines = ['| ' + ' | '.join(columns) + ' |', '|' + ' --- |' * len(columns)]
  lines += ['| ' + ' | '.join(_text(row.get(c)).replace('|', '\\|') for c in columns) + ' |' for row in rows]
  return '\n'.join(lines)


def _text(value: Any) -> str:
  if value is None:
    return ''
  if isinstance(value, float):
    return f'{value:.{_DIGITS}g}'
  if isinstance(value, (dict, list, tuple)):
    return json.dumps(value, default=str)
  return str(value)
