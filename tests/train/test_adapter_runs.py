"""Runs with adapters: what is frozen stays to the bit, stopped runs go on, products are plain where they can be."""

import shutil

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmed
from jaxmed.cli import main
from jaxmed.config import merge
from jaxmed.errors import UserError
from jaxmed.interop.safetensors_io import read_tensors
from jaxmed.models import registry
from jaxmed.models.layers.adapters import Adapter, is_adapter
from jaxmed.parallel import sharding_table
from jaxmed.train import loop
from jaxmed.train.build import adapting, resolve, rundir, towers, weights
from jaxmed.train.optimizer import HELD, Group, Optimizer
from jaxmed.train.step import gradients
from tests.common import same, saved_state, start
from tests.conftest import SUPERVISED, TINY
from tests.models.common import build
from tests.train.test_step import Bench

LORA = {'adapter': {'name': 'lora', 'rank': 2}, 'encoder': {'pos': 'sincos'}, 'optimizer': {'ema': 0.5, 'warmup_steps': 1}, 'steps': 4,
        'checkpoint_every': 2, 'evaluators': 'loss', 'learning_rate': 1e-2}


def flat(tree):
  return {k: np.asarray(v) for k, v in flax.traverse_util.flatten_dict(tree, sep='/').items()}


def frozen(tree):
  return {k: v for k, v in flat(tree).items() if not is_adapter(tuple(k.split('/'))) and k not in adapting.TRAINING_ONLY}


@pytest.fixture(scope='module')
def lora(corpus, trained, tmp_path_factory):
  out = tmp_path_factory.mktemp('lora') / 'run'
  start(corpus, out, SUPERVISED, **LORA, init=str(trained))
  return out


def test_what_is_frozen_stays_to_the_bit(lora, trained):
  old, state = jaxmed.load(trained), saved_state(lora)
  assert towers.digest_of(frozen(old.params)) == towers.digest_of(frozen(state.params['encoder']))
  assert towers.digest_of(frozen(old.params)) == towers.digest_of(frozen(state.average['encoder']))
  added = {k: v for k, v in flat(state.params['encoder']).items() if k not in flat(old.params)}
  assert len(added) == 4 and all(k.startswith('transformer/blocks/attn/adapter_') for k in added)
  assert all(np.abs(v).max() > 0 for v in added.values())
  held = {k for k in flat(state.moments['mu']) if not is_adapter(tuple(k.split('/')))}
  assert held == {'head/kernel', 'head/bias'}


def test_a_product_is_a_plain_network_with_the_features(lora, corpus, trained):
  plain, (trainer, config, _, state) = jaxmed.load(lora), rundir.load_state(lora)
  assert plain.model == trainer.objective.encoder.clone(adapter=None)
  image = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3)).astype(np.uint8)
  whole = plain.__class__(trainer.objective.encoder, state.average['encoder'], plain.channels, plain.normalize)
  np.testing.assert_allclose(plain.embed(image)['cls'], whole.embed(image)['cls'], atol=1e-5)
  assert np.abs(plain.embed(image)['cls'] - jaxmed.load(trained).embed(image)['cls']).max() > 1e-4
  said = adapting.told(config, trainer.optimizer, state.params)
  count = 2 * 2 * (32 * 2 + 2 * 32) + 2 * 32 + 2  # blocks, q and v, down and up; the head
  assert said.startswith(f'adapter lora (rank 2, alpha 4, targets q,v, dropout 0): {count:,} of ')


def test_the_command_writes_a_product_for_pytorch(lora, tmp_path, capsys):
  """LoRA is in the weights of the official class, whose layout is read back to the features of the run."""
  trainer, config, _, state = rundir.load_state(lora)
  plain = jaxmed.load(lora)
  whole = plain.__class__(trainer.objective.encoder, state.average['encoder'], plain.channels, plain.normalize)
  image = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3)).astype(np.uint8)
  for fmt in ('channelvit', 'jaxmed'):
    path = tmp_path / f'{fmt}.safetensors'
    assert main(['export', str(lora), '--format', fmt, '--out', str(path)]) == 0, capsys.readouterr().err
    assert not [k for k in read_tensors(path)[0] if 'adapter' in k or 'lora' in k]
    for key in ('cls', 'patches'):
      np.testing.assert_allclose(jaxmed.load(path).embed(image)[key], whole.embed(image)[key], atol=1e-5)


