"""A run that was stopped, killed or damaged ends with the weights of one that was not, bit for bit."""

import dataclasses
import json
import os
import shutil
import signal
import time
import types

import numpy as np
import pytest

from jaxmed import load
from jaxmed.data.corpus.open import open_source
from jaxmed.errors import Stopped, UserError
from jaxmed.train import loop
from jaxmed.train.build import assemble, data_spec, rundir, weights
from jaxmed.train.logs import read_rows
from tests.common import record_indices, same, saved_state, saved_steps, start, words
from tests.conftest import TINY

OFTEN = TINY | {'checkpoint_every': 2, 'eval_every': 7}


def rows_of(run, key='loss'):
  return [r['step'] for r in read_rows(run / 'metrics.jsonl') if key in r]


@pytest.mark.parametrize('changes', [{}, {'method': 'supervised', 'objective': {'mixup': 0.8, 'cutmix': 1.0},
                                          'loader': {'label': 'tissue'}, 'optimizer': {'ema': 0.9}}],
                         ids=['mae', 'supervised'])
def test_7_and_13_equal_20(corpus, tmp_path, monkeypatch, changes):
  """Parameters, moments, averages, random state, counts, data order and the rows that were logged."""
  user = TINY | ({'objective': {}} if changes else {})
  with monkeypatch.context() as m:
    whole = record_indices(m)
    start(corpus, tmp_path / 'whole', user, **changes)
  with monkeypatch.context() as m:
    first = record_indices(m, stop_at=7)
    with pytest.raises(Stopped, match='SIGTERM'):
      start(corpus, tmp_path / 'parts', user, **changes)
  assert saved_steps(tmp_path / 'parts')[-1] == 7
  with monkeypatch.context() as m:
    second = record_indices(m)
    loop.resume(tmp_path / 'parts', quiet=True)
  assert min(second) == 8
  seen = {n: first.get(n) or second[n] for n in range(1, 21)}
  assert {n: whole[n] for n in seen} == seen
  same(saved_state(tmp_path / 'whole'), saved_state(tmp_path / 'parts'))
  losses = [[(r['step'], r['loss']) for r in read_rows(tmp_path / p / 'metrics.jsonl') if 'loss' in r]
            for p in ('whole', 'parts')]
  assert losses[0] == losses[1]
  assert rows_of(tmp_path / 'parts') == list(range(1, 21))
  assert rows_of(tmp_path / 'parts', 'val_loss') == [10, 20]


def test_a_stop_in_the_last_evaluation_loses_none(corpus, trained, tmp_path, monkeypatch):
  probe = loop._probe

  def stopped(measure, state, logs, n):
    if n < 20:
      return probe(measure, state, logs, n)
    os.kill(os.getpid(), signal.SIGTERM)  # which leaves the measurement unfinished
    return {}

  with monkeypatch.context() as m:
    m.setattr(loop, '_probe', stopped)
    with pytest.raises(Stopped, match='SIGTERM'):
      start(corpus, tmp_path / 'run', TINY)
  assert rows_of(tmp_path / 'run', 'val_loss') == [10]
  loop.resume(tmp_path / 'run', quiet=True)
  values = lambda run: [(r['step'], r['val_loss']) for r in read_rows(run / 'metrics.jsonl') if 'val_loss' in r]
  assert values(tmp_path / 'run') == values(trained)
  loop.resume(tmp_path / 'run', quiet=True)  # and what is there is not measured again
  assert rows_of(tmp_path / 'run', 'val_loss') == [10, 20]


def test_every_epoch_sees_every_record_once(corpus, tmp_path, monkeypatch):
  seen = record_indices(monkeypatch)
  start(corpus, tmp_path / 'run', TINY)
  epochs = [[i for n in range(first, first + 8) for i in seen[n]] for first in (1, 9)]
  assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(64))
  assert epochs[0] != epochs[1]


