"""Rows of MMEB and mmE5: queries and targets of a universal embedding, of images, texts or both.

  *.jsonl, *.json or *.parquet with qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path

The columns are those of haon-chen/mmE5 and TIGER-AI-Lab/VLM2Vec; '' stands for no image, and negatives may be lists as
Python writes them. A record is the image of the query, whose text is the positive one; a row whose target alone has an
image gives that image with the query as its text. `query`, `side` (query or target) and `negatives` (a JSON list) are
columns. Tokens that stand for the image (<|image_1|>) are left out. A row without any image is a reject: a corpus
holds images. Each row is its own subject; images that several rows name are one record with all their texts. The name
of the file says the split where it is train, val or test.
"""

import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from jaxmed.data.prepare.benchmarks.captioned import Listing, find, lines_of, listed, one_line, split_of, texts
from jaxmed.data.prepare.benchmarks.tables import rows
from jaxmed.data.prepare.items import Plan

EXPECTED = 'JSON, JSONL or Parquet files with qry, qry_image_path and pos_text'
NEEDED = ('qry', 'qry_image_path', 'pos_text')
FOLDERS = ('', 'images', 'MMEB-train', 'MMEB-eval')
_TOKEN = re.compile(r'<\|[a-z_]*image[a-z_0-9]*\|>|<image>')
_HEAD = 1 << 16


def here(root: pathlib.Path) -> bool:
  """Whether the first JSON or JSONL file begins with such a row."""
  first = next((p for p in _files(root) if p.suffix != '.parquet'), None)
  if first is None:
    return False
  try:
    with open(first, encoding='utf-8', errors='replace') as f:
      head = f.read(_HEAD)
  except OSError:
    return False
  return all(f'"{name}"' in head for name in NEEDED)


def plan(root: pathlib.Path) -> Plan:
  """An item an image. Rejects are rows without an image, and images that are missing.

  Raises:
    UserError: a file is damaged.
  """
  out = Listing(root, 'mmeb', **dict.fromkeys(('query', 'side', 'negatives'), pa.string()))
  for path in _files(root):
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for number, row in _rows(path):
      if row is None or not set(NEEDED) <= set(row):
        out.reject(f'{path.name}:{number}', f'is no row with {", ".join(NEEDED)}')
        continue
      side = 'query' if row['qry_image_path'] else 'target' if row.get('pos_image_path') else ''
      if not side:
        out.reject(f'{path.name}:{number}', 'has no image')
        continue
      found.setdefault((side, str(row['qry_image_path'] or row['pos_image_path'])), []).append(row)
    for (side, name), some in found.items():
      file = find(root, name, FOLDERS)
      if file is None:
        out.lost(name, path)
        continue
      words = [_plain(row['pos_text'] if side == 'query' else row['qry']) for row in some]
      negatives = [_plain(t) for row in some for t in _list(row.get('neg_text'))]
      more = {'side': side, 'query': _plain(some[0]['qry']) or None,
              'negatives': json.dumps(negatives, ensure_ascii=False) if negatives else None}
      out.add(file, texts([w for w in words if w]) | more, split=split_of(path.stem))
  return out.plan


def _files(root: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in root.iterdir() if p.suffix in ('.jsonl', '.json', '.parquet') and p.is_file())


def _rows(path: pathlib.Path) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
  return iter(enumerate(rows(path, NEEDED), 1)) if path.suffix == '.parquet' else lines_of(path)


def _list(value: Any) -> list[str]:
  return [str(v) for v in value] if isinstance(value, list) else listed(value)


def _plain(text: Any) -> str:
  return one_line(_TOKEN.sub(' ', str(text or '')))