def test_the_command_refuses_what_weights_cannot_take_up(corpus, trained, tmp_path, capsys):
  """A run with bottlenecks is one of our own format alone."""
  run = tmp_path / 'run'
  start(corpus, run, SUPERVISED, **LORA | {'adapter': {'name': 'adaptformer', 'rank': 2}, 'steps': 2}, init=str(trained))
  words = ['export', str(run), '--out', str(tmp_path / 'w.safetensors'), '--format']
  assert main([*words, 'channelvit']) == 2
  told = capsys.readouterr().err
  assert 'no place for adapters of adaptformer' in told and told.count('\n') == 1
  assert not (tmp_path / 'w.safetensors').exists()
  assert main([*words, 'jaxmed']) == 0
  image = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3)).astype(np.uint8)
  np.testing.assert_allclose(jaxmed.load(tmp_path / 'w.safetensors').embed(image)['cls'], jaxmed.load(run).embed(image)['cls'],
                             atol=1e-5)


def test_a_stopped_run_goes_on_to_the_bit(lora, tmp_path):
  run = tmp_path / 'run'
  shutil.copytree(lora, run)
  shutil.rmtree(run / 'checkpoints' / '4')
  loop.resume(run, quiet=True)
  same(saved_state(run), saved_state(lora))


def test_a_self_supervised_run_goes_on_beside_its_encoder(corpus, trained):
  b = Bench(corpus, merge(TINY, {'adapter': {'name': 'adaptformer'}, 'init': str(trained), 'freeze': 'encoder/blocks/0',
                                 'optimizer': {'warmup_steps': 0, 'layer_decay': 0.5, 'clip': 1.0}}))
  state = b.trainer.initialize(b.trainer.abstract(b.shapes, b.mesh), b.shapes)
  after, metrics = b.step()(state, b.batches(1)[0])
  before, after = flat(state.params), flat(after.params)
  moved = {k for k in before if not np.array_equal(before[k], after[k])}
  beside = {k for k in before if 'adapter_beside/up' in k}
  assert beside <= moved and all(is_adapter((k,)) or not k.startswith('encoder/') or 'adapter' in k for k in moved)
  assert any(k.startswith('decoder/') for k in moved)
  for k in beside:
    np.testing.assert_array_equal(after[k][0], before[k][0])  # which freeze holds
    assert not np.array_equal(after[k][1], before[k][1])
  assert b.trainer.objective.encoder.adapter.rank == 64 and np.isfinite(metrics['loss'])


@pytest.mark.parametrize('values, words', [
    ({'adapter': {'name': 'lorra'}}, "did you mean 'lora'"),
    ({'adapter': {'name': 'lora'}}, 'give its weights, init=RUN'),
    ({'adapter': {'rank': 4}}, 'adapter.rank says how adapters are, but there are none'),
    ({'adapter': {'name': 'vpt', 'rank': 4}, 'init': 'x'}, 'adapter.rank means nothing to vpt, which takes prompts'),
    ({'adapter': {'name': 'lora', 'targets': 'q,o'}, 'init': 'x'}, 'adapter.targets'),
    ({'adapter': {'name': 'lora', 'dropout': 1.0}, 'init': 'x'}, 'between 0 and 1'),
    ({'adapter': {'name': 'dvpt', 'share': 0}, 'init': 'x'}, 'adapter.share must be at least 1'),
    ({'adapter': {'name': 'lora'}, 'init': 'x', 'optimizer': {'scaling': 'mup'}}, 'take optimizer.scaling=standard'),
])
def test_wrong_sections_are_told(values, words):
  with pytest.raises(UserError, match=words):
    resolve.check(values)


def test_wrong_encoders_and_names_are_told(corpus, trained):
  for values, words in (({'model': 'resnet_micro', 'encoder': {}, 'image_size': 32}, 'is for vit, channel_vit and bag'),
                        ({'encoder': {'packing': 0.5}}, 'does not go with encoder.packing=0.5')):
    user = merge({k: v for k, v in TINY.items() if k not in values}, {'init': str(trained), 'method': 'simmim'}, values)
    with pytest.raises(UserError, match=words):
      Bench(corpus, merge({k: v for k, v in user.items() if k != 'objective'}, {'adapter': {'name': 'vpt'}}))
  config = resolve.config_lib.base()
  config.adapter.name, config.adapter.also = 'lora', 'norm7'
  with pytest.raises(UserError, match="did you mean 'norm1'"):
    adapting.check_names(config, {'transformer': {'blocks': {'norm1': {'scale': jnp.ones(2)}}}})


