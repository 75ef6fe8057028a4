"""muP: growth and factors by hand, first values against their laws, updates by hand, and the coordinate check."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed import config as config_lib
from jaxmed import create_model
from jaxmed.errors import UserError
from jaxmed.objectives.distillation.dino import DINO
from jaxmed.objectives.masked.data2vec import Data2Vec
from jaxmed.objectives.masked.ijepa import IJEPA
from jaxmed.objectives.masked.mae import MAE
from jaxmed.objectives.masked.simmim import SimMIM
from jaxmed.objectives.networks import inputs
from jaxmed.objectives.supervised.supervised import Supervised
from jaxmed.train import width
from jaxmed.train.build import assemble, data_spec, resolve
from jaxmed.train.optimizer import Group, Optimizer
from jaxmed.train.step import Trainer
from jaxmed.train.width import Growth
from tests.common import same
from tools import mup_rate

SIZE, CHANNELS, SAMPLES = 16, 2, 8
WIDTHS = (64, 128, 256, 512)
FAST = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}  # to compile
XAVIER = dict(pos='sincos', kernel_init='xavier_uniform', patch_init='torch_bias')  # MAE's


class AsGiven:
  """The view maker of batches that are views already."""

  channel_sampling = 'none'

  def __call__(self, rng, batch):
    return batch


AS_GIVEN = AsGiven()


@functools.cache
def batch():
  """Waves with some noise, of which a method has something to learn in a few steps."""
  place = np.stack(np.meshgrid(*[np.arange(SIZE)] * 2, indexing='ij'), axis=-1)[None, ..., None, :]
  noise = np.random.default_rng(0).normal(size=(SAMPLES, SIZE, SIZE, CHANNELS))
  image = np.sin(place @ np.asarray([0.9, 0.5]) + np.arange(CHANNELS)) + 0.3 * noise
  return {'image': image.astype(np.float32), 'channels': np.tile(np.arange(CHANNELS, dtype=np.int32), (SAMPLES, 1)),
          'label': np.arange(SAMPLES, dtype=np.int32) % 4}


def encoder(dim, heads, family='vit', **options):
  return create_model(f'{family}_micro/8', SIZE, CHANNELS, embed_dim=dim, depth=2, num_heads=heads, **options)


def views():
  """Two global views of each sample."""
  one = lambda x: jnp.stack([x, x], axis=1)
  return {'global': {k: one(v) for k, v in batch().items() if k != 'label'}}


# Growth


def shape(*sizes, names=None):
  return {'shape': sizes, 'names': names or (None,) * len(sizes)}


@pytest.mark.parametrize('path, before, after, names, growth', [
    ('encoder/patch_embed/kernel', (192, 64), (192, 256), ('patch', 'embed'), Growth(1, 4)),
    ('encoder/patch_embed/bias', (64,), (256,), ('embed',), Growth(1, 4)),
    ('encoder/channel_embed', (5, 64), (5, 256), ('channels', 'embed'), Growth(1, 4)),
    ('encoder/transformer/blocks/mlp/fc1/kernel', (2, 64, 256), (4, 128, 384), ('layers', 'embed', 'mlp'),
     Growth(2, 1.5)),
    ('encoder/transformer/blocks/attn/qkv/kernel', (2, 64, 3, 2, 32), (2, 256, 3, 8, 32),
     ('layers', 'embed', None, 'heads', 'head_dim'), Growth(4, 4)),
    ('encoder/transformer/blocks/attn/qkv/kernel', (2, 64, 3, 2, 32), (2, 256, 3, 2, 128),
     ('layers', 'embed', None, 'heads', 'head_dim'), Growth(4, 4, (0.5, 1.0, 1.0))),
    ('encoder/transformer/blocks/attn/qkv/bias', (2, 3, 2, 32), (2, 3, 2, 128), ('layers', None, 'heads', 'head_dim'),
     Growth(1, 4, (0.5, 1.0, 1.0))),
    ('decoder/look_q/kernel', (64, 1, 8, 8), (256, 1, 8, 32), ('embed', None, 'heads', 'head_dim'),
     Growth(4, 4, (0.5,))),
    ('decoder/look_kv/kernel', (64, 2, 8, 8), (256, 2, 8, 32), ('embed', None, 'heads', 'head_dim'), Growth(4, 4)),
    ('decoder/transformer/blocks/mlp/fc2/kernel', (3, 2, 256, 64), (3, 2, 512, 128),
     ('channels', 'layers', 'mlp', 'embed'), Growth(2, 2)),
    ('decoder/conv0/kernel', (16, 36, 4), (16, 72, 8), ('stack', None, 'embed'), Growth(2, 2)),
    ('encoder/channel_hash/kernel', (8, 64, 64), (8, 64, 128), ('stack', None, 'embed'), Growth(1, 2)),
    ('head/kernel', (64, 10), (256, 10), ('embed', None), Growth(4, 1)),
    ('head/bias', (10,), (10,), (None,), Growth()),
    ('proxies', (5, 64), (5, 256), ('channels', 'embed'), Growth(1, 4)),
])
def test_growth_by_hand(path, before, after, names, growth):
  assert width.of_shapes(path, shape(*before, names=names), shape(*after, names=names)) == growth


@pytest.mark.parametrize('growth, kind, deviation, adamw, sgd', [
    (Growth(), 'input', 1, 1, 1),
    (Growth(1, 4), 'input', 1, 1, 4),
    (Growth(4, 4), 'hidden', 1 / 2, 1 / 4, 1),
    (Growth(4, 2), 'hidden', 1 / 2, 1 / 4, 1 / 2),
    (Growth(4, 1), 'output', 1 / 4, 1 / 4, 1 / 4),
    (Growth(4, 4, (0.5, 1.0, 1.0)), 'hidden', (1 / 4, 1 / 2, 1 / 2), (1 / 8, 1 / 4, 1 / 4), (1 / 4, 1, 1)),
    (Growth(1, 4, (0.5, 1.0, 1.0)), 'input', (1 / 2, 1, 1), (1 / 2, 1, 1), (1, 4, 4)),
])
def test_factors_are_those_of_table_3(growth, kind, deviation, adamw, sgd):
  assert growth.kind == kind
  for got, want in ((growth.deviation, deviation), (growth.rate('adamw'), adamw), (growth.rate('sgd'), sgd)):
    np.testing.assert_allclose(np.ravel(got), np.ravel(want), rtol=1e-6)


def kinds(objective, base=64, heads=0, data=None):
  found = width.compared(objective, base, heads, batch() if data is None else data)
  return {name: g.kind for name, g in found.growth}


@pytest.mark.parametrize('family', ['vit', 'channel_vit', 'bag'])
def test_what_grows_in_mae(family):
  """The decoder is as wide as the encoder here: all but its pixels grow."""
  found = kinds(MAE(encoder(128, 4, family)))
  assert found['encoder/patch_embed/kernel'] == found['encoder/norm/scale'] == found['decoder/mask_token'] == 'input'
  assert found['decoder/embed/kernel'] == found['decoder/transformer/blocks/mlp/fc1/kernel'] == 'hidden'
  assert [name for name, kind in found.items() if kind == 'output'] == ['decoder/predict/kernel']
  assert ('encoder/channel_embed' in found) == (family == 'channel_vit')


def test_a_decoder_of_fixed_width_does_not_grow():
  found = kinds(MAE(encoder(128, 4), decoder_dim=48, decoder_heads=2))
  assert [name for name in found if name.startswith('decoder')] == ['decoder/embed/kernel']
  assert found['decoder/embed/kernel'] == 'output'


def test_what_grows_in_heads():
  """DINO's head and the linear ones have fixed widths; predictors of latents end at the encoder's."""
  dino = kinds(DINO(encoder(128, 4), hidden_dim=32, bottleneck_dim=16, out_dim=24), data=views())
  assert {n: k for n, k in dino.items() if n.startswith('head')} == {'head/dense0/kernel': 'output'}
  assert kinds(Supervised(encoder(128, 4), num_classes=4))['head/kernel'] == 'output'
  assert kinds(SimMIM(encoder(128, 4, mask_token=True)))['encoder/mask_token'] == 'input'
  assert kinds(IJEPA(encoder(256, 8)), base=128)['predictor/predict/kernel'] == 'hidden'
  assert kinds(IJEPA(encoder(128, 4), predictor_dim=32))['predictor/predict/kernel'] == 'input'
  found = kinds(Data2Vec(encoder(128, 4), decoder_dim=32))
  names = [n for n in found if n.startswith('decoder')]
  assert {found[n] for n in names if n.endswith('conv0/kernel')} == {'output'}
  assert {found[n] for n in names if n.endswith('predict/kernel')} == {'input'}
  assert not [n for n in names if 'conv1' in n]


def test_heads_grow_in_number_or_in_width():
  number = dict(width.compared(MAE(encoder(128, 4)), 64, 0, batch()).growth)
  wider = dict(width.compared(MAE(encoder(128, 4)), 64, 4, batch()).growth)
  name = 'encoder/transformer/blocks/attn/qkv/kernel'
  assert number[name] == Growth(2, 2)
  assert wider[name] == Growth(2, 2, (2**-0.5, 1.0, 1.0))
  assert {k for k in number if number[k] != wider[k]} == {name, name.replace('kernel', 'bias')}


# First values


@pytest.mark.parametrize('make', [
    lambda dim: MAE(encoder(dim, dim // 32, 'channel_vit', channel_init='orthogonal', **XAVIER)),
    lambda dim: MAE(encoder(dim, dim // 32), class_weight=0.1, class_loss='proxy', num_classes=4),
    lambda dim: SimMIM(encoder(dim, dim // 32, mask_token=True, kernel_init='beit', layer_scale=0.1)),
    lambda dim: Data2Vec(encoder(dim, dim // 32, patch_init='xavier', kernel_init='xavier_qkv')),
], ids=['xavier', 'proxies', 'beit', 'convolutions'])
def test_first_values_are_those_of_the_base_times_the_factors(make):
  """Measured on draws of both: Xavier's, PyTorch's and orthogonal laws know the width, the others do not."""
  objective = make(256)
  found = width.compared(objective, 64, 0, batch())
  values = lambda o, scale: nn.unbox(scale(o.init(jax.random.key(1), batch()))['params'])
  draw = lambda o, scale: jax.jit(lambda: values(o, scale), compiler_options=FAST)()
  base = draw(found.base, lambda v: v)
  wide = draw(objective, lambda v: found.scaled(objective, v, batch()))
  grown, checked = dict(found.growth), 0
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(base), jax.tree.leaves(wide), strict=True):
    name, rms = width.name_of(path), lambda a: float(np.sqrt(np.square(a).mean()))
    want = rms(x) * float(grown.get(name, Growth()).deviation)
    if x.size < 1000:  # too few to tell
      assert rms(y) == pytest.approx(want, rel=0.35), name
      continue
    checked += 1
    assert rms(y) == pytest.approx(want, rel=0.08), name
  assert checked >= 5


def test_first_values_of_queries():
  objective = MAE(encoder(256, 2))
  found = width.compared(objective, 64, 2, batch())
  draw = lambda: nn.unbox(found.scaled(objective, objective.init(jax.random.key(0), batch()), batch())['params'])
  params = jax.jit(draw, compiler_options=FAST)()
  kernel = params['encoder']['transformer']['blocks']['attn']['qkv']['kernel']  # [L, D, 3, H, Dh]
  np.testing.assert_allclose(np.std(kernel, axis=(0, 1, 3, 4)), (0.02 / 4, 0.02 / 2, 0.02 / 2), rtol=0.02)


def test_a_target_begins_as_what_it_follows():
  objective = DINO(encoder(128, 4), hidden_dim=32, bottleneck_dim=16, out_dim=24)
  found = width.compared(objective, 64, 0, views())
  trainer = Trainer(objective, Optimizer(0.1, 10, growth=found.growth), AS_GIVEN, width=found)
  state = jax.jit(lambda: nn.unbox(trainer.create(views())), compiler_options=FAST)()
  same(state.target, {name: state.params[name] for name in state.target})
  plain = nn.unbox(objective.init(jax.random.wrap_key_data(state.rng), views())['params'])
  np.testing.assert_allclose(state.params['head']['dense0']['kernel'], plain['head']['dense0']['kernel'] / 2, rtol=1e-6)


# Updates


def leaves(values):
  """{'head': {'kernel': ...}, ...} of {'head/kernel': array}."""
  out = {}
  for path, value in values.items():
    first, _, last = path.partition('/')
    out.setdefault(first, {})[last] = jnp.asarray(value, jnp.float32)
  return out


GROWN = (('in/bias', Growth(1, 4)), ('in/kernel', Growth(1, 4)), ('mid/kernel', Growth(4, 4)),
         ('out/kernel', Growth(4, 1)))


@pytest.mark.parametrize('rule, factors', [('adamw', (1, 1, 1 / 4, 1 / 4, 1)), ('sgd', (4, 4, 1, 1 / 4, 1))])
def test_updates_by_hand(rule, factors):
  """A step from empty moments: the rate by the table, and rate times decay as at the base width."""
  paths = ('in/bias', 'in/kernel', 'mid/kernel', 'out/kernel', 'out/bias')
  weight, slope, rate, decay = 2.0, 0.5, 0.1, 0.3
  params, grads = (leaves({path: [[value]] for path in paths}) for value in (weight, slope))
  o = Optimizer(rate, 100, final_learning_rate=rate, name=rule, weight_decay=decay, growth=GROWN, b1=0.9)
  new, _ = o.update(grads, o.init(params), params, jnp.asarray(0))
  for path, factor in zip(paths, factors, strict=True):
    pull = decay * weight if path.endswith('kernel') else 0.0
    direction = 1.0 if rule == 'adamw' else 1.9 * slope  # Nesterov's first step: (1 + b1) times the gradient
    share = 1.0 if rule == 'adamw' else 1.9  # which has the decay in it
    want = weight - rate * (factor * direction + share * pull)
    first, _, last = path.partition('/')
    assert float(new[first][last][0, 0]) == pytest.approx(want, rel=1e-6), path


@pytest.mark.parametrize('rule, power', [('adamw', 1), ('sgd', 2)])
def test_queries_equal_a_multiplier_in_the_network(rule, power):
  """Logits (w q) . k with weights theta w0 and the rate factor are those of theta (w q) . k with w0 (lemma J.1)."""
  theta, q = 0.5, jnp.asarray([0.3, -1.2, 0.7])
  plain = Optimizer(0.05, 100, name=rule, weight_decay=0.1, final_learning_rate=0.05)
  ours = dataclasses.replace(plain, growth=(('qkv/kernel', Growth(1, 1, (theta,))),))
  assert np.ravel(dict(ours.growth)['qkv/kernel'].rate(rule)) == pytest.approx(theta**power)
  loss = lambda w, factor: jnp.square(factor * (w[0, 0] * q).sum(axis=-1) - jnp.asarray([1.0, 2.0])).sum()
  start = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 2, 3)), jnp.float32)

  def run(optimizer, weight, factor):
    params = {'qkv': {'kernel': weight}}
    moments = optimizer.init(params)
    for i in range(5):
      grads = {'qkv': {'kernel': jax.grad(loss)(params['qkv']['kernel'], factor)}}
      params, moments = optimizer.update(grads, moments, params, jnp.asarray(i))
    return params['qkv']['kernel'] * factor

  np.testing.assert_allclose(run(ours, theta * start, 1.0), run(plain, start, theta), rtol=2e-5, atol=1e-6)


def test_factors_multiply_those_of_groups_and_layers():
  paths = {'encoder/norm': [1.0], 'mid/kernel': [[1.0]], 'out/kernel': [[1.0]]}
  params = grads = leaves(paths)
  groups = (('slow', Group(('mid',), rate=0.5)),)
  o = Optimizer(0.1, 100, weight_decay=0.0, growth=GROWN, groups=groups, towers=())
  new, _ = o.update(grads, o.init(params), params, jnp.asarray(0))
  assert float(new['mid']['kernel'][0, 0]) == pytest.approx(1 - 0.1 * 0.5 / 4, rel=1e-5)
  assert float(new['out']['kernel'][0, 0]) == pytest.approx(1 - 0.1 / 4, rel=1e-5)
  assert float(new['encoder']['norm'][0]) == pytest.approx(1 - 0.1, rel=1e-5)


# Runs


SPEC = data_spec.DataSpec(tuple({'name': n, 'mean': 100.0, 'std': 50.0} for n in 'ab'), CHANNELS, False, 'uint8', 640,
                          (SIZE, SIZE), ('x', 'y'))


def built(**user):
  values = {'method': 'mae', 'model': 'channel_vit_micro/8', 'image_size': SIZE, 'batch_size': 8, 'steps': 4,
            'encoder': {'embed_dim': 64, 'depth': 2, 'num_heads': 2}}
  config = resolve.resolve(config_lib.merge(values, user), SPEC)
  return assemble.build(config, SPEC)


def test_at_the_base_width_a_run_is_the_standard_one():
  """Equal trainers share one program, so every bit is the same."""
  assert built(optimizer={'scaling': 'mup', 'base_width': 64}) == built()
  grown = built(optimizer={'scaling': 'mup', 'base_width': 32})
  assert grown != built() and grown.optimizer.growth == grown.width.growth
  assert 'encoder/norm/scale' in dict(grown.optimizer.growth)
  assert dict(grown.optimizer.growth)['decoder/predict/kernel'] == Growth(2, 1)


def test_a_narrower_encoder_than_the_base():
  growth = dict(built(optimizer={'scaling': 'mup'}).optimizer.growth)
  assert growth['encoder/transformer/blocks/mlp/fc1/kernel'] == Growth(0.5, 0.5)


def test_the_table_names_every_factor():
  text = width.table(built(optimizer={'scaling': 'mup', 'base_width': 32, 'base_heads': 2}).width)
  row = next(line.split() for line in text.splitlines() if line.startswith('encoder/transformer/blocks/attn/qkv/kernel'))
  assert row[1:4] == ['hidden', '2', '2'] and row[5] == '0.3536/0.5/0.5'
  assert width.told(64, None) == 'muP from width 64: nothing grew, as with optimizer.scaling=standard'


@pytest.mark.parametrize('user, message', [
    (dict(optimizer={'scaling': 'mup', 'name': 'muon'}),
     r'optimizer\.scaling=mup has the rates of adamw and sgd, not of muon'),
    (dict(optimizer={'scaling': 'mup', 'groups': {'x': {'paths': ('decoder',), 'name': 'lion'}}}), 'not of lion'),
    (dict(optimizer={'scaling': 'mup', 'base_width': 48}),
     r'base_width=48 does not divide into heads of 32, as the encoder has them: nearest is 64, or set'),
    (dict(optimizer={'scaling': 'mup', 'base_width': 64, 'base_heads': 3}), 'base_heads=3 does not divide .* 63'),
    (dict(optimizer={'scaling': 'mup', 'base_width': 0}), r'optimizer\.base_width must be at least 1, not 0'),
    (dict(optimizer={'scaling': 'mpu'}), "optimizer.scaling 'mpu': did you mean 'mup'"),
    (dict(optimizer={'scaling': 'mup'}, model='resnet_micro', encoder={}, method='supervised',
          loader={'label': 'label'}), 'rules for vit, channel_vit and bag, not for ResNet'),
    (dict(optimizer={'scaling': 'mup', 'base_width': 32}, objective={'decoder_dim': 64, 'decoder_shares': True}),
     r'optimizer\.base_width=32: at that width objective\.decoder_shares needs'),
])
def test_bad_options(user, message):
  with pytest.raises(UserError, match=message) as e:
    if user.get('model'):
      user = config_lib.merge({'image_size': SIZE, 'batch_size': 8, 'steps': 4}, user)
      assemble.build(resolve.resolve(user, SPEC), SPEC)
    else:
      built(**user)
  assert '\n' not in str(e.value)


# The coordinate check


def activations(objective, params):
  """{part: activations} of a method: every projection and norm of the encoder, logits of attention, and the output."""
  data, weights = batch(), {'params': params['encoder']}
  known = ('patch_embed', 'qkv', 'proj', 'fc1', 'fc2', 'norm1', 'norm')
  caught = objective.encoder.apply(weights, **inputs(data), capture_intermediates=True, mutable=['intermediates'])[1]
  out = {}
  for path, x in jax.tree_util.tree_leaves_with_path(caught['intermediates']):
    part = str(getattr(path[-3], 'key', ''))
    if part in known and hasattr(x, 'ndim'):
      out[part] = x
  q, k = out['qkv'][..., 0, :, :], out['qkv'][..., 1, :, :]  # [L, B, N, H, Dh]
  out['logits'] = jnp.einsum('lbnhd,lbmhd->lbhnm', q, k) * q.shape[-1] ** -0.5
  out['qkv'] = out['qkv'][..., 1:, :, :]  # queries have the factor of the logits
  if isinstance(objective, MAE):
    out['output'] = objective._predict(params, data, jax.random.key(5), False)[0]
  else:
    features = objective.encoder.apply(weights, **inputs(data))
    out['output'] = objective.head.apply({'params': params['head']}, features.pooled(objective.feature))
  return out


look = jax.jit(activations, static_argnums=0, compiler_options=FAST)


@functools.cache
def coordinates(case, scaling, dim, steps=10):
  """({part: mean size at first}, after some steps of AdamW, of the change)."""
  make, base_heads, rate = CASES[case]
  objective = make(dim)
  found = width.compared(objective, WIDTHS[0], base_heads, batch()) if scaling == 'mup' else None
  optimizer = Optimizer(rate, 10**6, b2=0.95, growth=found.growth if found else ())
  trainer = Trainer(objective, optimizer, AS_GIVEN, width=found)
  jit = functools.partial(jax.jit, compiler_options=FAST)
  state = jit(lambda: nn.unbox(trainer.create(batch())))()
  first, step = state.params, jit(trainer.step)
  for _ in range(steps):
    state, _ = step(state, batch())
  before, after = look(objective, first), look(objective, state.params)
  size = lambda tree: {name: float(jnp.abs(x).mean()) for name, x in tree.items()}
  return size(before), size(after), size(jax.tree.map(jnp.subtract, after, before))


def slopes(case, scaling, widths=WIDTHS):
  """{part: exponents of its size over the width} at first, after some steps, and of the change."""
  # At the base width both are one, see test_at_the_base_width_a_run_is_the_standard_one.
  sizes = [coordinates(case, scaling if dim > WIDTHS[0] else 'mup', dim) for dim in widths]
  exponent = lambda when, part: np.polyfit(np.log(widths), np.log([s[when][part] for s in sizes]), 1)[0]
  return {part: tuple(exponent(when, part) for when in range(3)) for part in sizes[0][0]}


CASES = {
    'vit': (lambda dim: Supervised(encoder(dim, dim // 32), num_classes=4, feature='mean'), 0, 3e-3),
    'channel_vit': (lambda dim: MAE(encoder(dim, 2, 'channel_vit', **XAVIER), decoder_depth=1, decoder_heads=2), 2,
                    2e-3),
}


@pytest.mark.parametrize('case', CASES)
def test_coordinate_check(case):
  """Sizes of activations do not depend on the width, at first and after 10 steps; by the standard rules they do.

  ViT with heads of one width and normal kernels, supervised; ChannelViT with two heads and Xavier's kernels, with MAE's
  decoder. Outputs, and logits of attention where heads grow wider, begin smaller, by the root of the width, and are near
  their limit after some steps only (microsoft/mup, README, coordinate check).
  """
  for part, (first, after, change) in slopes(case, 'mup').items():
    late = part == 'output' or part == 'logits' and case == 'channel_vit'
    assert -0.65 < first < 0.15 if late else abs(first) < 0.15, (part, first)
    assert max(abs(after), abs(change)) < (0.5 if late else 0.15), (part, after, change)


@pytest.mark.parametrize('case', CASES)
def test_coordinate_check_fails_by_the_standard_rules(case):
  found = slopes(case, 'standard', (64, 256))  # so far off that two widths tell
  assert min(found[part][2] for part in ('logits', 'proj', 'fc2')) > 0.3
  assert max(change for _, _, change in found.values()) > 0.7


# Rates over width


def test_the_optimum_is_the_vertex_of_a_parabola():
  rates = [1e-3 * 2**i for i in range(5)]
  losses = np.asarray([0.1 * (np.log2(rate / 3e-3)) ** 2 for rate in rates])
  assert mup_rate.optimum(rates, losses) == pytest.approx(3e-3)
  assert mup_rate.optimum(rates, np.arange(5.0)) is None
  assert mup_rate.optimum(rates, np.asarray([3, 2, 1, np.nan, np.nan])) is None
  assert mup_rate.slope({64: 4e-3, 128: 2e-3, 256: 1e-3, 512: None}) == pytest.approx(-1)
  assert mup_rate.slope({64: 4e-3}) is None


def test_rates_over_width_at_their_smallest(corpus, capsys):
  """At the base width both rules are one."""
  mup_rate.main(['--data', str(corpus), '--widths', '32,64', '--rates', '3', '--steps', '5', '--batch', '4',
                 'image_size=16', 'encoder.depth=1', 'loader.threads=1'])
  rows = [line.split('|')[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
  rows = [[cell.strip(' *') for cell in row] for row in rows]
  assert [row[:2] for row in rows[2:]] == [[s, w] for s in ('mup', 'standard') for w in ('32', '64', 'slope')]
  assert rows[2][2:5] == rows[5][2:5] and rows[3][2:5] != rows[6][2:5]
  with pytest.raises(UserError, match='48 does not divide into heads of 32: nearest is 64'):
    mup_rate.main(['--data', str(corpus), '--widths', '48'])
