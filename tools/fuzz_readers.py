"""Damages files of every format and reads them: each must be read or refused with one line, soon and in little memory.

  python tools/fuzz_readers.py --count 2000 --seed 0 --keep failures

Files are cut, bits of them flipped, pieces overwritten, repeated, left out, and numbers in their headers made large;
some are made to harm: declared sizes of terabytes, compressed zeros, pickles, links and names that lead elsewhere.
Each file is read in a process of its own with 2 GiB beyond what the programs take, for 10 seconds at most. Prints what
became of them by format; files that crashed a reader, ran on, or ran their code are kept, and the exit code is then 1.

Needs `pip install -e '.[test]'`.
"""

import argparse
import collections
import contextlib
import gzip
import io
import json
import os
import pathlib
import pickle
import resource
import signal
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence

os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')  # threads do not survive a fork

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from tools.needs import need, run_script  # noqa: E402

SECONDS, MEMORY = 10, 2 << 30
DICOMS = ('CT_small', 'MR_small_RLE', 'MR_small_jp2klossless', 'MR_small_jpeg_ls_lossless', 'SC_rgb_jpeg_dcmtk',
          'SC_rgb_rle_2frame', 'SC_rgb_jpeg_gdcm', 'image_dfl', 'SC_rgb_gdcm_KY', 'JPGExtended')


class Payload:
  """Unpickled, it leaves a file behind."""

  def __init__(self, marker: pathlib.Path):
    self.marker = marker

  def __reduce__(self):
    return os.system, (f'touch {self.marker}',)


def write_seeds(folder: pathlib.Path) -> None:
  """A small valid file of each format, by the format's own library (ND2: as the tests write it)."""
  rng = np.random.default_rng(0)
  volume = rng.integers(0, 3000, (17, 20, 24)).astype(np.int16)
  colour = rng.integers(0, 255, (24, 32, 3)).astype(np.uint8)
  _write_images(folder, volume, colour)
  _write_volumes(folder, volume)
  _write_video(folder)
  _write_microscopes(folder, colour)
  import pydicom

  for name in DICOMS:
    source = pathlib.Path(pydicom.__file__).parent / f'data/test_files/{name}.dcm'
    (folder / f'{name}.dcm').write_bytes(source.read_bytes())


def _write_images(folder: pathlib.Path, volume: np.ndarray, colour: np.ndarray) -> None:
  import tifffile
  from PIL import Image

  for suffix in ('png', 'jpg'):
    Image.fromarray(colour).save(folder / f'a.{suffix}')
  Image.fromarray(volume[0].astype(np.uint16)).save(folder / 'deep.png')
  tifffile.imwrite(folder / 'a.tif', volume.astype(np.uint16), compression='zlib', photometric='minisblack')
  tifffile.imwrite(folder / 'a.ome.tif', volume.astype(np.uint16), bigtiff=True,
                   metadata={'axes': 'ZYX', 'PhysicalSizeX': 0.5, 'PhysicalSizeY': 0.5})
  full = np.full((512, 512, 3), 240, np.uint8)
  full[:256, :256] = np.resize(colour, (256, 256, 3))
  with tifffile.TiffWriter(folder / 'a.svs') as w:
    options = {'tile': (128, 128), 'photometric': 'rgb', 'compression': 'jpeg'}
    w.write(full, subifds=1, resolution=(20000, 20000), resolutionunit='CENTIMETER', **options)
    w.write(full[::2, ::2], subfiletype=1, **options)
  np.save(folder / 'a.npy', volume)
  np.savez_compressed(folder / 'a.npz', image=colour, channels=['R', 'G', 'B'], spacing=[1.0, 1.0])


