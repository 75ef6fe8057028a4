"""PyTorch's checkpoint files read and written without torch, and without running anything that is in them.

Both containers of `torch.save` are read: the zip archive (PyTorch 1.6 and later: `data.pkl` beside one stored entry a
storage; torch/serialization.py) and the row of pickles before it. A pickle is a program that may import and call
whatever it names, so an unpickler that knows a fixed list of names takes its place: tensors, ordered dictionaries, and
a few plain things which lie beside weights in published checkpoints and become empty objects. Any other name ends the
reading with a line that tells it.
"""

import collections
import dataclasses
import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from jaxmed.errors import UserError
from jaxmed.files import writing

MAX_PICKLE = 256 << 20  # bytes of a program; weights lie beside it
MAX_DEPTH = 32  # of dictionaries in dictionaries
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

# Storages by the names of their classes: the type of an element, None for one that numpy lacks (bfloat16).
_STORAGES: dict[str, np.dtype | None] = {
    'DoubleStorage': np.dtype('<f8'), 'FloatStorage': np.dtype('<f4'), 'HalfStorage': np.dtype('<f2'),
    'BFloat16Storage': None, 'LongStorage': np.dtype('<i8'), 'IntStorage': np.dtype('<i4'),
    'ShortStorage': np.dtype('<i2'), 'CharStorage': np.dtype('<i1'), 'ByteStorage': np.dtype('<u1'),
    'BoolStorage': np.dtype('?'),
}
# What may lie beside weights and holds none: settings, scalars, dates, random states. It becomes an `Inert`, so these
# names are never imported.
_INERT = {
    'argparse.Namespace', 'types.SimpleNamespace', 'typing.Any', 'collections.deque', '_codecs.encode',
    'decimal.Decimal', 'fractions.Fraction', 'uuid.UUID', 'builtins.set', 'builtins.frozenset', 'builtins.bytearray',
    'builtins.complex', 'builtins.range', 'builtins.slice', 'builtins.bytes', 'builtins.object', '__builtin__.set',
    '__builtin__.frozenset', '__builtin__.bytearray', '__builtin__.complex', '__builtin__.object', 'torch.Size',
    'torch.device', 'torch.strided', 'torch.nn.parameter.UninitializedParameter', 'copy_reg._reconstructor',
    'copyreg._reconstructor',
}
_INERT_MODULES = ('numpy', 'pathlib', 'datetime', 'omegaconf')  # all names of these
_DTYPES = {'float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'int16', 'int8', 'uint8', 'bool', 'half',
           'float', 'double', 'long', 'int', 'complex64', 'complex128'}
# Factories of a defaultdict, which are never called.
_FACTORIES = {f'{module}.{name}' for module in ('builtins', '__builtin__')
              for name in ('dict', 'list', 'tuple', 'int', 'long', 'float', 'str', 'unicode', 'bool')}


class _Dict(dict):
  """Stands for a dictionary of another class: keeps what a pickle puts in, and takes no argument but a dictionary."""

  def __new__(cls, *args: Any, **kwargs: Any) -> '_Dict':
    del args, kwargs
    return super().__new__(cls)

  def __init__(self, *args: Any):
    super().__init__(*(a for a in args if isinstance(a, dict)))

  def __setstate__(self, state: Any) -> None:
    del state


class Inert:
  """Stands for a thing that is not needed: takes whatever a pickle gives it, and does nothing."""

  def __new__(cls, *args: Any, **kwargs: Any) -> 'Inert':
    del args, kwargs
    return super().__new__(cls)

  def __init__(self, *args: Any, **kwargs: Any):
    del args, kwargs

  def __setstate__(self, state: Any) -> None:
    del state

  def __setitem__(self, key: Any, value: Any) -> None:
    del key, value

  def append(self, value: Any) -> None:
    """Drops an item."""
    del value

  def extend(self, values: Any) -> None:
    """Drops items."""
    del values

  add = append

  def __hash__(self) -> int:
    return 0


