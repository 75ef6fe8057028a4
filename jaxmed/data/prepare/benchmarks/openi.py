"""Open-i, the chest radiographs of Indiana University: a report in XML (MEDLINE) for a few images each.

  ecgen-radiology/1.xml ...                    AbstractText Label="FINDINGS", "IMPRESSION", "INDICATION"; MeSH `major`
  images/CXR1_1_IM-0001-3001.png ...           (or .dcm, .jpg, anywhere below) named by `parentImage id`

The element names are those of the reports as the National Library of Medicine gives them out (NLMCXR_reports.tgz). A
report is a subject: nothing says which reports are of one patient. `text` is the impression, then the findings; these,
`indication` and `mesh` (major terms, 'a|b') are columns. There is no official split.
"""

import pathlib
import xml.etree.ElementTree as ElementTree

import pyarrow as pa

from jaxmed.data.prepare.benchmarks.captioned import Listing, one_line, sections
from jaxmed.data.prepare.items import Plan
from jaxmed.files import text_of

EXPECTED = 'ecgen-radiology with reports in XML, and the images that they name'
SUFFIXES = ('.png', '.dcm', '.jpg', '.jpeg')
_HEAD = 1 << 16


def here(root: pathlib.Path) -> bool:
  """Whether the first XML file is such a report."""
  first = next(iter(_reports(root)), None)
  if first is None:
    return False
  try:
    with open(first, 'rb') as f:
      return b'<parentImage' in f.read(_HEAD) or first.parent.name == 'ecgen-radiology'
  except OSError:
    return False


def plan(root: pathlib.Path) -> Plan:
  """An item an image. Rejects are damaged reports, and images that are missing; a report without images is ignored."""
  out = Listing(root, 'openi', **dict.fromkeys(('findings', 'impression', 'indication', 'mesh'), pa.string()))
  images = {path.stem: path for path in sorted(root.rglob('*')) if path.suffix.lower() in SUFFIXES}
  for path in _reports(root):
    rel = text_of(path.relative_to(root).as_posix())
    try:
      tree = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError) as e:
      out.reject(rel, f'is no report in XML: {e}')
      continue
    _add(out, path, tree, images)
  return out.plan


def _add(out: Listing, path: pathlib.Path, tree: ElementTree.Element, images: dict[str, pathlib.Path]) -> None:
  told = {e.get('Label', ''): one_line(''.join(e.itertext())) for e in tree.iter('AbstractText')}
  names = [e.get('id', '') for e in tree.iter('parentImage')]
  uid = tree.find('.//uId')
  subject = uid.get('id', '') if uid is not None else ''
  mesh = '|'.join(one_line(e.text) for e in tree.iter('major') if e.text)
  for name in dict.fromkeys(names):
    file = images.get(name)
    if file is None:
      out.lost(name, path)
      continue
    more = {'indication': told.get('INDICATION') or None, 'mesh': mesh or None}
    out.add(file, sections(told.get('FINDINGS'), told.get('IMPRESSION')) | more, subject=subject or f'CXR{path.stem}')
  if not names:
    out.plan.ignored += 1


def _reports(root: pathlib.Path) -> list[pathlib.Path]:
  """The XML files of the folder, in the order of their numbers."""
  place = root / 'ecgen-radiology'
  found = (place if place.is_dir() else root).glob('*.xml')
  return sorted(found, key=lambda p: (len(p.stem), p.stem))
