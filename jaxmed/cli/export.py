"""`jaxmed export`: an encoder for PyTorch."""

import argparse
import pathlib
import shutil
from typing import Any

from jaxmed import files
from jaxmed.cli.common import millimetres, tower, which
from jaxmed.errors import UserError, choose

DOES = 'write the encoder for PyTorch'
EXAMPLE = 'jaxmed export run --format timm --out encoder.safetensors'
NNSSL = 'nnssl'
EXPORT_TOLERANCE = 1e-4  # largest difference of a float32 feature that `export` accepts


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  which(p)
  tower(p)
  p.add_argument('--format', required=True, help='weight format: hf, a folder for transformers (or hf_vit, hf_vit_mae, '
                 'hf_dinov2 by its class), open_clip, a folder for it, timm, channelvit, monai_vit, '
                 'monai_swinunetr, monai_swinunetr_legacy, monai_swinunetr_mergingv2, nnunet, stunet, torchvision, '
                 "jaxmed, or nnssl: a .pth for nnU-Net's fine-tuning of pretrained networks")
  p.add_argument('--spacing', metavar='MM', help='with nnssl: spacing of the images of pretraining, along the stored '
                 'axes: 1,1,1; default: none, nnU-Net then takes that of the data it is fine-tuned on')
  p.add_argument('--out', required=True, metavar='FILE.safetensors|FOLDER',
                 help='file to write; of hf and open_clip a folder')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Writes the encoder for PyTorch, reads it back, compares, and writes the card."""
  import jax

  from jaxmed.interop import folders, verify
  from jaxmed.interop import weight_formats as layouts
  from jaxmed.parallel import compilation
  from jaxmed.train.build.rundir import load
  compilation.keep()
  choose('format', args.format, (*layouts.FORMATS, NNSSL, *folders.FORMATS))
  if args.format in folders.FORMATS:
    return _folder(args)
  encoder = load(args.path, args.checkpoint, args.tower)
  if not hasattr(encoder, 'model'):
    raise UserError(f'the tower {args.tower} is of texts: export writes encoders of images')
  if args.format == NNSSL:
    return _checkpoint(encoder, args)
  model = encoder.model
  info = encoder.described
  layouts.export_file(args.out, args.format, model, encoder.params, info)
  image = jax.random.normal(jax.random.key(0), (2, *model.image_size, model.in_channels))
  difference = verify.verify_export(args.out, model, encoder.params, image)
  if not difference <= EXPORT_TOLERANCE:
    pathlib.Path(args.out).unlink()
    raise RuntimeError(f'{args.out} did not give the features of the model back: largest difference {difference}')
  run = pathlib.Path(args.path)
  read = lambda name: files.read_json(run / name) if run.is_dir() and (run / name).exists() else None
  result = read('evaluation.json')
  card = pathlib.Path(args.out).with_suffix('.md')
  files.write_text(card, verify.model_card(
      args.format, model, info, file=pathlib.Path(args.out).name, title=f'{info.get("model", "encoder")} by jaxmed',
      config=read('config.json'), data=(read('data.json') or {}).get('summary'),
      metrics=_scores(result) if result else (), difference=difference))
  return {'json': {'out': args.out, 'card': str(card), 'format': args.format, 'difference': difference},
          'text': f'{args.out} ({args.format}), read back with a largest difference of {difference:.2g}\ncard: {card}'}


def _folder(args: argparse.Namespace) -> dict[str, Any]:
  """Writes a folder of transformers or open_clip, reads it back, compares, and writes the card."""
  from jaxmed.interop import folders, verify
  from jaxmed.train.build import rundir
  encoder, pair, tokenizer, more = rundir.load_for_folder(args.path, args.checkpoint, args.tower, args.format)
  info = encoder.described
  if pair is not None:
    difference, notes = folders.export_towers(args.out, args.format, pair, info)
  else:
    difference, notes = folders.export_encoder(args.out, args.format, encoder.model, encoder.params, info, more)
  if not difference <= EXPORT_TOLERANCE:
    shutil.rmtree(args.out)
    raise RuntimeError(f'{args.out} did not give the features of the model back: largest difference {difference}')
  if tokenizer is not None and tokenizer.model:
    tokenizer.save(pathlib.Path(args.out))
  card = pathlib.Path(args.out) / folders.CARD
  files.write_text(card, verify.folder_card(
      folders.snippet(args.format, args.out, pair is not None), encoder.model, info, folders.FORMATS[args.format],
      title=f'{info.get("model", "encoder")} by jaxmed', notes=notes, difference=difference))
  return {'json': {'out': args.out, 'card': str(card), 'format': args.format, 'difference': difference, 'notes': notes},
          'text': '\n'.join([f'{args.out} ({args.format}), read back with a largest difference of {difference:.2g}',
                             *notes, f'card: {card}'])}


def _checkpoint(encoder: Any, args: argparse.Namespace) -> dict[str, Any]:
  """Writes the encoder and nnssl's plan of how nnU-Net goes on with it."""
  from jaxmed.interop import nnssl
  spacing = millimetres('--spacing', args.spacing, len(encoder.image_size)) if args.spacing else None
  nnssl.write_checkpoint(args.out, encoder.model, encoder.params, spacing)
  return {'json': {'out': args.out, 'format': NNSSL},
          'text': f'{args.out}: nnUNetv2_preprocess_like_nnssl -d DATASET -n NAME -pc {args.out} -am '
                  f'{"like_pretrained" if spacing else "default_nnunet"}'}


def _scores(result: dict[str, Any]) -> list[dict[str, Any]]:
  """A row for each score of an evaluation."""
  return [{'features': row['features'], 'method': row['method'], 'metric': metric, **cell}
          for row in result['rows'] for metric, cell in row['metrics'].items()]
