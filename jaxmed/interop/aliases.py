"""Other projects' names for the tensors of a vision transformer, turned into timm's.

Their sources: facebookresearch/dinov2 (dinov2/models/vision_transformer.py, layers/swiglu_ffn.py), facebookresearch/mae
(models_mae.py), facebookresearch/dino (vision_transformer.py, which has timm's names already), facebookresearch/dinov3
(dinov3/models/vision_transformer.py, layers/attention.py, layers/ffn_layers.py).
"""

import logging
import re
from collections.abc import Mapping

import numpy as np

logger = logging.getLogger('jaxmed.interop')

_CHUNK = re.compile(r'^blocks\.\d+\.(\d+)\.')  # blocks.CHUNK.BLOCK, where FSDP wrapped chunks of blocks
_NAMES = ((_CHUNK, r'blocks.\1.'), (re.compile(r'\.mlp\.w12\.'), '.mlp.fc1.'),
          (re.compile(r'\.mlp\.w1\.'), '.mlp.fc1_g.'), (re.compile(r'\.mlp\.w2\.'), '.mlp.fc1_x.'),
          (re.compile(r'\.mlp\.w3\.'), '.mlp.fc2.'), (re.compile(r'^storage_tokens$'), 'reg_token'))
# A decoder, the token of hidden patches, and the norm of local crops, which is of use in training only.
_UNUSED = re.compile(r'^(decoder_|mask_token$|local_cls_norm\.)')


def timm_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors by timm's names; what no feature depends on is left out with a note.

  DINOv2 adds positions to the class token and the patches before it puts registers between them: they get rows of
  zeros in the table.
  """
  out: dict[str, np.ndarray] = {}
  for name, value in tensors.items():
    if _UNUSED.match(name):
      continue
    for pattern, new in _NAMES:
      name = pattern.sub(new, name)
    out[name] = value
  if len(out) < len(tensors):
    logger.warning('left out %d tensors of a decoder or mask token', len(tensors) - len(out))
  for name in [name for name in out if name.endswith('.attn.qkv.bias_mask')]:
    _mask_bias(out, name.removesuffix('_mask'), out.pop(name))
  if 'register_tokens' in out and 'pos_embed' in out:
    registers = out.pop('register_tokens')
    table = out['pos_embed']
    rows = np.zeros((1, registers.shape[1], table.shape[-1]), table.dtype)
    out |= {'reg_token': registers, 'pos_embed': np.concatenate([table[:, :1], rows, table[:, 1:]], axis=1)}
  return out


def _mask_bias(tensors: dict[str, np.ndarray], name: str, mask: np.ndarray) -> None:
  """DINOv3 multiplies the biases of queries, keys and values by a mask, which is 0 for keys; before training it is NaN.
  """
  if name in tensors and mask.shape == tensors[name].shape:
    usual = np.repeat(np.array([1, 0, 1], np.float32), len(mask) // 3)
    tensors[name] = tensors[name] * np.where(np.isfinite(mask), mask, usual)
