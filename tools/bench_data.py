"""Batches a second from the same images and cores, in one run: this pipeline, PyTorch's DataLoader, MONAI, nnssl's way.

Two sets are made of real pixels. Flat: tiles 256 x 256 of the colour fundus and the stained colon of scikit-image as
PNG; batches are random crops of 224 x 224. Volumes: the ICBM152 T1 template of nilearn, enlarged, with added noise,
int16 as NIfTI (.nii.gz); batches are random crops of 96^3. `prepare` makes corpora of the very same files. Contenders:

  jaxmed       train_batches with fit=crop, threads
  jaxmed 2     the same with two crops of what is read for one, as `loader.crops=2`
  dataloader   torch DataLoader over the folder of PNG (Pillow, a random crop), worker processes
  webdataset   the PNG in tar shards, shuffled within a buffer, the same decoder and workers
  tfds         tensorflow-datasets alone (no TensorFlow) on the corpus: its random access, one thread, the same crop
  monai        Dataset of LoadImaged and RandSpatialCropd, one crop a load, in a DataLoader
  monai 4      the same with RandSpatialCropSamplesd, four crops a load (correlated, as one usually does)
  monai cache  the same with CacheDataset: all volumes in memory, decoded (what that takes grows with the set)
  blosc2       volumes as blosc2 arrays (as nnU-Net and nnssl store them; int16 here), memory-mapped, in a DataLoader

Rounds alternate; each begins every contender anew (the time to the first batch is reported apart), leaves out what was
read ahead meanwhile, and counts for some seconds. What is printed are medians over rounds; a ratio is the median of the
rounds' ratios. A package that is missing is named and left out. With --index N: a corpus of N records whose manifest is
real and whose shards are one shard under many names; the time from open_source to the first batch, in a fresh process.

Needs `make install`; the others `pip install -e '.[bench]'`.

Example:
  python tools/bench_data.py
  python tools/bench_data.py --quick
  python tools/bench_data.py --index 10000000
"""

import argparse
import functools
import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from jaxmed.errors import UserError  # noqa: E402
from tools.needs import measured_on, need, run_script  # noqa: E402

SIZE_2D, SIZE_3D = 224, 96
TILE = 256


def _file(package: str, name: str) -> pathlib.Path:
  spec = importlib.util.find_spec(package)
  assert spec is not None and spec.origin is not None
  return pathlib.Path(spec.origin).parent / name


# Data.


def make_flat(folder: pathlib.Path, count: int) -> None:
  """PNG tiles at random places of two photographs."""
  from PIL import Image

  pages = []
  for name in ('retina.jpg', 'ihc.png'):
    with Image.open(_file('skimage', f'data/{name}')) as image:
      pages.append(np.asarray(image)[..., :3])
  rng = np.random.default_rng(0)
  (folder / 'png').mkdir(parents=True)
  for i in range(count):
    page = pages[i % 2]
    y, x = (int(rng.integers(n - TILE + 1)) for n in page.shape[:2])
    Image.fromarray(page[y:y + TILE, x:x + TILE]).save(folder / 'png' / f'{i:05d}.png')


def make_tars(folder: pathlib.Path, shard: int) -> list[str]:
  """The PNG of a folder in tar files of `shard` each."""
  files = sorted((folder / 'png').glob('*.png'))
  (folder / 'tar').mkdir()
  out = []
  for k in range(0, len(files), shard):
    out.append(str(folder / 'tar' / f'{k // shard:04d}.tar'))
    with tarfile.open(out[-1], 'w') as tar:
      for file in files[k:k + shard]:
        tar.add(file, arcname=file.name)
  return out


def make_volumes(folder: pathlib.Path, count: int, scale: float) -> None:
  """NIfTI volumes of a template with noise of their own."""
  import nibabel
  from scipy.ndimage import zoom

  path = _file('nilearn', 'datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz')
  fine = zoom(np.asanyarray(nibabel.nifti1.load(path).dataobj).astype(np.float32), scale, order=1) * 8
  (folder / 'nii').mkdir(parents=True)
  for i in range(count):
    noisy = (fine + np.random.default_rng(i).normal(0, 40, fine.shape)).round().astype(np.int16)
    image = nibabel.nifti1.Nifti1Image(noisy, np.diag([1 / scale] * 3 + [1]))
    nibabel.save(image, folder / 'nii' / f'{i:03d}.nii.gz')


