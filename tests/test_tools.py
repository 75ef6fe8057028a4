"""Every script of tools/ runs at its smallest, says what it needs, and ends with one line where that is missing.

Others have files of their own: chaos (parallel), bench_step, bench_segment and bench_kernels (parity), fuzz_readers (data/readers), mutate (test_mutations),
reference (test_reference).
"""

import csv
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest

from jaxmed.errors import UserError
from tests.common import words
from tests.conftest import TINY
from tools import needs

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted(p.stem for p in (ROOT / 'tools').glob('*.py') if p.stem not in ('needs', 'mutations'))
# `health` is what each run begins with anyway; without a list it has all evaluators, and those of untrained weights too.
SMALL = {key: TINY[key] for key in ('image_size', 'batch_size')} | {'loader': {'threads': 1}, 'evaluators': 'health'}
ENCODER = words({'encoder': TINY['encoder']})
BRAIN, RGB = ('T1', 'GM', 'WM'), ('R', 'G', 'B')


@pytest.fixture(autouse=True)
def plain(monkeypatch):
  """No figures of runs in this process: they are tested elsewhere."""
  from jaxmed.train import pictures
  for name in ('views', 'end'):
    monkeypatch.setattr(pictures, name, lambda run, state: None)


def main(name, *argv):
  """Runs a script in this process; what its `main` returns."""
  return importlib.import_module(f'tools.{name}').main([str(a) for a in argv])


def script(name, *argv, **env):
  """Runs a script in a process of its own."""
  return subprocess.run([sys.executable, ROOT / 'tools' / f'{name}.py', *map(str, argv)], capture_output=True, text=True,
                        env=os.environ | env, timeout=250)


@pytest.fixture(scope='module')
def like_the_demo(tmp_path_factory):
  """A corpus with the channels, sources and the label of the demo's: 36 slices of 3 regions, 24 colour images."""
  from jaxmed.data.prepare.prepare import prepare
  raw, out, rng, rows = tmp_path_factory.mktemp('raw'), tmp_path_factory.mktemp('like') / 'demo', np.random.default_rng(0), []
  for i in range(60):
    region, source = i % 3, 'icbm152' if i < 36 else ('fundus', 'histology')[i % 2]
    image = rng.integers(0, 80, (16, 16, 3)) + 80 * np.eye(3, dtype=int)[region]
    np.savez(raw / f'{i}.npz', image=image.astype(np.uint8), channels=BRAIN if i < 36 else RGB)
    rows.append({'path': f'{i}.npz', 'subject': f's{i // 3}', 'split': ('train', 'val', 'test')[i // 3 % 3] if i < 36 else 'train',
                 'source': source, 'region': f'r{region}' if i < 36 else ''})
  with open(raw / 'table.csv', 'w', newline='', encoding='utf-8') as f:
    table = csv.DictWriter(f, rows[0])
    table.writeheader()
    table.writerows(rows)
  prepare([raw], out, table=raw / 'table.csv', progress=False)
  return out


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_script_says_which_installation_it_needs(name):
  text = (ROOT / 'tools' / f'{name}.py').read_text(encoding='utf-8')
  found = re.search(r'Needs `(make install|pip install -e \'\.\[([a-z,-]+)\]\')`', text.split('"""')[1])
  assert found, 'a line "Needs `make install`" or "Needs `pip install -e ...`" in the docstring'
  assert 'run_script(main)' in text
  extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
  assert set((found[2] or 'demo').split(',')) <= set(extras)
  assert {e for e in re.findall(r"need\('([a-z-]+)'", text)} <= set(extras)


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['/place/tools/bench.py'])
  needs.need('demo', 'numpy')
  with pytest.raises(SystemExit) as end:
    needs.need('demo', 'numpy', 'no_such_module')
  assert end.value.code == 2
  assert capsys.readouterr().err == "bench.py: no_such_module not installed: pip install -e '.[demo]'\n"


@pytest.mark.parametrize(('name', 'module', 'extra'), [('chaos', 'pytest', 'test'), ('mutate', 'pytest', 'test')])
def test_a_script_whose_imports_are_missing(tmp_path, name, module, extra):
  """Of packages that it imports at once: as after `make install`, which brings no pytest."""
  (tmp_path / 'sitecustomize.py').write_text(
    'import importlib.util\nfind = importlib.util.find_spec\n'
    f'importlib.util.find_spec = lambda name, *rest: None if name == {module!r} else find(name, *rest)\n')
  done = script(name, '--help', PYTHONPATH=str(tmp_path))
  assert done.returncode == 2
  assert done.stderr == f"{name}.py: {module} not installed: pip install -e '.[{extra}]'\n"


