"""Host memory that predicting a whole volume takes beside its image and the weights.

A network that costs next to nothing gives logits of real size; tiles and sums are those of `Segmenter.predict`. Memory
is the peak of this process (ru_maxrss) less what it had before prediction.

Needs `make install` alone.

Example:
  python tools/predict_memory.py --size 600,512,512 --classes 14
"""

import argparse
import pathlib
import resource
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from jaxmed import tiles  # noqa: E402
from tools.needs import measured_on, run_script  # noqa: E402


def numbers(text: str) -> tuple[int, ...]:
  return tuple(int(n) for n in text.split(','))


def peak() -> int:
  """Bytes that this process had at most."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def volume(grid: Sequence[int]) -> np.ndarray:
  """Noise [*grid, 1] int16, made slice by slice."""
  image, rng = np.empty((*grid, 1), np.int16), np.random.default_rng(0)
  for plane in image:
    plane[:] = rng.integers(-1000, 1000, plane.shape, np.int16)
  return image


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--size', type=numbers, default=(600, 512, 512), help='grid of the volume')
  parser.add_argument('--tile', type=numbers, default=(128, 128, 128), help='grid of a tile')
  parser.add_argument('--classes', type=int, default=14)
  parser.add_argument('--scale', type=float, default=1.0, help='stored voxels along an axis for one of the network; '
                      'logits are brought back')
  args = parser.parse_args(argv)
  grid = tuple(max(1, round(n / args.scale)) for n in args.size)
  weight = jnp.linspace(-1, 1, args.classes)
  network = jax.jit(lambda x: x[..., :1] * weight)
  image = volume(grid)
  np.asarray(network(jnp.zeros((1, *args.tile, 1))))
  before, start = peak(), time.perf_counter()
  logits = tiles.slices(network, image, args.tile)
  if args.scale != 1:
    logits = tiles.resampled(logits, grid[0], args.size)
  mask = np.empty(args.size, np.int32)
  for z, x in enumerate(logits):
    mask[z] = x.argmax(axis=-1)
  gib = lambda n: f'{n / 2**30:.2f} GiB'
  print(f'{"x".join(map(str, args.size))}, {args.classes} classes, tiles of {"x".join(map(str, args.tile))}, scale '
        f'{args.scale:g}: {gib(peak() - before)}, of which the mask {gib(mask.nbytes)}; the image {gib(image.nbytes)}; '
        f'{time.perf_counter() - start:.0f} s ({measured_on()})')


if __name__ == '__main__':
  run_script(main)