@dataclasses.dataclass(frozen=True)
class _Storage:
  """A storage by its key in the container; `kind` is the name of its class, `count` its elements."""

  key: str
  kind: str
  count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """A view of a storage, in elements, before its bytes are read."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  stride: tuple[int, ...]


def read_pickle(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """All floating-point tensors of a file of `torch.save` as float32, by their keys joined with '.'.

  Dictionaries in dictionaries are walked by their text keys ('teacher' -> 'backbone.cls_token' gives
  'teacher.backbone.cls_token'); lists and dictionaries with other keys (the state of an optimizer) are not.

  Raises:
    UserError: a damaged file, a name that is not on the list, a tensor that lies outside its storage.
  """
  try:
    with open(path, 'rb') as f:
      start = f.read(4)
      f.seek(0)
      read: Callable[[str | os.PathLike, BinaryIO], dict[str, np.ndarray]] = (
          _read_zip if start == b'PK\x03\x04' else _read_legacy)
      return read(path, f)
  except UserError:
    raise
  except OSError as e:
    raise UserError(f'cannot read {path}: {e.strerror or e}') from e
  except Exception as e:  # a hostile or cut pickle raises almost anything
    raise UserError(f'cannot read {path} as a PyTorch checkpoint, it is damaged or something else: '
                    f'{type(e).__name__}: {" ".join(str(e).split())[:200]}') from e


class _Unpickler(pickle.Unpickler):
  """Knows the names in this module and no others; `storages` are those that the pickle refers to, by their keys."""

  def __init__(self, file: BinaryIO, path: str | os.PathLike):
    super().__init__(file, encoding='utf-8')
    self._path = path
    self.storages: dict[str, _Storage] = {}

  def find_class(self, module: str, name: str) -> Any:
    """The stand-in for a name."""
    full = f'{module}.{name}'
    if full == 'collections.OrderedDict':
      return collections.OrderedDict
    if full in ('collections.defaultdict', 'collections.Counter'):
      return _Dict
    if full == 'torch._utils._rebuild_tensor_v2':
      return _rebuild_tensor
    if full == 'torch._utils._rebuild_parameter':
      return lambda data, *_: data
    if module in ('torch', 'torch.cuda') and name in _STORAGES:
      return _Storages(name)
    if full in _INERT or full in _FACTORIES or module.partition('.')[0] in _INERT_MODULES or (
        module == 'torch' and name in _DTYPES):
      return Inert
    raise UserError(f'{self._path} names {full}, which is not read from a checkpoint (it could run code): expected '
                    'tensors in dictionaries. If you trust the file, save its state_dict alone with torch')

  def persistent_load(self, pid: Any) -> _Storage:
    """A storage, which a pickle refers to as ('storage', class, key, device, elements)."""
    if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == 'storage' and isinstance(pid[1], _Storages)):
      raise UserError(f'{self._path} refers to something that is no storage: expected a checkpoint of tensors')
    if len(pid) > 5 and pid[5] is not None:
      raise UserError(f'{self._path} has storages that are parts of others, as before PyTorch 0.4: save it again')
    storage = _Storage(str(pid[2]), pid[1].kind, int(pid[4]))
    self.storages[storage.key] = storage
    return storage


@dataclasses.dataclass(frozen=True)
class _Storages:
  """What the class of a storage is unpickled as."""

  kind: str


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
  if not isinstance(storage, _Storage):
    raise pickle.UnpicklingError('a tensor without a storage')
  return _Tensor(storage, int(offset), tuple(int(n) for n in shape), tuple(int(n) for n in stride))


def _load(data: bytes, path: str | os.PathLike) -> Any:
  return _Unpickler(io.BytesIO(data), path).load()


def _read_zip(path: str | os.PathLike, file: BinaryIO) -> dict[str, np.ndarray]:
  with zipfile.ZipFile(file) as archive:
    names = {name.partition('/')[2]: name for name in archive.namelist()}

    def entry(name: str, most: int) -> bytes:
      info = archive.getinfo(names[name])
      if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
        raise UserError(f'{path}: its part {name!r} is compressed or larger than {most} bytes, which torch.save never '
                        'writes')
      return archive.read(info)

    if 'data.pkl' not in names:
      raise UserError(f'{path} is a zip archive but no PyTorch checkpoint: it has no data.pkl')
    if 'byteorder' in names and entry('byteorder', 16) != b'little':
      raise UserError(f'{path} was saved on a big-endian machine, which is not read')
    content = _load(entry('data.pkl', MAX_PICKLE), path)
    return _arrays(path, content, lambda s: entry(f'data/{s.key}', _bytes(s)))


def _read_legacy(path: str | os.PathLike, file: BinaryIO) -> dict[str, np.ndarray]:
  """Five pickles (magic, protocol, system, content, keys of storages), then each storage: its length, its elements."""
  size = os.fstat(file.fileno()).st_size
  known: dict[str, _Storage] = {}
  parts = []
  for _ in range(5):
    unpickler = _Unpickler(file, path)
    parts.append(unpickler.load())
    known |= unpickler.storages
  if parts[0] != _LEGACY_MAGIC:
    raise UserError(f'{path} is a pickle but no PyTorch checkpoint')
  data: dict[str, bytes] = {}
  for key in parts[4]:
    count = int.from_bytes(file.read(8), 'little')
    if key not in known:
      raise UserError(f'{path} holds the storage {key!r} of no tensor that is read: save its state_dict alone')
    width = _bytes(known[key]) // max(known[key].count, 1)
    if count != known[key].count or count * width > size:
      raise UserError(f'{path} is damaged: storage {key!r} has {count} elements, expected {known[key].count}')
    data[key] = file.read(count * width)
  return _arrays(path, parts[3], lambda s: data[s.key])


def _tensors(content: Any, prefix: str = '', depth: int = 0) -> dict[str, _Tensor]:
  """Tensors by their keys joined with '.'."""
  out: dict[str, _Tensor] = {}
  if isinstance(content, Mapping) and depth < MAX_DEPTH and all(isinstance(k, str) for k in content):
    for key, value in content.items():
      if isinstance(value, _Tensor):
        out[prefix + key] = value
      else:
        out |= _tensors(value, f'{prefix}{key}.', depth + 1)
  return out


def _bytes(storage: _Storage) -> int:
  kind = _STORAGES[storage.kind]
  return storage.count * (2 if kind is None else kind.itemsize)


def _arrays(path: str | os.PathLike, content: Any, read: Callable[[_Storage], bytes]) -> dict[str, np.ndarray]:
  """The floating-point tensors as float32; `read` gives the bytes of a storage."""
  out: dict[str, np.ndarray] = {}
  buffers: dict[str, np.ndarray] = {}
  for name, tensor in _tensors(content).items():
    storage = tensor.storage
    kind = _STORAGES[storage.kind]
    if kind is not None and kind.kind != 'f':
      continue
    if storage.key not in buffers:
      buffers[storage.key] = _elements(path, storage, read(storage))
    out[name] = _view(path, name, tensor, buffers[storage.key])
  if not out:
    raise UserError(f'{path} holds no tensors in dictionaries: expected a state_dict')
  return out


def _elements(path: str | os.PathLike, storage: _Storage, data: bytes) -> np.ndarray:
  if len(data) != _bytes(storage):
    raise UserError(f'{path} is damaged: storage {storage.key!r} has {len(data)} bytes, expected {_bytes(storage)}')
  kind = _STORAGES[storage.kind]
  if kind is None:  # bfloat16: the upper half of a float32
    return (np.frombuffer(data, '<u2').astype(np.uint32) << 16).view(np.float32)
  return np.frombuffer(data, kind).astype(np.float32)


def _view(path: str | os.PathLike, name: str, tensor: _Tensor, buffer: np.ndarray) -> np.ndarray:
  shape, stride = tensor.shape, tensor.stride
  last = tensor.offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
  outside = last >= len(buffer) or min((tensor.offset, *shape, *stride)) < 0
  count = math.prod(int(n) for n in shape)
  if count > len(buffer) or (outside and count):  # a view never needs more than it has
    raise UserError(f'{path} is damaged: tensor {name!r} of shape {list(shape)} lies outside its storage')
  strides = tuple(s * buffer.itemsize for s in stride)
  return np.lib.stride_tricks.as_strided(buffer[tensor.offset:], shape, strides).copy()


def write_pickle(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
  """Writes nested dictionaries, lists, texts, numbers and None, with arrays as float32 tensors, as `torch.save` does.

  `torch.load(weights_only=True)` reads it. One array in several places is stored once. Whole or not at all.

  Raises:
    UserError: the place cannot be written. TypeError: something else in the content.
  """
  storages: list[np.ndarray] = []
  program = b'\x80\x02' + _encoded(content, storages, {}) + b'.'
  with writing(path) as part, zipfile.ZipFile(part, 'w', zipfile.ZIP_STORED) as archive:
    entry = lambda name, data: archive.writestr(zipfile.ZipInfo(f'archive/{name}'), data)
    entry('data.pkl', program)
    entry('byteorder', b'little')
    for i, array in enumerate(storages):
      entry(f'data/{i}', array.tobytes())
    entry('version', b'3\n')


def _encoded(value: Any, storages: list[np.ndarray], known: dict[int, int]) -> bytes:
  """The program of protocol 2 that makes a value; arrays go to `storages`, `known` has their places by id."""
  again = lambda item: _encoded(item, storages, known)
  if value is None or isinstance(value, bool):
    return {None: b'N', True: b'\x88', False: b'\x89'}[value]
  if isinstance(value, int):
    return b'J' + value.to_bytes(4, 'little', signed=True)
  if isinstance(value, float):
    return b'G' + struct.pack('>d', value)
  if isinstance(value, str):
    text = value.encode()
    return b'X' + len(text).to_bytes(4, 'little') + text
  if isinstance(value, Mapping):
    return b'}(' + b''.join(again(k) + again(v) for k, v in value.items()) + b'u'
  if isinstance(value, (list, tuple)):
    ends = (b'(', b't') if isinstance(value, tuple) else (b'](', b'e')
    return ends[0] + b''.join(map(again, value)) + ends[1]
  if not isinstance(value, np.ndarray):
    raise TypeError(f'{type(value).__name__} has no place in a checkpoint')
  if id(value) not in known:
    known[id(value)] = len(storages)
    storages.append(np.ascontiguousarray(value, '<f4'))
  stride = tuple(s // 4 for s in storages[known[id(value)]].strides)
  storage = b'(' + again('storage') + b'ctorch\nFloatStorage\n' + again(str(known[id(value)])) + again('cpu') + again(
      value.size) + b'tQ'
  hooks = b'ccollections\nOrderedDict\n)R'
  return (b'ctorch._utils\n_rebuild_tensor_v2\n(' + storage + again(0) + again(tuple(value.shape)) + again(stride)
          + again(False) + hooks + b'tR')
