"""A study as an array of SLURM and as an Indexed Job: scripts and manifests, what is refused, a real array."""

import json
import pathlib
import re
import subprocess

import pytest
import yaml

from jaxmed import cli
from tests.conftest import TINY
from tests.launch.schema import errors
from tests.launch.test_slurm import jaxmed, takes_jobs, wait

HERE = pathlib.Path(__file__).parent


def file(tmp_path, base=TINY, seeds=(0, 1, 2)):
  path = tmp_path / 'study.py'
  path.write_text(f'def get_study():\n  return {{"base": {base!r}, "axes": {{"seed": {list(seeds)!r}}}}}\n')
  return str(path)


def dry(tmp_path, capfd, *words, data='/mnt/lab/corpus', out='/mnt/lab/runs/s'):
  code = cli.main(['study', file(tmp_path), '--data', data, '--out', out, '--python', '/opt/bin/python', '--dry-run',
                   *words])
  return code, *capfd.readouterr()


def test_slurm_array(tmp_path, capfd, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code, text, err = dry(tmp_path, capfd, '--launcher', 'slurm', '--jobs', '2', '--time', '1:00:00', '--gpus-per-task',
                        '1', out='runs/s')
  assert code == 0, err
  assert '#SBATCH --array=0-2%2\n' in text and f'{tmp_path}/runs/s.launch/log-%A_%a.txt' in text
  assert f'study {tmp_path}/study.py --data /mnt/lab/corpus --out {tmp_path}/runs/s --cell-index auto\n' in text
  assert 'train' not in text.split('srun')[1].splitlines()[0] and 'scontrol requeue' in text
  assert subprocess.run(['bash', '-n'], input=text, text=True, check=False).returncode == 0
  assert '#SBATCH --array=0-2\n' in dry(tmp_path, capfd, '--launcher', 'slurm', '--time', '60')[1]


def test_indexed_job(tmp_path, capfd, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code, text, err = dry(tmp_path, capfd, '--launcher', 'jobset', '--image', 'lab/jaxmed:1', '--claim', 'lab:/mnt/lab',
                        '--gpus', '1', '--jobs', '2')
  assert code == 0, err
  config, manifest = yaml.safe_load_all(text)
  schema = json.loads((HERE / 'jobset_schema.json').read_text())['schema']
  assert errors(manifest, schema) == []
  assert 'def get_study(' in config['data']['config.py']
  spec = manifest['spec']['replicatedJobs'][0]['template']['spec']
  assert (spec['completions'], spec['parallelism'], spec['completionMode']) == (3, 2, 'Indexed')
  assert (spec['backoffLimitPerIndex'], spec['maxFailedIndexes']) == (0, 3)
  rules = spec['podFailurePolicy']['rules']
  assert [r['action'] for r in rules] == ['Ignore', 'Ignore'] and rules[0]['onExitCodes']['values'] == [75]
  container = spec['template']['spec']['containers'][0]
  assert container['command'][1:] == ['-m', 'jaxmed', 'study', '/etc/jaxmed/config.py', '--data', '/mnt/lab/corpus',
                                      '--out', '/mnt/lab/runs/s', '--cell-index', 'auto']
  assert 'JAX_NUM_PROCESSES' not in {e['name'] for e in container.get('env', [])}


@pytest.mark.parametrize('words, said', [
    (['--launcher', 'slurm', '--nodes', '2'], 'a cell of a study is one process: leave --nodes out'),
    (['--launcher', 'slurm', '--tasks-per-node', '2'], 'leave --tasks-per-node out'),
    (['--launcher', 'jobset', '--image', 'i', '--nodes', '2'], 'leave --nodes out'),
    (['--launcher', 'jobset', '--image', 'i', '--tpu', 'tpu-v6e-slice', '--topology', '4x4'], 'has 4 hosts'),
    (['--launcher', 'jobset'], 'launch jobset needs --image'),
    (['--launcher', 'slurm', '--time', '2h'], "--time '2h' must look like"),
])
def test_mistakes_are_one_line(tmp_path, capfd, words, said):
  code, out, err = dry(tmp_path, capfd, *words)
  assert code == 2 and said in err and err.count('\n') == 1 and out == ''


@pytest.mark.slurm
@pytest.mark.skipif(not takes_jobs(), reason='no SLURM here: tools/slurm_here.sh sets one up')
@pytest.mark.timeout(900)
def test_an_array_on_a_real_slurm(corpus, tmp_path):
  out = tmp_path / 's'
  sent = jaxmed('study', file(tmp_path), '--data', corpus, '--out', out, '--launcher', 'slurm', '--time', 30)
  try:
    wait(lambda: not jaxmed('status', out)['alive'], 600, pause=2)
  finally:
    subprocess.run(['scancel', sent['job']], check=False)
  found = jaxmed('status', out)
  assert found['counts'] == {'done': 3}, found
  logs = sorted(p.name for p in (tmp_path / 's.launch').glob('log-*.txt'))
  assert len(logs) == 3 and all(re.fullmatch(r'log-\d+_[012]\.txt', name) for name in logs)
  assert (out / 'table.csv').read_text().count(',done,') == 3
