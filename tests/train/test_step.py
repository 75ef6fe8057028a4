"""The one jitted step: accumulation, averages, updates that are left out, and what it does not depend on."""

import csv
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmed.config import merge
from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed.pipeline import train_batches
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.train.build import assemble, data_spec, resolve, rundir, towers
from jaxmed.train.checkpoint import Checkpoints
from jaxmed.train.logs import read_rows
from jaxmed.train.step import Trainer
from tests.common import host, same, saved_state, saved_steps, start
from tests.conftest import SUPERVISED, TINY

# Nothing random but the order of the data: then a batch may be cut into parts.
FIXED = {'encoder': {'drop_path': 0.0}, 'image_size': 24, 'augment': {'scale': (1.0, 1.0), 'flip': (0.0, 0.0)}}
PLAIN = merge(SUPERVISED, FIXED)
LEAN = merge(TINY, FIXED)


# Equal trainers share them.
STEP = jax.jit(Trainer.step, static_argnums=0)
GRADIENTS = jax.jit(Trainer._gradients, static_argnums=0)


class Bench:
  """A trainer with its state and batches, outside of the loop."""

  def __init__(self, corpus, user):
    user = merge(user, {'data': str(corpus)})
    self.source = open_source(corpus).select(split='train')
    self.spec = data_spec.describe(self.source, user['loader'].get('label', ''))
    self.config = resolve.resolve(user, self.spec)
    towers.opened(self.config, rundir.load)
    self.trainer = assemble.build(self.config, self.spec)
    self.mesh = mesh_lib.make_mesh(self.config.mesh)
    self.shapes = assemble.batch_shapes(self.config, self.spec, self.mesh)

  def state(self):
    return self.trainer.initialize(self.trainer.abstract(self.shapes, self.mesh), self.shapes)

  def batches(self, count):
    it = train_batches(self.source, batch_size=self.config.batch_size, seed=0, threads=1,
                       **assemble.reading(self.config, self.spec))
    return [mesh_lib.put_batch(next(it), self.mesh) for _ in range(count)]

  def step(self):
    return functools.partial(STEP, self.trainer)


def close(a, b, tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), host(a), host(b))


def test_accumulation_equals_one_batch(corpus):
  one, four = (Bench(corpus, merge(PLAIN, {'optimizer': {'accumulate': n}})) for n in (1, 4))
  state = one.state()
  same(state, four.state())
  key = jax.random.key(0)
  for batch in one.batches(2):
    (loss, (metrics, _)), grads = GRADIENTS(one.trainer, state, batch, key)
    (loss4, (metrics4, _)), grads4 = GRADIENTS(four.trainer, state, batch, key)
    assert float(loss) == pytest.approx(float(loss4), rel=1e-5)
    close(grads, grads4, 1e-5)
    close(metrics, metrics4, 1e-5)
  a, _ = one.step()(state, batch)
  b, _ = four.step()(state, batch)
  close(a.moments, b.moments, 1e-5)


def test_supervised_gradient_equals_finite_differences(corpus):
  """The step's gradient along its own direction against the loss itself."""
  bench = Bench(corpus, PLAIN)
  state, batch, key = bench.state(), bench.batches(1)[0], jax.random.key(0)
  gradients = functools.partial(GRADIENTS, bench.trainer)
  grads = gradients(state, batch, key)[1]
  size = np.sqrt(sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(grads)))
  loss = lambda h: float(gradients(dataclasses.replace(
      state, params=jax.tree.map(lambda p, g: p + h / size * g, state.params, grads)), batch, key)[0][0])
  assert (loss(1e-2) - loss(-1e-2)) / 2e-2 == pytest.approx(size, rel=0.01)


def test_average_follows_the_weights(corpus):
  bench = Bench(corpus, merge(LEAN, {'optimizer': {'ema': 0.7}}))
  state, step = bench.state(), bench.step()
  same(state.average, state.params)
  want = host(state.params)
  for batch in bench.batches(3):
    state, _ = step(state, batch)
    want = jax.tree.map(lambda a, p: np.float32(0.7) * a + np.float32(0.3) * np.asarray(p), want, state.params)
  close(state.average, want, 1e-6)
  assert not np.allclose(jax.tree.leaves(want['encoder']['patch_embed'])[-1],
                         jax.tree.leaves(state.params['encoder']['patch_embed'])[-1])


