"""Times training steps of segmentation networks beside PyTorch's, and forced crops beside MONAI's and nnU-Net's reader.

Steps: nnU-Net's plain network ('unet'; 'unet_micro' has four stages of 16 to 128 channels) and Swin UNETR with
feature_size 12 ('swin_unetr') on one channel, three classes, patches of 64^3, batch 2, float32: forward, cross-entropy
and soft Dice, backward, AdamW, on data already in memory. jaxmed runs `Trainer.compile` of the objective `segment`;
PyTorch runs MONAI's DynUNet (without biases before norms), SwinUNETR and DiceCELoss, eager. Sides alternate as in
tools/bench_step.py, which says what the bound by FLOPs is. --also takes another checkout with this script as a third
side. --cpu-seconds counts the processes' CPU time: for one thread on a machine that does other work too.

  FLOPs of a step, 2 a multiply-add, those of 3x3x3 convolutions by hand, backward as two forward: 'unet_micro' 0.17
  TFLOP, 'unet' 0.70; the table has what is counted from the program. Bytes: 'unet_micro' has activations of about
  0.23 GB, which forward and backward pass some ten times: 2 GB, 0.2 s at 10 GB/s, where the FLOPs take 3 s of a core at
  60 GFLOP/s: convolutions decide. Expected before anything is optimised: a ratio of 0.2 to 0.4, as XLA's convolution
  of volumes alone takes 6 (16 channels) to 2.6 (128) times as long forward as oneDNN's, and 1.7 to 3 times for the
  kernel's gradient (docs/results/speed.md).

Crops: volumes of int16 with masks of two tissues (the ICBM152 template of nilearn); patches of 64^3, batch 2, a third
around a voxel of a class (by nnU-Net's rule one of two), image and mask. Crops a second of:

  jaxmed       train_batches with fit=crop and forced crops: bricks of 32^3, threads
  monai        CacheDataset (all volumes in memory, decoded, with places of classes) and RandCropByPosNegLabeld, in a
               DataLoader
  npy          arrays memory-mapped as nnU-Net v2 keeps them unpacked, places of classes from a pickle, in a DataLoader
  blosc2       the same from blosc2 arrays in blocks of 32^3, nnU-Net's later format

  Bytes of a crop: 64^3 x (2 + 1) = 0.8 MB, copied once from memory by 'monai' and 'npy' (below 1 ms). A crop that does
  not lie on the grid of bricks touches 27 of them, of image and of mask: 2.7 MB to be decoded, as by 'blosc2'.
  Expected: slower than what lies decoded in memory, and level with 'blosc2'.

Needs `pip install -e '.[parity,demo]'` (blosc2 is left out where it is not installed).

Example:
  python tools/bench_segment.py --cases unet_micro,crops --threads 1 --rounds 7
"""

import argparse
import dataclasses
import os
import pathlib
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from tools import bench_data  # noqa: E402
from tools.bench_step import BETAS, DECAY, RATE, Worker, compare, worker  # noqa: E402
from tools.needs import measured_on, need, run_script  # noqa: E402

CLASSES = 3
FORCED = 0.33  # nnU-Net's oversample_foreground_percent
TISSUES = ('gm', 'wm')


@dataclasses.dataclass(frozen=True)
class Case:
  """A network of the registry for cubes of `size`; `flops` of its step, 0 where nobody counted."""

  model: str
  size: int = 64
  batch: int = 2
  flops: float = 0.0


CASES = {'unet_micro': Case('nnunet_micro'), 'unet': Case('nnunet_plain'), 'swin_unetr': Case('swin_unetr_micro')}
SMALLEST = {'unet_micro': 16, 'unet': 64, 'swin_unetr': 64}


# The two sides. Each returns a function that runs one step and waits for its end.


def jax_program(case: Case) -> tuple[Any, Any, Any]:
  """Trainer, batch on the mesh, mesh."""
  import jax

  from jaxmed.augment.views import ViewMaker
  from jaxmed.models import create_model
  from jaxmed.objectives.dense.segment import Segment
  from jaxmed.parallel import mesh as mesh_lib
  from jaxmed.train.optimizer import Optimizer
  from jaxmed.train.step import Trainer

  size = (case.size,) * 3
  objective = Segment(create_model(case.model, size, 1), values=tuple(range(CLASSES)))
  view = ViewMaker(size, (0.0,), (1.0,), 'corpus', scale=(1.0, 1.0), flip=(0.0, 0.0, 0.0))
  optimizer = Optimizer(RATE, 1000, b1=BETAS[0], b2=BETAS[1], weight_decay=DECAY, clip=0.0)
  image, mask = data(case)
  batch = {'image': image, 'mask': mask, 'channels': np.zeros((case.batch, 1), np.int32)}
  mesh = mesh_lib.make_mesh({'data': 0})
  return Trainer(objective, optimizer, view), jax.device_put(batch, mesh_lib.batch_sharding(mesh)), mesh


