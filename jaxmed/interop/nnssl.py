"""A checkpoint that nnU-Net's fine-tuning of pretrained networks takes: an encoder, and nnssl's plan of how it goes on.

Keys of MIC-DKFZ/nnUNet (2026-07) like_nnssl.py:preprocess_like_nnssl and pretrainedTrainer.py:load_pretrained_weights.
nnU-Net takes the encoder and the stem, makes the decoder anew, and repeats the stem's kernels over further channels,
divided by their number.
"""

import os
from collections.abc import Sequence
from typing import Any

from jaxmed.errors import UserError
from jaxmed.interop import nnunet
from jaxmed.interop.nnunet import Network
from jaxmed.interop.pickle_io import write_pickle
from jaxmed.interop.state_dict import Params
from jaxmed.models.encoders.unet import UNet


def adaptation_plan(encoder: UNet, spacing: Sequence[float] | None = None) -> dict[str, Any]:
  """What `nnUNetv2_preprocess_like_nnssl` and the trainer ask of a checkpoint, beside the weights.

  Args:
    spacing: mm of a voxel along the axes on which it was pretrained; None where they varied.
  Raises:
    UserError: nnU-Net's classes cannot hold the encoder.
  """
  nnunet.check_nnunet(encoder)
  if spacing is not None and (len(spacing) != 3 or min(spacing) <= 0):
    raise UserError(f'spacing {tuple(spacing)}: expected three numbers of mm above 0, one for each stored axis')
  if len(encoder.image_size) != 3:
    raise UserError(f"format 'nnssl' holds encoders of volumes, not of image size {tuple(encoder.image_size)}: export "
                    'with --format nnunet')
  stem = 'encoder.stages.0' if encoder.block == 'plain' else 'encoder.stem'
  first = 'encoder.stages.0.0.convs.0' if encoder.block == 'plain' else 'encoder.stem.convs.0'
  size = list(encoder.image_size)
  configuration = {'spacing': None if spacing is None else [float(s) for s in spacing], 'patch_size': size}
  return {
      'pretrain_plan': {'configurations': {'pretraining': configuration}},
      'architecture_plans': {'arch_class_name': nnunet.class_of(encoder), 'arch_kwargs': nnunet.arch_kwargs(encoder),
                             'arch_kwargs_requiring_import': list(nnunet.IMPORTED)},
      'pretrain_num_input_channels': encoder.in_channels, 'recommended_downstream_patchsize': size,
      'key_to_encoder': 'encoder.stages', 'key_to_stem': stem,
      'keys_to_in_proj': [f'{first}.conv', f'{first}.all_modules.0'], 'key_to_lpe': None}


def write_checkpoint(path: str | os.PathLike, encoder: UNet, params: Params,
                     spacing: Sequence[float] | None = None) -> None:
  """Writes the checkpoint, a file of `torch.save`; arguments and errors as for `adaptation_plan`."""
  plan = adaptation_plan(encoder, spacing)
  weights = nnunet.to_nnunet(Network(encoder, params))
  write_pickle(path, {'network_weights': weights, 'nnssl_adaptation_plan': plan, 'citations': []})
