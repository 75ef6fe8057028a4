"""Scripts and manifests: compared with golden files, checked against the published schema, refused in one line."""

import dataclasses
import json
import os
import pathlib
import subprocess

import pytest
import yaml

from jaxmed import cli
from jaxmed.errors import UserError
from jaxmed.launch import job, jobset, options, slurm, tpu
from tests.launch.schema import errors

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / 'golden'
WORDS = ['experiments/mae.py:laptop', 'batch_size=4096', 'mesh.fsdp=8']
CONFIG = """VARIANTS = ('laptop',)


def get_config(variant):
  return {'method': 'mae', 'steps': 800}
"""
CASES = {
    'slurm.sh': 'slurm --nodes 4 --tasks-per-node 2 --gpus-per-task 4 --cpus-per-task 8 --mem 240G --time 1-12:00:00 '
                '--lead 300 --partition gpu --account lab --cache /scratch/cache --env NCCL_DEBUG=WARN --setup',
    'slurm_pyxis.sh': 'slurm --nodes 1 --gpus-per-task 8 --time 4:00:00 --container ghcr.io/lab/jaxmed:1 --mount /scratch '
                      '--restarts 5 --sbatch=--constraint=h100',
    'slurm_apptainer.sh': 'slurm --nodes 1 --tasks-per-node 8 --gpus-per-task 1 --time 90 --lead 60 --container '
                          '/images/jaxmed.sif --cache /scratch/cache',
    'tpu_vm.sh': 'tpu-vm --accelerator v5litepod-16 --zone us-west4-a --project lab --spot --cache /mnt/lab/cache --setup',
    'tpu_vm_keep.sh': 'tpu-vm --accelerator v6e-8 --zone us-east5-b --reserved --keep --restarts 0',
    'jobset_tpu.yaml': 'jobset --image europe-docker.pkg.dev/lab/jaxmed:1 --tpu tpu-v6e-slice --topology 4x4 --slices 2 '
                       '--claim lab:/mnt/lab --cache /mnt/lab/cache --spot --grace 25 --queue trainings',
    'jobset_gpu.yaml': 'jobset --image lab/jaxmed:1 --nodes 2 --gpus 8 --gpu-type nvidia-h100-80gb --cpu 96 --mem 900Gi '
                       '--bucket lab-runs:/mnt/lab --namespace research --service-account trainer --env A=1 --setup',
    'jobset_cpu.yaml': 'jobset --image lab/jaxmed:1 --claim lab:/mnt/lab --cpu 8 --mem 16Gi --restarts 0',
}


def argv(case):
  """The words of a case; `--setup` at the end takes a line with spaces."""
  words = CASES[case].split()
  launcher = words.pop(0)
  own = [w for w in (WORDS[1:] if case == 'jobset_cpu.yaml' else WORDS) if case in ('slurm.sh', 'tpu_vm_keep.sh', 'jobset_gpu.yaml') or 'mesh' not in w]
  words += ["module load 'cuda 13'"] if words[-1] == '--setup' else []
  out = '/mnt/lab/runs/MAE_b' if launcher in ('tpu-vm', 'jobset') else 'runs/MAE_b'
  return ['launch', launcher, *own, '--data', '/mnt/lab/corpus', '--out', out, '--python', '/opt/bin/python',
          *words, '--dry-run']


@pytest.fixture
def written(capfd, monkeypatch, tmp_path):
  """What a case writes, with the folder that it ran in as /home/me."""
  def run(case):
    root = tmp_path / 'home'
    (root / 'experiments').mkdir(parents=True)
    (root / 'experiments' / 'mae.py').write_text(CONFIG)
    monkeypatch.chdir(root)
    assert cli.main(argv(case)) == 0
    text, err = capfd.readouterr()
    assert sorted(p.name for p in root.iterdir()) == ['experiments']
    return text.replace(str(root), '/home/me'), err
  return run


@pytest.mark.parametrize('case', CASES)
def test_golden(case, written):
  text, _ = written(case)
  if os.environ.get('JAXMED_WRITE_GOLDEN'):
    (GOLDEN / case).write_text(text)
  assert text == (GOLDEN / case).read_text()