def counted(case: Case) -> Case:
  """The case with its FLOPs."""
  from jaxmed.parallel import flops

  trainer, batch, mesh = jax_program(case)
  return dataclasses.replace(case, flops=float(flops.count(trainer.step, trainer.abstract(batch, mesh), batch)))


def jax_step(case: Case) -> Callable[[], None]:
  """jaxmed's side."""
  import jax

  trainer, batch, mesh = jax_program(case)
  abstract = trainer.abstract(batch, mesh)
  step, box = trainer.compile(abstract, batch, mesh), [trainer.initialize(abstract, batch)]

  def run():
    box[0], metrics = step(box[0], batch)
    jax.block_until_ready((box[0], metrics))
    _check(case, float(metrics['loss']))

  return run


def torch_step(case: Case) -> Callable[[], None]:
  """The same step in PyTorch, with MONAI's networks and loss."""
  import torch
  from monai.losses import DiceCELoss

  torch.manual_seed(0)
  model = _torch_model(case)
  criterion = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
  optimizer = torch.optim.AdamW(model.parameters(), RATE, BETAS, weight_decay=DECAY, fused=True)
  image, mask = (torch.from_numpy(x) for x in data(case))
  image, mask = image.permute(0, 4, 1, 2, 3).contiguous(), mask[:, None]

  def run():
    optimizer.zero_grad(set_to_none=True)
    loss = criterion(model(image), mask)
    loss.backward()
    optimizer.step()
    _check(case, float(loss))

  return run


def _torch_model(case: Case) -> Any:
  from monai.networks.nets import DynUNet, SwinUNETR

  from jaxmed.models import create_model

  if case.model.startswith('swin'):
    return SwinUNETR(in_channels=1, out_channels=CLASSES, feature_size=12)
  dims = create_model(case.model, (case.size,) * 3, 1).dims
  strides = (1, *(2,) * (len(dims) - 1))
  return DynUNet(3, 1, CLASSES, (3,) * len(dims), strides, strides[1:], filters=dims,
                 norm_name=('instance', {'affine': True}))


def _check(case: Case, loss: float) -> None:
  if not np.isfinite(loss):
    raise FloatingPointError(f'{case.model}: loss is {loss}')


def data(case: Case) -> tuple[np.ndarray, np.ndarray]:
  """Images [B, D, H, W, 1] float32 and masks [B, D, H, W] int32, the same for both sides."""
  rng, size = np.random.default_rng(0), (case.batch, *(case.size,) * 3)
  return rng.normal(size=(*size, 1)).astype(np.float32), rng.integers(0, CLASSES, size).astype(np.int32)


