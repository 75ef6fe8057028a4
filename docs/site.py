"""Hooks of mkdocs: pages that lie beside docs/ are part of the site, so that links to them work there too."""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[1]
BESIDE = ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'experiments/README.md', 'launch/README.md',
          'launch/*/README.md')
FOLDER = 'repository'  # of the site, where they are
_LINK = re.compile(r'(\]\()([^)#\s:]+)(#[^)\s]*)?(\))')


def on_files(files, config):
  """Adds the pages of BESIDE, and plain files that they name."""
  for path in sorted(p for pattern in BESIDE for p in ROOT.glob(pattern)):
    name = f'{FOLDER}/{path.relative_to(ROOT).as_posix()}'
    files.append(File.generated(config, name, abs_src_path=str(path)))
  recipes = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / 'experiments').rglob('*.py'))
  for name in ('LICENSE', 'CITATION.cff', 'tests/slow.txt', *recipes):
    files.append(File.generated(config, f'{FOLDER}/{name}', abs_src_path=str(ROOT / name)))
  return files


def on_page_markdown(markdown, page, config, files):
  """Turns relative links of the repository into those of the site."""
  here = page.file.src_uri
  source = here.removeprefix(FOLDER + '/') if here.startswith(FOLDER + '/') else f'docs/{here}'

  def move(found):
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
    site = target.removeprefix('docs/') if target.startswith('docs/') else f'{FOLDER}/{target}'
    link = posixpath.relpath(site, posixpath.dirname(here) or '.')
    return f'{found[1]}{link}{found[3] or ""}{found[4]}'

  return _LINK.sub(move, markdown)
