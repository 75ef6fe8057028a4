"""Loggers: rows in files, W&B offline and MLflow in a folder, each read back from what it wrote."""

import glob
import json
import math
import pathlib
import struct

import pytest
from PIL import Image

from jaxmed import config as config_lib
from jaxmed.errors import UserError
from jaxmed.train import loggers, loop, pictures
from jaxmed.train.build import resolve, rundir
from jaxmed.train.logs import Logs, read_rows
from tests.conftest import TINY


def one_figure(run, state):
  (run.folder / 'figures').mkdir(exist_ok=True)
  Image.new('RGB', (4, 4)).save(run.folder / 'figures' / 'loss.png')


@pytest.fixture(scope='module')
def tracked(corpus, trained, tmp_path_factory):
  """A run of TINY with both trackers and no network, and gone on with once."""
  pytest.importorskip('wandb')
  pytest.importorskip('mlflow')
  run = tmp_path_factory.mktemp('tracked') / 'run'
  with pytest.MonkeyPatch.context() as m:
    for name in ('WANDB_PROJECT', 'MLFLOW_TRACKING_URI', 'MLFLOW_EXPERIMENT_NAME'):
      m.delenv(name, raising=False)
    m.setenv('WANDB_MODE', 'offline')
    m.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
    m.setattr(pictures, 'end', one_figure)
    loop.train(TINY | {'data': str(corpus), 'loggers': ('wandb', 'mlflow')}, run, quiet=True)
    loop.resume(run, quiet=True)
    yield run


def leveldb(data):
  """The records of W&B's file: LevelDB's log format after a header of seven bytes."""
  at, whole = 7, b''
  while at + 7 <= len(data):
    if (left := 32768 - at % 32768) < 7:  # the end of a block
      at += left
      continue
    length, kind = struct.unpack('<HB', data[at + 4:at + 7])
    whole = (b'' if kind in (1, 2) else whole) + data[at + 7:at + 7 + length]
    at += 7 + length
    if kind in (1, 4):
      yield whole


