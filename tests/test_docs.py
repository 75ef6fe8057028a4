"""The pages: links and anchors, the size of the README, the navigation, and every command of the tutorials."""

import functools
import pathlib
import re
import shlex
import subprocess
import sys
import urllib.parse

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs'
PAGES = sorted([ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'experiments' / 'README.md',
                *DOCS.rglob('*.md'), *(ROOT / 'launch').rglob('*.md')])
TUTORIALS = sorted((DOCS / 'tutorials').glob('*.md'))
MOST_BYTES = 8192  # of the README
SECONDS = 300.0  # that a command of a tutorial may take on a busy machine

_FENCE = re.compile(r'^\s*(`{3,}|~{3,})\s*(\w*)')
_CODE = re.compile(r'(`+)(?!`).*?(?<!`)\1(?!`)')
_LINK = re.compile(r'!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(\s*<?([^()\s<>]*(?:\([^()\s]*\)[^()\s<>]*)*)>?(?:\s+"[^"]*")?\s*\)')
_TAG = re.compile(r'<(?:img|a)\b[^>]*?\b(?:src|href)="([^"]+)"')


def prose(text):
  """The lines of a page outside of fences."""
  fence = ''
  for line in text.splitlines():
    found = _FENCE.match(line)
    if fence:
      if found and found[1].startswith(fence) and not found[2]:
        fence = ''
    elif found:
      fence = found[1]
    else:
      yield line


def slug(heading):
  """The anchor of a heading by GitHub's rules."""
  words = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', heading).strip().lower()
  return re.sub(r'[^\w\- ]', '', words).replace(' ', '-')


@functools.cache
def anchors(page):
  """The anchors of a page; a heading that comes again gets -1, -2 ..."""
  seen, out = {}, set()
  for line in prose(page.read_text(encoding='utf-8')):
    if found := re.match(r'#{1,6}\s+(.*?)\s*#*$', line):
      name = slug(found[1])
      count = seen[name] = seen.get(name, -1) + 1
      out.add(f'{name}-{count}' if count else name)
    out |= set(re.findall(r'<a (?:id|name)="([^"]+)"', line))
  return out


def links(page):
  """The targets of the links and images of a page."""
  for line in prose(page.read_text(encoding='utf-8')):
    line = _CODE.sub('`code`', line)
    yield from _LINK.findall(line)
    yield from _TAG.findall(line)


def wrong(page, target):
  """What is wrong with a link of a page, or ''."""
  if re.match(r'[a-z][a-z0-9+.-]*:', target):
    return ''
  path, _, anchor = urllib.parse.unquote(target).partition('#')
  place = (page.parent / path).resolve() if path else page
  if path.startswith('/') or not place.is_relative_to(ROOT):
    return 'not a relative link into the repository'
  if not place.exists():
    return 'no such file'
  if place.is_dir():
    return 'a folder: name a page'
  if anchor and place.suffix == '.md' and anchor not in anchors(place):
    return 'no such heading'
  return ''


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page):
  bad = [f'{target}: {what}' for target in links(page) if (what := wrong(page, target))]
  assert not bad, bad


def test_the_checker_sees(tmp_path):
  page = tmp_path / 'page.md'
  page.write_text('# A *b* `c.d` & [e](f.md)\n## A *b* `c.d` & [e](f.md)\n`[no](no.md)` ![x](x.png "t") [y](y_(z).md)\n'
                  '```\n# no\n[no](no.md)\n```\n<img src="i.png">[![k](l.png)](m.md)\n')
  assert anchors(page) == {'a-b-cd--e', 'a-b-cd--e-1'}
  assert [*links(page)][:4] == ['f.md', 'f.md', 'x.png', 'y_(z).md'] and 'i.png' in links(page)
  assert wrong(ROOT / 'README.md', 'no.md') == 'no such file'
  assert wrong(ROOT / 'README.md', '#no') == 'no such heading'
  assert wrong(ROOT / 'README.md', '../x.md').startswith('not a relative')
  assert not wrong(ROOT / 'README.md', 'https://example.org/x')


def test_the_readme_is_short():
  assert (ROOT / 'README.md').stat().st_size <= MOST_BYTES


def test_the_navigation_lists_every_page():
  def pages(node):
    if isinstance(node, str):
      yield node
    elif isinstance(node, dict):
      for value in node.values():
        yield from pages(value)
    else:
      for value in node:
        yield from pages(value)

  listed = [*pages(yaml.safe_load((ROOT / 'mkdocs.yml').read_text(encoding='utf-8'))['nav'])]
  assert len(listed) == len(set(listed))
  assert set(listed) == {p.relative_to(DOCS).as_posix() for p in DOCS.rglob('*.md')}


def blocks(page):
  """(language, text) of the fenced blocks of a tutorial, in order."""
  return re.findall(r'^```(\w*)\n(.*?)^```$', page.read_text(encoding='utf-8'), re.MULTILINE | re.DOTALL)


def perform(line, place, server):
  """Runs one command line of a tutorial; its output."""
  words = shlex.split(line, comments=True)
  if not words:
    return ''
  if words[0] == 'jaxmed':
    logs = place.parent / 'logs'
    logs.mkdir(exist_ok=True)
    fork = server.start(words[1:], logs, place, FIGURES='yes')
    code, said = fork.wait(SECONDS), fork.out.read_text() + fork.err.read_text()
  else:
    line = shlex.quote(sys.executable) + line.removeprefix('python') if words[0] == 'python' else line
    done = subprocess.run(line, shell=True, cwd=place, capture_output=True, text=True, timeout=SECONDS)
    code, said = done.returncode, done.stdout + done.stderr
  assert code == 0, f'{line}\n{said}'
  return said


@pytest.mark.slow
@pytest.mark.parametrize('page', TUTORIALS, ids=lambda p: p.stem)
def test_tutorials(page, server, tmp_path, monkeypatch):
  """Each `sh` block runs, line by line; each `text` block is what the block before it says, `...` being anything.

  A `python` block that begins with `# file: NAME` becomes that file.
  """
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  place, said = tmp_path / 'work', ''
  place.mkdir()
  assert any(kind == 'sh' for kind, _ in blocks(page))
  for kind, text in blocks(page):
    if kind == 'python' and (name := re.match(r'# file: (\S+)\n', text)):
      (place / name[1]).write_text(text)
    elif kind == 'sh':
      lines = text.replace('\\\n', ' ').splitlines()
      said = ''.join(perform(line, place, server) for line in lines)
    elif kind == 'text':
      flat = ' '.join(said.split())
      for line in text.splitlines():
        for part in line.split('...'):
          assert ' '.join(part.split()) in flat, f'{part.strip()!r} is not in\n{said}'
