"""Shards of WebDataset with images and texts: tar files whose members of one key are a sample.

  dataset-000001.tar      000000.jpg, 000000.txt (or .json, .cls), 000001.jpg, ...

A sample has an image (.jpg, .jpeg, .png, .webp, .bmp, .tif, .tiff), maybe a text: the member .txt, or `caption`, `text`
or `report` of .json; .cls is its label. Images are read out of the shards where they lie; nothing is unpacked. A sample
is its own subject, as nothing says more. Shards in folders train, val and test, or named so, have that split.

Texts of UniMed (mbzuai-oryx/UniMed-CLIP, src/training/data.py) hold several captions, joined by a marker that names the
set: they are taken apart as there. Of `_openi_` the first is the report and the only one; of `_mimiccxr_` the last is,
unless it says that there is none; of `_medicat_` the second may be missing; of others the first 10 (`_dr_`: 15) count.
"""

import json
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from jaxmed.data.prepare.benchmarks.captioned import SPLITS, Listing, one_line, texts
from jaxmed.data.prepare.items import Item, Plan
from jaxmed.data.prepare.items import one_line as told
from jaxmed.data.readers import Parts
from jaxmed.files import text_of

EXPECTED = 'tar files whose members are 000000.jpg, 000000.txt, 000001.jpg ...'
IMAGES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff')
TEXTS = ('.txt', '.json', '.cls')
MOST = 1 << 20  # bytes of a text
# {marker: (name of the set, captions that count)}, in the order in which they are looked for.
MARKERS = {'_radimagenet_': ('radimagenet', 10), '_chexpert_': ('chexpert', 10), '_openi_': ('openi', 1),
           '_chestxray8_': ('chestxray8', 10), '_all_retina_merged_': ('retina', 10), '_dr_': ('dr', 15),
           '_medicat_': ('medicat', 2), '_mimiccxr_': ('mimiccxr', 10)}
NO_REPORT, NOTHING = 'noreportpresent', 'nothingpresent'

Sample = dict[str, tarfile.TarInfo]


def here(root: pathlib.Path) -> bool:
  """Whether the first shard begins with a sample of an image and a text."""
  first = next(iter(_shards(root)), None)
  if first is None:
    return False
  try:
    with tarfile.open(first, 'r:') as shard:
      _, sample = next(_samples(shard), ('', {}))
      return bool(set(sample) & set(IMAGES)) and bool(set(sample) & set(TEXTS))
  except (tarfile.TarError, OSError):
    return False


def plan(root: pathlib.Path) -> Plan:
  """An item a sample. Rejects are samples without an image or with a text that is none, and shards that are damaged or
  compressed: what of a damaged one comes before that is kept."""
  out = Listing(root, 'webdataset', label=pa.string(), set=pa.string())
  for path in _shards(root):
    rel = text_of(path.relative_to(root).as_posix())
    try:
      with tarfile.open(path, 'r:') as shard:
        for key, sample in _samples(shard):
          _add(out, path, f'{rel}/{text_of(key)}', shard, sample)
    except (tarfile.TarError, OSError) as e:
      out.reject(rel, f'is no tar file that can be read (compressed ones must be unpacked): {told(ValueError(str(e)))}')
  return out.plan


def captions(text: str) -> tuple[list[str], str | None]:
  """The captions of a text, and the set of UniMed that its marker names, or None."""
  for marker, (name, most) in MARKERS.items():
    if marker not in text:
      continue
    parts = [one_line(part) for part in text.split(marker)]
    if name == 'mimiccxr' and parts[-1] != NO_REPORT:
      return [p for p in parts[-1:] if p], name
    return [p for p in parts[:most] if p not in ('', NOTHING, NO_REPORT)], name
  return [t for t in [one_line(text)] if t], None


def _add(out: Listing, path: pathlib.Path, rel: str, shard: tarfile.TarFile, sample: Sample) -> None:
  suffix = next((s for s in IMAGES if s in sample), '')
  if not suffix:
    out.reject(rel, f'has no image: it has {", ".join(sample)}')
    return
  try:
    some, name = captions(_text(shard, sample))
    label = one_line(_read(shard, sample['.cls'])) if '.cls' in sample else None
  except ValueError as e:
    out.reject(rel, told(e))
    return
  image = sample[suffix]
  words = [p.lower() for p in pathlib.PurePosixPath(rel).parts[:-1]]
  split = next((SPLITS[w] for part in words for w in (part, part.split('-')[0].split('_')[0].removesuffix('.tar'))
                if w in SPLITS), None)
  extra = dict.fromkeys(out.plan.types) | {'label': label, 'set': name} | texts(some)
  out.plan.items.append(Item(
      path, rel, rel, name or 'webdataset', subject=rel, split=split, extra=extra, size=max(image.size, 1),
      stamp=path.stat().st_mtime_ns, parts=Parts((path,), (), 'member', values=(suffix,),
                                                 rows=(image.offset_data, image.offset_data + image.size))))


def _text(shard: tarfile.TarFile, sample: Sample) -> str:
  """The text of a sample, '' without one; a ValueError where it is none."""
  if '.txt' in sample:
    return _read(shard, sample['.txt'])
  if '.json' not in sample:
    return ''
  found: Any = json.loads(_read(shard, sample['.json']))
  value = next((found[k] for k in ('caption', 'text', 'report') if found.get(k)), '') if isinstance(found, dict) else ''
  return value if isinstance(value, str) else ''


def _read(shard: tarfile.TarFile, member: tarfile.TarInfo) -> str:
  if member.size > MOST:
    raise ValueError(f'{member.name} has {member.size:,} bytes of text: expected at most {MOST:,}')
  content = shard.extractfile(member)
  assert content is not None
  try:
    return content.read().decode('utf-8-sig')
  except UnicodeDecodeError as e:
    raise ValueError(f'{member.name} is no UTF-8 text') from e


def _samples(shard: tarfile.TarFile) -> Iterator[tuple[str, Sample]]:
  """(key, {suffix: member}) of members that follow each other with one key: the name up to its first dot."""
  key, sample = '', {}  # type: tuple[str, Sample]
  for member in shard:
    if not member.isfile():
      continue
    folder, _, name = member.name.rpartition('/')
    stem, _, suffix = name.partition('.')
    own = f'{folder}/{stem}' if folder else stem
    if sample and own != key:
      yield key, sample
      sample = {}
    key = own
    sample[f'.{suffix.lower()}'] = member
  if sample:
    yield key, sample


def _shards(root: pathlib.Path) -> list[pathlib.Path]:
  return sorted(root.rglob('*.tar')) if root.is_dir() else []
