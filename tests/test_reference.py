"""The generated pages of docs/reference say what the code says."""

import importlib.util
import pathlib
import re

import pytest

from jaxmed import cli, config, objectives
from jaxmed.models import registry
from jaxmed.models.text import registry as texts

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def reference():
  spec = importlib.util.spec_from_file_location('reference', ROOT / 'tools' / 'reference.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_no_page_is_stale(reference):
  assert not [*reference.stale()], 'write them again: python tools/reference.py'


def test_check_tells_a_stale_page(reference, monkeypatch, tmp_path, capsys):
  for name in reference.PAGES:
    (tmp_path / name).write_text((reference.PLACE / name).read_text() + ('changed' if name == 'cli.md' else ''))
  monkeypatch.setattr(reference, 'PLACE', tmp_path)
  monkeypatch.setattr('sys.argv', ['reference.py', '--check'])
  assert reference.main() == 1
  assert capsys.readouterr().out == 'stale: docs/reference/cli.md\n'
  assert (tmp_path / 'cli.md').read_text().endswith('changed')
  monkeypatch.setattr('sys.argv', ['reference.py'])
  assert reference.main() == 0
  assert not reference.stale()


def test_pages_name_everything():
  page = lambda name: (ROOT / 'docs' / 'reference' / name).read_text()
  headings = lambda name: set(re.findall(r'^## (.*)', page(name), re.MULTILINE))
  assert headings('cli.md') == {*cli.VERBS, 'Exit codes'}
  assert headings('methods.md') == set(objectives.METHODS)
  assert headings('models.md') == {*registry.FAMILIES, *texts.FAMILIES}
  assert all(f'`{key}`' in page('config.md') for key in config.flat(config.base()))
  assert all(f'`{name}`' in page('models.md') for name in (*registry.MODELS, *texts.MODELS))
  assert '`--auto-resume`' in page('cli.md')
  assert '`--volumes slices\\|whole`' in page('cli.md')
  assert 'JAXMED_SALT' in page('cli.md')


def test_text_is_safe_markdown(reference):
  assert reference.text('a_b _x *c* `d_e*` [N] x<y|z') == 'a_b \\_x \\*c\\* `d_e*` \\[N\\] x&lt;y\\|z'
  assert reference.table(('a',), []) == []