@pytest.mark.parametrize('case', [c for c in CASES if c.endswith('.sh')])
def test_bash_reads_it(case):
  assert subprocess.run(['bash', '-n', str(GOLDEN / case)], check=False).returncode == 0


@pytest.mark.parametrize('case', [c for c in CASES if c.endswith('.yaml')])
def test_kubernetes_would_take_it(case):
  schema = json.loads((HERE / 'jobset_schema.json').read_text())['schema']
  *config, manifest = yaml.safe_load_all((GOLDEN / case).read_text())
  assert errors(manifest, schema) == []
  spec = manifest['spec']['replicatedJobs'][0]['template']['spec']
  # Rules that the schema does not have: a podFailurePolicy needs pods that are never restarted in place.
  pod = spec['template']['spec']
  assert pod['restartPolicy'] == 'Never' and spec['backoffLimit'] == 0
  assert {m['name'] for c in pod['containers'] for m in c.get('volumeMounts', [])} == {
      v['name'] for v in pod.get('volumes', [])}
  assert spec['podFailurePolicy']['rules'][0]['onExitCodes'] == {
      'containerName': pod['containers'][0]['name'], 'operator': 'In', 'values': [75]}
  assert [c['metadata']['name'] for c in config] == [
      v['configMap']['name'] for v in pod.get('volumes', []) if v['name'] == 'config']
  assert all('def get_config(' in c['data']['config.py'] for c in config)
  restarts = manifest['spec']['failurePolicy']
  if case == 'jobset_cpu.yaml':
    assert restarts['maxRestarts'] == 0 and restarts['rules'] == []
  else:
    assert [r['action'] for r in restarts['rules']] == ['RestartJobSetAndIgnoreMaxRestarts']


def test_the_schema_refuses():
  """The check above finds what it is for."""
  schema = json.loads((HERE / 'jobset_schema.json').read_text())['schema']
  *_, manifest = yaml.safe_load_all((GOLDEN / 'jobset_gpu.yaml').read_text())
  spec = manifest['spec']['replicatedJobs'][0]['template']['spec']
  spec['paralellism'] = spec.pop('parallelism')
  spec['backoffLimit'] = '0'
  manifest['spec']['failurePolicy']['rules'][0]['action'] = 'Restart'
  del spec['podFailurePolicy']['rules'][0]['onExitCodes']['operator']
  said = '\n'.join(errors(manifest, schema))
  assert 'paralellism is unknown' in said and "backoffLimit: '0' is no integer" in said
  assert "'Restart' is none of" in said and 'operator is missing' in said
  assert said.count('\n') == 3


BASE = ['--data', '/mnt/corpus', '--out', '/mnt/runs/a', '--dry-run']