def _write_volumes(folder: pathlib.Path, volume: np.ndarray) -> None:
  import h5py
  import nibabel
  import SimpleITK as sitk
  import zarr

  for suffix in ('nii', 'nii.gz'):
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.0, 2, 3, 1])), folder / f'a.{suffix}')
  image = sitk.GetImageFromArray(volume)
  for suffix in ('nrrd', 'mha'):
    sitk.WriteImage(image, str(folder / f'a.{suffix}'), useCompression=True)
  with h5py.File(folder / 'a.h5', 'w') as f:
    f.create_dataset('image', data=volume, compression='gzip', chunks=(2, 8, 8)).attrs['spacing'] = [1.0, 1.0, 1.0]
  group = zarr.open_group(str(folder / 'a.zarr'), mode='w')
  group.create_array('0', shape=volume.shape, dtype=volume.dtype, chunks=(17, 20, 24))[...] = volume
  group.attrs['ome'] = {'version': '0.5', 'multiscales': [{
    'axes': [{'name': a, 'type': 'space', 'unit': 'micrometer'} for a in 'zyx'],
    'datasets': [{'path': '0', 'coordinateTransformations': [{'type': 'scale', 'scale': [1.0, 1.0, 1.0]}]}]}]}


def _write_video(folder: pathlib.Path) -> None:
  import av

  for suffix, codec in (('mp4', 'mpeg4'), ('avi', 'mjpeg'), ('mkv', 'ffv1'), ('webm', 'libvpx-vp9')):
    with av.open(str(folder / f'a.{suffix}'), 'w') as out:
      stream = out.add_stream(codec, rate=5)
      stream.width, stream.height = 64, 48
      stream.pix_fmt = 'yuvj420p' if codec == 'mjpeg' else 'yuv420p'
      for i in range(12):
        frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), i * 20, np.uint8), format='rgb24')
        for packet in stream.encode(frame):
          out.mux(packet)
      for packet in stream.encode():
        out.mux(packet)


def _write_microscopes(folder: pathlib.Path, colour: np.ndarray) -> None:
  from tests.data.readers import czis, nd2s

  for name in ('tczyx', 'rgb', 'zstd'):
    (folder / f'{name}.czi').write_bytes(czis.unpack(name))
  nd2s.write(folder / 'a.nd2', colour[None, ..., :2], ['a', 'b'], 0.5)


def damage(data: bytes, rng: np.random.Generator) -> bytes:
  """One to three random injuries."""
  out = bytearray(data)
  for _ in range(rng.integers(1, 4)):
    _INJURIES[rng.integers(len(_INJURIES))](out, rng)
    if not out:
      break
  return bytes(out)


def _cut(out: bytearray, rng) -> None:
  del out[int(len(out) * rng.random()):]


def _flip(out: bytearray, rng) -> None:
  end = len(out) if rng.random() < 0.5 else min(len(out), 1024)  # headers matter most
  for at in rng.integers(0, end, rng.integers(1, 33)):
    out[at] ^= 1 << int(rng.integers(8))


def _overwrite(out: bytearray, rng) -> None:
  at, size = int(rng.integers(len(out))), int(rng.integers(1, 65))
  out[at : at + size] = rng.bytes(size) if rng.random() < 0.5 else bytes([int(rng.choice([0, 255]))]) * size


def _repeat_or_drop(out: bytearray, rng) -> None:
  at, size = int(rng.integers(len(out))), int(rng.integers(1, 257))
  piece = bytes(out[at : at + size])
  out[at : at + (0 if rng.random() < 0.5 else size)] = piece if rng.random() < 0.5 else b''


def _enlarge(out: bytearray, rng) -> None:
  """A number somewhere in the header becomes huge."""
  form = str(rng.choice(['<H', '>H', '<I', '>I', '<Q', '>Q']))
  size = struct.calcsize(form)
  if len(out) > size:
    at = int(rng.integers(min(len(out), 1024) - size if len(out) > size else 1))
    out[at : at + size] = struct.pack(form, int(256**size * rng.choice([0.4999, 0.9999])))