def test_the_target_follows_the_weights_of_its_names():
  """By the method's share of the old one at that step; what is no part of the target is left out."""
  trainer = Trainer(types.SimpleNamespace(momentum=lambda step: 0.9 + 0.01 * step), None, None)
  params = {'encoder': {'a': 1.0, 'b': -2.0}, 'head': {'a': 7.0}}
  found = trainer._follow({'encoder': {'a': 2.0, 'b': 4.0}}, params, 5)
  assert found == {'encoder': {'a': pytest.approx(0.95 * 2 + 0.05), 'b': pytest.approx(0.95 * 4 - 0.05 * 2)}}
  assert trainer._follow({}, params, 5) == {}


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_batch_that_is_not_finite_changes_nothing(corpus, accumulate):
  bench = Bench(corpus, merge(LEAN, {'optimizer': {'ema': 0.9, 'accumulate': accumulate}}))
  bench.spec = dataclasses.replace(bench.spec, dtype='float32')
  step, state = bench.step(), bench.state()
  good, bad = bench.batches(2)
  bad = dict(bad, image=bad['image'].at[3].set(jnp.nan))
  state, _ = step(state, good)
  before = host(state)
  for row in (1, 2):
    state, metrics = step(state, bad)
    for name in ('params', 'moments', 'average', 'target', 'extra', 'rng'):
      same(getattr(state, name), getattr(before, name))
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (1 + row, row, row)
    assert not np.isfinite(float(metrics['loss']))
  state, metrics = step(state, good)
  assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (4, 2, 0)
  assert int(metrics['skipped']) == 2
  assert np.isfinite(float(metrics['loss']))
  assert not np.array_equal(host(state.params)['encoder']['channel_embed'], before.params['encoder']['channel_embed'])


def test_a_gradient_that_is_not_finite_changes_nothing(corpus):
  """A finite loss with an infinite gradient: sqrt at zero."""
  bench = Bench(corpus, LEAN)

  class Bad(type(bench.trainer.objective)):
    def loss(self, variables, *args, **kwargs):
      loss, rest = super().loss(variables, *args, **kwargs)
      return loss + jnp.sqrt((variables['params']['encoder']['channel_embed'] * 0.0).sum()), rest

  fields = {f.name: getattr(bench.trainer.objective, f.name) for f in dataclasses.fields(bench.trainer.objective)}
  bench.trainer = dataclasses.replace(bench.trainer, objective=Bad(**fields))
  state = bench.state()
  after, metrics = bench.step()(state, bench.batches(1)[0])
  assert np.isfinite(float(metrics['loss']))
  assert int(after.skipped) == 1
  same(after.params, state.params)


def test_the_state_starts_the_same_from_a_seed_alone(corpus):
  a, b, c = (Bench(corpus, merge(LEAN, {'seed': s})).state() for s in (0, 0, 1))
  same(a, b)
  assert not np.array_equal(host(a.params)['encoder']['channel_embed'], host(c.params)['encoder']['channel_embed'])


def test_metrics_say_what_was_done(corpus):
  bench = Bench(corpus, merge(LEAN, {'optimizer': {'warmup_steps': 4}}))
  state, step = bench.state(), bench.step()
  rates = []
  for batch in bench.batches(3):
    grads = GRADIENTS(bench.trainer, state, batch, jax.random.fold_in(
        jax.random.wrap_key_data(state.rng), state.step))[1]
    state, metrics = step(state, batch)
    rates.append(float(metrics['learning_rate']))
    want = np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(grads)))
    assert float(metrics['grad_norm']) == pytest.approx(want, rel=1e-5)
    parts = sum(float(v) ** 2 for k, v in metrics.items() if k.startswith('grad_norm/'))
    assert parts == pytest.approx(want**2, rel=1e-4)
  np.testing.assert_allclose(rates, [0, 2.5e-4, 5e-4], rtol=1e-5)


