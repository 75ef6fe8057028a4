"""Folders of Hugging Face's transformers and of open_clip: written, read, compared with what they came from."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxmed import files
from jaxmed.errors import UserError
from jaxmed.interop import huggingface, two_towers
from jaxmed.interop.huggingface import CLASSES, CONFIG, OURS, PREPROCESSOR
from jaxmed.interop.safetensors_io import read_tensors, write_tensors
from jaxmed.interop.state_dict import Params
from jaxmed.interop.text import OPEN_CONFIG
from jaxmed.interop.two_towers import Towers
from jaxmed.models import registry
from jaxmed.models.encoders.vit import ViT

FORMATS = {'hf': "a folder of transformers, with the class that holds the network", 'hf_vit': 'ViTModel',
           'hf_vit_mae': 'ViTMAEModel', 'hf_dinov2': 'Dinov2Model, with registers Dinov2WithRegistersModel',
           'open_clip': "a folder of open_clip, of runs of images and texts"}
WEIGHTS, CARD, OPEN_WEIGHTS = 'model.safetensors', 'README.md', 'open_clip_model.safetensors'
TORCH = {'format': 'pt'}  # metadata without which transformers takes no file


def is_folder(path: str | os.PathLike) -> bool:
  """Whether a path is a folder of transformers or open_clip."""
  return (pathlib.Path(path) / OPEN_CONFIG).is_file() or huggingface.is_folder(path)


def read_encoder(path: str | os.PathLike) -> tuple[ViT, Params, dict[str, Any]]:
  """The encoder of a folder as of an exported file: model, parameters, info. Errors as of `huggingface`."""
  if not (pathlib.Path(path) / OPEN_CONFIG).is_file():
    return huggingface.read_encoder(path)
  config = files.read_json(pathlib.Path(path) / OPEN_CONFIG)
  towers = _of_open_clip(path, config)
  own = config.get(OURS)
  if own:
    return registry.rebuild(own['model']), towers.params, dict(own['info'])
  told = config.get('preprocess_cfg', {})
  usual = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])  # constants.py of open_clip
  mean, std = told.get('mean', usual[0]), told.get('std', usual[1])
  channels = [{'name': n, 'mean': 255 * m, 'std': 255 * s} for n, m, s in zip('RGB', mean, std, strict=True)]
  return towers.image, towers.params, {'channels': channels, 'normalize': 'corpus', 'method': 'imported',
                                       'feature': towers.feature}


def read_towers(path: str | os.PathLike) -> Towers:
  """Both towers of a folder of CLIP, SigLIP or open_clip."""
  folder = pathlib.Path(path)
  if (folder / OPEN_CONFIG).is_file():
    return _of_open_clip(path, files.read_json(folder / OPEN_CONFIG))
  config = files.read_json(folder / CONFIG)
  if config.get('model_type') not in ('clip', 'siglip'):
    raise UserError(f'{path} has model_type {config.get("model_type")}: expected clip or siglip')
  return two_towers.from_huggingface(read_tensors(path)[0], config)


def _of_open_clip(path: str | os.PathLike, config: Mapping[str, Any]) -> Towers:
  try:
    return two_towers.from_open_clip(read_tensors(path)[0], config['model_cfg'])
  except UserError as e:
    raise UserError(f'{path}: {e}') from e


def _check_place(path: str | os.PathLike) -> pathlib.Path:
  """The folder to write, or a UserError where something else is there."""
  folder = pathlib.Path(path)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f'{folder} exists and is not empty: choose another --out')
  return folder


def export_encoder(path: str | os.PathLike, fmt: str, model: ViT, params: Params, info: Mapping[str, Any],
                   more: tuple[Mapping[str, np.ndarray], Mapping[str, Any]] = ({}, {})) -> tuple[float, list[str]]:
  """Writes an encoder as a folder of transformers and reads it back as one that is not ours.

  Args:
    fmt: 'hf' for the class that holds it, or 'hf_vit', 'hf_vit_mae', 'hf_dinov2'.
    more: tensors and config of a decoder (`vit_mae`); the encoder's names then begin with 'vit.'.
  Returns:
    (the largest difference of a feature, what the preprocessor cannot say).
  Raises:
    UserError: the class cannot hold the model; names the option.
  """
  folder, kind = _check_place(path), fmt.removeprefix('hf_')
  if fmt == 'hf' or (kind == 'dinov2' and getattr(model, 'num_registers', False)):
    kind = huggingface.kind_of(model)
  same, p = huggingface.canonical(model, params, kind)
  tensors = huggingface.to_tensors(same, p, kind)
  if more[0]:
    tensors = {f'vit.{name}': x for name, x in tensors.items()} | dict(more[0])
  config = huggingface.vision_config(same, kind) | dict(more[1])
  notes = _write(folder, tensors, config, same, info, kind)
  other, again = huggingface.from_tensors(read_tensors(folder)[0], config, kind)
  image = jax.random.normal(jax.random.key(0), (2, *model.image_size, model.in_channels))
  difference = _difference((model, params), (other, again), image)
  if model.pos_interpolation != other.pos_interpolation:
    notes.append(f'At sizes other than {model.image_size[0]} {CLASSES[kind]} resamples positions by '
                 f"'{other.pos_interpolation}', not by '{model.pos_interpolation}': features differ slightly there.")
  return difference, notes


def _write(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], model: ViT,
           info: Mapping[str, Any], kind: str) -> list[str]:
  """The files of transformers' folder; returns what the preprocessor cannot say."""
  processor, notes = huggingface.preprocessor(model, info, kind)
  write_tensors(folder / WEIGHTS, dict(tensors), TORCH)
  files.write_json(folder / PREPROCESSOR, processor)
  ours = {'model': registry.describe(model), 'info': dict(info)}
  files.write_json(folder / CONFIG, {**config, OURS: ours})
  return notes


