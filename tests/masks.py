"""Corpora with masks for tests: tiles of a real image, and classes of their pixels by brightness."""

import csv
import pathlib

import numpy as np
from PIL import Image

from jaxmed.data.prepare.prepare import prepare

SPLITS = ('train', 'train', 'train', 'val', 'test', 'test')


def classes_of(tile):
  """0 dark, 1, 2 bright: thirds of the brightness of a tile [H, W, 3]."""
  grey = tile.mean(axis=-1)
  return np.digitize(grey, np.quantile(grey, (1 / 3, 2 / 3))).astype(np.uint8)


def tiles_with_masks(tiles: pathlib.Path, place: pathlib.Path, count: int = 48, without: int = 6) -> pathlib.Path:
  """A corpus of `count` tiles, two a subject, of which the first training ones, `without` of them, have no mask."""
  rows, names = [], sorted(tiles.glob('colon*.png'))[:count]
  folder = place / 'raw'
  folder.mkdir()
  for i, path in enumerate(names):
    with Image.open(path) as image:
      tile = np.asarray(image)
    Image.fromarray(tile).save(folder / path.name)
    Image.fromarray(classes_of(tile)).save(folder / f'mask_{path.stem}.png')
    split = SPLITS[i // 2 % 6]
    bare = split == 'train' and sum(r['mask'] == '' for r in rows) < without
    rows.append({'path': path.name, 'subject': f's{i // 2}', 'split': split, 'mask': '' if bare else f'mask_{path.stem}.png',
                 'bright': f'{tile.mean():.3f}', 'half': 'light' if tile.mean() > 180 else 'dark'})
  with open(folder / 'table.csv', 'w', newline='', encoding='utf-8') as f:
    table = csv.DictWriter(f, rows[0])
    table.writeheader()
    table.writerows(rows)
  prepare([folder], place / 'corpus', table=folder / 'table.csv', progress=False)
  return place / 'corpus'