def test_a_mistake_is_one_line(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['tools/a.py'])
  for main_, code, err in ((lambda: None, 0, ''), (lambda: 3, 3, '')):
    with pytest.raises(SystemExit) as end:
      needs.run_script(main_)
    assert (end.value.code, capsys.readouterr().err) == (code, err)

  def mistaken():
    raise UserError('no corpus\n  here')

  with pytest.raises(SystemExit) as end:
    needs.run_script(mistaken)
  assert (end.value.code, capsys.readouterr().err) == (2, 'a.py: no corpus here\n')


def test_bench_channels(tmp_path, capsys):
  place = tmp_path / 'found.json'
  main('bench_channels', '--channels', 1, '--kinds', 'joint', '--size', 16, '--batch', 1, '--rounds', 1, '--no-torch', '--json',
       place, '--plot', tmp_path / 'plot.png')
  found = json.loads(place.read_text())['1']['joint']
  # 12 blocks of 2 tokens of width 192, and the head: 12 * (12 * 192^2 * 2 + 2 * 2^2 * 192) * 2 * 3 operations and a few.
  assert 0.06 < found['gflops'] < 0.1 and found['seconds'] > 0
  assert capsys.readouterr().out.splitlines()[2].startswith('| 1 | joint | 0.1 |')
  assert (tmp_path / 'plot.png').stat().st_size > 1000
  with pytest.raises(UserError, match="unknown kind of attention 'joined': did you mean 'joint'"):
    main('bench_channels', '--kinds', 'joined')


def test_bench_curate(capsys):
  main('bench_curate', '--sizes', 500, '--check', 500)
  row = capsys.readouterr().out.splitlines()[1].split()
  assert row[0] == '500' and 0 < int(row[1]) <= 500 and row[-1] == 'True'


def test_bench_data_index(tmp_path):
  """In a process of its own, as all of it: its contenders fork."""
  done = script('bench_data', '--index', 2000, '--json', tmp_path / 'out.json')
  assert done.returncode == 0, done.stderr
  assert json.loads((tmp_path / 'out.json').read_text())['index']['records'] == 1800


def test_bench_data_rates(tmp_path):
  done = script('bench_data', '--quick', '--only', 'flat', '--workers', 1, '--threads', 1, '--json', tmp_path / 'out.json')
  assert done.returncode == 0, done.stderr
  rates = json.loads((tmp_path / 'out.json').read_text())['flat']
  assert {'jaxmed', 'tfds'} <= set(rates) and all(r['images_per_second'] > 0 for r in rates.values())
  assert rates['jaxmed']['ratio'] == 1


def test_bench_packing(tmp_path, capsys):
  main('bench_packing', '--size', 16, '--batch', 8, '--batches', 4, '--rounds', 1, '--json', tmp_path / 'out.json')
  found = json.loads((tmp_path / 'out.json').read_text())
  assert found['speed']['ratio'] > 0 and found['speed']['length'] == 8 * 4 + 3
  assert 'packed' in capsys.readouterr().out and len(found['waste']) >= 8


def test_bench_prepare(capsys):
  main('bench_prepare', '--megabytes', 2, '--workers', 1, '--rounds', 1, '--kinds', 'png', '--json')
  found = json.loads(capsys.readouterr().out)['png']
  assert found['records'] == 16 and found['seconds']['1'] > 0


def test_predict_memory(capsys):
  main('predict_memory', '--size', '20,12,10', '--tile', '8,8,8', '--classes', 3, '--scale', 1.5)
  assert re.search(r'20x12x10, 3 classes, .*: [\d.]+ GiB in all', capsys.readouterr().out)


def test_bench_records(capsys):
  main('bench_records', '--rounds', 1, '--most', 1)
  text = capsys.readouterr().out
  assert text.count('jpeg-xl effort 1') == 3 and re.search(r'^raw +1\.000 ', text, re.MULTILINE)


def test_bench_start(corpus, capsys):
  main('bench_start', '--data', corpus, '--rounds', 1, '--steps', 2, '--cold', '--json', *words(SMALL), 'model=channel_vit_micro/8',
       *ENCODER, 'objective.decoder_dim=32', 'objective.decoder_depth=1', 'objective.decoder_heads=2', 'loader.label=')
  found = json.loads(capsys.readouterr().out)
  assert [kind.split()[-1] for kind in found] == ['cold']
  for (banner, first, end), in found.values():
    assert 0 < banner < first and end > 0