def export_towers(path: str | os.PathLike, fmt: str, towers: Towers, info: Mapping[str, Any]
                  ) -> tuple[float, list[str]]:
  """Writes two towers as a folder of transformers ('hf') or open_clip; returns as `export_encoder`."""
  folder, towers = _check_place(path), two_towers.on_host(towers)
  if fmt == 'open_clip':
    tensors, model_config, same = two_towers.to_open_clip(towers)
    notes = _write_open_clip(folder, tensors, model_config, same, info)
    again = two_towers.from_open_clip(read_tensors(folder)[0], model_config)
  else:
    tensors, config, same = two_towers.to_huggingface(towers)
    notes = _write(folder, tensors, config, same.image, info, two_towers.kind_of(towers))
    again = two_towers.from_huggingface(read_tensors(folder)[0], config)
  keys = jax.random.split(jax.random.key(0))
  image = jax.random.normal(keys[0], (2, *towers.image.image_size, towers.image.in_channels))
  ids = jax.random.randint(keys[1], (2, towers.text.context), 1, towers.text.vocab_size)
  pairs = zip(two_towers.vectors(towers, image, ids), two_towers.vectors(again, image, ids), strict=True)
  return float(np.max([np.abs(a - b).max() for a, b in pairs])), notes


def _write_open_clip(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], towers: Towers,
                     info: Mapping[str, Any]) -> list[str]:
  """The files of `open_clip.create_model('local-dir:FOLDER')`; returns what its preprocessing cannot say."""
  preprocess: dict[str, Any] = {'size': towers.image.image_size[0], 'mode': 'RGB', 'interpolation': 'bilinear',
                                'resize_mode': 'squash', 'mean': [0.0] * 3, 'std': [1.0] * 3}
  notes = []
  if info.get('normalize') == 'corpus':
    preprocess |= {key: [c[key] / 255 for c in info['channels']] for key in ('mean', 'std')}
  elif info.get('normalize') == 'none':
    preprocess['std'] = [1 / 255] * 3  # an image is divided by 255 first
  else:
    notes.append(f'open_clip does not normalise so: normalize={info.get("normalize")} standardises each image by '
                 'itself; do so before the model.')
  write_tensors(folder / OPEN_WEIGHTS, dict(tensors), TORCH)
  ours = {'model': registry.describe(towers.image), 'info': dict(info)}
  files.write_json(folder / OPEN_CONFIG, {'model_cfg': config, 'preprocess_cfg': preprocess, OURS: ours})
  return notes


def _difference(a: tuple[ViT, Params], b: tuple[ViT, Params], image: jax.Array) -> float:
  """The largest difference of a feature, in float32."""
  outs = []
  for model, params in (a, b):
    plain = model.clone(dtype='float32', remat='none')
    outs.append(jax.jit(lambda p, x, plain=plain: plain.apply({'params': p}, x))(params, image))
  keys = ('cls', 'registers', 'patches', 'pool')
  return max(float(np.abs(np.asarray(x) - np.asarray(y)).max())
             for key in keys for x, y in [(getattr(outs[0], key), getattr(outs[1], key))] if x is not None)


def snippet(fmt: str, path: str | os.PathLike, towers: bool) -> str:
  """Lines of PyTorch that load a folder."""
  name = pathlib.Path(path).name
  if fmt == 'open_clip':
    return (f"import open_clip\nmodel, preprocess = open_clip.create_model_from_pretrained('local-dir:{name}')\n"
            'images, texts = model.encode_image, model.encode_text\n')
  last = 'model.get_image_features(pixel_values)' if towers else 'model(pixel_values).last_hidden_state'
  return ('from transformers import AutoImageProcessor, AutoModel\n'
          f"model = AutoModel.from_pretrained('{name}').eval()\n"
          f"pixel_values = AutoImageProcessor.from_pretrained('{name}')(images, return_tensors='pt')['pixel_values']\n"
          f'{last}\n')
