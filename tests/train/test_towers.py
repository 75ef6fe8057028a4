"""Towers beside the encoder, weights that are only read, losses by group, and what begins where."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmed
from jaxmed import config as config_lib
from jaxmed.config import merge
from jaxmed.errors import UserError
from jaxmed.train import loop
from jaxmed.train.build import rundir, towers
from jaxmed.train.build.rundir import load_config, load_state
from tests.common import host, same
from tests.conftest import TINY
from tests.train.test_step import LEAN, Bench
from tests.train.toys import register

MICRO = 'channel_vit_micro/8'
SMALL = {'embed_dim': 32, 'depth': 2, 'num_heads': 2}
BASE = {k: v for k, v in TINY.items() if k != 'objective'} | {'steps': 6, 'checkpoint_every': 3, 'eval_every': 6}
TWO = BASE | {'method': 'toy_two_towers', 'towers': {'second': {'model': 'vit_micro/4', 'options': SMALL | {'depth': 3}}}}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
  register(monkeypatch)


def bench(corpus, **values):
  return Bench(corpus, merge({k: v for k, v in LEAN.items() if k != 'objective'} | {'image_size': 16}, values))


def leaves(tree):
  return {jax.tree_util.keystr(p, simple=True, separator='/'): np.asarray(x)
          for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def moved(before, after):
  before, after = leaves(before), leaves(after)
  return {name for name in before if not np.array_equal(before[name], after[name])}


def test_two_towers_are_trained_saved_and_loaded_by_name(corpus, tmp_path):
  out = tmp_path / 'run'
  summary = loop.train(TWO | {'data': str(corpus)}, out, quiet=True)
  trainer, config, _, state = load_state(out)
  assert set(state.params) == {'encoder', 'second'} and trainer.objective.towers['second'].depth == 3
  assert config.towers.second.model == 'vit_micro/4' and summary['steps'] == 6
  second, encoder = jaxmed.load(out, tower='second'), jaxmed.load(out)
  images = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3)).astype('uint8')
  assert second.embed(images)['patches'].shape == (2, 4, 4, 32) and second.model.embed_dim == 32
  assert encoder.embed(images)['patches'].shape == (2, 3, 2, 2, 32)
  same(second.params, state.params['second'])
  with pytest.raises(UserError, match="unknown tower 'secnd': did you mean 'second'"):
    jaxmed.load(out, tower='secnd')


def test_rates_by_depth_go_to_each_tower_by_its_own(corpus):
  values = {k: TWO[k] for k in ('method', 'towers')}
  plain, scaled = (bench(corpus, **values, optimizer={'layer_decay': d, 'weight_decay': 0.0, 'warmup_steps': 1})
                   for d in (1.0, 0.5))
  state, batch = plain.state(), plain.batches(1)[0]
  state = dataclasses.replace(state, step=jnp.int32(2))
  one, half = (b.step()(state, batch)[0].params for b in (plain, scaled))
  step = lambda after, tower, *path: np.asarray(_at(after[tower], path) - _at(state.params[tower], path))
  for tower, depth in (('encoder', 2), ('second', 3)):
    ratio = step(half, tower, 'patch_embed', 'kernel') / step(one, tower, 'patch_embed', 'kernel')
    np.testing.assert_allclose(np.median(ratio), 0.5 ** (depth + 1), rtol=2e-2)


def _at(tree, path):
  for key in path:
    tree = tree[key]
  return tree


def test_image_tower_is_the_short_form():
  assert towers.short({'towers': {'image': {'model': MICRO, 'options': {'depth': 2}}}, 'seed': 1}) == {
      'model': MICRO, 'encoder': {'depth': 2}, 'seed': 1}
  for values, words in (({'towers': {'image': {'model': MICRO}}, 'model': MICRO}, 'say the same'),
                        ({'towers': {'image': {'modle': MICRO}}}, "did you mean 'model'"),
                        ({'towers': {'image': {'fixed': True}}}, 'freeze=encoder')):
    with pytest.raises(UserError, match=words):
      towers.short(values)


@pytest.mark.parametrize('values, words', [
    ({'towers': {'text': {'model': MICRO}}}, "unknown tower of the method 'text': "),
    ({'towers': {'second': {}}}, 'towers.second needs a model'),
    ({'towers': {'second': {'modell': MICRO}}}, "did you mean 'model'"),
    ({'towers': {'second': {'model': MICRO, 'fixed': True}}}, 'needs the weights to read'),
    ({'towers': {'second': {'model': 3}}}, 'towers.second.model takes text, not 3'),
    ({'method': 'mae', 'towers': {'second': {'model': MICRO}}}, 'the method has one tower, image'),
])
def test_wrong_towers_are_told(corpus, tmp_path, values, words):
  with pytest.raises(UserError, match=words):
    loop.train({'method': 'toy_two_towers', 'data': str(corpus)} | values, tmp_path / 'run', quiet=True)
  assert not (tmp_path / 'run').exists()


def test_teacher_is_read_and_neither_trained_nor_saved(corpus, trained, tmp_path):
  """The student comes near the teacher; the run holds its digest, no weight of it, and goes on with the same alone."""
  teacher, out = tmp_path / 'teacher', tmp_path / 'run'
  teacher.symlink_to(trained)
  user = merge(BASE, {'method': 'toy_distilled', 'data': str(corpus), 'learning_rate': 3e-3, 'steps': 12,
                      'towers': {'teacher': {'init': str(teacher), 'fixed': True}}})
  loop.train(user, out, quiet=True)
  rows = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
  losses = [row['loss'] for row in rows if 'loss' in row]
  assert losses[-1] < 0.5 * losses[0]
  config, _ = load_config(out)
  weights = jaxmed.load(trained).params
  assert config.towers.teacher.sha256 == towers.digest_of(weights)
  assert config.towers.teacher.description.family == 'channel_vit'
  trainer, _, _, state = load_state(out)  # builds the teacher's model without its weights
  assert set(state.params) == {'encoder'} and trainer.objective.towers['teacher'].depth == 2
  size = sum(x.nbytes for x in jax.tree.leaves(weights))
  told = json.loads((out / 'checkpoints' / '12' / 'state' / '_METADATA').read_text())['tree_metadata']
  saved = 4 * sum(math.prod(entry['value_metadata'].get('write_shape') or ()) for entry in told.values())
  alone = 3 * sum(x.nbytes for x in jax.tree.leaves(state.params))
  assert alone <= saved < alone + size / 2  # weights and two moments, and nothing of the teacher
  assert not any('teacher' in key for key in told)
  other = tmp_path / 'other'
  loop.train(TINY | {'data': str(corpus), 'steps': 1, 'seed': 5}, other, quiet=True)
  teacher.unlink()
  teacher.symlink_to(other)
  with pytest.raises(UserError, match='has other weights than those that the run began with'):
    loop.resume(out, quiet=True)


def test_a_trained_tower_needs_its_first_weights_once(trained, tmp_path):
  """A run that goes on has weights of its own: the file that they began from may be gone."""
  config = config_lib.base()
  config.towers = {'second': towers.KEYS | {'init': str(trained)}}
  towers.opened(config, rundir.load)
  assert config.towers.second.description.family == 'channel_vit' and config.towers.second.sha256
  config.towers.second.init = str(tmp_path / 'gone')
  towers.opened(config, rundir.load)
  config.towers.second.fixed = True
  with pytest.raises(UserError, match='gone does not exist'):
    towers.opened(config, rundir.load)


def test_what_is_only_read_is_not_donated(corpus, trained):
  b = bench(corpus, method='toy_distilled', towers={'teacher': {'init': str(trained), 'fixed': True}})
  fixed = towers.fixed(b.config, towers.fixed_shapes(b.config, b.trainer.objective, b.mesh), rundir.load)
  step = b.trainer.compile(b.trainer.abstract(b.shapes, b.mesh), b.shapes, b.mesh, fixed)
  state, batch = b.state(), b.batches(1)[0]
  before = host(fixed)
  after, _ = step(state, batch, fixed)
  assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
  assert not any(x.is_deleted() for x in jax.tree.leaves(fixed))
  same(before, fixed)
  assert set(after.params) == {'encoder'}


def test_each_group_follows_its_own_loss(corpus):
  b = bench(corpus, method='toy_players')
  state, batch = b.state(), b.batches(1)[0]
  key = jax.random.key(3)
  (loss, (metrics, _)), grads = jax.jit(b.trainer._gradients)(state, batch, key)
  view_key, loss_key = jax.random.split(key)
  views = b.trainer.view(view_key, batch)

  def alone(params, group):
    return b.trainer.objective.loss(state.variables() | {'params': params}, views, loss_key, 0)[0][group]

  for group, part in (('rest', 'encoder'), ('critic', 'critic')):
    wanted = jax.jit(jax.grad(alone), static_argnums=1)(state.params, group)[part]
    for name, value in leaves(wanted).items():
      np.testing.assert_allclose(leaves(grads[part])[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert any(np.abs(x).max() > 1e-6 for x in leaves(wanted).values())
  assert float(loss) == pytest.approx(float(metrics['loss/rest'] + metrics['loss/critic']), rel=1e-6)


def test_groups_have_rules_rates_and_periods(corpus):
  b = bench(corpus, method='toy_players', optimizer={
      'weight_decay': 0.0, 'warmup_steps': 1,
      'groups': {'critic': {'name': 'sgd', 'rate': 0.5, 'every': 2}}})
  state, step = b.state(), b.step()
  assert set(state.moments) == {'critic', 'rest'} and set(state.moments['rest']) == {'count', 'mu', 'nu'}
  changes = []
  for batch in b.batches(4):
    fresh, _ = step(state, batch)
    changes.append(moved(state.params['critic'], fresh.params['critic']))
    if int(state.step) % 2:
      same(state.moments['critic'], fresh.moments['critic'])
    assert int(state.step) == 0 or moved(state.params['encoder'], fresh.params['encoder'])
    last, state = state, fresh
  assert changes == [set(), set(), {'kernel'}, set()]  # the first rate is 0
  grads = jax.jit(b.trainer._gradients)(last, batch, jax.random.fold_in(jax.random.wrap_key_data(last.rng), 3))[1]
  assert jax.tree.structure(grads) == jax.tree.structure(last.params)


@pytest.mark.parametrize('values, words', [
    ({'optimizer': {'groups': {'head': {'paths': 'hed'}}}}, 'unknown optimizer.groups.head.paths'),
    ({'optimizer': {'groups': {'head': {'rate': 1.0}}}}, 'optimizer.groups.head needs paths'),
    ({'optimizer': {'groups': {'head': {'paths': 'decoder', 'evry': 2}}}}, "did you mean 'every'"),
    ({'optimizer': {'groups': {'head': {'paths': 'decoder', 'name': 'linon'}}}}, "did you mean 'lion'"),
    ({'optimizer': {'name': 'muonn'}}, "did you mean 'muon'"),
    ({'optimizer': {'name': 'lion', 'options': {'b3': 1}}}, 'unknown option of optimizer.name=lion'),
    ({'optimizer': {'name': 'schedule_free_adamw', 'ema': 0.9}}, 'both average the weights'),
    ({'freeze': 'encoder/blocks/1..2'}, 'encoder has blocks 0..1'),
    ({'freeze': 'encodr'}, "did you mean 'encoder'"),
    ({'init_map': 'encoder->encoder'}, 'give it with init=RUN'),
])
def test_wrong_optimizers_are_told(corpus, tmp_path, values, words):
  with pytest.raises(UserError, match=words):
    loop.train(merge(TINY, {'data': str(corpus), 'steps': 1}, values), tmp_path / 'run', quiet=True)


@pytest.mark.parametrize('freeze', ['encoder/patch_embed', 'encoder'])
def test_frozen_parameters_stay_to_the_bit(corpus, freeze):
  rests = lambda name: name.startswith(freeze)
  b = bench(corpus, method='mae', objective=TINY['objective'], freeze=freeze, optimizer={'warmup_steps': 1})
  state, step = b.state(), b.step()
  first = state
  for batch in b.batches(2):
    state, _ = step(state, batch)
  changed = moved(first.params, state.params)
  assert changed and not any(map(rests, changed))
  assert {name for name in leaves(first.params) if not rests(name)} - changed <= {'decoder/mask_token', 'mask_token'}
  assert not any(map(rests, moved(first.moments['mu'], state.moments['mu'])))


def test_frozen_blocks_stay_and_the_others_go_on(corpus):
  b = bench(corpus, method='mae', objective=TINY['objective'], freeze='encoder/blocks/0', optimizer={'warmup_steps': 1})
  state, step = b.state(), b.step()
  first = state
  for batch in b.batches(2):
    state, _ = step(state, batch)
  before, after = (leaves(s.params['encoder']['transformer']) for s in (first, state))
  kernels = [name for name in before if name.endswith('kernel')]
  assert kernels
  for name in kernels:
    np.testing.assert_array_equal(before[name][0], after[name][0])
    assert not np.array_equal(before[name][1], after[name][1])


def test_parts_of_a_run_go_where_the_map_says(corpus, trained, tmp_path):
  out = tmp_path / 'run'
  user = TINY | {'data': str(corpus), 'steps': 1, 'seed': 9, 'init': str(trained), 'learning_rate': 1e-12,
                 'optimizer': {'weight_decay': 0.0}}
  loop.train(user | {'init_map': 'towers.image->encoder, decoder->none'}, out, quiet=True)
  old, new = load_state(trained)[3].params, load_state(out)[3].params
  close = lambda a, b: all(np.allclose(x, y, atol=1e-6) for x, y in zip(leaves(a).values(), leaves(b).values(), strict=True))
  assert close(old['encoder'], new['encoder'])
  assert not close(old['decoder'], new['decoder'])
  for text, words in (('encodr->encoder', 'unknown part of'), ('encoder->head', 'unknown part of the run'),
                      ('encoder', 'is no pair')):
    with pytest.raises(UserError, match=words):
      loop.train(user | {'init_map': text}, tmp_path / 'wrong', quiet=True)