def test_channel_claims(corpus, tmp_path, capsys):
  out = tmp_path / 'claims'
  argv = ('--data', corpus, '--label', 'tissue', '--out', out, '--seeds', 1, '--steps', 1, '--shares', '', '--subsets', 4,
          *words(SMALL), *ENCODER)
  assert main('channel_claims', *argv) == 0
  told = json.loads((out / 'claims.json').read_text())
  assert len(told['accuracy']) == 4 and {c['claim'] for c in told['claims']} == {1, 2}
  assert capsys.readouterr().out == (out / 'claims.md').read_text() and (out / 'claims.png').exists()
  assert main('channel_claims', *argv) == 0  # reads what is there


def test_channel_study(like_the_demo, tmp_path, capsys):
  main('channel_study', '--data', like_the_demo, '--out', tmp_path, '--seeds', 1, '--steps', 1, *words(SMALL), *ENCODER,
       'model=channel_vit_micro/8', 'augment.local_views=1', 'augment.local_size=8', 'objective.out_dim=32',
       'objective.hidden_dim=16', 'objective.bottleneck_dim=8')
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(' | ')[0] for line in lines[2:6]] == ['| untrained', '| rgb', '| all', '| hcs']
  assert lines[-3].startswith('| hcs - rgb |') and (tmp_path / 'table.md').read_text().splitlines() == lines


def test_curation_study(like_the_demo, tmp_path, capsys):
  import shutil
  data = shutil.copytree(like_the_demo, tmp_path / 'corpus')  # it writes selections
  main('curation_study', '--data', data, '--out', tmp_path / 'out', '--seeds', 1, '--steps', 1, *words(SMALL), *ENCODER,
       'model=channel_vit_micro/8', 'objective.hidden_dim=16', 'objective.out_dim=8')
  text = capsys.readouterr().out
  assert [line.split(' | ')[0] for line in text.splitlines()[2:6]] == [
    '| full', '| reduced, steps', '| reduced, epochs', '| random, steps']
  assert (tmp_path / 'out' / 'curation.png').exists()


def test_method_table(like_the_demo, tmp_path, capsys):
  main('method_table', '--data', like_the_demo, '--out', tmp_path, '--steps', 1, '--models', 'vit_micro/8', '--methods', 'simmim',
       *words(SMALL), *ENCODER)
  rows = {line.split(' | ')[0]: line for line in capsys.readouterr().out.splitlines()}
  assert re.fullmatch(r'\| simmim \| \d\.\d+ \(\d\.\d+\) \| \d\.\d+ \(\d\.\d+\) \|', rows['| simmim']), rows
  assert (tmp_path / 'table.md').exists()


def test_plan_table_writes_its_page(tmp_path, monkeypatch):
  """From the plans that docs/results has; compiling needs libtpu, and minutes."""
  from tools import plan_table
  plans = (ROOT / 'docs' / 'results' / 'scaling.json').read_text()
  (tmp_path / 'scaling.json').write_text(plans)
  monkeypatch.setattr(plan_table, 'DOCS', tmp_path)
  monkeypatch.setattr(plan_table, 'TARGETS', {'vitl': plan_table.TARGETS['vitl']})
  main('plan_table', '--write-only')
  page = (tmp_path / 'scaling.md').read_text()
  assert '| ViT-L/16 DINOv2 | v5e:16x16 | data 256 | 2048 |' in page and 'Not measured yet.' in page
  assert (tmp_path / 'scaling.png').exists()


def test_weak_scaling(corpus, tmp_path, capsys):
  main('weak_scaling', '--data', corpus, '--counts', 1, '--batch', 2, '--steps', 6, '--rounds', 1, '--out', tmp_path / 'out.md')
  assert re.search(r'^\| 1 \| \d+\.\d{3} \| \d+\.\d{3} \| 1\.00 \| 1\.00 \|$', capsys.readouterr().out, re.MULTILINE)
  with pytest.raises(SystemExit):
    main('weak_scaling', '--data', corpus, '--counts', '2,4')


def test_slurm_here_tells_its_words():
  done = subprocess.run(['bash', ROOT / 'tools' / 'slurm_here.sh', 'begin'], capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (1, "slurm_here: unknown word 'begin': start, stop or status\n")
