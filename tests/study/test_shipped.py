"""The studies that ship: each says what it is, each variant is a grid, the laptop ones can run on the demo corpus."""

import ast
import pathlib

import pytest

from jaxmed import config
from jaxmed.data.prepare.prepare import prepare
from jaxmed.study import cost, grid

ROOT = pathlib.Path(__file__).parents[2]
STUDIES = sorted((ROOT / config.STUDIES).glob('*.py'))
PAPERS = [path for path in STUDIES if path.stem != 'defaults']  # of a paper, with a laptop variant
CASES = [(path, variant) for path in STUDIES for variant in config.variants(str(path))]
NAMED = [f'{path.stem}:{variant}' for path, variant in CASES]


@pytest.mark.parametrize('path, variant', CASES, ids=NAMED)
def test_is_a_grid(path, variant):
  study = grid.read(f'{path}:{variant}')
  cells = grid.cells(study)
  assert 2 <= len(cells) <= 40 and (path not in PAPERS or all(c.config['method'] for c in cells))
  assert 'data' not in study.base and 'init' not in study.base


@pytest.mark.parametrize('path', PAPERS, ids=lambda p: p.stem)
def test_says_what_it_is(path):
  doc = ' '.join(ast.get_docstring(ast.parse(path.read_text())).split())
  name = path.relative_to(ROOT).as_posix()
  for words in ('arXiv', f'jaxmed study {name}', f'jaxmed study {name}:laptop --data corpus', 'ot run here'):
    assert words in doc, words
  assert all(f'`{v}`' in doc for v in config.variants(str(path)))


def test_they_are_found_by_name_and_are_no_recipes():
  names = {p.relative_to(ROOT).as_posix() for p in STUDIES}
  assert names == {*config.studies()} and not names & {*config.recipes()}
  assert config.find('experiments/studies/scaling_mae.py').is_file()


def test_a_law_has_cells_enough():
  """Four widths, four subsets and two seeds at the least, so that the largest can be foretold."""
  study = grid.read('experiments/studies/scaling_mae.py:laptop')
  assert [len(values) for values in study.axes.values()] == [4, 4, 2]


@pytest.fixture(scope='module')
def demo(demo_corpus):
  return cost.Corpus(str(demo_corpus))


@pytest.fixture(scope='module')
def phantoms(tmp_path_factory):
  out = tmp_path_factory.mktemp('phantoms') / 'corpus'
  prepare(['phantoms'], out, subjects=24, size=32, progress=False)
  return cost.Corpus(str(out))


@pytest.fixture(scope='module')
def tissue(tmp_path_factory):
  out = tmp_path_factory.mktemp('tissue') / 'corpus'
  prepare(['tissue'], out, progress=False)
  return cost.Corpus(str(out))


@pytest.mark.parametrize('path', PAPERS, ids=lambda p: p.stem)
def test_laptop_variants_can_run(request, path):
  """On the corpus that it names: all cells fit, and together take minutes of a processor of 20 GFLOP/s."""
  corpus = request.getfixturevalue({'stunet_sizes': 'phantoms', 'volume_methods': 'phantoms', 'voco_sizes': 'tissue'}.get(path.stem, 'demo'))
  cells = cost.ready(grid.read(f'{path}:laptop'), corpus)
  assert sum(c.flops for c in cells) / 20e9 < 1800
  assert cost.check_memory(cells, 2) == []
