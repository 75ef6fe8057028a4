"""Figures of publications with captions: ROCO, ROCOv2 and PMC-OA.

  ROCO     [data/]train/radiology/captions.txt, ID <tab> caption; images in images/ beside it, called ID.jpg, or as
           scripts/fetch.py calls them, which dlinks.txt says; validation and test alike
  ROCOv2   train_captions.csv, ID and Caption; images in train/; valid_captions.csv, test_captions.csv alike
  PMC-OA   pmc_oa.jsonl, {"image": .., "caption": ..}; images in caption_T060_filtered_top4_sep_v0_subfigures/ or
           images/; train.jsonl, valid.jsonl and test.jsonl alike

The forms are those of razorx89/roco-dataset, and for ROCOv2 and PMC-OA what mbzuai-oryx/UniMed-CLIP reads of them
(data_prepration_scripts/ROCOV2 and PMC-OA). `kind` tells radiology from other images of ROCO. Each image is its own
subject; names of files give the splits.
"""

import pathlib

import pyarrow as pa

from jaxmed.data.prepare.benchmarks.captioned import Listing, columns, find, lines_of, one_line, split_of, texts
from jaxmed.data.prepare.benchmarks.tables import rows
from jaxmed.data.prepare.items import Plan
from jaxmed.errors import UserError
from jaxmed.files import text_of

EXPECTED = 'train/radiology/captions.txt, train_captions.csv or pmc_oa.jsonl'
SUFFIXES = ('.jpg', '.png', '.jpeg')
SUBFIGURES = 'caption_T060_filtered_top4_sep_v0_subfigures'


def here(root: pathlib.Path) -> bool:
  """Whether captions of a split, or of all figures, are there."""
  return bool(_lists(root) or _tables(root)) or (root / 'pmc_oa.jsonl').is_file()


def plan(root: pathlib.Path) -> Plan:
  """An item an image. Rejects are images that are missing, and rows without a caption or image.

  Raises:
    UserError: a table is damaged.
  """
  out = Listing(root, 'roco', kind=pa.string())
  for path, split, kind in _lists(root):
    fetched = _fetched(path.parent / 'dlinks.txt')
    for line in _text(path).splitlines():
      name, _, caption = line.partition('\t')
      name = name.strip()
      if name:
        _add(out, path, name, caption, split, (f'{path.parent.relative_to(root)}/images',), kind, fetched.get(name, ''))
  for path, split in _tables(root):
    folder = path.name.removesuffix('_captions.csv')
    for row in rows(path, ('ID', 'Caption')):
      _add(out, path, row['ID'] or '', row['Caption'], split, (folder, f'{folder}_images', f'{folder}_images/{folder}'))
  for path, whole in _jsons(root):
    out.source = 'pmc_oa'
    for number, figure in lines_of(path):
      if figure is None:
        out.reject(f'{path.name}:{number}', 'is no JSON object')
        continue
      _add(out, path, str(figure.get('image') or ''), str(figure.get('caption') or ''), whole,
           (SUBFIGURES, 'images', f'images/{SUBFIGURES}', ''))
  return out.plan


def _add(out: Listing, path: pathlib.Path, name: str, caption: str | None, split: str | None, folders: tuple[str, ...],
         kind: str | None = None, other: str = '') -> None:
  names = (name, *(f'{name}{s}' for s in SUFFIXES), *([other] if other else [])) if name else ()
  file = next((f for n in names if (f := find(out.root, n, folders))), None)
  if file is None:
    out.lost(name, path)
  elif not one_line(caption):
    out.reject(text_of(file.relative_to(out.root).as_posix()), f'{path.name} has no caption of it')
  else:
    out.add(file, texts([one_line(caption)]) | {'kind': kind}, split=split)


def _lists(root: pathlib.Path) -> list[tuple[pathlib.Path, str, str]]:
  """(file, split, kind) of the lists of ROCO."""
  found = sorted([*root.glob('*/*/captions.txt'), *root.glob('data/*/*/captions.txt')])
  return [(p, s, p.parent.name) for p in found
          if (s := split_of(p.parent.parent.name)) and (p.parent / 'images').is_dir()]


def _fetched(path: pathlib.Path) -> dict[str, str]:
  """{ID: file} as scripts/fetch.py of the data set writes them: the name of the archive before that of the image."""
  out = {}
  for line in _text(path).splitlines() if path.is_file() else ():
    words = line.split('\t')
    url = next((w for w in line.split() if w.endswith('.tar.gz')), '')
    if len(words) > 2 and url:
      out[words[0].strip()] = f'{url.rpartition("/")[2].removesuffix(".tar.gz")}_{words[-1].strip()}'
  return out


def _tables(root: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
  """(file, split) of the tables of ROCOv2."""
  found = [(p, split_of(p.name.removesuffix('_captions.csv'))) for p in sorted(root.glob('*_captions.csv'))]
  return [(p, s) for p, s in found if s and {'ID', 'Caption'} <= set(columns(p))]


def _jsons(root: pathlib.Path) -> list[tuple[pathlib.Path, str | None]]:
  """(file, split) of the lists of PMC-OA: those of splits, or the one of all."""
  splits = [(root / f'{word}.jsonl', split) for word, split in (('train', 'train'), ('valid', 'val'), ('test', 'test'))]
  found: list[tuple[pathlib.Path, str | None]] = [(p, s) for p, s in splits if p.is_file()]
  whole = root / 'pmc_oa.jsonl'
  return found or ([(whole, None)] if whole.is_file() else [])


def _text(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding='utf-8-sig')
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(f'cannot read {path}: {e}') from e