def test_six_kills_at_random_moments(server, corpus, trained, tmp_path):
  run, rng = tmp_path / 'run', np.random.default_rng(0)
  log, argv = run / 'metrics.jsonl', ['train', '--data', corpus, '--out', run, *words(OFTEN)]
  steps = []
  for kill in range(6):
    fork = server.start(argv, tmp_path)
    if kill in (1, 3):  # also while it starts: reads, restores, compiles
      fork.wait_for('device(s)')
    else:
      rows = rng.integers(1, 5)
      begin = max([r['step'] for r in read_rows(log)], default=0)
      fork.wait_for(f'step {min(begin + rows, 20)}/20')
    time.sleep(float(rng.uniform(0, 0.1)))
    fork.signal(signal.SIGKILL)
    assert fork.wait() in (-9, 0)
    steps.append(max([r['step'] for r in read_rows(log)], default=0))
    argv = ['train', '--resume', run]
  assert server.run(argv, tmp_path)[0] == 0
  same(saved_state(run), saved_state(trained))
  assert rows_of(run) == list(range(1, 21)), steps
  assert rows_of(run, 'val_loss') == [7, 14, 20]
  assert len(set(steps)) > 2  # the kills did fall at different places


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT], ids=['SIGTERM', 'Ctrl-C'])
@pytest.mark.parametrize('moment', ['device(s)', 'step 3/20'], ids=['compiling', 'training'])
def test_a_signal_to_the_command(server, corpus, trained, tmp_path, number, moment):
  run = tmp_path / 'run'
  fork = server.start(['train', '--data', corpus, '--out', run, *words(OFTEN)], tmp_path)
  fork.wait_for(moment)
  fork.signal(number)
  assert fork.wait() == 75
  last = fork.err.read_text().splitlines()[-1]
  assert last == f'jaxmed: stopped by {number.name}; everything is saved, go on with --resume {run}'
  step = saved_steps(run)[-1]
  assert rows_of(run) == list(range(1, step + 1))
  if moment == 'device(s)':
    assert step == 0
    loop.resume(run, quiet=True)
    same(saved_state(run), saved_state(trained))


def test_two_hands_on_one_run(server, corpus, trained, tmp_path):
  """Of two that start, and of two that go on, one has the run and the other is told with 2; nothing is lost."""
  run = tmp_path / 'run'
  for name in 'ab':
    (tmp_path / name).mkdir()
  both = [server.start(['train', '--data', corpus, '--out', run, *words(OFTEN)], tmp_path / name) for name in 'ab']
  codes = [fork.wait() for fork in both]
  assert sorted(codes) == [0, 2]
  told = both[codes.index(2)].err.read_text().splitlines()
  assert len(told) == 1 and ('is being written by process' in told[0] or 'is not empty' in told[0])
  same(saved_state(run), saved_state(trained))
  assert rows_of(run) == list(range(1, 21))
  shutil.rmtree(run / 'checkpoints' / '20')
  first = server.start(['train', '--resume', run], tmp_path / 'a')
  first.wait_for('device(s)')
  code, _, err = server.run(['train', '--resume', run], tmp_path / 'b')
  assert code == 2 and f'{run} is being written by process {first.pid} on' in err and len(err.splitlines()) == 1
  assert first.wait() == 0
  same(saved_state(run), saved_state(trained))
  assert not list(run.glob('.owner*'))


def test_ctrl_c_twice_saves_too(server, corpus, tmp_path):
  """Wrappers hand a terminal's Ctrl-C on, so that two arrive."""
  run = tmp_path / 'run'
  fork = server.start(['train', '--data', corpus, '--out', run, *words(OFTEN)], tmp_path)
  fork.wait_for('step 3/20')
  fork.signal(signal.SIGINT)
  fork.signal(signal.SIGINT)
  assert fork.wait() == 75
  lines = fork.err.read_text().splitlines()
  assert lines[-1].startswith('jaxmed: stopped by SIGINT; everything is saved')
  assert saved_steps(run)[-1] >= 3 and not list((run / 'checkpoints').glob('*tmp*'))


