"""Bytes and rates of lossless codecs on real pixels: which one `prepare` should store images and bricks with.

Three samples: bricks of 64^3 voxels of the ICBM152 T1 template (nilearn; uint8), the same enlarged to 0.67 mm in int16
with noise of the strength of a scanner (one voxel in 20 of the white matter's value), and the colour fundus of
scikit-image in tiles of 256 x 256. Rates are of one thread, in MB of pixels a second, the best of several rounds.

Needs `make install` alone.

Example:
  python tools/bench_records.py --rounds 3
"""

import argparse
import importlib.util
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import imagecodecs as ic
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from tools.needs import need, run_script  # noqa: E402

Codec = tuple[Callable[[np.ndarray], bytes], Callable[[bytes, np.ndarray], np.ndarray]]


def _file(package: str, name: str) -> pathlib.Path:
  spec = importlib.util.find_spec(package)
  assert spec is not None and spec.origin is not None
  return pathlib.Path(spec.origin).parent / name


def samples() -> dict[str, list[np.ndarray]]:
  """Name -> arrays [Z, Y, X] or [H, W, 3]."""
  import nibabel
  from PIL import Image
  from scipy.ndimage import zoom

  path = _file('nilearn', 'datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz')
  t1 = np.ascontiguousarray(np.asanyarray(nibabel.nifti1.load(path).dataobj).T)
  fine = zoom(t1[32:160, 32:192, 32:160].astype(np.float32), 1.5, order=1)
  fine = (fine * 8 + np.random.default_rng(0).normal(0, 80, fine.shape)).round().astype(np.int16)
  with Image.open(_file('skimage', 'data/retina.jpg')) as image:
    retina = np.asarray(image)
  cut = lambda v, n: [np.ascontiguousarray(v[z:z + n, y:y + n, x:x + n]) for z in range(0, v.shape[0] - n + 1, n)
                      for y in range(0, v.shape[1] - n + 1, n) for x in range(0, v.shape[2] - n + 1, n)]
  tiles = [np.ascontiguousarray(retina[y:y + 256, x:x + 256]) for y in range(0, 1280, 256) for x in range(0, 1280, 256)]
  return {'T1 uint8 64^3': cut(t1, 64), 'T1 int16 64^3': cut(fine, 64), 'fundus uint8 256^2x3': tiles}


def _shuffled(a: np.ndarray) -> bytes:
  """The bytes of a value apart: all low ones, then all high ones."""
  return a.view(np.uint8).reshape(-1, a.itemsize).T.tobytes()


def _unshuffled(data: bytes, like: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(like.itemsize, -1).T).view(like.dtype).reshape(
    like.shape)


def _delta(a: np.ndarray, axis: int) -> np.ndarray:
  """Differences along an axis, wrapping around in the array's own type."""
  out = a.copy()
  index = [slice(None)] * a.ndim
  left, right = list(index), list(index)
  left[axis], right[axis] = slice(None, -1), slice(1, None)
  out[tuple(right)] -= a[tuple(left)]
  return out


def _sum(a: np.ndarray, axis: int) -> np.ndarray:
  return np.add.accumulate(a, axis=axis, dtype=a.dtype)


def codecs() -> dict[str, Codec]:
  """Name -> (encode, decode)."""
  raw = lambda data, like: np.frombuffer(data, like.dtype).reshape(like.shape)
  out: dict[str, Codec] = {'raw': (lambda a: a.tobytes(), raw)}
  for level in (1, 3, 9):
    out[f'zstd {level}'] = (lambda a, n=level: ic.zstd_encode(a.tobytes(), level=n),
                            lambda d, like: raw(ic.zstd_decode(d), like))
  for level in (1, 3):
    out[f'shuffle + zstd {level}'] = (lambda a, n=level: ic.zstd_encode(_shuffled(a), level=n),
                                      lambda d, like: _unshuffled(ic.zstd_decode(d), like))
    out[f'delta + shuffle + zstd {level}'] = (
      lambda a, n=level: ic.zstd_encode(_shuffled(_delta(a, 1)), level=n),
      lambda d, like: _sum(_unshuffled(ic.zstd_decode(d), like), 1))
  for name, level in (('zstd', 3), ('lz4hc', 9)):  # of an array: of bytes the size of a value is taken to be 8
    out[f'blosc2 bitshuffle {name} {level}'] = (
      lambda a, n=name, m=level: ic.blosc2_encode(a, level=m, compressor=n, shuffle='bitshuffle', numthreads=1),
      lambda d, like: raw(ic.blosc2_decode(d, numthreads=1), like))
  page = lambda a: a if a.ndim == 3 and a.shape[-1] == 3 else a.reshape(-1, a.shape[-1])
  unsigned = lambda a: a.view(np.uint16) if a.dtype == np.int16 else a
  out['png'] = (lambda a: ic.png_encode(unsigned(page(a)), level=6),
                lambda d, like: ic.png_decode(d).view(like.dtype).reshape(like.shape))
  out['jpeg-xl effort 1'] = (lambda a: ic.jpegxl_encode(unsigned(page(a)), lossless=True, effort=1, numthreads=1),
                             lambda d, like: ic.jpegxl_decode(d, numthreads=1).view(like.dtype).reshape(like.shape))
  out['jpeg-ls'] = (lambda a: ic.jpegls_encode(unsigned(page(a))),
                    lambda d, like: ic.jpegls_decode(d).view(like.dtype).reshape(like.shape))
  return out


def measure(arrays: list[np.ndarray], codec: Codec, rounds: int) -> tuple[float, float, float]:
  """Compressed size / size, and MB/s of encoding and decoding; the pixels must come back as they were."""
  encode, decode = codec
  size = sum(a.nbytes for a in arrays)
  slow, fast = [], []
  for _ in range(rounds):
    begin = time.perf_counter()
    packed = [encode(a) for a in arrays]
    middle = time.perf_counter()
    back = [decode(p, a) for p, a in zip(packed, arrays)]
    slow.append(middle - begin)
    fast.append(time.perf_counter() - middle)
  if not all(np.array_equal(a, b) for a, b in zip(arrays, back)):
    raise SystemExit('not lossless')
  return sum(map(len, packed)) / size, size / min(slow) / 1e6, size / min(fast) / 1e6


def main(argv: Sequence[str] | None = None) -> None:
  need('demo', 'nilearn', 'skimage')
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--most', type=int, default=0, help='arrays of each sample; 0: all')
  args = parser.parse_args(argv)
  for name, arrays in samples().items():
    arrays = arrays[:args.most or None]
    print(f'\n{name}: {len(arrays)} arrays, {sum(a.nbytes for a in arrays) / 1e6:.1f} MB')
    print(f'{"codec":28} {"size":>6} {"encode MB/s":>12} {"decode MB/s":>12}')
    for label, codec in codecs().items():
      ratio, slow, fast = measure(arrays, codec, args.rounds)
      print(f'{label:28} {ratio:6.3f} {slow:12.0f} {fast:12.0f}', flush=True)


if __name__ == '__main__':
  run_script(main)