def steps(names: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
  """Runs the chosen networks and prints a table."""
  more = ['--cpu-seconds'] if options.cpu_seconds else []
  found = [(side, __file__, side) for side in ('jax', 'torch')]
  if options.also:
    found.append(('jax', f'{options.also}/tools/bench_segment.py', 'also'))
  sides = [Worker(side, options.threads, options.huge_pages, script, name, more) for side, script, name in found]
  print(f'{"case":12} {"ratio":>6} {"(range)":>11} {"jaxmed s":>9} {"torch s":>8} {"also s":>8} {"GFLOP":>6} '
        f'{"bound s":>8}')
  rows = []
  for name in names:
    case = CASES[name]
    if options.smallest:
      case = dataclasses.replace(case, size=SMALLEST[name], batch=1)
    r = compare(counted(case), sides, options.rounds, options.each)
    also = np.median(r['all_seconds'].get('also', [np.nan]))
    rows.append({'case': name} | r)
    print(f'{name:12} {r["ratio"]:6.2f} {r["ratio_low"]:6.2f}-{r["ratio_high"]:6.2f} {r["jax_seconds"]:9.3f} '
          f'{r["torch_seconds"]:8.3f} {also:8.3f} {r["gflop"]:6.0f} {r["bound_seconds"]:8.3f}', flush=True)
  for s in sides:
    s.close()
  return rows


# Crops.


def make_volumes(folder: pathlib.Path, count: int, every: int = 1) -> list[tuple[str, str]]:
  """Paths of NIfTI images of int16, a template with noise of their own, and of masks of two tissues; `every` voxel."""
  import nibabel

  def read(name):
    path = bench_data._file('nilearn', f'datasets/data/mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz')
    return np.asanyarray(nibabel.nifti1.load(path).dataobj)[::every, ::every, ::every].astype(np.float32)

  fine, tissues = 8 * read('t1'), [read(name) for name in TISSUES]
  mask = sum((k + 1) * (x > max(x.max(), 1) / 2) for k, x in enumerate(tissues)).clip(0, 2).astype(np.uint8)
  (folder / 'nii').mkdir(parents=True)
  out = []
  for i in range(count):
    noisy = (fine + np.random.default_rng(i).normal(0, 40, fine.shape)).round().astype(np.int16)
    out.append((str(folder / 'nii' / f'{i}.nii.gz'), str(folder / 'nii' / f'{i}_mask.nii.gz')))
    for path, array in zip(out[-1], (noisy, mask), strict=True):
      nibabel.save(nibabel.nifti1.Nifti1Image(array, np.eye(4)), path)
  return out


def make_corpus(folder: pathlib.Path, pairs: list[tuple[str, str]], workers: int) -> Any:
  """A corpus of the same files, masks and places of classes with them."""
  import csv

  from jaxmed.data.corpus.open import open_source
  from jaxmed.data.prepare.prepare import prepare

  with open(folder / 'table.csv', 'w', newline='', encoding='utf-8') as f:
    csv.writer(f).writerows([('path', 'mask'), *([pathlib.Path(p).name for p in pair] for pair in pairs)])
  prepare([folder / 'nii'], folder / 'corpus', table=folder / 'table.csv', splits=(1.0, 0.0, 0.0), volumes='whole',
          progress=False, workers=workers)
  return open_source(folder / 'corpus')


def make_arrays(folder: pathlib.Path, pairs: list[tuple[str, str]], blosc: bool) -> list[str]:
  """The same as arrays [1, *size], and pickles of at most 10,000 places of each class, as nnU-Net writes them."""
  import nibabel

  (folder / 'arrays').mkdir()
  out = []
  for i, pair in enumerate(pairs):
    arrays = [np.ascontiguousarray(np.asanyarray(nibabel.nifti1.load(path).dataobj))[None] for path in pair]
    out.append(str(folder / 'arrays' / str(i)))
    for kind, array in zip(('', '_seg'), arrays, strict=True):
      np.save(f'{out[-1]}{kind}.npy', array)
      if blosc:
        import blosc2
        blosc2.asarray(array, urlpath=f'{out[-1]}{kind}.b2nd', chunks=(1, 96, 96, 96), blocks=(1, 32, 32, 32),
                       cparams={'codec': blosc2.Codec.ZSTD, 'clevel': 8, 'nthreads': 1})
    rng, places = np.random.default_rng(0), {}
    for value in range(1, CLASSES):
      every = np.argwhere(arrays[1][0] == value)
      places[value] = every[rng.choice(len(every), min(10_000, len(every)), replace=False)]
    with open(f'{out[-1]}.pkl', 'wb') as f:
      pickle.dump({'class_locations': places}, f)
  return out


class Arrays:
  """Batches of crops of memory-mapped arrays, the last ones of a batch around a place of a class, as nnU-Net has it."""

  def __init__(self, paths: list[str], size: int, batch: int, blosc: bool):
    self.paths, self.size, self.batch, self.blosc = paths, size, batch, blosc

  def __len__(self) -> int:
    return 1 << 30

  def __getitem__(self, step: int) -> dict[str, Any]:
    rng = np.random.default_rng()
    crops = [self._crop(rng, k >= round(self.batch * (1 - FORCED))) for k in range(self.batch)]
    return {name: np.stack([c[name] for c in crops]) for name in crops[0]}

  def _crop(self, rng: np.random.Generator, forced: bool) -> dict[str, np.ndarray]:
    path = self.paths[rng.integers(len(self.paths))]
    with open(f'{path}.pkl', 'rb') as f:
      places = pickle.load(f)['class_locations']
    image, mask = self._open(path), self._open(f'{path}_seg')
    spare = [n - self.size for n in image.shape[1:]]
    start = [int(rng.integers(n + 1)) for n in spare]
    if forced:
      own = places[int(rng.choice(list(places)))]
      place = own[rng.integers(len(own))]
      start = [int(np.clip(at - self.size // 2, 0, n)) for at, n in zip(place, spare, strict=True)]
    at = (slice(None), *(slice(a, a + self.size) for a in start))
    return {'image': np.asarray(image[at]), 'mask': np.asarray(mask[at])}

  def _open(self, path: str) -> Any:
    if not self.blosc:
      return np.load(f'{path}.npy', mmap_mode='r')
    import blosc2
    return blosc2.open(f'{path}.b2nd', mode='r', mmap_mode='r', dparams={'nthreads': 1})


def array_crops(data: Arrays, workers: int) -> Iterator[Any]:
  from torch.utils.data import DataLoader

  for found in DataLoader(data, batch_size=None, num_workers=workers):
    yield found['image']


def monai_crops(pairs: list[tuple[str, str]], size: int, batch: int, workers: int) -> Callable[[], Iterator[Any]]:
  """MONAI's crops around a voxel of a class with the same probability, out of memory, filled beforehand."""
  import monai.data
  import monai.transforms as mt

  keys, shape = ['image', 'mask'], (size,) * 3
  steps = mt.Compose([
    mt.LoadImaged(keys, dtype=np.int16), mt.EnsureChannelFirstd(keys), mt.FgBgToIndicesd('mask'),
    mt.RandCropByPosNegLabeld(keys, 'mask', shape, pos=FORCED, neg=1 - FORCED, num_samples=1,
                              fg_indices_key='mask_fg_indices', bg_indices_key='mask_bg_indices'),
    mt.SelectItemsd(keys)])
  cached = monai.data.CacheDataset([dict(zip(keys, pair, strict=True)) for pair in pairs], steps, progress=False)
  return lambda: bench_data.loader(cached, batch, workers, collate_fn=monai.data.utils.list_data_collate)


def jaxmed_crops(source: Any, size: int, batch: int, threads: int) -> Iterator[np.ndarray]:
  from jaxmed.data.feed import fields, foreground
  from jaxmed.data.feed.pipeline import train_batches

  wanted = fields.of_source(source, (size,) * 3, ('image', 'mask'))
  forced = foreground.make(source, FORCED, 'slots', batch)
  for found in train_batches(source, batch_size=batch, size=(size,) * 3, vocabulary=source.channels, seed=0, fit='crop',
                             fields=wanted, foreground=forced, threads=threads):
    yield found['image']


def crops(root: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
  """All contenders, on `threads` cores: that many threads or processes."""
  size, batch, workers = (16 if options.smallest else 64), 2, options.threads
  pairs = make_volumes(root, 1, 4) if options.smallest else make_volumes(root, 6)
  source, blosc = make_corpus(root, pairs, workers), bench_data._there('blosc2')
  paths = make_arrays(root, pairs, blosc)
  contenders: dict[str, Callable[[], Iterator[Any]]] = {
    'jaxmed': lambda: jaxmed_crops(source, size, batch, workers), 'monai': monai_crops(pairs, size, batch, workers),
    'npy': lambda: array_crops(Arrays(paths, size, batch, False), workers)}
  if blosc:
    contenders['blosc2'] = lambda: array_crops(Arrays(paths, size, batch, True), workers)
  shape = 'x'.join(map(str, source.table['shape'][0].as_py()[:-1]))
  title = f'crops: {len(pairs)} volumes of {shape}, crops of {size}^3, batch {batch}, {FORCED:.0%} forced'
  return bench_data.alternate(title, contenders, options.rounds, options.seconds, 2 * workers)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the chosen cases and prints tables."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  names = (*CASES, 'crops')
  parser.add_argument('--cases', default=','.join(names), help='comma-separated, of: ' + ', '.join(names))
  parser.add_argument('--rounds', type=int, default=5, help='alternations a case (default 5)')
  parser.add_argument('--each', type=int, default=1, help='steps a round; the faster counts (default 1)')
  parser.add_argument('--seconds', type=float, default=3.0, help='of each contender of crops in a round')
  parser.add_argument('--threads', type=int, default=min(2, os.cpu_count() or 1), help='cores of each side')
  parser.add_argument('--huge-pages', action='store_true', help='all sides use huge pages (Linux, glibc)')
  parser.add_argument('--cpu-seconds', action='store_true', help='CPU time of steps, with --threads 1')
  parser.add_argument('--smallest', action='store_true', help='the smallest sizes: to see that it runs')
  parser.add_argument('--also', help='another checkout of this repository as a third side of steps')
  parser.add_argument('--json', default='', help='write the results here')
  parser.add_argument('--worker', choices=('jax', 'torch'), help=argparse.SUPPRESS)
  options = parser.parse_args(argv)
  if options.worker:
    clock = time.process_time if options.cpu_seconds else time.perf_counter
    worker(options.worker, options.threads, {'jax': jax_step, 'torch': torch_step}, Case, clock)
    return
  chosen = options.cases.split(',')
  unknown = [n for n in chosen if n not in names]
  if unknown:
    parser.error(f'unknown case {unknown[0]!r}: choose of {", ".join(names)}')
  need('parity', 'torch', 'monai')
  need('demo', 'nilearn')
  clock = ', CPU seconds' if options.cpu_seconds else ''
  print(f'{options.threads} threads a side, {options.rounds} alternating rounds{clock}; ratio > 1: jaxmed is faster; '
        f'{measured_on()}', flush=True)
  out: dict[str, Any] = {'on': measured_on(), 'threads': options.threads}
  networks = [name for name in chosen if name in CASES]
  if networks:
    out['cases'] = steps(networks, options)
  if 'crops' in chosen:
    with tempfile.TemporaryDirectory() as scratch:
      out['crops'] = crops(pathlib.Path(scratch), options)
  if options.json:
    from jaxmed.files import write_json

    write_json(options.json, out)


if __name__ == '__main__':
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  run_script(main)