def test_ten_in_a_row_end_the_run(corpus, tmp_path, monkeypatch):
  """The loss is NaN from step 8 on: the run ends at 17, and its last checkpoint holds the weights of step 7."""
  monkeypatch.setattr(assemble, 'build', _poisoned(assemble.build))
  run = tmp_path / 'run'
  with pytest.raises(UserError) as e:
    start(corpus, run, LEAN, eval_every=100, checkpoint_every=1, checkpoint={'keep': 99})
  assert '10 steps in a row' in str(e.value)
  assert '\n' not in str(e.value)
  rows = [r for r in read_rows(run / 'metrics.jsonl') if 'skipped' in r]
  assert [r['skipped'] for r in rows] == [0] * 7 + list(range(1, 11))
  last = saved_steps(run)[-1]
  assert last in (16, 17)
  assert str(run / 'checkpoints' / str(last)) in str(e.value)
  kept, good = saved_state(run), saved_state(run, 7)
  assert int(kept.skipped_in_row) == last - 7
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept))
  same((kept.params, kept.moments), (good.params, good.moments))
  with pytest.raises(AssertionError):
    same(good.params, saved_state(run, 6).params)


def _poisoned(build):
  def poisoned(config, spec):
    trainer = build(config, spec)

    class Bad(type(trainer.objective)):
      def loss(self, variables, batch, rng, step, train=True):
        loss, rest = super().loss(variables, batch, rng, step, train)
        return jnp.where(step >= 7, jnp.nan, loss), rest

    fields = {f.name: getattr(trainer.objective, f.name) for f in dataclasses.fields(trainer.objective)}
    return dataclasses.replace(trainer, objective=Bad(**fields))
  return poisoned


def test_moments_in_the_hosts_memory(corpus, trained, tmp_path):
  """They lie there between steps and after a restart, and nothing else changes."""
  user = merge(TINY, {'optimizer': {'offload': True}})
  b = Bench(corpus, user)
  state = b.state()
  step = b.trainer.compile(b.trainer.abstract(b.shapes, b.mesh), b.shapes, b.mesh)
  state, _ = step(state, b.batches(1)[0])
  kinds = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}
  assert kinds(state.moments) == {'pinned_host'} and kinds(state.params) == {'device'}
  start(corpus, tmp_path / 'run', user)
  same(saved_state(trained), saved_state(tmp_path / 'run'))
  checkpoints = Checkpoints(tmp_path / 'run', read_only=True)
  assert kinds(checkpoints.restore(b.trainer.abstract(b.shapes, b.mesh)).moments) == {'pinned_host'}
  checkpoints.close()


def test_records_of_some_sources_alone(tiles, tmp_path):
  """A run on the grey half knows no colours, and neither do its probes, though the corpus has them."""
  with open(tiles / 'table.csv', newline='', encoding='utf-8') as f:
    rows = list(csv.DictReader(f))[::4]
  for i, row in enumerate(rows):
    with Image.open(tiles / row['path']) as image:
      (image.convert('L') if i % 2 else image).save(tmp_path / row['path'])
    row |= {'source': 'grey' if i % 2 else 'colour', 'split': 'val' if i % 6 == 0 else 'train'}  # none of grey in val
  with open(tmp_path / 'table.csv', 'w', newline='', encoding='utf-8') as f:
    table = csv.DictWriter(f, rows[0])
    table.writeheader()
    table.writerows(rows)
  prepare([tmp_path], tmp_path / 'corpus', table=tmp_path / 'table.csv', progress=False)
  user = merge(TINY, {'steps': 2, 'batch_size': 4, 'loader': {'sources': 'grey', 'label': 'tissue'}})
  start(tmp_path / 'corpus', tmp_path / 'run', user)
  _, spec = rundir.load_config(tmp_path / 'run')
  assert (spec.rows, len(spec.vocabulary), spec.masked) == (12, 1, False)
  assert any('rankme' in r for r in read_rows(tmp_path / 'run' / 'metrics.jsonl'))
  with pytest.raises(UserError, match="'gray': did you mean 'grey'"):
    start(tmp_path / 'corpus', tmp_path / 'other', merge(user, {'loader': {'sources': 'gray'}}))
