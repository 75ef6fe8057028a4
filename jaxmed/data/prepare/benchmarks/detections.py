"""Frames of operations with boxes in COCO's form.

  endoscapes   {train,val,test}/VID_FRAME.jpg with annotation_coco.json (boxes) and annotation_ds_coco.json (critical
               view of safety); semseg/VID_FRAME.png; seg_label_map.txt
  hsdb         any folder of images with JSON of images, annotations and categories

Endoscapes2023 (CAMMA-public/Endoscapes): `cvs` holds the criteria that the mean of three annotators, rounded, says are
met (of 0.5, which three cannot give, the even number, 0). Numbers of classes in masks are those of seg_label_map.txt,
for 0 is not the background of the boxes there. Frames are one a second of their video: `frame_seconds` is FRAME / 25
(from memory). Splits are the folders.

hSDB-instrument: the fields of its JSON files are from memory, as is that the part of a file's name before the last
number tells the video; splits are those that the names of JSON files say.
"""

import json
import pathlib
import re
from typing import Any

from jaxmed import files
from jaxmed.data.corpus.corpus_format import SPLITS
from jaxmed.data.prepare.benchmarks import videos
from jaxmed.data.prepare.benchmarks.videos import Layout
from jaxmed.data.prepare.items import Item, Plan
from jaxmed.errors import UserError

CRITERIA = ('two_structures', 'hepatocystic_triangle', 'cystic_plate')
BOXES, CVS = 'annotation_coco.json', 'annotation_ds_coco.json'
_RATE = 25.0


def coco(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """{file name: its image field, with `boxes` [[y, x, y end, x end], ...] and `box_names`} of a JSON file of COCO.

  Raises:
    UserError: another form, an annotation of no image, a box without extent.
  """
  try:
    content = files.read_json(path)
    names = {c['id']: str(c['name']).strip() for c in content.get('categories', ())}
    images = {i['id']: i | {'boxes': [], 'box_names': []} for i in content['images']}
    for each in content.get('annotations', ()):
      if 'bbox' not in each:
        continue
      x, y, width, height = (float(v) for v in each['bbox'])
      if width <= 0 or height <= 0:
        raise UserError(f'{path}: annotation {each.get("id")} has a box of {width:g} x {height:g} pixels')
      images[each['image_id']]['boxes'].append([y, x, y + height, x + width])
      images[each['image_id']]['box_names'].append(names[each['category_id']])
    return {str(image['file_name']): image for image in images.values()}
  except (KeyError, TypeError, AttributeError) as e:
    raise UserError(f'cannot read {path}: expected JSON of COCO (images, annotations, categories); {e} is missing or '
                    'odd') from e


def _boxes(image: dict[str, Any] | None) -> dict[str, str | None]:
  """The columns of the boxes of an image; None where nobody looked for any."""
  if image is None:
    return {'boxes': None, 'box_names': None}
  return {'boxes': json.dumps(image['boxes']), 'box_names': videos.SEPARATOR.join(image['box_names'])}


def met(ratings: Any, path: pathlib.Path) -> str:
  """The criteria that three means of ratings, rounded, say are met."""
  if not isinstance(ratings, list) or len(ratings) != len(CRITERIA):
    raise UserError(f'{path}: field ds is {ratings}: expected three numbers')
  return videos.SEPARATOR.join(name for name, value in zip(CRITERIA, ratings) if round(float(value)) == 1)


def _endoscapes(root: pathlib.Path) -> Plan:
  out = videos.typed('cvs', 'boxes', 'box_names', 'mask', images=True)
  home = next((p for p in (root, *sorted(root.glob('*/'))) if (p / 'train' / BOXES).is_file()), root)
  out.labels = _classes(home / 'seg_label_map.txt')
  for split in SPLITS:
    tables = {name: coco(home / split / name) if (home / split / name).is_file() else {} for name in (BOXES, CVS)}
    for file in sorted((home / split).glob('*.jpg')):
      def make(file=file, split=split, tables=tables) -> Item:
        match = re.fullmatch(r'(\d+)_(\d+)', file.stem)
        if not match:
          raise UserError('its name is none of the form VID_FRAME.jpg')
        rated = tables[CVS].get(file.name, {}).get('ds')
        mask = home / 'semseg' / f'{file.stem}.png'
        return videos.frame(root, file, f'endoscapes/{int(match[1])}', int(match[2]) / _RATE, split,
                            mask if mask.is_file() else None,
                            cvs=None if rated is None else met(rated, home / split / CVS),
                            **_boxes(tables[BOXES].get(file.name)))
      videos.add(out, root, file, make)
  return out


def _classes(path: pathlib.Path) -> dict[int, str]:
  """{value: name} of lines of a number and a name, in any order; {} where there is no such file."""
  if not path.is_file():
    return {}
  out = {}
  for line in path.read_text(encoding='utf-8-sig').splitlines():
    number, word = re.search(r'\d+', line), re.search(r'[A-Za-z][\w \-]*[A-Za-z]', line)
    if number and word:
      out[int(number[0])] = word[0].replace('_', ' ')
  return dict(sorted(out.items()))


def _hsdb(root: pathlib.Path) -> Plan:
  out = videos.typed('boxes', 'box_names', images=True)
  here = {path.name: path for path, _ in videos.found(root, r'[^/]+\.(?:jpg|jpeg|png)')}
  for table, _ in videos.found(root, r'[^/]+\.json'):
    split = next((s for s in SPLITS if s in table.stem.lower()), None)
    for name, image in coco(table).items():
      file = here.get(pathlib.PurePosixPath(name).name)
      if file is None:
        out.rejects.append((name, f'{table.name} lists it, but no such file exists'))
        continue
      match = re.fullmatch(r'(.*?)[_-]?(\d+)', file.stem)
      operation = f'hsdb/{match[1] or file.parent.name}' if match else f'hsdb/{file.stem}'
      boxes: Any = _boxes(image)
      out.items.append(videos.frame(root, file, operation, float(match[2]) if match else None, split, **boxes))
  return out


LAYOUTS = {
  'endoscapes': Layout(lambda root: videos.near(root, f'train/{CVS}'), _endoscapes,
                       f'train/1_2.jpg with train/{BOXES}'),
  'hsdb': Layout(lambda root: False, _hsdb, 'images and JSON of images, annotations and categories'),
}
