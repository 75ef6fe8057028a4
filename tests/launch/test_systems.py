"""What is done with gcloud and kubectl: the real script and the real verbs, with programs of those names that answer
from a file, since no test can rent a TPU."""

import json
import os
import pathlib
import subprocess
import time

import pytest

from jaxmed import cli
from jaxmed.launch import record

GCLOUD = '''#!/bin/bash
# `states`: what describe answers, one after the other. `codes`: what ssh to all workers ends with, likewise.
cd "$(dirname "$0")"
echo "$*" | head -1 >> calls
next() { head -1 "$1"; sed -i 1d "$1"; }
case "$*" in
  *describe*)
    state=$(next states)
    case "$state" in
      NONE) echo "ERROR: (gcloud) NOT_FOUND: Resource was not found." >&2; exit 1 ;;
      BROKEN) echo "ERROR: (gcloud) network is unreachable" >&2; exit 1 ;;
    esac
    echo "$state" ;;
  *pkill*) exit 0 ;;
  *ssh*) exit "$(next codes)" ;;
esac
'''


@pytest.fixture
def tools(tmp_path, monkeypatch):
  """A folder of programs in front of the path."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')
  monkeypatch.setenv('POLL', '0.01')
  monkeypatch.chdir(tmp_path)
  return folder


def program(folder, name, text):
  (folder / name).write_text(text)
  (folder / name).chmod(0o755)


def tpu(tools, states, codes, *words, place='run.launch'):
  """Runs the script that launch tpu-vm writes: (exit code, the calls of gcloud, its output)."""
  program(tools, 'gcloud', GCLOUD)
  (tools / 'states').write_text('\n'.join(states) + '\n')
  (tools / 'codes').write_text('\n'.join(map(str, codes)) + '\n')
  (tools / 'calls').unlink(missing_ok=True)
  done = subprocess.run(['bash', '-c', script(*words)], capture_output=True, text=True, check=False, timeout=60)
  calls = [next(v for v in ('describe', 'create', 'delete', 'scp', 'ssh') if v in call.split())
           for call in (tools / 'calls').read_text().splitlines()]
  return done.returncode, [c for c in calls if c != 'describe'], done.stdout + done.stderr


def script(*words):
  from jaxmed.launch import control, options
  args = cli._parse(['launch', 'tpu-vm', '--accelerator', 'v6e-8', '--zone', 'z', '--data', '/mnt/c', '--out', '/mnt/run',
                     *words])
  return control.prepare('tpu-vm', args.words, args.data, args.out, options.of('tpu-vm', args))[1]


def test_a_slice_is_asked_for_and_given_back(tools):
  code, calls, _ = tpu(tools, ['NONE', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE'], [0])
  assert (code, calls) == (0, ['create', 'ssh', 'delete'])


def test_a_slice_that_is_there_is_used_and_kept(tools):
  assert tpu(tools, ['ACTIVE'], [0], '--keep')[:2] == (0, ['ssh'])


def test_exit_75_and_a_broken_connection_start_again(tools):
  code, calls, _ = tpu(tools, ['ACTIVE'] * 4, [75, 255, 69, 0])
  assert (code, calls) == (0, ['ssh'] * 4 + ['delete'])


def test_restarts_are_counted(tools):
  assert tpu(tools, ['ACTIVE'] * 3, [75, 75, 75], '--restarts', '1')[:2] == (75, ['ssh', 'ssh', 'delete'])


def test_a_mistake_does_not_start_again(tools):
  assert tpu(tools, ['ACTIVE'] * 3, [2])[:2] == (2, ['ssh', 'delete'])


def test_a_slice_that_was_taken_away_is_asked_for_again(tools):
  # ssh ends with any code; then the resource is suspended, deleted, and there is none.
  code, calls, _ = tpu(tools, ['ACTIVE', 'SUSPENDED', 'SUSPENDING', 'SUSPENDED', 'NONE', 'ACTIVE'], [1, 0], '--spot')
  assert (code, calls) == (0, ['ssh', 'delete', 'create', 'ssh', 'delete'])


def test_a_request_that_failed_is_not_repeated(tools):
  code, calls, said = tpu(tools, ['NONE', 'FAILED', 'FAILED'], [0])
  assert (code, calls) == (1, ['create', 'delete']) and 'FAILED' in said


def test_a_network_that_is_down_for_a_while_costs_nothing(tools):
  assert tpu(tools, ['BROKEN', 'BROKEN', 'ACTIVE'], [0], '--keep')[:2] == (0, ['ssh'])
  code, calls, said = tpu(tools, ['BROKEN'] * 30, [0], '--keep')
  assert (code, calls) == (1, []) and said.count('network is unreachable') == 20


def test_the_config_file_goes_along(tools, tmp_path):
  (tmp_path / 'own.py').write_text("VARIANTS = ('a',)\n\n\ndef get_config(v):\n  return {'steps': 3}\n")
  code, calls, _ = tpu(tools, ['ACTIVE'], [0], 'own.py:a', '--keep')
  assert (code, calls) == (0, ['scp', 'ssh'])
  sent, = [c for c in (tools / 'calls').read_text().splitlines() if 'scp' in c]
  assert f'scp {tmp_path}/own.py jaxmed-run-' in sent and ':config.py' in sent and '--worker=all' in sent
  assert 'jaxmed train config.py:a --data' in script('own.py:a')


def verb(capfd, *argv):
  """Runs a verb, which must succeed: its JSON."""
  capfd.readouterr()
  code = cli.main([*map(str, argv), '--json'])
  out, err = capfd.readouterr()
  assert code == 0, err
  return json.loads(out)


def test_tpu_verbs(tools, capfd, tmp_path):
  """Launch, status and stop, with the script alive and after it."""
  program(tools, 'gcloud', GCLOUD.replace('*ssh*) exit "$(next codes)"', '*ssh*) while [ ! -e ended ]; do sleep 0.05; '
                                          'done; exit 75').replace('*pkill*) exit 0', '*pkill*) touch ended'))
  (tools / 'states').write_text('ACTIVE\n' * 20)
  sent = verb(capfd, 'launch', 'tpu-vm', '--accelerator', 'v6e-8', '--zone', 'z', '--data', '/mnt/c', '--out', '/mnt/run')
  assert sent['script'] == str(tmp_path / 'run.launch' / 'job.sh')
  assert cli.main(['launch', 'tpu-vm', '--accelerator', 'v6e-8', '--zone', 'z', '--data', '/c', '--out', '/mnt/run']) == 2
  assert 'was launched already' in capfd.readouterr().err
  log = pathlib.Path(sent['log'])
  end = time.monotonic() + 30
  while 'attempt 0' not in log.read_text():
    assert time.monotonic() < end
    time.sleep(0.02)
  assert 'its script runs here' in verb(capfd, 'status', '/mnt/run')['state']
  assert 'asked to save and end' in verb(capfd, 'stop', '/mnt/run')['stopped']
  values = record.find('/mnt/run')
  while record.alive(values['script_process']):
    assert time.monotonic() < end
    time.sleep(0.02)
  assert 'stopped by jaxmed stop' in log.read_text() and 'giving jaxmed-run-' in log.read_text()
  told = verb(capfd, 'status', '/mnt/run')['state']
  assert 'still billed: jaxmed stop /mnt/run' in told  # it says ACTIVE still
  assert 'given back' in verb(capfd, 'stop', '/mnt/run')['stopped']
  (tools / 'states').write_text('NONE\n' * 5)
  assert 'has ended already' in verb(capfd, 'stop', '/mnt/run')['stopped']


KUBECTL = '''#!/bin/bash
cd "$(dirname "$0")"
echo "$*" >> calls
case "$1" in
  get) if [ -e answer ]; then cat answer; else echo 'Error from server (NotFound): jobsets "x" not found' >&2; exit 1; fi ;;
  create) [ ! -e refuse ] || { echo 'error: no matches for kind "JobSet"' >&2; exit 1; } ;;
esac
'''


def test_jobset_verbs(tools, capfd, tmp_path):
  program(tools, 'kubectl', KUBECTL)
  launch = ['launch', 'jobset', '--image', 'i', '--claim', 'lab:/mnt', '--namespace', 'n', '--data', '/mnt/c', '--out',
            '/mnt/run']
  (tools / 'refuse').touch()
  assert cli.main(launch) == 2
  err = capfd.readouterr().err
  assert err == 'jaxmed: kubectl did not take the JobSet: error: no matches for kind "JobSet"\n'
  assert not (tmp_path / 'run.launch' / 'launch.json').exists()
  (tools / 'refuse').unlink()
  sent = verb(capfd, *launch)
  assert sent['job'].startswith('jaxmed-run-')
  assert f'create -f {tmp_path}/run.launch/job.yaml --namespace=n' in (tools / 'calls').read_text()
  (tools / 'answer').write_text(json.dumps({'status': {
      'restarts': 2, 'replicatedJobsStatus': [{'name': 'worker', 'ready': 1, 'failed': 0}]}}))
  told = verb(capfd, 'status', '/mnt/run')
  assert told['alive'] is True and told['state'].endswith('1 jobs ready, 0 failed, 2 restarts')
  assert told['log'].startswith('kubectl logs -f')
  assert cli.main(launch) == 2
  assert 'was launched already' in capfd.readouterr().err
  assert 'its pods save and end' in verb(capfd, 'stop', '/mnt/run')['stopped']
  (tools / 'answer').write_text(json.dumps({'status': {'terminalState': 'Completed', 'restarts': 3}}))
  assert verb(capfd, 'status', '/mnt/run')['state'].endswith('Completed, 3 restarts')
  assert 'has ended already' in verb(capfd, 'stop', '/mnt/run')['stopped']
  (tools / 'answer').unlink()
  assert verb(capfd, 'status', '/mnt/run')['alive'] is False


def test_a_run_that_nothing_was_launched_for(capfd, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for word in ('status', 'stop'):
    assert cli.main([word, str(tmp_path / 'run')]) == 2
    assert 'nothing was launched for' in capfd.readouterr().err
  (tmp_path / 'run.launch').mkdir()
  (tmp_path / 'run.launch' / 'launch.json').write_text('[]')
  assert cli.main(['status', str(tmp_path / 'run')]) == 2
  assert 'is damaged' in capfd.readouterr().err
