"""A mixture of sizes: each step equals that of a run with its size alone, and the draw is a function of seed and step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.config import merge
from jaxmed.errors import UserError
from jaxmed.train import utilization
from jaxmed.train.build import resolve
from jaxmed.train.build.view_sizes import LISTS
from jaxmed.train.step import drawn
from tests.common import host
from tests.conftest import TINY
from tests.train.test_step import Bench

MIXED = merge(TINY, {
    'method': 'dinov3', 'steps': 12, 'batch_size': 4, 'eval_every': 12, 'checkpoint_every': 12, 'image_size': 24,
    'encoder': {'depth': 1},
    'augment': {'local_views': 2, 'local_size': 8, 'gram_size': 24, 'sizes': (16, 24), 'local_sizes': (8, 16),
                'gram_sizes': (24, 32), 'size_shares': (1, 3)}})
# Without KoLeo, whose logarithm of small distances magnifies rounding, otherwise on each processor.
MIXED['objective'] = {'out_dim': 16, 'hidden_dim': 16, 'bottleneck_dim': 8, 'koleo_weight': 0.0, 'gram_weight': 1.0,
                      'gram_every': 0}


def test_each_branch_is_a_run_with_that_size_alone(corpus):
  """Loss, metrics, new extra state and gradients, by one compiled program for both sizes."""
  bench = Bench(corpus, MIXED)
  state, batch = bench.state(), bench.batches(1)[0]
  state = dataclasses.replace(state, params=jax.tree.map(  # a student other than its teacher
      lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), state.params))
  both, losses = jax.jit(bench.trainer._gradients), []
  for i, sizes in enumerate(({'image_size': 16, 'augment': {'local_size': 8, 'gram_size': 24}},
                             {'image_size': 24, 'augment': {'local_size': 16, 'gram_size': 32}})):
    one = Bench(corpus, merge(MIXED, {'augment': dict.fromkeys(LISTS, ())},
                              sizes)).trainer
    assert one.view == bench.trainer.sizes[i] and not one.sizes
    key = next(k for k in map(jax.random.key, range(99)) if int(drawn(k, bench.trainer.shares)) == i)
    (loss, (metrics, extra)), grads = both(state, batch, key)
    (want, (alone, wanted)), wanted_grads = jax.jit(one._gradients)(state, batch, key)
    assert int(metrics.pop('view_size')) == (16, 24)[i]
    for a, b in ((loss, want), (metrics, alone), (extra, wanted), (grads, wanted_grads)):
      jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), host(a), host(b))
    assert float(metrics['gram_loss']) > 1e-4
    losses.append(float(loss))
  assert abs(losses[0] - losses[1]) > 1e-3


def test_sizes_are_drawn_by_seed_and_step_with_their_shares():
  shares = (0.3, 0.3, 0.3, 0.05, 0.05)  # the published ones
  keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(5), n))(jnp.arange(20_000))
  index = np.asarray(jax.vmap(lambda k: drawn(k, shares))(keys))
  found = np.bincount(index, minlength=5) / len(index)
  np.testing.assert_allclose(found, shares, atol=4 * np.sqrt(0.3 * 0.7 / 20_000))
  assert int(drawn(jax.random.fold_in(jax.random.key(5), 17), shares)) == index[17]


def test_a_curriculum_goes_by_the_step(corpus):
  """The same program as a mixture's, which takes the size that has begun."""
  bench = Bench(corpus, merge(MIXED, {'augment': {'size_shares': (), 'size_starts': (0, 0.7)}}))
  assert bench.trainer.firsts == (0, 8)  # of 12 steps
  assert bench.trainer.shares == pytest.approx((8 / 12, 4 / 12))
  state, batch = bench.state(), bench.batches(1)[0]
  gradients = jax.jit(bench.trainer._gradients)
  for step, size in ((0, 16), (7, 16), (8, 24), (11, 24), (12, 24)):
    (_, (metrics, _)), _ = gradients(dataclasses.replace(state, step=jnp.int32(step)), batch, jax.random.key(step))
    assert int(metrics['view_size']) == size


def test_flops_are_those_of_the_mean_step(corpus):
  spec = Bench(corpus, MIXED).spec
  count = lambda **augment: utilization.model_flops(
      resolve.resolve(merge(MIXED, {'data': str(corpus), 'augment': augment}), spec), spec)
  small, large, mean = (count(size_shares=shares) for shares in ((1, 1e-12), (1e-12, 1), (1, 3)))
  assert mean == pytest.approx(0.25 * small + 0.75 * large, rel=1e-6) and large > 1.2 * small


@pytest.mark.parametrize('changes, words', [
    ({'augment': {'local_sizes': (8,)}}, r'augment.local_sizes has 1 numbers, not 2'),
    ({'augment': {'gram_sizes': ()}}, r'augment.gram_sizes has 0 numbers, not 2'),
    ({'augment': {'local_views': 0}}, r'augment.local_sizes has 2 numbers, not 0'),
    ({'augment': {'sizes': (16, 20)}}, r'augment.sizes: 20 is no multiple of the patch \(8, 8\); nearest is 16'),
    ({'augment': {'size_shares': (1, 0)}}, r'size_shares \(1, 0\) must be positive'),
    ({'augment': {'size_starts': (0, 0.5)}}, 'go without size_shares'),
    ({'augment': {'size_shares': (), 'size_starts': (0.1, 0.5)}}, 'must rise from 0'),
    ({'augment': {'size_shares': (), 'size_starts': (0, 1)}}, 'stay below 1'),
    ({'augment': {'size_shares': (), 'size_starts': (0,)}}, 'size_starts has 1 numbers, not 2'),
])
def test_lists_that_do_not_fit_are_told(corpus, changes, words):
  with pytest.raises(UserError, match=words):
    Bench(corpus, merge(MIXED, changes))


@pytest.mark.parametrize('changes, words', [
    ({'augment': {'sample_sizes': (8, 12)}}, r'sample_sizes: 12 is no multiple of the patch \(8, 8\); nearest is 16'),
    ({'augment': {'sample_sizes': (8, 24)}}, r'sample_sizes: 24 is more than image_size \(16, 16\)'),
    ({'model': 'convnextv2_micro', 'augment': {'sample_sizes': (8,)}},
     'sample_sizes need a vit or channel_vit, not model=convnextv2_micro'),
    ({'model': 'bag_micro/8', 'augment': {'sample_sizes': (8,)}}, 'need a vit or channel_vit, not model=bag'),
])
def test_sizes_of_samples_that_do_not_fit_are_told(corpus, changes, words):
  with pytest.raises(UserError, match=words):
    Bench(corpus, merge({k: v for k, v in TINY.items() if k != 'encoder'}, changes))


def test_sizes_of_a_batch_and_of_its_samples_exclude_each_other(corpus):
  with pytest.raises(UserError, match='sample_sizes go without augment.sizes and gram_size'):
    Bench(corpus, merge(MIXED, {'augment': {'sample_sizes': (8,)}}))


def test_one_view_has_no_sizes(corpus):
  with pytest.raises(UserError, match='augment.sizes are for methods that compare views, not for mae'):
    Bench(corpus, merge(TINY, {'augment': {'sizes': (16, 24)}}))