def wandb_records(run):
  """What all offline files of a run hold: config, rows in order, figures, identities."""
  from wandb.proto import wandb_internal_pb2
  config, rows, ids = {}, [], set()
  for path in sorted(glob.glob(f'{run}/wandb/offline-run-*/*.wandb')):
    for data in leveldb(pathlib.Path(path).read_bytes()):
      record = wandb_internal_pb2.Record()
      record.ParseFromString(data)
      if record.HasField('run'):
        ids.add(record.run.run_id)
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
      if record.HasField('history'):
        rows.append({item.key or '/'.join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
  return config, rows, ids


@pytest.mark.slow
def test_wandb_offline(tracked):
  """Config, each row of metrics.jsonl and the figure are in RUN/wandb; a resumed run has the same identity."""
  config, rows, ids = wandb_records(tracked)
  assert config['steps'] == TINY['steps']
  assert config['encoder.embed_dim'] == TINY['encoder']['embed_dim']
  for row in read_rows(tracked / 'metrics.jsonl'):
    assert any(all(logged.get(k) == v for k, v in row.items()) for logged in rows), row
  image = next(row for row in rows if any(key.startswith('figures') for key in row))
  assert image['step'] == TINY['steps']
  assert glob.glob(f'{tracked}/wandb/offline-run-*/files/media/images/figures/loss*.png')
  assert ids == {json.loads((tracked / loggers.IDS).read_text())['wandb']}


@pytest.mark.slow
def test_mlflow_in_a_folder(tracked):
  """The same in RUN/mlruns."""
  from mlflow.tracking import MlflowClient
  client = MlflowClient(tracking_uri=(tracked / 'mlruns').as_uri())
  found = client.get_run(json.loads((tracked / loggers.IDS).read_text())['mlflow'])
  assert found.info.status == 'FINISHED'
  assert found.info.run_name == 'run'
  assert found.data.params['steps'] == str(TINY['steps'])
  assert set(found.data.params) == set(config_lib.flat(rundir.load_config(tracked)[0]))
  history = {m.step: m.value for m in client.get_metric_history(found.info.run_id, 'loss')}
  assert history == {row['step']: row['loss'] for row in read_rows(tracked / 'metrics.jsonl') if 'loss' in row}
  assert 'grad_norm.encoder' in found.data.metrics
  assert [f.path for f in client.list_artifacts(found.info.run_id, 'figures')] == ['figures/loss.png']
  experiment = client.get_experiment_by_name('jaxmed')
  assert len(client.search_runs([experiment.experiment_id])) == 1


def test_files_of_a_run_that_goes_on(tmp_path):
  """Rows past the checkpoint are dropped, the others stay; the events are there."""
  first = Logs(tmp_path, 0, 10, 8, quiet=True)
  for step in (1, 2, 3):
    first.scalars(step, {'loss': 1.0 / step})
  first.close()
  second = Logs(tmp_path, 2, 10, 8, quiet=True)
  second.scalars(3, {'loss': 7.0})
  second.close()
  assert [(r['step'], r['loss']) for r in read_rows(tmp_path / 'metrics.jsonl')] == [(1, 1.0), (2, 0.5), (3, 7.0)]
  assert any((tmp_path / 'events').iterdir())


class Memory:
  """A tracker that remembers what it is told, and fails from a step on."""

  made = None

  def __init__(self, run, config):
    type(self).made = self
    self.config, self.rows, self.shown, self.closed, self.fails = config, [], [], False, math.inf

  def scalars(self, step, values):
    if step >= self.fails:
      raise ConnectionError('gone')
    self.rows.append((step, values))

  def figures(self, step, paths):
    self.shown += [(step, path.name) for path in paths]

  def close(self):
    self.closed = True


def test_a_tracker_that_fails_is_left_out(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(loggers.TRACKERS, 'memory', Memory)
  logs = Logs(tmp_path, 0, 10, 8, quiet=True, trackers=('memory',), config={'seed': 0})
  logs.scalars(1, {'loss': 1.0})
  logs.figures(1, [tmp_path / 'a.png'])
  Memory.made.fails = 2
  for step in (2, 3):
    logs.scalars(step, {'loss': 1.0})
  logs.close()
  assert Memory.made.config == {'seed': 0}
  assert Memory.made.rows == [(1, {'loss': 1.0})]
  assert Memory.made.shown == [(1, 'a.png')]
  assert not Memory.made.closed
  assert [r['step'] for r in read_rows(tmp_path / 'metrics.jsonl')] == [1, 2, 3]
  err = capsys.readouterr().err
  assert err.count('memory takes no more metrics (ConnectionError: gone)') == 1


def test_only_the_main_process_logs(tmp_path, monkeypatch):
  monkeypatch.setitem(loggers.TRACKERS, 'memory', lambda run, config: pytest.fail('another process logs'))
  logs = Logs(tmp_path, 0, 10, 8, quiet=True, main=False, trackers=('memory',))
  logs.scalars(1, {'loss': 1.0})
  logs.close()
  assert not list(tmp_path.iterdir())


def test_a_tracker_that_does_not_begin(tmp_path, monkeypatch):
  def broken(run, config):
    raise ConnectionError('no server')
  monkeypatch.setitem(loggers.TRACKERS, 'memory', broken)
  with pytest.raises(UserError, match='loggers=memory: ConnectionError: no server'):
    Logs(tmp_path, 0, 10, 8, quiet=True, trackers=('memory',))


def test_a_package_that_is_missing(corpus, tmp_path, monkeypatch):
  """One line that names the extra, before anything is written."""
  monkeypatch.setattr(loggers.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"loggers=mlflow: mlflow is not installed: pip install 'jaxmed\[mlflow\]'"):
    loop.train(TINY | {'data': str(corpus), 'loggers': 'mlflow'}, tmp_path / 'run', quiet=True)
  assert not (tmp_path / 'run').exists()


def test_the_names_are_those_of_the_config():
  assert tuple(loggers.TRACKERS) == config_lib.CHOICES['loggers']
  assert 'loggers' in resolve.RESUMABLE
  assert 'loggers' in rundir.ADDED