def test_other_records_under_a_run_are_refused(corpus, trained):
  """As many, with the same channels: by digest."""
  spec = rundir.load_config(trained)[1]
  source = open_source(corpus).select('train')
  assert spec.digest == data_spec.digest_of(source)
  swapped = dataclasses.replace(source, table=source.table.take([1, 0, *range(2, len(source))]))
  with pytest.raises(UserError, match='has as many records as the corpus that the run began with, but others'):
    data_spec.check_same(spec, swapped)
  data_spec.check_same(dataclasses.replace(spec, digest=''), swapped)  # a run of an earlier version


def test_a_signal_before_training_begins(server, corpus, tmp_path):
  fork = server.start(['train', '--data', corpus, '--out', tmp_path / 'run', *words(OFTEN)], tmp_path)
  fork.wait_for('')
  fork.signal(signal.SIGTERM)
  assert fork.wait() in (75, -signal.SIGTERM)  # the fork may not have reached our first line yet
  assert not fork.err.exists() or 'Traceback' not in fork.err.read_text()


@pytest.mark.parametrize('where', ['compile', 'probe'])
def test_a_signal_while_it_compiles_or_evaluates(corpus, trained, tmp_path, monkeypatch, where):
  def signalled(f):
    def g(*args, **kwargs):
      signal.raise_signal(signal.SIGTERM)
      return f(*args, **kwargs)
    return g

  with monkeypatch.context() as m:
    if where == 'compile':  # the handler runs in the main thread, which waits for the compiler's
      compile_ = assemble.Trainer.compile
      m.setattr(assemble.Trainer, 'compile', lambda *a: os.kill(os.getpid(), signal.SIGTERM) or compile_(*a))
    else:
      m.setattr(loop.Probe, '_loss', signalled(loop.Probe._loss))
    with pytest.raises(Stopped, match='SIGTERM'):
      start(corpus, tmp_path / 'run', TINY)
  assert saved_steps(tmp_path / 'run')[-1] == {'compile': 0, 'probe': 10}[where]
  loop.resume(tmp_path / 'run', quiet=True)
  same(saved_state(tmp_path / 'run'), saved_state(trained))


def test_a_finished_run_is_left_as_it_is(trained, tmp_path):
  run = shutil.copytree(trained, tmp_path / 'run')
  before = saved_state(run)
  summary = loop.resume(run, quiet=True)
  assert summary['steps'] == 20
  last = [r['loss'] for r in read_rows(run / 'metrics.jsonl') if 'loss' in r][-1]
  assert summary['loss'] == last
  same(saved_state(run), before)
  assert rows_of(run) == list(range(1, 21))


@pytest.mark.parametrize('changes, expected', [
    ({'seed': 1}, 'seed cannot change'), ({'optimizer': {'clip': 1.0}}, 'optimizer.clip cannot change'),
    ({'loader': {'fit': 'crop'}}, 'loader.fit cannot change'), ({'steps': 30}, 'steps cannot change'),
    ({'stepps': 30}, "'stepps'.*'steps'"),
])
def test_what_may_not_change(trained, tmp_path, changes, expected):
  before = sorted((p, p.stat().st_mtime_ns) for p in trained.rglob('*'))
  with pytest.raises(UserError, match=expected):
    loop.resume(trained, changes, quiet=True)
  assert sorted((p, p.stat().st_mtime_ns) for p in trained.rglob('*')) == before


def test_another_corpus_is_refused(trained, mixed_corpus):
  with pytest.raises(UserError, match='64 records to train on with channels R, G, B'):
    loop.resume(trained, {'data': str(mixed_corpus)}, quiet=True)


def test_no_run(tmp_path):
  with pytest.raises(UserError, match=r'is not a run: it has no config.json'):
    loop.resume(tmp_path, quiet=True)