def test_what_is_trained_beside_adapters():
  config = resolve.config_lib.base()
  for name, also, want in (('', '', ()), ('lora', '', adapting.TRAINING_ONLY),
                           ('houlsby', '', ('norm1', 'norm2', 'norm', *adapting.TRAINING_ONLY)),
                           ('houlsby', 'none', adapting.TRAINING_ONLY),
                           ('lora', 'pos_embed, norm', ('pos_embed', 'norm', *adapting.TRAINING_ONLY))):
    config.adapter.name, config.adapter.also = name, also
    assert adapting.beside(config) == want
  o = Optimizer(1e-3, 10, adapted=('encoder',), beside=('norm1',))
  for path, held in (('encoder/patch_embed/kernel', True), ('encoder/transformer/blocks/norm1/scale', False),
                     ('encoder/transformer/blocks/attn/adapter_q/up/kernel', False), ('decoder/norm/scale', False)):
    assert o.holds(tuple(path.split('/'))) == held


def test_groups_with_losses_of_their_own_and_held_parameters():
  groups = (('critic', Group(('critic',))),)
  o = Optimizer(1e-3, 10, groups=groups, adapted=('encoder',))
  params = {'encoder': {'w': jnp.array(2.0), 'adapter': {'kernel': jnp.array(3.0)}}, 'critic': {'w': jnp.array(5.0)}}

  def loss(params):
    params = o.only_trained(params)
    e = params['encoder']
    score = e['w'] * e['adapter']['kernel'] * params['critic']['w']
    return {'rest': score, 'critic': -score}, None

  (value, _), grads = gradients(loss, o.part_of, params)
  assert float(value) == 0 and float(grads['encoder']['w']) == 0
  assert float(grads['encoder']['adapter']['kernel']) == 10 and float(grads['critic']['w']) == -6
  moments = o.init(params)
  assert set(moments) == {'critic', 'rest'} and HELD not in moments
  new, moments = o.update(grads, moments, params, jnp.asarray(1))
  assert float(new['encoder']['w']) == 2.0 and float(new['encoder']['adapter']['kernel']) != 3.0
  free = Optimizer(1e-3, 10, name='schedule_free_adamw', adapted=('encoder',))
  assert float(free.averaged(free.init(params), params)['encoder']['w']) == 2.0


def test_weights_of_a_2d_encoder_serve_volumes():
  model, params = build('vit_micro/4', (8, 8))
  given = jaxmed.encoder.Encoder(model, params, tuple({'name': n, 'mean': 0.0, 'std': 1.0} for n in 'RGB'))
  config = resolve.config_lib.base()
  config.model, config.image_size = 'vit_micro/2x4x4', (4, 8, 12)
  config.encoder = dict(depth=2, embed_dim=48, num_heads=3)
  got = weights._encoder(config, given, {}, ('R', 'G', 'B'), True)
  volume = registry.create_model(config.model, config.image_size, 3, **config.encoder)
  want = jax.eval_shape(volume.init, jax.random.key(0), jnp.zeros((1, 4, 8, 12, 3)))['params']
  shapes = lambda tree: {k: v.shape for k, v in flax.traverse_util.flatten_dict(tree, sep='/').items()}
  assert shapes(got) == shapes(nn.unbox(want))
  kernel = np.asarray(got['patch_embed']['kernel']).reshape(2, 48, 48)
  np.testing.assert_array_equal(kernel[0], np.asarray(params['patch_embed']['kernel']) / 2)


def test_low_rank_products_lie_as_their_projections_do():
  model, _ = build('vit_micro/4', (8, 8), num_heads=4)
  boxed = jax.eval_shape(model.clone(adapter=Adapter('lora', 2, 4.0, ('q', 'proj', 'fc1'))).init, jax.random.key(0),
                         jnp.zeros((1, 8, 8, 3)))['params']
  placed = sharding_table.on_mesh(boxed, {'replica': 1, 'data': 1, 'fsdp': 2, 'sequence': 1, 'tensor': 2})
  blocks = flax.traverse_util.flatten_dict(placed['transformer']['blocks'])
  spec = lambda *path: tuple(blocks[path].sharding.spec)
  assert spec('attn', 'adapter_q', 'up', 'kernel') == (None, None, 'tensor', None)
  assert spec('attn', 'adapter_proj', 'down', 'kernel')[1] == 'tensor'
  assert spec('attn', 'adapter_q', 'down', 'kernel')[1] == spec('attn', 'qkv', 'kernel')[1] == 'fsdp'