def make_blosc2(folder: pathlib.Path) -> list[str]:
  """The same volumes as blosc2 arrays in chunks of 96^3 and blocks of 32^3."""
  import blosc2
  import nibabel

  (folder / 'b2nd').mkdir()
  out = []
  for file in sorted((folder / 'nii').glob('*.nii.gz')):
    volume = np.ascontiguousarray(np.asanyarray(nibabel.nifti1.load(file).dataobj))
    out.append(str(folder / 'b2nd' / file.name.replace('.nii.gz', '.b2nd')))
    blosc2.asarray(volume, urlpath=out[-1], chunks=(96,) * 3, blocks=(32,) * 3,
                   cparams={'codec': blosc2.Codec.ZSTD, 'clevel': 8, 'nthreads': 1})
  return out


def make_corpus(inputs: pathlib.Path, out: pathlib.Path, workers: int, volumes: str) -> Any:
  from jaxmed.data.corpus.open import open_source
  from jaxmed.data.prepare.prepare import prepare

  prepare([inputs], out, splits=(1.0, 0.0, 0.0), volumes=volumes, progress=False, workers=workers)
  return open_source(out)


# Contenders: each gives an iterator of arrays [b, ..., C] without end.


def jaxmed_batches(source: Any, size: int, batch: int, threads: int, crops: int = 1) -> Iterator[np.ndarray]:
  from jaxmed.data.feed.pipeline import train_batches

  rank = len(source.table['shape'][0].as_py()) - 1
  for found in train_batches(source, batch_size=batch, size=(size,) * rank, vocabulary=source.channels, seed=0,
                             fit='crop', threads=threads, crops=crops):
    yield found['image']


def tfds_batches(path: pathlib.Path, size: int, batch: int) -> Iterator[np.ndarray]:
  import tensorflow_datasets as tfds

  data = tfds.builder_from_directory(path).as_data_source(split='train')
  rng = np.random.default_rng(0)
  while True:
    images = []
    for example in data.__getitems__(rng.integers(len(data), size=batch).tolist()):
      image = np.frombuffer(example['image'], example['dtype'].decode()).reshape(example['shape'])
      images.append(_crop(image, size, rng))
    yield np.stack(images)


def _crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
  y, x = (int(rng.integers(n - size + 1)) for n in image.shape[:2])
  return image[y:y + size, x:x + size]


class PngFolder:
  """A map-style data set of a folder of PNG, as it is usually written for PyTorch."""

  def __init__(self, folder: pathlib.Path, size: int):
    self.files, self.size = sorted(map(str, folder.glob('*.png'))), size

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int) -> Any:
    import torch

    with open(self.files[i], 'rb') as f:
      return torch.from_numpy(np.array(_crop(_png(f.read()), self.size, np.random.default_rng())))


def _png(data: bytes) -> np.ndarray:
  from PIL import Image

  with Image.open(io.BytesIO(data)) as image:
    return np.asarray(image.convert('RGB'))


def _from_tar(sample: dict[str, Any], size: int) -> np.ndarray:
  return np.array(_crop(_png(sample['png']), size, np.random.default_rng()))


class Blosc2Crops:
  """Random crops of memory-mapped blosc2 arrays."""

  def __init__(self, paths: list[str], size: int):
    self.paths, self.size = paths, size

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, i: int) -> Any:
    import blosc2
    import torch

    rng = np.random.default_rng()
    array = blosc2.open(self.paths[i], mode='r', mmap_mode='r', dparams={'nthreads': 1})
    at = tuple(slice(a, a + self.size) for a in (int(rng.integers(n - self.size + 1)) for n in array.shape))
    return torch.from_numpy(array[at][..., None])


def loader(data: Any, batch: int, workers: int, **options: Any) -> Iterator[np.ndarray]:
  """A DataLoader without end over a map-style data set."""
  import torch
  from torch.utils.data import DataLoader, RandomSampler

  generator = torch.Generator()
  sampler = RandomSampler(data, replacement=True, num_samples=1 << 30, generator=generator)
  found = DataLoader(data, batch, sampler=sampler, num_workers=workers, persistent_workers=False, **options)
  for value in found:
    yield value['image'] if isinstance(value, dict) else value


