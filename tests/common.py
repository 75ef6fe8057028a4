"""What tests of runs need: words for the command, states as NumPy, records of what a run saw."""

import os
import signal

import jax
import numpy as np

from jaxmed.config import merge
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.train import loop
from jaxmed.train.build import assemble, rundir
from jaxmed.train.checkpoint import Checkpoints


def words(values, prefix=''):
  """A nested config as the words of the command."""
  out = []
  for key, value in values.items():
    out += words(value, f'{prefix}{key}.') if isinstance(value, dict) else [f'{prefix}{key}={value}']
  return out


def host(tree):
  """Copies to NumPy."""
  return jax.tree.map(lambda x: np.array(x), tree)


def same(a, b):
  """Equal bit for bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, host(a), host(b))


def abstract_state(run):
  """Shapes of the state of a run."""
  config, spec = rundir.load_config(run)
  return assemble.build(config, spec).abstract(assemble.batch_shapes(config, spec), mesh_lib.make_mesh({'data': 0}))


def saved_state(run, which='latest'):
  """The state in a checkpoint of a run."""
  checkpoints = Checkpoints(run, read_only=True)
  state = checkpoints.restore(abstract_state(run), which)
  checkpoints.close()
  return host(state)


def saved_steps(run):
  """The checkpoints of a run."""
  checkpoints = Checkpoints(run, read_only=True)
  steps = checkpoints.steps()
  checkpoints.close()
  return steps


def record_indices(monkeypatch, stop_at=0, number=signal.SIGTERM):
  """Lists the records of every batch that a run takes; sends this process a signal with batch `stop_at`."""
  seen, batches = {}, loop._batches

  def recorded(run, first):
    for n, batch in enumerate(batches(run, first), first + 1):
      seen[n] = batch['index'].tolist()
      if n == stop_at:
        os.kill(os.getpid(), number)
      yield batch

  monkeypatch.setattr(loop, '_batches', recorded)
  return seen


def start(corpus, out, user, **changes):
  """Trains in this process."""
  return loop.train(merge(user, changes, {'data': str(corpus)}), out, quiet=True)
