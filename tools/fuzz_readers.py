"""Damages files of every format and reads them: each must be read or refused with one line, soon and in little memory.

  python tools/fuzz_readers.py --count 2000 --seed 0 --keep failures

Files are cut, bits of them flipped, pieces overwritten, repeated, left out, and numbers in their headers made large;
some are made to harm: declared sizes of terabytes, compressed zeros, pickles, links and names that lead elsewhere.
A tenth as many folders have names of any bytes, links, FIFOs and tables: what would be read of them is planned.
Each file is read in a process of its own with 2 GiB beyond what the programs take, for 10 seconds at most. Prints what
became of them by format; files that crashed a reader, ran on, or ran their code are kept, and the exit code is then 1.

Needs `pip install -e '.[test]'`.
"""

import argparse
import collections
import contextlib
import gzip
import io
import itertools
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
  source = pathlib.Path(pydicom.__file__).parent / 'data/test_files/CT_small.dcm'
  (folder / 'bare.dcm').write_bytes(source.read_bytes()[132:])


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
  _write_tiffs(folder, volume[0].astype(np.uint16), colour)
  for suffix in ('bmp', 'gif', 'webp', 'ppm', 'jp2', 'tga'):
    Image.fromarray(colour).save(folder / f'a.{suffix}')
  np.save(folder / 'a.npy', volume)
  np.savez_compressed(folder / 'a.npz', image=colour, channels=['R', 'G', 'B'], spacing=[1.0, 1.0])


def _write_tiffs(folder: pathlib.Path, plane: np.ndarray, colour: np.ndarray) -> None:
  """A file for each meaning that TIFF's tags give to samples."""
  import tifffile

  gray = colour[..., 0]
  table = np.arange(768, dtype=np.uint16).reshape(3, 256)
  stack = np.stack([plane, plane + 1, plane + 2, plane + 3])
  kinds: dict[str, tuple[np.ndarray, dict]] = {
    'palette': (gray, {'photometric': 'palette', 'colormap': table}),
    'bilevel': (gray > 99, {'photometric': 'miniswhite'}),
    'turned': (gray, {'photometric': 'minisblack', 'extratags': [(274, 'H', 1, 6)]}),
    'stack': (stack, {'photometric': 'rgb', 'planarconfig': 'separate', 'extrasamples': ['unassalpha']}),
    'ycbcr': (colour, {'photometric': 'ycbcr', 'subsampling': (1, 1), 'compression': 'zlib'}),
    'inks': (np.concatenate([colour, colour[..., :1]], -1), {'photometric': 'separated'}),
    'float': (plane.astype(np.float32), {'photometric': 'minisblack', 'predictor': 3, 'compression': 'zlib'})}
  for name, (pixels, how) in kinds.items():
    tifffile.imwrite(folder / f'{name}.tif', pixels, **how)
  with tifffile.TiffWriter(folder / 'mask.tif') as w:
    w.write(colour, photometric='rgb', metadata=None)
    w.write(gray > 99, photometric='minisblack', subfiletype=4, metadata=None)
  told = ('<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1"><Image ID="Image:0">'
          '<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="32" SizeY="24" SizeZ="1" SizeC="2" '
          'SizeT="1">'
          '<Channel ID="Channel:0:0" Name="a"/><Channel ID="Channel:0:1" Name="b"/>'
          '<TiffData FirstC="0" IFD="0" PlaneCount="1"><UUID FileName="set.tif">urn:uuid:1</UUID></TiffData>'
          '<TiffData FirstC="1" IFD="0" PlaneCount="1"><UUID FileName="gone.tif">urn:uuid:2</UUID></TiffData>'
          '</Pixels></Image></OME>')
  tifffile.imwrite(folder / 'set.tif', gray, description=told, metadata=None)


def _write_volumes(folder: pathlib.Path, volume: np.ndarray) -> None:
  import h5py
  import nibabel
  import SimpleITK as sitk
  import zarr

  for suffix in ('nii', 'nii.gz'):
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.0, 2, 3, 1])), folder / f'a.{suffix}')
  voxels = np.zeros((4, 5, 6), [(c, 'u1') for c in 'RGB'])
  nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), folder / 'colour.nii')
  times = nibabel.Nifti2Image(volume[:16, :8, :8].reshape(8, 8, 1, 16), np.eye(4))
  times.header.set_xyzt_units('mm', 'sec')
  nibabel.save(times, folder / 'times.nii')
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


def _tag(out: bytearray, rng) -> None:
  """A tag of the first directory of a TIFF gets another value, type or number."""
  if out[:4] not in (b'II*\0', b'MM\0*') or len(out) < 16:
    return
  order = '<' if out[:1] == b'I' else '>'
  (at,) = struct.unpack_from(f'{order}I', out, 4)
  count = struct.unpack_from(f'{order}H', out, at)[0] if at + 2 <= len(out) else 0
  entry = at + 2 + 12 * int(rng.integers(max(1, count)))
  if entry + 12 <= len(out):
    known = (254, 255, 258, 259, 262, 266, 274, 277, 284, 317, 320, 332, 338, 339, 529, 530, 532)
    code = struct.unpack_from(f'{order}H', out, entry)[0] if rng.random() < 0.7 else int(rng.choice(known))
    value = int(rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 32, 65535, 32803]))
    struct.pack_into(f'{order}HHIHH', out, entry, code, 3, 1, value, 0)