def test_what_may_change(corpus, trained, tmp_path):
  """A moved corpus, other intervals and threads: the weights stay the same."""
  run = shutil.copytree(trained, tmp_path / 'run')
  shutil.rmtree(run / 'checkpoints' / '20')
  moved = shutil.copytree(corpus, tmp_path / 'moved')
  loop.resume(run, {'data': str(moved), 'checkpoint_every': 2, 'loader': {'threads': 2}, 'log_every': 1.0}, quiet=True)
  same(saved_state(run), saved_state(trained))


def test_a_run_is_readable_without_its_corpus(corpus, trained, tmp_path):
  run = shutil.copytree(trained, tmp_path / 'run')
  config = (run / 'config.json').read_text()
  assert str(corpus) in config
  (run / 'config.json').write_text(config.replace(str(corpus), str(tmp_path / 'gone')))
  images = np.stack([open_source(corpus)[i]['image'] for i in range(3)])[:, :16, :16]
  before, after = load(trained).embed(images), load(run).embed(images)
  assert {k: v.shape for k, v in after.items()} == {'cls': (3, 32), 'mean': (3, 32), 'patches': (3, 3, 2, 2, 32),
                                                     'map': (3, 2, 2, 32)}
  same(before, after)
  with pytest.raises(UserError, match='gone does not exist'):
    loop.resume(run, quiet=True)


def test_init_copies_the_encoder(corpus, trained, tmp_path, monkeypatch):
  """The rate of the first step is 0: what it leaves is what the run began with."""
  record_indices(monkeypatch, stop_at=1)
  with pytest.raises(Stopped):
    start(corpus, tmp_path / 'run', TINY, init=str(trained), seed=5)
  old, new = saved_state(trained), saved_state(tmp_path / 'run')
  same(new.params['encoder'], old.params['encoder'])
  assert not np.allclose(old.params['decoder']['mask_token'], new.params['decoder']['mask_token'])


def test_init_reaches_the_average_of_the_weights(corpus, trained, tmp_path):
  """It is the product of a run that has one."""
  config, spec = rundir.load_config(trained)
  config.optimizer.ema, config.init = 0.9, str(trained)
  run = types.SimpleNamespace(config=config, spec=spec, trainer=assemble.build(config, spec),
                              mesh=loop.mesh_lib.make_mesh(config.mesh))
  shapes = assemble.batch_shapes(config, spec, run.mesh)
  state = weights.initialize(run, run.trainer.abstract(shapes, run.mesh), shapes)
  same(state.average, state.params)
  same(state.average['encoder'], saved_state(trained).params['encoder'])


def test_init_of_another_model(corpus, trained, tmp_path):
  with pytest.raises(UserError, match='is another model than channel_vit_micro/8') as e:
    start(corpus, tmp_path / 'run', TINY, init=str(trained), encoder={'embed_dim': 16})
  assert str(trained) in str(e.value)
  assert not (tmp_path / 'run').exists()


def test_a_run_of_an_earlier_version_goes_on(trained, tmp_path):
  """Its config lacks keys, even a whole section, whose defaults do what it did."""
  run = shutil.copytree(trained, tmp_path / 'run')
  values = json.loads((run / 'config.json').read_text())
  for key in rundir.ADDED:
    section, _, name = key.rpartition('.')
    del (values[section] if section else values)[name]
  assert not values.pop('watchdog')
  (run / 'config.json').write_text(json.dumps(values))
  config, _ = rundir.load_config(run)
  assert config.watchdog.minutes == 0.0 and config.mesh.sequence == 1 and config.on_spike == 'warn'
  assert config.learning_rate == 1e-3
  loop.resume(run, quiet=True)
  del values['seed']
  (run / 'config.json').write_text(json.dumps(values))
  with pytest.raises(UserError, match='config.json has no seed'):
    rundir.load_config(run)
