"""Flat dicts of float32 arrays: safetensors files, the container of every layout here, and PyTorch's own, read."""

import os
import pathlib

import numpy as np
import safetensors
import safetensors.numpy

from jaxmed.errors import UserError
from jaxmed.files import read_json, writing
from jaxmed.interop.pickle_io import read_pickle

_FLOATS = ('F64', 'F32', 'F16', 'BF16')
_INDEX = '.index.json'
_PICKLES = ('.pth', '.pt', '.ckpt', '.bin', '.pkl')


def write_tensors(path: str | os.PathLike, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
  """Writes float32 arrays and text metadata; the file is whole or absent.

  A file with one metadata entry has the same bytes each time (the format does not order several).

  Raises:
    UserError: a tensor holds NaN or infinity, or the place cannot be written.
  """
  ready = {}
  for name, value in tensors.items():
    ready[name] = np.asarray(value, np.float32, order='C')  # a number keeps its rank of 0
    _check_finite(path, name, ready[name])
  with writing(path) as part:
    try:
      safetensors.numpy.save_file(ready, part, metadata)
    except safetensors.SafetensorError as e:  # a full disk arrives as this too
      raise UserError(f'cannot write {path}: {e}') from e


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Reads all floating-point tensors as float32, and the metadata (none in PyTorch's files, see `pickle_io`).

  float64, float16 and bfloat16 are converted; integer tensors (counters) are left out. Weights in several files
  (shards) are read by their index, model.safetensors.index.json, or by the folder that holds it.

  Raises:
    UserError: no such file, a damaged one, a shard that is missing, a pickle that names more than tensors, a NaN or
      infinite weight, an 8-bit float.
  """
  path = _main_file(pathlib.Path(path))
  if path.name.endswith(_INDEX):
    return _read_shards(path), {}
  if _is_pickle(path):
    tensors = read_pickle(path)
    for name, value in tensors.items():
      _check_finite(path, name, value)
    return tensors, {}
  try:
    with safetensors.safe_open(path, framework='numpy') as f:
      kinds = {name: f.get_slice(name).get_dtype() for name in f.keys()}  # noqa: SIM118 (not a dict)
      tensors = {name: f.get_tensor(name).astype(np.float32) for name, kind in kinds.items()
                 if kind in _FLOATS and kind != 'BF16'}
      metadata = f.metadata() or {}
  except (safetensors.SafetensorError, OSError) as e:
    raise UserError(f'cannot read {path} as safetensors, it is damaged or something else: {e}') from e
  odd = [name for name, kind in kinds.items() if kind.startswith('F') and kind not in _FLOATS]
  if odd:
    raise UserError(f'{path}: tensor {odd[0]!r} is {kinds[odd[0]]}, expected one of {", ".join(_FLOATS)}')
  if 'BF16' in kinds.values():
    tensors |= _read_bfloat16(path)
  for name, value in tensors.items():
    _check_finite(path, name, value)
  return tensors, metadata


def _main_file(path: pathlib.Path) -> pathlib.Path:
  """The file that stands for a folder of weights: its index of shards, or the one file of weights."""
  if not path.is_dir():
    return path
  names = sorted(p.name for p in path.iterdir() if p.is_file() and not p.name.startswith('.'))
  for ending in (f'.safetensors{_INDEX}', '.safetensors', f'.bin{_INDEX}', *_PICKLES):
    found = [name for name in names if name.endswith(ending)]
    if len(found) == 1:
      return path / found[0]
    if found:
      raise UserError(f'{path} is a folder with {len(found)} files of weights and no index of shards: name one of '
                      f'{", ".join(found[:5])}')
  raise UserError(f'{path} is a folder without weights: expected model.safetensors or its index of shards, '
                  'model.safetensors.index.json, in it')


def _read_shards(index: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of all shards that an index lists, each from the file that it names."""
  content = read_json(index)
  where = content.get('weight_map') if isinstance(content, dict) else None
  if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
    raise UserError(f'{index} is no index of shards: expected weight_map, the file of each tensor')
  out: dict[str, np.ndarray] = {}
  for name in sorted(set(where.values())):
    if name != os.path.basename(name) or name.endswith(_INDEX) or not name.strip('.'):
      raise UserError(f'{index} names the shard {name!r}: expected a file beside it')
    if not (index.parent / name).is_file():
      raise UserError(f'{index} names the shard {name}, which does not exist beside it: download it too')
    wanted = [tensor for tensor, file in where.items() if file == name]
    found = read_tensors(index.parent / name)[0]
    lost = [tensor for tensor in wanted if tensor not in found]
    if lost and not _is_pickle(index.parent / name):  # counters are not in `found`
      with safetensors.safe_open(index.parent / name, framework='numpy') as f:
        lost = sorted(set(lost) - set(f.keys()))
      if lost:
        raise UserError(f'{index.parent / name} has no tensor {lost[0]!r}, which {index.name} says is in it')
    out |= {tensor: found[tensor] for tensor in wanted if tensor in found}
  return out


def _read_bfloat16(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The bfloat16 tensors, which numpy has no type for, as float32: they are its upper 16 bits."""
  tensors = {}
  for name, view in safetensors.deserialize(path.read_bytes()):
    if view['dtype'] == 'BF16':
      bits = np.frombuffer(view['data'], '<u2').astype(np.uint32) << 16
      tensors[name] = bits.view(np.float32).reshape(view['shape'])
  return tensors


def _is_pickle(path: pathlib.Path) -> bool:
  """Whether a file is PyTorch's; a UserError where there is none."""
  if not path.is_file():
    raise UserError(f'{path} {"is no regular file" if path.exists() else "does not exist"}: expected a file of weights')
  try:
    with open(path, 'rb') as f:
      start = f.read(9)
  except OSError as e:
    raise UserError(f'cannot read {path}: {e.strerror or e}') from e
  named = path.suffix in _PICKLES and start[8:] != b'{'
  # The header of a safetensors file may be 128 + 256 n bytes long, and then begins as a pickle does.
  return start[:4] == b'PK\x03\x04' or named or (start[:1] == b'\x80' and start[8:] != b'{')


def _check_finite(path: str | os.PathLike, name: str, value: np.ndarray) -> None:
  bad = value.size - np.count_nonzero(np.isfinite(value))
  if bad and not name.endswith('.bias_mask'):  # a buffer of DINOv3, which is NaN where nobody filled it
    raise UserError(f'{path}: tensor {name!r} holds {bad} NaN or infinite of {value.size} values')