_INJURIES: tuple[Callable, ...] = (_tag, _cut, _flip, _flip, _overwrite, _repeat_or_drop, _enlarge, _digits)


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


def folders(work: pathlib.Path, count: int, seed: int) -> Iterator[tuple[str, pathlib.Path]]:
  """(kind, folder) of folders with odd names, links, FIFOs and a table, of which it is planned what to read."""
  rng = np.random.default_rng(seed)
  for i in range(count):
    folder = work / f'{i:05d}.folder'
    (folder / 'in').mkdir(parents=True)
    places = [folder / 'in']
    for _ in range(rng.integers(3, 12)):
      _entry(places, places[rng.integers(len(places))] / _name(rng), folder, rng)
    if rng.random() < 0.7:
      _table(folder, rng)
    yield 'folder with table' if (folder / 't.csv').exists() else 'folder', folder


def _name(rng) -> str:
  """A name of one to six bytes of any kind, maybe with an image's suffix."""
  letters = bytes(set(range(1, 256)) - set(b'/.')) if rng.random() < 0.5 else b'ab\\xf'
  name = bytes(rng.choice(list(letters), rng.integers(1, 7)).astype(np.uint8))
  return os.fsdecode(name + [b'.png', b'', b'.txt', b'.zarr'][rng.choice(4, p=[0.6, 0.2, 0.1, 0.1])])


def _entry(places: list[pathlib.Path], path: pathlib.Path, top: pathlib.Path, rng) -> None:
  """A file, folder, link or FIFO at a path, where nothing is yet."""
  targets = [path, path.parent, top / 'in', top, pathlib.Path('..'), pathlib.Path('none'), pathlib.Path('/dev/zero'),
             *places, *(p for place in places for p in sorted(place.iterdir()))]
  with contextlib.suppress(FileExistsError):
    match rng.choice(['file', 'folder', 'link', 'hard', 'fifo'], p=[0.4, 0.15, 0.3, 0.05, 0.1]):
      case 'file':
        with path.open('xb') as f:
          f.write(b'\x89PNG\r\n\x1a\n')
      case 'folder':
        path.mkdir()
        places.append(path)
      case 'link':
        path.symlink_to(targets[rng.integers(len(targets))])
      case 'hard':
        files = [t for t in targets if t.is_file() and not t.is_symlink()]
        if files:
          os.link(files[rng.integers(len(files))], path)
      case 'fifo':
        os.mkfifo(path)


def _table(folder: pathlib.Path, rng) -> None:
  """A table of some names in the folder, in any encoding and with any delimiter, often damaged."""
  names = [str(p.relative_to(folder / 'in')) for p in sorted((folder / 'in').rglob('*'))]
  cells = ['007', '7', '', '1E5', '0,7', 'Tum\xf6r', '9' * 25, '"a"', 'NaN']
  head = ['path', *rng.choice(['label', 'score', '', 'subject', 'mask', 'site'], 2)]
  lines = [head, *([name, *rng.choice(cells, 2)] for name in names)]
  delimiter = str(rng.choice([',', ';', '\t', '|']))
  encoding = str(rng.choice(['utf-8', 'utf-8-sig', 'utf-16', 'cp1252']))
  data = '\n'.join(delimiter.join(line) for line in lines).encode('utf-8', 'surrogateescape')
  data = data.decode('utf-8', 'replace').encode(encoding, 'replace') if encoding != 'utf-8' else data
  (folder / 't.csv').write_bytes(damage(data, rng) if rng.random() < 0.5 else data)


def _planned(folder: pathlib.Path) -> str:
  """Plans a folder, and looks whether each file is read once, is a regular one, and comes back from its name."""
  from jaxmed.data.prepare.plan import make_plan
  from jaxmed.files import name_of

  table = folder / 't.csv'
  items = make_plan([folder / 'in'], folder / 'out', table if table.exists() else None).items
  real = [os.path.realpath(item.file) for item in items]
  for item in items:
    item.rel.encode()
    if not item.file.is_file() and not item.file.is_dir():
      return f'wrong: {item.rel} is no regular file'
    if not table.exists() and not os.path.exists(folder / 'in' / name_of(item.rel)):
      return f'wrong: {item.rel} does not come back'
  return 'read' if len(set(real)) == len(real) else 'wrong: a file twice'


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
  with contextlib.suppress(Exception):  # of a dry run; a folder of images has none; reading will find the same
    collections.deque(readers.outline(path), maxlen=0)
  try:
    if path.suffix == '.folder':
      os.write(pipe, _planned(path).encode('utf-8', 'replace'))
      os._exit(0)
    for record in readers.read(path, readers.Options(volumes='whole')):
      if record['image'].size == 0 or len(record['channels']) != record['image'].shape[-1]:
        told = 'wrong: a record without pixels, or with another number of names'
  except Exception as e:
    said = ' '.join(str(e).split())
    told = f'{"refused" if said else "no words"}: {type(e).__name__}: {said[:300]}'
    if path.suffix == '.folder' and type(e).__name__ != 'UserError':
      told = f'wrong: {type(e).__name__}: {said[:300]}'
  os.write(pipe, told.encode('utf-8', 'replace'))
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
  parser.add_argument('--count', type=int, default=2000, help='damaged files, beside those made to harm and folders')
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
    for kind, path in itertools.chain(cases(work, args.count, args.seed), folders(work, args.count // 10, args.seed)):
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
