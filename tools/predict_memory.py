"""Host memory that predicting a whole volume takes beside the weights.

A network that costs next to nothing gives logits of real size; all else is `Segmenter.mask_of`, as `jaxmed predict` and
`jaxmed evaluate --task segment` call it. Memory is the peak of this process (ru_maxrss), and what it grew by.

Needs `make install` alone.

Example:
  python tools/predict_memory.py --size 600,512,512 --classes 14
"""

import argparse
import dataclasses
import pathlib
import resource
import sys
import time
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from jaxmed.models.registry import create_model  # noqa: E402
from jaxmed.objectives.dense.segment import Segment  # noqa: E402
from jaxmed.segmenter import Segmenter  # noqa: E402
from tools.needs import measured_on, run_script  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Cheap(Segment):
  """Logits of all classes that are products of the image and a number."""

  def logits(self, variables, batch, train=False, rngs=None):
    del variables, train, rngs
    return (batch['image'] * jnp.linspace(-1, 1, len(self.values)),), {}


def segmenter(tile: Sequence[int], classes: int, scale: float) -> Segmenter:
  """Tiles at a spacing of `scale` mm."""
  objective = Cheap(create_model('vit_micro/4', tuple(tile), 1), decoder='linear', values=tuple(range(classes)))
  channels = ({'name': 'CT', 'mean': 0.0, 'std': 500.0},)
  return Segmenter(objective, {'encoder': {}, 'decoder': {}}, channels, tile=tuple(tile), spacing=(scale,) * len(tile))


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
  network = segmenter(args.tile, args.classes, args.scale)
  record = lambda size: {'image': volume(size), 'channels': ('CT',), 'spacing': (1.0,) * len(size)}
  network.mask_of(record(args.tile))
  scan = record(args.size)
  before, start = peak(), time.perf_counter()
  mask = network.mask_of(scan)
  gib = lambda n: f'{n / 2**30:.2f} GiB'
  print(f'{"x".join(map(str, args.size))}, {args.classes} classes, tiles of {"x".join(map(str, args.tile))}, scale '
        f'{args.scale:g}: {gib(peak())} in all, {gib(peak() - before)} by prediction, of which the mask '
        f'{gib(mask.nbytes)}; the image {gib(scan["image"].nbytes)}; {time.perf_counter() - start:.0f} s '
        f'({measured_on()})')


if __name__ == '__main__':
  run_script(main)