def tar_batches(urls: list[str], size: int, batch: int, workers: int) -> Iterator[np.ndarray]:
  import webdataset as wds
  from torch.utils.data import DataLoader

  data = wds.DataPipeline(wds.ResampledShards(urls), wds.tarfile_to_samples(), wds.shuffle(500),
                          wds.map(functools.partial(_from_tar, size=size)), wds.batched(batch, np.stack))
  yield from DataLoader(data, batch_size=None, num_workers=workers)


def monai_batches(files: list[str], size: int, batch: int, workers: int, samples: int, cache: bool
                  ) -> Iterator[np.ndarray]:
  import monai.data
  import monai.transforms as mt

  shape = (size,) * 3
  crop = (mt.RandSpatialCropSamplesd('image', shape, samples, random_size=False) if samples > 1 else
          mt.RandSpatialCropd('image', shape, random_size=False))
  steps = mt.Compose([mt.LoadImaged('image', dtype=np.int16), mt.EnsureChannelFirstd('image'), crop])
  rows = [{'image': f} for f in files]
  data = monai.data.CacheDataset(rows, steps, progress=False) if cache else monai.data.Dataset(rows, steps)
  collate = monai.data.utils.list_data_collate
  yield from loader(data, max(batch // samples, 1), workers, collate_fn=collate)


# Measurement.


def measure(make: Callable[[], Iterator[Any]], seconds: float, ahead: int) -> tuple[float, float, float]:
  """Images/s, bytes/s of pixels, and seconds to the first batch."""
  begin = time.perf_counter()
  batches = make()
  next(batches)
  first = time.perf_counter() - begin
  for _ in range(ahead):  # read while the first one was waited for
    next(batches)
  count, size, begin = 0, 0, time.perf_counter()
  while (spent := time.perf_counter() - begin) < seconds or not count:
    batch = next(batches)
    count += len(batch)
    size += batch.nbytes
  if hasattr(batches, 'close'):
    batches.close()  # type: ignore[attr-defined]
  return count / spent, size / spent, first


def alternate(title: str, contenders: dict[str, Callable[[], Iterator[Any]]], rounds: int, seconds: float,
              ahead: int) -> dict[str, Any]:
  """Rounds of all, in an order that turns; prints medians and the ratio of jaxmed's rate to each."""
  found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contenders}
  names = list(contenders)
  for r in range(rounds):
    for name in names[r % len(names):] + names[:r % len(names)]:
      found[name].append(measure(contenders[name], seconds, ahead))
  print(f'\n{title}\n{"":14}{"images/s":>10}{"MB/s":>10}{"first s":>10}{"jaxmed is":>12}')
  out = {}
  for name, values in found.items():
    images, size, first = (float(np.median([v[k] for v in values])) for k in range(3))
    ratio = float(np.median([ours[0] / theirs[0] for ours, theirs in zip(found['jaxmed'], values)]))
    out[name] = {'images_per_second': images, 'bytes_per_second': size, 'first_seconds': first, 'ratio': ratio}
    print(f'{name:14}{images:10.1f}{size / 1e6:10.1f}{first:10.2f}{ratio:11.2f}x', flush=True)
  return out


def _there(*modules: str) -> bool:
  lost = [m for m in modules if importlib.util.find_spec(m) is None]
  for module in lost:
    print(f'{module} is not installed: left out', flush=True)
  return not lost


def flat(root: pathlib.Path, args: argparse.Namespace) -> dict[str, Any]:
  """All contenders on PNG tiles."""
  make_flat(root, 200 if args.quick else 2000)
  source = make_corpus(root / 'png', root / 'corpus', args.workers, 'slices')
  threads, workers, batch = args.threads, args.workers, args.batch
  contenders: dict[str, Callable[[], Iterator[Any]]] = {
    'jaxmed': lambda: jaxmed_batches(source, SIZE_2D, batch, threads)}
  if _there('torch'):
    contenders['dataloader'] = lambda: loader(PngFolder(root / 'png', SIZE_2D), batch, workers)
  if _there('torch', 'webdataset'):
    urls = make_tars(root, 100)
    contenders['webdataset'] = lambda: tar_batches(urls, SIZE_2D, batch, workers)
  contenders['tfds'] = lambda: tfds_batches(root / 'corpus', SIZE_2D, batch)
  sizes = {name: sum(f.stat().st_size for f in (root / name).rglob('*')) / 1e6 for name in ('png', 'corpus')}
  title = (f'flat: {len(source)} PNG of {TILE}x{TILE}x3, {sizes["png"]:.0f} MB (corpus {sizes["corpus"]:.0f} MB), '
           f'crops of {SIZE_2D}, batch {batch}, {workers} workers or {threads} threads')
  return alternate(title, contenders, args.rounds, args.seconds, 2 * workers)


def volumes(root: pathlib.Path, args: argparse.Namespace) -> dict[str, Any]:
  """All contenders on NIfTI volumes."""
  make_volumes(root, 3 if args.quick else 8, 1.0 if args.quick else 1.3)
  source = make_corpus(root / 'nii', root / 'corpus', args.workers, 'whole')
  files = sorted(map(str, (root / 'nii').glob('*.nii.gz')))
  threads, workers, batch = args.threads, args.workers, 8
  contenders: dict[str, Callable[[], Iterator[Any]]] = {
    'jaxmed': lambda: jaxmed_batches(source, SIZE_3D, batch, threads),
    'jaxmed 2': lambda: jaxmed_batches(source, SIZE_3D, batch, threads, 2)}
  if _there('torch', 'monai'):
    for name, samples, cache in (('monai', 1, False), ('monai 4', 4, False), ('monai cache', 1, True)):
      contenders[name] = functools.partial(monai_batches, files, SIZE_3D, batch, workers, samples, cache)
  if _there('torch', 'blosc2'):
    paths = make_blosc2(root)
    contenders['blosc2'] = lambda: loader(Blosc2Crops(paths, SIZE_3D), batch, workers)
  shape = 'x'.join(map(str, source.table['shape'][0].as_py()[:-1]))
  title = (f'volumes: {len(files)} NIfTI of {shape}, int16, crops of {SIZE_3D}^3, batch {batch}, {workers} workers or '
           f'{threads} threads')
  return alternate(title, contenders, args.rounds, args.seconds, 2)


# A corpus of very many records.

_OPEN = '''
import json, resource, time
begin = time.perf_counter()
import grain.python, pyarrow.parquet, tensorflow_datasets
from jaxmed.data.feed.pipeline import train_batches
from jaxmed.data.corpus.open import open_source
imported = time.perf_counter()
source = open_source({path!r}).select('train')
opened = time.perf_counter()
batch = next(train_batches(source, batch_size=64, size=(8, 8), vocabulary=source.channels, seed=0))
first = time.perf_counter()
from jaxmed.train.build.data_spec import describe
begun = time.perf_counter()
describe(source, '')
told = time.perf_counter() - begun
print(json.dumps({{'records': len(source), 'imports_seconds': imported - begin, 'open_seconds': opened - imported,
                   'first_batch_seconds': first - imported, 'spec_seconds': told,
                   'distinct_rows': len(set(batch['index'].tolist())),
                   'rss_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}}))
'''


_PATIENT, _PERIOD = 20, 200  # rows of a patient; of ten patients the last one is in val


def synthetic(folder: pathlib.Path, count: int) -> None:
  """A corpus of about `count` records of 8 x 8 pixels; its shards are links to one, so they hold the same pixels."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  from jaxmed import files
  from jaxmed.data.corpus import corpus_format

  count = max(count // (10 * _PERIOD), 1) * 10 * _PERIOD
  parts = {'train': count // 10 * 9, 'val': count // 10}
  shard = next(n for n in range(min(10_000, parts['val']), 0, -1) if parts['val'] % n == 0)
  writer = corpus_format.Writer(folder)
  for i in range(shard):
    image = np.full((8, 8, 1), i % 251, np.uint8)
    writer.add({'id': f'{i}', 'subject': f's{i // _PATIENT}', 'source': 'a', 'channels': ['CT'], 'image': image,
                'spacing': None}, 'train', f'{i}.png', '0' * 64, {})
  writer.close()
  for split, rows in parts.items():
    for k in range(rows // shard):
      os.link(writer.part('train', 0), folder / corpus_format.shard_name(split, k, rows // shard))
  os.unlink(writer.part('train', 0))
  shards = {split: [[shard, shard * 64]] * (rows // shard) for split, rows in parts.items()}
  corpus_format.write_metadata(folder, shards)
  files.write_json(folder / 'stats.json', writer.stats.summary())
  with pq.ParquetWriter(folder / corpus_format.MANIFEST, corpus_format.COLUMNS) as out:
    for begin in range(0, count, 1 << 20):
      rows = np.arange(begin, min(begin + (1 << 20), count))
      known = _known(rows, count)
      out.write_table(pa.Table.from_arrays(
        [known[f.name] if f.name in known else pa.nulls(len(rows), f.type) for f in corpus_format.COLUMNS],
        schema=corpus_format.COLUMNS))


def _known(rows: np.ndarray, count: int) -> dict[str, Any]:
  """The columns of some rows of a manifest."""
  import pyarrow as pa

  n = len(rows)
  text = lambda prefix, values: pa.array(np.char.add(prefix, values.astype('U9')))
  some = lambda values, codes: pa.DictionaryArray.from_arrays(
    pa.array(codes.astype(np.int32)), pa.array(values)).cast(pa.string())
  lists = lambda values, k, kind: pa.ListArray.from_arrays(np.arange(n + 1, dtype=np.int32) * k,
                                                           pa.array(values * n, kind))
  block, within = np.divmod(rows, _PERIOD)
  trained = _PERIOD - _PATIENT
  val = within >= trained
  place = np.where(val, block * _PATIENT + within - trained, block * trained + within)
  return {
    'id': text('study/image', rows), 'subject': text('s', rows // _PATIENT), 'row': pa.array(place),
    'source': some([f'site{k}' for k in range(7)], rows * 7 // count), 'split': some(['train', 'val'], val),
    'channels': lists(['CT'], 1, pa.string()), 'shape': lists([8, 8, 1], 3, pa.int32()),
    'dtype': some(['uint8'], rows * 0), 'path': text('study/image', rows), 'sha256': text('0' * 55, rows)}


def index(root: pathlib.Path, count: int) -> dict[str, Any]:
  """Opens a corpus of `count` records in a fresh process, three times: medians."""
  (root / 'index').mkdir()
  synthetic(root / 'index', count)
  os.sync()  # what was written just now must not be on its way to the disk meanwhile
  runs = []
  for _ in range(3):
    done = subprocess.run([sys.executable, '-c', _OPEN.format(path=str(root / 'index'))], capture_output=True,
                          text=True, check=False)
    if done.returncode:
      raise UserError(done.stderr)
    runs.append(json.loads(done.stdout.splitlines()[-1]))
  out = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
  print(f'index of {out["records"]:,.0f} records: open {out["open_seconds"]:.2f} s, first batch '
        f'{out["first_batch_seconds"]:.2f} s after open_source was called (imports {out["imports_seconds"]:.2f} s '
        f'before), {out["spec_seconds"]:.2f} s more for what a run tells of its data, {out["rss_mb"]:.0f} MB',
        flush=True)
  return out


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  cores = len(os.sched_getaffinity(0))
  parser.add_argument('--index', type=int, default=0, metavar='N', help='time to the first of N records, nothing else')
  parser.add_argument('--quick', action='store_true', help='few files, one short round')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--seconds', type=float, default=3.0, help='of each contender in a round')
  parser.add_argument('--batch', type=int, default=64, help='of flat images')
  parser.add_argument('--workers', type=int, default=cores, help="others' processes")
  parser.add_argument('--threads', type=int, default=cores, help="jaxmed's threads")
  parser.add_argument('--only', choices=('flat', 'volumes'))
  parser.add_argument('--json', metavar='FILE')
  args = parser.parse_args(argv)
  if args.quick:
    args.rounds, args.seconds = 1, 0.5
  print(f'on {measured_on()}', flush=True)
  with tempfile.TemporaryDirectory() as scratch:
    root = pathlib.Path(scratch)
    if args.index:
      out: dict[str, Any] = {'index': index(root, args.index)}
    else:
      need('demo', 'nilearn', 'skimage')
      parts = {'flat': flat, 'volumes': volumes}
      out = {name: part(root / name, args) for name, part in parts.items() if args.only in (None, name)}
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(out | {'on': measured_on()}, indent=2) + '\n')


if __name__ == '__main__':
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  run_script(main)