@pytest.mark.parametrize('words, expected', [
    (['slrum'], ['unknown launcher', "did you mean 'slurm'?"]),
    (['slurm', '--zone', 'x'], ['--zone is an option of launch tpu-vm, not of launch slurm']),
    (['local', '--gpus-per-task', '2'], ['--gpus-per-task is an option of launch slurm']),
    (['slurm', '--time', '2h'], ["--time '2h' must look like D-HH:MM:SS"]),
    (['slurm', '--time', '3', '--lead', '120'], ['180 s, too short for --lead 120']),
    (['slurm', '--nodes', '0'], ['--nodes must be 1 or more']),
    (['slurm', '--nodes', 'two'], ['--nodes', 'invalid int value']),
    (['slurm', '--env', 'A'], ["--env 'A' must look like NAME=VALUE"]),
    (['slurm', '--mount', '/x'], ['--mount is for --container']),
    (['slurm', '--setup', 'a\nb'], ['--setup']),
    (['slurm', '--nodes', '2', '--gpus-per-task', '4', 'mesh.fsdp=3'],
     ['mesh data=rest x fsdp=3 does not fit 2 nodes x 1 tasks x 4 GPUs = 8 devices']),
    (['slurm', '--nodes', '2', 'mesh.data=4'], ['does not fit 2 nodes x 1 tasks = 2 devices', 'multiply to 2']),
    (['slurm', 'batchsize=4'], ["unknown key 'batchsize'", "'batch_size'"]),
    (['slurm', 'nowhere.py'], ['nowhere.py does not exist']),
    (['tpu-vm', '--zone', 'z'], ['launch tpu-vm needs --accelerator']),
    (['tpu-vm', '--accelerator', 'v5litepod-16'], ['launch tpu-vm needs --zone']),
    (['tpu-vm', '--accelerator', 'v5lite-16', '--zone', 'z'], ['unknown TPU type', 'v5litepod']),
    (['tpu-vm', '--accelerator', 'v6e-6', '--zone', 'z'], ['no slice of 6', 'v6e-4, v6e-8']),
    (['tpu-vm', '--accelerator', 'v4-32', '--zone', 'z', 'mesh.data=32'], ['does not fit v4-32 = 16 devices']),
    (['jobset', '--tpu', 'tpu-v6e-slice', '--topology', '4x4'], ['launch jobset needs --image']),
    (['jobset', '--image', 'i', '--topology', '4x4'], ['launch jobset needs --tpu']),
    (['jobset', '--image', 'i', '--tpu', 'tpu-v6e-slices', '--topology', '4x4'], ["did you mean 'tpu-v6e-slice'?"]),
    (['jobset', '--image', 'i', '--tpu', 'tpu-v5p-slice', '--topology', '4x4'], ['has 3 sides, such as 2x2x4']),
    (['jobset', '--image', 'i', '--tpu', 'tpu-v6e-slice', '--topology', '4x4', '--gpus', '1'], ['leave --gpus']),
    (['jobset', '--image', 'i', '--slices', '2'], ['go with --tpu']),
    (['jobset', '--image', 'i', '--claim', 'x'], ['--claim', 'NAME:/DIR']),
    (['jobset', '--image', 'i', '--cache', 'here'], ['--cache here must be an absolute path']),
])
def test_mistakes_are_one_line(words, expected, capfd):
  assert cli.main(['launch', *words, *BASE]) == 2
  out, err = capfd.readouterr()
  assert out == '' and err.count('\n') == 1
  for text in expected:
    assert text in err


@pytest.mark.parametrize('launcher, program, words', [
    ('slurm', 'sbatch', []), ('tpu-vm', 'gcloud', ['--accelerator', 'v6e-8', '--zone', 'z']),
    ('jobset', 'kubectl', ['--image', 'i'])])
