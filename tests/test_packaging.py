"""What the wheel holds, and what the command finds with nothing but it."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PARTS = ('jaxmed', 'experiments', 'pyproject.toml', 'setup.py', 'MANIFEST.in', 'README.md', 'LICENSE')


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """A folder that holds only what the wheel installs."""
  pytest.importorskip('setuptools', minversion='77')
  place = tmp_path_factory.mktemp('wheel')
  source = place / 'source'
  source.mkdir()
  for name in PARTS:
    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
    copy(ROOT / name, source / name)
  pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
  built = subprocess.run([*pip, 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', place, source],
                         capture_output=True, text=True)
  assert built.returncode == 0, built.stderr
  subprocess.run([*pip, 'install', '-q', '--no-deps', '--target', place / 'site', *place.glob('*.whl')], check=True)
  return place / 'site'


def command(site, cwd, *argv):
  """`jaxmed` of the wheel in a folder: (exit code, stdout, stderr)."""
  done = subprocess.run([sys.executable, '-m', 'jaxmed', *argv], cwd=cwd, capture_output=True, text=True,
                        env=os.environ | {'PYTHONPATH': str(site)})
  return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_wheel_has_recipes_and_types(installed, tmp_path):
  names = {p.relative_to(installed / 'jaxmed').as_posix() for p in (installed / 'jaxmed').rglob('*')}
  assert 'py.typed' in names
  assert {p.relative_to(ROOT).as_posix() for p in (ROOT / 'experiments').rglob('*.py')} <= names
  code, out, err = command(installed, tmp_path, 'list', 'recipes')
  assert code == 0, err
  listed = {line.split()[0] for line in out.splitlines()[1:]}
  assert listed == {p.relative_to(ROOT).as_posix() for p in (ROOT / 'experiments').rglob('*.py')
                    if p.parent.name not in ('studies', 'transfer')}
  assert '[:published :laptop]' in out


@pytest.mark.slow
def test_a_shipped_recipe_trains_by_its_name(installed, tmp_path):
  """It is found, so that what is missing is the data; a file of the working directory wins; a typo names the nearest."""
  train = lambda recipe: command(installed, tmp_path, 'train', recipe, '--out', 'run')
  code, _, err = train('experiments/mae.py:laptop')
  assert (code, 'nothing to train on' in err) == (2, True), err
  code, _, err = train('experiments/mea.py:laptop')
  assert (code, 'recipes near it: experiments/mae.py' in err) == (2, True), err
  (tmp_path / 'experiments').mkdir()
  (tmp_path / 'experiments' / 'mae.py').write_text('def get_config():\n  return {}\n')
  code, _, err = train('experiments/mae.py:laptop')
  assert (code, 'has no variants' in err) == (2, True), err
