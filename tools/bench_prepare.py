"""How much faster more processes make `jaxmed prepare`, and whether they write the same bytes.

  python tools/bench_prepare.py --megabytes 400 --workers 1,2 --rounds 3

Writes real volumes to a temporary folder (the ICBM152 T1 template of nilearn, enlarged, with a scanner's noise; as
NIfTI, gzipped; as DICOM series; and its slices as PNG), then prepares each kind in turn with each number of processes,
a command each time. Prints for each kind the best wall time, what is read a second, and the ratio to the first number.
The time is that of the whole command, its start included; --json prints the numbers. Nothing else should run meanwhile.

Needs `make install` alone.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from jaxmed.errors import UserError, choose  # noqa: E402
from tools.needs import measured_on, need, run_script  # noqa: E402


def volumes(megabytes: float) -> list[np.ndarray]:
  """int16 [z, y, x] volumes of together so many megabytes, each another part and noise of the template."""
  import importlib.util

  import nibabel
  from scipy.ndimage import zoom

  spec = importlib.util.find_spec('nilearn')
  assert spec is not None and spec.origin is not None
  path = pathlib.Path(spec.origin).parent / 'datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz'
  t1 = np.asanyarray(nibabel.nifti1.load(path).dataobj).T[:, 20:212, 2:194].astype(np.float32)
  fine = zoom(t1, 4 / 3, order=1)[:192]  # [192, 256, 256], 25 MB as int16
  rng = np.random.default_rng(0)
  out, left = [], megabytes * 1e6
  while left > 0:
    depth = int(min(len(fine), max(16, left // (256 * 256 * 2))))
    noisy = fine[len(fine) // 2 - depth // 2 :][:depth] * 8
    out.append((noisy + rng.normal(0, 80, noisy.shape)).round().astype(np.int16))
    left -= out[-1].nbytes
  return out


def write_nifti(folder: pathlib.Path, parts: list[np.ndarray]) -> None:
  import nibabel

  for i, part in enumerate(parts):
    nibabel.save(nibabel.Nifti1Image(part.T, np.diag([0.75, 0.75, 0.75, 1.0])), folder / f'{i:03d}.nii.gz')


def write_dicom(folder: pathlib.Path, parts: list[np.ndarray]) -> None:
  from tests.data.readers import dicoms

  for i, part in enumerate(parts):
    found = dicoms.series(part, (1, 0, 0, 0, 1, 0), (0, 0, 0.75), spacing=(0.75, 0.75), series=f's{i}',
                          PatientID=f'p{i}', sop_class=dicoms.MR)
    dicoms.write(folder, found, np.random.default_rng(i), prefix=f'{i:03d}-')


def write_png(folder: pathlib.Path, parts: list[np.ndarray]) -> None:
  from PIL import Image

  for i, part in enumerate(parts):
    for z, plane in enumerate(part):
      Image.fromarray(plane.clip(0, None).astype(np.uint16)).save(folder / f'{i:03d}-{z:03d}.png')


KINDS: dict[str, tuple[Callable[[pathlib.Path, list[np.ndarray]], None], list[str]]] = {
  'nifti': (write_nifti, ['--volumes', 'whole']), 'dicom': (write_dicom, ['--volumes', 'whole']),
  'nifti to 1 mm': (write_nifti, ['--volumes', 'whole', '--spacing', '1', '--crop', 'foreground']),
  'png': (write_png, []),
}


def prepare(folder: pathlib.Path, out: pathlib.Path, workers: int, words: list[str]) -> tuple[float, dict, str]:
  """Wall seconds of the command, its summary, and a hash of all that it wrote."""
  shutil.rmtree(out, ignore_errors=True)
  command = [sys.executable, '-m', 'jaxmed', 'prepare', folder, '--out', out, '--workers', workers, '--splits', '1,0,0',
             '--salt', 'x', '--json', *words]
  begin = time.perf_counter()
  done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, cwd=ROOT,
                        env=os.environ | {'JAX_PLATFORMS': 'cpu'})
  seconds = time.perf_counter() - begin
  if done.returncode:
    raise UserError(done.stderr)
  digest = hashlib.sha256()
  for path in sorted(out.iterdir()):
    digest.update(path.name.encode() + path.read_bytes())
  return seconds, json.loads(done.stdout.splitlines()[-1]), digest.hexdigest()


def measure(folder: pathlib.Path, out: pathlib.Path, counts: list[int], rounds: int, words: list[str]) -> dict:
  """Best seconds by number of processes, taken in turn, and what was read."""
  best: dict[int, float] = {}
  digests = set()
  for _ in range(rounds):
    for workers in counts:
      seconds, summary, digest = prepare(folder, out, workers, words)
      best[workers] = min(seconds, best.get(workers, seconds))
      digests.add(digest)
  if len(digests) > 1:
    raise UserError(f'{folder}: not the same bytes by {counts} processes')
  size = sum(p.stat().st_size for p in folder.iterdir())
  return {'records': summary['records'], 'blocks': summary['blocks'], 'bytes': size, 'corpus': summary['bytes'],
          'seconds': best}


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--megabytes', type=float, default=400, help='of int16 voxels')
  parser.add_argument('--workers', default='1,2', help='numbers of processes, comma-separated')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--kinds', default=','.join(KINDS), help='of files, comma-separated')
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args(argv)
  counts = [int(n) for n in args.workers.split(',')]
  kinds = [choose('kind of file', kind, KINDS) for kind in args.kinds.split(',')]
  need('demo', 'nilearn')
  parts = volumes(args.megabytes)
  found = {}
  for kind in kinds:
    write, words = KINDS[kind]
    with tempfile.TemporaryDirectory() as place:
      folder = pathlib.Path(place) / 'in'
      folder.mkdir()
      write(folder, parts)
      found[kind] = told = measure(folder, pathlib.Path(place) / 'out', counts, args.rounds, words)
    if not args.json:
      print(f'on {measured_on()}')
      first = told['seconds'][counts[0]]
      print(f'{kind}: {told["bytes"] / 1e6:.0f} MB, {told["records"]} records in {told["blocks"]} blocks, same bytes')
      for n, seconds in told['seconds'].items():
        print(f'  {n} processes {seconds:8.2f} s {told["bytes"] / 1e6 / seconds:8.1f} MB/s   {first / seconds:.2f} x',
              flush=True)
  if args.json:
    print(json.dumps(found))


if __name__ == '__main__':
  run_script(main)