def _digits(out: bytearray, rng) -> None:
  """A digit of a text header is followed by zeros."""
  places = [i for i, b in enumerate(out[:2048]) if 48 <= b < 58]
  if places:
    at = int(rng.choice(places)) + 1
    out[at:at] = b'0' * int(rng.integers(1, 9))


_INJURIES: tuple[Callable, ...] = (_cut, _flip, _flip, _overwrite, _repeat_or_drop, _enlarge, _digits)


def harmful(folder: pathlib.Path, marker: pathlib.Path) -> Iterator[pathlib.Path]:
  """Files that are made to harm: bombs, pickles, and names that lead out of the folder."""
  def put(name: str, data: bytes) -> pathlib.Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return folder / name
  secret = put('secret.bin', bytes(1000))
  np.save(folder / 'pickle.npy', np.array([[Payload(marker)]], object), allow_pickle=True)
  np.savez(folder / 'pickle.npz', image=np.array([[Payload(marker)]], object), allow_pickle=True)
  yield from (folder / 'pickle.npy', folder / 'pickle.npz')
  yield put('bare.npy', pickle.dumps(Payload(marker)))
  header = io.BytesIO()
  fields = {'descr': '<f8', 'fortran_order': False, 'shape': (10**6, 10**6)}
  np.lib.format.write_array_header_1_0(header, fields)
  yield put('huge.npy', header.getvalue() + bytes(64))
  yield from _zips(folder, header.getvalue())
  nifti = bytearray(348)
  nifti[:4], nifti[344:348] = struct.pack('<i', 348), b'n+1\0'
  nifti[40:56] = struct.pack('<8h', 3, 32767, 32767, 32767, 1, 1, 1, 1)
  nifti[70:74], nifti[108:112] = struct.pack('<2h', 16, 32), struct.pack('<f', 352)
  yield put('huge.nii', bytes(nifti) + bytes(1000))
  nifti[40:56] = struct.pack('<8h', 3, 1000, 1000, 1000, 1, 1, 1, 1)
  yield put('zeros.nii.gz', gzip.compress(bytes(nifti) + bytes(4) + bytes(1 << 28), 9))
  for name, target in (('up.mhd', '../secret.bin'), ('root.mhd', '/etc/passwd'), ('list.mhd', 'LIST')):
    text = f'ObjectType = Image\nNDims = 2\nDimSize = 10 10\nElementType = MET_UCHAR\nElementDataFile = {target}\n'
    yield put(f'itk/{name}', text.encode())
  for name, text in (('up.nhdr', b'sizes: 10 10 10\nencoding: raw\ndata file: ../secret.bin\n'),
                     ('huge.nrrd', b'sizes: 99999 99999 99999\nencoding: gzip\n\n')):
    yield put(f'itk/{name}', b'NRRD0004\ntype: uint8\ndimension: 3\n' + text)
  yield put('list.mp4', f'#EXTM3U\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n'.encode())
  yield put('list.avi', f'ffconcat version 1.0\nfile {secret}\n'.encode())
  yield from _dicoms(folder)
  yield from _stores(folder, marker)
  (folder / 'loop.png').symlink_to(folder / 'loop.png')
  (folder / 'null.dcm').symlink_to('/dev/null')
  yield from (folder / 'loop.png', folder / 'null.dcm')


def _zips(folder: pathlib.Path, header: bytes) -> Iterator[pathlib.Path]:
  for name, member, data in (('bomb.npz', 'image.npy', header + bytes(1 << 26)), ('up.npz', '../../up.npy', header)):
    with zipfile.ZipFile(folder / name, 'w', zipfile.ZIP_DEFLATED) as z:
      z.writestr(member, data)
    yield folder / name


