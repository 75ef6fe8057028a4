"""Which checkpoints stay, that they hold what the step held, and what becomes of damaged ones."""

import dataclasses
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed import load
from jaxmed.errors import UserError
from jaxmed.train import loop
from jaxmed.train.checkpoint import Checkpoints
from tests.common import abstract_state, host, same, saved_state, saved_steps, start
from tests.conftest import TINY


@pytest.fixture
def run(trained, tmp_path):
  return shutil.copytree(trained, tmp_path / 'run')


def test_the_latest_and_the_best_stay(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2)
  for step, loss in enumerate((5.0, 1.0, 3.0, 2.0, 4.0), 1):
    checkpoints.save(step, {'x': jnp.full(3, step)}, {'loss': loss})
  checkpoints.wait()
  assert checkpoints.steps() == [2, 4, 5]
  assert checkpoints.best_step() == 2
  abstract = {'x': jax.ShapeDtypeStruct((3,), jnp.int32)}
  assert checkpoints.restore(abstract)['x'].tolist() == [5, 5, 5]
  assert checkpoints.restore(abstract, 'best')['x'].tolist() == [2, 2, 2]
  assert checkpoints.restore(abstract, '4')['x'].tolist() == [4, 4, 4]
  with pytest.raises(UserError, match=r"no checkpoint '3'.*\[2, 4, 5\]"):
    checkpoints.restore(abstract, '3')
  checkpoints.close()


def test_the_best_by_a_metric_to_raise(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1, best='knn', best_mode='max')
  for step, values in enumerate(({'knn': 0.4}, {'knn': 0.9}, {}, {'loss': 0.0}), 1):
    checkpoints.save(step, {'x': jnp.zeros(1)}, values)
  checkpoints.wait()
  assert (checkpoints.steps(), checkpoints.best_step()) == ([2, 4], 2)
  checkpoints.close()


def test_saved_while_training_goes_on(corpus, tmp_path, monkeypatch):
  """The state is donated to the next step while it is written: the file must hold it as it was."""
  copies, save = {}, Checkpoints.save

  def recorded(self, step, state, metrics):
    copies[step] = host(state)
    save(self, step, state, metrics)

  monkeypatch.setattr(Checkpoints, 'save', recorded)
  start(corpus, tmp_path / 'run', TINY, checkpoint_every=2, checkpoint={'keep': 99})
  assert sorted(copies) == list(range(2, 21, 2))
  for step, copy in copies.items():
    assert int(copy.step) == step
    same(saved_state(tmp_path / 'run', step), copy)
  embed = [c.params['encoder']['channel_embed'] for c in copies.values()]
  assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(embed[1:]))


def test_the_last_step_is_saved_also_between_two_dates(corpus, tmp_path):
  start(corpus, tmp_path / 'run', TINY, checkpoint_every=7, checkpoint={'best': 'none'})
  assert saved_steps(tmp_path / 'run') == [14, 20]


def truncate(path, keep=0.5):
  data = path.read_bytes()
  path.write_bytes(data[: int(len(data) * keep)])


DAMAGES = {
    'array cut': lambda f: [truncate(p) for p in (f / 'state' / 'ocdbt.process_0' / 'd').iterdir()],
    'arrays lost': lambda f: shutil.rmtree(f / 'state' / 'ocdbt.process_0'),
    'data lost': lambda f: [shutil.rmtree(f / 'state' / 'd'), shutil.rmtree(f / 'state' / 'ocdbt.process_0' / 'd')],
    'manifest empty': lambda f: truncate(f / 'state' / 'manifest.ocdbt', 0),
    'metadata cut': lambda f: truncate(f / 'state' / '_METADATA'),
    'metadata lost': lambda f: (f / 'state' / '_METADATA').unlink(),
    'state lost': lambda f: shutil.rmtree(f / 'state'),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_one_is_passed_over(run, damage, capfd):
  good = saved_state(run, 15)
  DAMAGES[damage](run / 'checkpoints' / '20')
  same(saved_state(run), good)
  warning = capfd.readouterr().err
  assert warning.startswith(f'warning: checkpoint {run / "checkpoints" / "20"} is not readable')
  assert warning.count('\n') == 1


def test_no_readable_one(run):
  for step in (15, 20):
    DAMAGES['data lost'](run / 'checkpoints' / str(step))
  with pytest.raises(UserError, match=r'no checkpoint in .* is readable') as e:
    saved_state(run)
  assert '\n' not in str(e.value)


def test_going_on_after_damage_ends_as_before(run, trained, capfd):
  """The damaged last checkpoint is set aside, and the one that takes its place is whole."""
  DAMAGES['array cut'](run / 'checkpoints' / '20')
  loop.resume(run, quiet=True)
  assert 'trying the one before' in capfd.readouterr().err
  same(saved_state(run), saved_state(trained))
  assert capfd.readouterr().err == ''
  assert saved_steps(run) == [15, 20]


def test_half_written_folders_are_ignored(run, trained):
  shutil.copytree(run / 'checkpoints' / '20', run / 'checkpoints' / '25.orbax-checkpoint-tmp')
  (run / 'checkpoints' / '30.orbax-checkpoint-tmp').mkdir()
  assert saved_steps(run)[-1] == 20
  same(saved_state(run), saved_state(trained))


@pytest.mark.parametrize('change', ['width', 'depth', 'method'])
def test_another_models_checkpoint(run, change):
  state = saved_state(run)
  if change == 'method':
    state = dataclasses.replace(state, params={'encoder': state.params['encoder'], 'head': {'bias': np.zeros(2)}})
  else:
    cut = (lambda x: x[:1]) if change == 'depth' else lambda x: x[..., :8]
    state = dataclasses.replace(state, params=jax.tree.map(cut, state.params))
  shutil.rmtree(run / 'checkpoints')
  checkpoints = Checkpoints(run)
  for step in (1, 2):
    checkpoints.save(step, jax.tree.map(jnp.asarray, state), {})
  checkpoints.close()
  with pytest.raises(UserError, match='belongs to another model') as e:
    load(run)
  assert '\n' not in str(e.value)
  assert str(run / 'checkpoints' / '2') in str(e.value)


def test_a_run_without_checkpoints(run):
  shutil.rmtree(run / 'checkpoints')
  with pytest.raises(UserError, match='has no checkpoint yet'):
    load(run)
  (run / 'checkpoints').mkdir()
  with pytest.raises(UserError, match='has no checkpoint yet'):
    load(run)


def test_reading_changes_nothing(run):
  before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob('*'))
  load(run)
  assert sorted((p, p.stat().st_mtime_ns) for p in run.rglob('*')) == before


def test_restored_with_the_shapes_and_types_that_were_saved(trained):
  state, abstract = saved_state(trained), abstract_state(trained)
  jax.tree.map(lambda a, b: (np.testing.assert_equal(a.shape, b.shape), np.testing.assert_equal(a.dtype, b.dtype)),
               state, abstract)
  assert int(state.step) == 20
