"""Collapse: provoked in real runs, and what a run does about it."""

import json

import numpy as np
import pytest

from jaxmed.config import merge
from jaxmed.errors import UserError
from jaxmed.evaluate import health
from jaxmed.train import loop
from jaxmed.train.logs import read_rows
from jaxmed.train.monitor.watch import RollBack, Watch
from tests.common import saved_state, saved_steps, start
from tests.conftest import TINY

HEALTHY = {'rankme': 40.0, 'gram_offdiagonal': 0.3, 'feature_std': 0.7}
DEAD = {'rankme': 1.0, 'gram_offdiagonal': 0.9999, 'feature_std': 1e-4}
DINO = TINY | {
    'method': 'dino', 'steps': 60, 'eval_every': 20, 'checkpoint_every': 20, 'log_every': 10, 'batch_size': 16,
    'objective': {'out_dim': 64, 'hidden_dim': 32, 'bottleneck_dim': 16, 'freeze_epochs': 0.0},
    'augment': {'local_views': 2, 'local_size': 8},
}


def watch(folder, action='warn', **known):
  return Watch(folder, action, 128, 128, **({'start': HEALTHY} | known))


def test_a_watch_remembers(tmp_path, capsys):
  one = watch(tmp_path, start={})
  one.begin(HEALTHY)
  one.look(10, HEALTHY)
  one.look(20, DEAD)
  assert 'step 20: collapse: all images have the same features' in capsys.readouterr().err
  one.look(30, DEAD)
  assert capsys.readouterr().err == ''  # said once
  again = Watch(tmp_path, 'warn', 128, 128).load()
  assert (again.start, again.healthy, again.slowdown) == (HEALTHY, 10, 1.0)


def test_stop_and_rollback(tmp_path, capsys):
  with pytest.raises(UserError, match='step 20: collapse: .*learning_rate.*on_collapse=stop'):
    watch(tmp_path, 'stop').look(20, DEAD)
  one = watch(tmp_path, 'rollback', healthy=10)
  for n in range(3):
    with pytest.raises(RollBack):
      one.look(20, DEAD)
    assert one.slowdown == 0.5 ** (n + 1) == json.loads((tmp_path / 'health.json').read_text())['slowdown']
  with pytest.raises(UserError, match='3 rollbacks to smaller learning rates did not help'):
    one.look(20, DEAD)
  watch(tmp_path, 'stop').look(20, HEALTHY | {'rankme': 6.0})  # a soft sign only warns
  assert 'loss of dimensions' in capsys.readouterr().err


def collapsing(corpus, out, monkeypatch, capsys, **changes):
  """Trains until the sign is seen: the warnings, and the rows."""
  start(corpus, out, merge(DINO, changes))
  return capsys.readouterr().err, read_rows(out / 'metrics.jsonl')


def test_a_run_in_order_shows_no_sign(corpus, tmp_path, monkeypatch, capsys):
  said, rows = collapsing(corpus, tmp_path / 'run', monkeypatch, capsys)
  assert 'warning' not in said
  looks = [r for r in rows if 'rankme' in r]
  assert [r['step'] for r in looks] == [0, 20, 40, 60]
  for name in ('rankme', 'alpha_req', 'lidar', 'feature_std', 'gram_offdiagonal', 'token_cosine'):
    assert all(np.isfinite(r[name]) for r in looks), name
  assert json.loads((tmp_path / 'run' / 'health.json').read_text())['healthy'] == 60


@pytest.mark.parametrize('changes, sign', [
    # No centring and a sharp teacher: one prototype takes all.
    ({'objective': {'centre_momentum': 1.0, 'start_temperature': 0.005, 'teacher_temperature': 0.005},
      'learning_rate': 1e-2}, 'few prototypes'),
    # A teacher as flat as it goes: both agree on the uniform distribution.
    ({'objective': {'start_temperature': 50.0, 'teacher_temperature': 50.0, 'student_temperature': 1.0},
      'learning_rate': 1e-2}, 'uniform distribution'),
    # Learning rate times 1000.
    ({'learning_rate': 1.0}, 'collapse'),
], ids=['no centring', 'temperature', 'learning rate'])
def test_collapse_is_seen(changes, sign, corpus, tmp_path, monkeypatch, capsys):
  said, _ = collapsing(corpus, tmp_path / 'run', monkeypatch, capsys, **changes)
  assert sign in said and 'likely' in said


def test_rollback_goes_on_from_a_healthy_checkpoint_at_half_the_rate(corpus, tmp_path, monkeypatch):
  """The sign is put in at step 30 of the first pass; the second pass is left alone."""
  seen = []

  def diagnose(values, rows, width, start):
    seen.append(values['learning_rate'])
    return health.Collapse('all images have the same features', 'a test', True) if len(seen) == 3 else None

  monkeypatch.setattr('jaxmed.train.monitor.watch.diagnose', diagnose)
  user = merge(TINY, {'eval_every': 5, 'on_collapse': 'rollback'})
  summary = start(corpus, tmp_path / 'run', user)
  assert summary['steps'] == 20
  rows = read_rows(tmp_path / 'run' / 'metrics.jsonl')
  steps = [r['step'] for r in rows if 'loss' in r]
  assert steps == [*range(1, 11), *range(11, 21)]
  state = saved_state(tmp_path / 'run')
  assert float(state.rate) == 0.5 and int(state.step) == 20
  assert saved_steps(tmp_path / 'run')[-1] == 20
  rate = {r['step']: r['learning_rate'] for r in rows if 'loss' in r}
  config, spec = loop.rundir.load_config(tmp_path / 'run')
  full = loop.assemble.build(config, spec).optimizer.schedule
  assert rate[10] == pytest.approx(float(full(9)), rel=1e-5)
  assert rate[12] == pytest.approx(0.5 * float(full(11)), rel=1e-5)