def _dicoms(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  import pydicom

  source = pathlib.Path(pydicom.__file__).parent / 'data/test_files'
  for name in ('CT_small', 'MR_small_RLE', 'SC_rgb_jpeg_gdcm', 'MR_small_jp2klossless'):
    data = pydicom.dcmread(source / f'{name}.dcm')
    data.Rows = data.Columns = 65535
    data.NumberOfFrames = 99999
    data.save_as(folder / f'huge_{name}.dcm')
    yield folder / f'huge_{name}.dcm'
    data.NumberOfFrames, data.Columns = 1, 20000
    data.save_as(folder / f'wide_{name}.dcm')
    yield folder / f'wide_{name}.dcm'
  head = (source / 'image_dfl.dcm').read_bytes()
  meta = 144 + struct.unpack('<I', head[140:144])[0]
  squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
  body = b''.join([squeeze.compress(bytes(1 << 26)) for _ in range(20)] + [squeeze.flush()])
  (folder / 'deflated.dcm').write_bytes(head[:meta] + body)
  yield folder / 'deflated.dcm'


def _stores(folder: pathlib.Path, marker: pathlib.Path) -> Iterator[pathlib.Path]:
  import h5py
  import zarr

  with h5py.File(folder / 'huge.h5', 'w') as f:
    f.create_dataset('image', shape=(10**7, 10**7), dtype='f8', chunks=(64, 64))
  with h5py.File(folder / 'link.h5', 'w') as f:
    f['image'] = h5py.ExternalLink('/etc/passwd', '/image')
  yield from (folder / 'huge.h5', folder / 'link.h5')
  for name, path, shape in (('pickle.zarr', '0', [4, 4]), ('up.zarr', '../pickle.zarr/0', [4, 4]),
                            ('huge.zarr', '0', [10**7, 10**7])):
    group = zarr.open_group(str(folder / name), mode='w', zarr_format=2)
    group.attrs['multiscales'] = [{'axes': [{'name': 'y'}, {'name': 'x'}], 'datasets': [{'path': path}]}]
    group.create_array('0', shape=(4, 4), dtype='u1', chunks=(4, 4))[...] = 1
    meta = json.loads((folder / name / '0/.zarray').read_text()) | {'shape': shape, 'filters': None}
    if name == 'pickle.zarr':
      meta |= {'filters': [{'id': 'pickle', 'protocol': 5}], 'compressor': None}
      (folder / name / '0/0.0').write_bytes(pickle.dumps(Payload(marker)))
    (folder / name / '0/.zarray').write_text(json.dumps(meta))
    yield folder / name


def cases(work: pathlib.Path, count: int, seed: int) -> Iterator[tuple[str, pathlib.Path]]:
  """(format, file) of all files, the harmful ones first. Each damaged file is written when it is asked for."""
  marker = work / 'marker'
  for path in harmful(work / 'harmful', marker):
    yield path.suffix.lstrip('.') + ' made to harm', path
  seeds = sorted((work / 'seeds').iterdir())
  rng = np.random.default_rng(seed)
  for i in range(count):
    source = seeds[i % len(seeds)]
    target = work / f'case{i:05d}' / source.name
    target.parent.mkdir()
    members = sorted(p for p in source.rglob('*') if p.is_file()) if source.is_dir() else [source]
    hit = members[rng.integers(len(members))]
    for member in members:
      place = target / member.relative_to(source) if source.is_dir() else target
      place.parent.mkdir(parents=True, exist_ok=True)
      place.write_bytes(damage(member.read_bytes(), rng) if member == hit else member.read_bytes())
    yield source.name.split('.', 1)[1], target


def attempt(path: pathlib.Path) -> tuple[str, str]:
  """Reads a file in a process of its own: 'read', 'refused', or what went wrong; and the reason of a refusal."""
  ours, theirs = os.pipe()
  child = os.fork()
  if child == 0:
    os.close(ours)
    _child(path, theirs)
  os.close(theirs)
  deadline, status = time.monotonic() + SECONDS, None
  while status is None and time.monotonic() < deadline:
    done, code = os.waitpid(child, os.WNOHANG)
    status = code if done else None
    time.sleep(0.002)
  if status is None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
  with os.fdopen(ours) as f:
    told = f.read()
  if status is None:
    return f'not done after {SECONDS} s', ''
  if os.WIFSIGNALED(status):
    return f'killed by {signal.Signals(os.WTERMSIG(status)).name}', ''
  word, _, reason = told.partition(': ')
  return word or f'ended with {os.waitstatus_to_exitcode(status)} and no word', reason


def _child(path: pathlib.Path, pipe: int) -> None:
  quiet = os.open(os.devnull, os.O_WRONLY)
  os.dup2(quiet, 1)
  os.dup2(quiet, 2)
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
  limit = pages * os.sysconf('SC_PAGE_SIZE') + MEMORY
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  from jaxmed.data import readers

  told = 'read'
  with contextlib.suppress(Exception):  # of a dry run; reading will find the same
    collections.deque(readers.outline(path), maxlen=0)
  try:
    for record in readers.read(path, readers.Options(volumes='whole')):
      if record['image'].size == 0 or len(record['channels']) != record['image'].shape[-1]:
        told = 'wrong: a record without pixels, or with another number of names'
  except Exception as e:
    said = ' '.join(str(e).split())
    told = f'{"refused" if said else "no words"}: {type(e).__name__}: {said[:300]}'
  os.write(pipe, told.encode())
  os._exit(0)


def import_all() -> None:
  """What readers import when they are used, so that each child has it already. It starts no thread."""
  import av  # noqa: F401
  import h5py  # noqa: F401
  import imagecodecs  # noqa: F401
  import nd2  # noqa: F401
  import nibabel  # noqa: F401
  import openjpeg  # noqa: F401
  import pydicom.pixels.decoders  # noqa: F401
  import SimpleITK  # noqa: F401
  import tifffile  # noqa: F401
  import zarr  # noqa: F401

  from jaxmed.data.readers import array, czi, dicom, image, itk, nifti, slide, tiff, video  # noqa: F401


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--count', type=int, default=2000, help='damaged files, beside those made to harm')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--keep', type=pathlib.Path, help='folder for files that a reader failed on')
  parser.add_argument('--reasons', action='store_true', help='print what became of each file')
  args = parser.parse_args(argv)
  need('test', 'av', 'h5py', 'nd2', 'openjpeg', 'pydicom', 'SimpleITK', 'zarr')
  table: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  with tempfile.TemporaryDirectory() as place:
    work = pathlib.Path(place)
    (work / 'seeds').mkdir()
    if (writer := os.fork()) == 0:  # the libraries that write start threads: they have a process of their own
      write_seeds(work / 'seeds')
      os._exit(0)
    os.waitpid(writer, 0)
    import_all()
    unread = [f'{p.name}: {told}' for p in (work / 'seeds').iterdir() if (told := attempt(p))[0] != 'read']
    if unread:
      raise SystemExit(f'undamaged files are not read: {"; ".join(unread)}')
    for kind, path in cases(work, args.count, args.seed):
      told, reason = attempt(path)
      told = 'ran its code' if (work / 'marker').exists() else told
      if args.reasons:
        print(f'{kind}: {path.name}: {told} {reason}', flush=True)
      table[kind][told] += 1
      if told not in ('read', 'refused'):
        print(f'{kind}: {path.name}: {told} {reason}', flush=True)
        if args.keep:
          args.keep.mkdir(parents=True, exist_ok=True)
          os.rename(path, args.keep / f'{path.parent.name}-{path.name}')
      (work / 'marker').unlink(missing_ok=True)
  for kind, counts in sorted(table.items()):
    print(f'{kind:24s} ' + ', '.join(f'{n} {word}' for word, n in sorted(counts.items())))
  bad = sum(n for c in table.values() for word, n in c.items() if word not in ('read', 'refused'))
  total = sum(sum(c.values()) for c in table.values())
  print(f'{total} files, {bad} failures')
  return int(bad > 0)


if __name__ == '__main__':
  run_script(main)
