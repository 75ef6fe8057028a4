"""What pyproject.toml cannot say: the recipes in experiments/ ship as files of the package."""

import pathlib

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
  """Copies experiments/ into the package; an editable install reads them where they are."""

  def run(self):
    super().run()
    if not self.editable_mode:
      for path in sorted(pathlib.Path('experiments').rglob('*.py')):
        target = pathlib.Path(self.build_lib) / 'jaxmed' / path
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(path), str(target))


setup(cmdclass={'build_py': BuildPy})