def test_a_missing_program_is_named_and_nothing_is_written(launcher, program, words, capfd, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('PATH', str(tmp_path))
  assert cli.main(['launch', launcher, '--data', '/mnt/corpus', '--out', str(tmp_path / 'run'), *words]) == 2
  err = capfd.readouterr().err.splitlines()[-1]
  assert f'launch {launcher} needs {program}' in err and '--dry-run works without it' in err
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('launcher, words', [('slurm', []), ('tpu-vm', ['--accelerator', 'v6e-8', '--zone', 'z'])])
def test_corpora_of_stores_and_several(launcher, words, capfd, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  for data, want in (('s3://bucket/corpus', 's3://bucket/corpus'), ('/a,gs://b/c', '/a,gs://b/c')):
    assert cli.main(['launch', launcher, '--data', data, '--out', str(tmp_path / 'run'), '--dry-run', *words]) == 0
    assert f'--data {want}' in capfd.readouterr().out
  if launcher == 'slurm':
    assert cli.main(['launch', launcher, '--data', 'a,b', '--out', str(tmp_path / 'run'), '--dry-run']) == 0
    assert f'--data {tmp_path}/a,{tmp_path}/b' in capfd.readouterr().out


def test_a_shipped_recipe_keeps_its_name(tmp_path, monkeypatch):
  """Every process finds it by its name; a file of the working directory goes by its path."""
  monkeypatch.chdir(tmp_path)
  first = lambda: job.make(['experiments/mae.py:laptop'], 'corpus', 'run', options.Local(), here=True).words[0]
  assert first() == 'experiments/mae.py:laptop'
  (tmp_path / 'experiments').mkdir()
  (tmp_path / 'experiments' / 'mae.py').write_text('')
  assert first() == f'{tmp_path}/experiments/mae.py:laptop'


def test_a_disk_that_machines_do_not_share():
  mounts = '/dev/sda1 / ext4 rw 0 0\nnas:/x /home nfs4 rw 0 0\n/dev/sdb /home/me/own\\040disk xfs rw 0 0\n'
  assert [job.file_system(p, mounts) for p in ('/tmp/run', '/home/me/run', '/home/me/own disk/run', '/homes/run')] == [
      'ext4', 'nfs4', 'xfs', 'ext4']
  assert job.shared_warning('/proc/none/run', 4) == ''  # no disk at all
  assert job.shared_warning(str(HERE / 'run'), 1) == ''


@pytest.mark.parametrize('text, want', [('90', 5400), ('1:30', 90), ('1:30:00', 5400), ('2-12', 216000),
                                        ('1-0:30', 88200), ('1-01:00:05', 90005)])
def test_time_limits(text, want):
  assert slurm.seconds(text) == want


@pytest.mark.parametrize('name, want', [
    ('v5litepod-1', (1, 1, 1)), ('v5litepod-8', (1, 8, 8)), ('v5litepod-16', (4, 4, 16)), ('v6e-256', (64, 4, 256)),
    ('v4-8', (1, 4, 4)), ('v4-32', (4, 4, 16)), ('v5p-128', (16, 4, 64)), ('v3-8', (1, 4, 8)), ('v2-32', (4, 4, 32))])
def test_sizes_of_tpus(name, want):
  assert dataclasses.astuple(tpu.of_type(name)[0]) == want


@pytest.mark.parametrize('name, topology, each, want', [
    ('tpu-v6e-slice', '2x4', 0, (1, 8, 8)), ('tpu-v6e-slice', '2x4', 4, (2, 4, 8)), ('tpu-v6e-slice', '16x16', 0, (64, 4, 256)),
    ('tpu-v5-lite-podslice', '1x1', 0, (1, 1, 1)), ('tpu-v5p-slice', '2x2x4', 0, (4, 4, 16)), ('tpu7x', '2x2x1', 0, (1, 4, 8))])
def test_sizes_of_topologies(name, topology, each, want):
  assert dataclasses.astuple(tpu.of_topology(name, topology, each)) == want


def test_names_suit_every_system():
  names = [job.Job((), '', out, '', '', pathlib.Path()) for out in ('/a/MAE_b', '/a/' + 'x' * 90, '/a/___')]
  assert [n.name for n in names] == ['jaxmed-mae-b', 'jaxmed-' + 'x' * 33, 'jaxmed']
  assert names[0].unique != job.Job((), '', '/b/MAE_b', '', '', pathlib.Path()).unique
  # Pods are called NAME-slice-0-0 and more, at most 63 characters.
  assert all(len(n.unique) <= 45 and n.unique.startswith(n.name + '-') for n in names)


def test_a_run_outside_of_volumes_is_told(capfd):
  assert cli.main(['launch', 'jobset', '--image', 'i', '--claim', 'lab:/mnt/lab', *BASE]) == 0
  assert 'is lost with the pod' in capfd.readouterr().err
  assert jobset.shared(job.Job((), '', '/mnt/lab/a', '', '', pathlib.Path()), options.JobSet(claim=('x:/mnt/lab/',)))
  assert not jobset.shared(job.Job((), '', '/mnt/label', '', '', pathlib.Path()), options.JobSet(claim=('x:/mnt/lab',)))


def test_every_option_says_what_it_is():
  with pytest.raises(UserError, match='needs --image IMAGE: container image'):
    options.require(options.JobSet(), 'jobset', 'image')
  for kind in options.LAUNCHERS.values():
    assert all(f.metadata['help'] for f in dataclasses.fields(kind))
