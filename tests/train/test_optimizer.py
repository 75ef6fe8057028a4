"""AdamW against optax, and its masks, rates and clipping against NumPy loops over unstacked layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from jaxmed.errors import UserError
from jaxmed.train import rules
from jaxmed.train.optimizer import Group, Optimizer, clip_gradients, decays, layer_scale

DEPTH = 3


def tree(seed, scale=1.0):
  """Parameters as a run has them: encoder with stacked blocks, decoder, head."""
  shapes = {
      'encoder': {
          'patch_embed': {'kernel': (12, 8), 'bias': (8,)}, 'cls_token': (1, 1, 8), 'channel_embed': (3, 8),
          'transformer': {'blocks': {'norm1': {'scale': (DEPTH, 8), 'bias': (DEPTH, 8)},
                                     'mlp': {'kernel': (DEPTH, 8, 16), 'bias': (DEPTH, 16)}}},
          'norm': {'scale': (8,), 'bias': (8,)},
      },
      'decoder': {'transformer': {'blocks': {'mlp': {'kernel': (2, 8, 4)}}}, 'mask_token': (1, 1, 8)},
      'head': {'kernel': (8, 2), 'bias': (2,)},
  }
  rng = np.random.default_rng(seed)
  make = lambda s: jnp.asarray(scale * rng.normal(size=s), jnp.float32)
  return jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))


def run(optimizer, steps, scale=1.0):
  params = tree(0)
  moments = optimizer.init(params)
  for i in range(steps):
    params, moments = optimizer.update(tree(i + 1, scale), moments, params, jnp.asarray(i))
  return params


def reference(theirs, steps):
  """The same with an optimizer of optax: (params, state)."""
  params, state = tree(0), theirs.init(tree(0))
  for i in range(steps):
    updates, state = theirs.update(tree(i + 1), state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def close(a, b, tolerance=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def test_equals_optax_adamw():
  mine = Optimizer(3e-2, 20, 4, 1e-3, 0.9, 0.95, 0.05)
  theirs = optax.adamw(
      optax.warmup_cosine_decay_schedule(0.0, 3e-2, 4, 20, 1e-3), 0.9, 0.95, weight_decay=0.05,
      mask=lambda p: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', p))
  close(run(mine, 8), reference(theirs, 8)[0])


def test_adam_by_hand():
  """Two steps of one weight, written out (Loshchilov and Hutter 2019, algorithm 2, with the rate on both terms)."""
  o = Optimizer(0.1, 100, 0, 0.1, 0.9, 0.99, 0.2)
  w, m, v = 2.0, 0.0, 0.0
  params = {'head': {'kernel': jnp.asarray([w])}}
  moments = o.init(params)
  for t, g in enumerate((0.5, -3.0), 1):
    params, moments = o.update({'head': {'kernel': jnp.asarray([g])}}, moments, params, jnp.asarray(t - 1))
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    w -= 0.1 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8) + 0.2 * w)
    assert float(params['head']['kernel'][0]) == pytest.approx(w, rel=1e-6)


@pytest.mark.parametrize('step, value', [
    (0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (12, 0.55), (20, 0.1), (99, 0.1),
    (8, 0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2),
])
def test_schedule(step, value):
  assert float(Optimizer(1.0, 20, 4, 0.1).schedule(step)) == pytest.approx(value, abs=1e-6)


def test_the_polynomial_of_nnu_net():
  """lr0 (1 - t / T)^0.9, over the steps after warm-up."""
  schedule = Optimizer(0.01, 1000, annealing='poly').schedule
  for step, value in ((0, 0.01), (1, 0.009991), (500, 0.00535887), (999, 1.995e-5)):
    assert float(schedule(step)) == pytest.approx(value, rel=1e-3)
  schedule = Optimizer(1e-3, 1050, 50, annealing='poly').schedule
  for step, value in ((0, 0.0), (25, 5e-4), (50, 1e-3), (550, 5.35887e-4), (1050, 0.0)):
    assert float(schedule(step)) == pytest.approx(value, rel=1e-4, abs=1e-9)


def test_schedule_without_warm_up_starts_at_the_peak():
  assert float(Optimizer(0.5, 20).schedule(0)) == 0.5
  assert float(Optimizer(0.5, 1, 5).schedule(0)) == 0.5  # a warm-up longer than the run leaves the peak


def test_which_parameters_decay():
  paths = {jax.tree_util.keystr(p, simple=True, separator='/') for p, _ in
           jax.tree_util.tree_leaves_with_path(tree(0)) if decays(p)}
  assert paths == {'encoder/patch_embed/kernel', 'encoder/transformer/blocks/mlp/kernel',
                   'decoder/transformer/blocks/mlp/kernel', 'head/kernel'}


def test_decay_of_a_real_model():
  """Every dense kernel of the models ends in 'kernel', and nothing else of rank 2 or more in it decays."""
  from jaxmed import create_model
  model = create_model('channel_vit_micro/8', 16, 3, embed_dim=32, depth=2, num_heads=2, layer_scale=0.1,
                       num_registers=2)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))['params']
  leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(params))
  names = {jax.tree_util.keystr(p, simple=True, separator='/') for p, _ in leaves if decays(p)}
  assert len(names) == 5  # patch embedding, qkv, projection, two of the MLP
  assert all(n.endswith('/kernel') for n in names)


def test_layer_decay_equals_factors_of_single_layers():
  """BEiT: patch embedding and tokens d^(L+1), block i (from 0) d^(L-i), norm and what is outside 1."""
  d = 0.5
  plain, scaled = (run(Optimizer(0.1, 10, weight_decay=0.0, layer_decay=x), 1) for x in (1.0, d))
  start = tree(0)
  ratio = jax.tree.map(lambda a, b, s: (b - s) / (a - s), plain, scaled, start)
  encoder = ratio['encoder']
  want = {'patch_embed': d ** (DEPTH + 1), 'cls_token': d ** (DEPTH + 1), 'channel_embed': d ** (DEPTH + 1), 'norm': 1}
  for name, factor in want.items():
    for leaf in jax.tree.leaves(encoder[name]):
      np.testing.assert_allclose(leaf, factor, rtol=1e-3, err_msg=name)
  for leaf in jax.tree.leaves(encoder['transformer']):
    for i in range(DEPTH):
      np.testing.assert_allclose(leaf[i], d ** (DEPTH - i), rtol=1e-3)
  for leaf in jax.tree.leaves([ratio['decoder'], ratio['head']]):
    np.testing.assert_allclose(leaf, 1, rtol=1e-3)


def test_layer_scale_has_the_rank_of_its_parameter():
  path = tuple(jax.tree_util.DictKey(k) for k in ('encoder', 'transformer', 'blocks', 'mlp', 'kernel'))
  scale = layer_scale(path, (DEPTH, 8, 16), 0.5, {'encoder': DEPTH})
  assert scale.shape == (DEPTH, 1, 1)
  np.testing.assert_allclose(np.ravel(scale), [0.125, 0.25, 0.5])


@pytest.mark.parametrize('names, stages', [
    ({'stem_conv': 5, 'stem_norm': 5, 'stage0': 4, 'down1_conv': 3, 'stage1': 3, 'down3_norm': 1, 'stage3': 1, 'norm': 0}, 4),
    ({'conv1': 5, 'bn1': 5, 'layer1_0': 4, 'layer2_1': 3, 'layer4_2': 1}, 4),
    ({'stem_conv': 5, 'stage0': 4, 'norm0': 4, 'stage3': 1, 'norm3': 1, 'head_token': 5}, 4),
], ids=['convnext', 'resnet', 'pvt'])
def test_layer_decay_by_stages(names, stages):
  params = {'encoder': {n: {'kernel': jnp.ones((2, 2))} for n in names}, 'head': {'kernel': jnp.ones((2, 2))}}
  grads = jax.tree.map(jnp.ones_like, params)
  o = Optimizer(0.1, 10, weight_decay=0.0, layer_decay=0.5)
  new, _ = o.update(grads, o.init(params), params, jnp.asarray(0))
  moved = jax.tree.map(lambda x: float(1 - x[0, 0]), new)
  assert moved['head']['kernel'] == pytest.approx(0.1, rel=1e-4)
  for name, power in names.items():
    assert moved['encoder'][name]['kernel'] == pytest.approx(0.1 * 0.5**power, rel=1e-3), name


def test_moments_in_half_the_memory():
  """Rounded to 8 bits when stored, summed in float32: steps are those of full moments to 1 %."""
  full, half = (Optimizer(1e-2, 20, 0, 1e-2, weight_decay=0.0, moments=m) for m in ('float32', 'bfloat16'))
  moments = half.init(tree(0))
  assert {x.dtype for x in jax.tree.leaves((moments['mu'], moments['nu']))} == {jnp.dtype('bfloat16')}
  start, a, b = tree(0), run(full, 8), run(half, 8)
  off = jax.tree.map(lambda x, y, s: np.abs(np.asarray(x - y)).max() / np.abs(np.asarray(x - s)).max(), a, b, start)
  assert 0 < max(jax.tree.leaves(off)) < 2e-2
  assert {x.dtype for x in jax.tree.leaves(b)} == {jnp.dtype('float32')}


def norm(*leaves):
  return np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in leaves))


def test_clip_global():
  grads = tree(1)
  whole = norm(*jax.tree.leaves(grads))
  close(clip_gradients(grads, 2.0, 'global'), jax.tree.map(lambda g: g * 2.0 / whole, grads), 1e-5)


def test_clip_module():
  grads = tree(1)
  got = clip_gradients(grads, 2.0, 'module')
  for name, part in grads.items():
    size = norm(*jax.tree.leaves(part))
    assert size > 2
    close(got[name], jax.tree.map(lambda g, size=size: g * 2.0 / size, part), 1e-5)


def test_clip_tensor_layer_by_layer():
  grads = tree(1)
  got = clip_gradients(grads, 2.0, 'tensor')

  def check(path, g, c):
    stacked = 'blocks' in jax.tree_util.keystr(path)
    for a, b in zip(g, c, strict=True) if stacked else [(g, c)]:
      np.testing.assert_allclose(b, a * min(1.0, 2.0 / norm(a)), rtol=1e-5)

  jax.tree_util.tree_map_with_path(check, grads, got)
  kernel = got['encoder']['transformer']['blocks']['mlp']['kernel']
  np.testing.assert_allclose([norm(x) for x in kernel], 2.0, rtol=1e-5)


@pytest.mark.parametrize('scope', ['global', 'module', 'tensor'])
def test_small_gradients_are_left_alone(scope):
  grads = tree(1, 1e-3)
  close(clip_gradients(grads, 10.0, scope), grads, 0)


def test_clipping_acts_before_the_moments():
  """Adam forgets a common factor of all gradients, but not one that differs from step to step."""
  optimizer = lambda clip: Optimizer(0.1, 10, weight_decay=0.0, clip=clip)
  params = {'head': {'kernel': jnp.zeros(1)}}

  def end(o, sizes):
    p, m = params, o.init(params)
    for i, g in enumerate(sizes):
      p, m = o.update({'head': {'kernel': jnp.asarray([g])}}, m, p, jnp.asarray(i))
    return float(p['head']['kernel'][0])

  assert end(optimizer(1.0), (100.0, 1.0)) == pytest.approx(end(optimizer(0.0), (1.0, 1.0)), rel=1e-4)
  assert end(optimizer(0.0), (100.0, 1.0)) != pytest.approx(end(optimizer(0.0), (1.0, 1.0)), rel=1e-2)


@pytest.mark.parametrize('fields, words', [
    (dict(learning_rate=0.0), 'learning_rate'), (dict(moments='float16'), 'bfloat16'), (dict(layer_decay=1.1), 'layer_decay'),
    (dict(clip_scope='tensors'), "'tensor'"),
])
def test_refused(fields, words):
  with pytest.raises(UserError, match=words):
    Optimizer(**{'learning_rate': 0.1, 'steps': 10} | fields)


def test_weight_decay_follows_a_cosine():
  o = Optimizer(1.0, 20, weight_decay=0.04, final_weight_decay=0.4)
  for step, want in ((0, 0.04), (10, 0.22), (20, 0.4), (30, 0.4)):
    assert float(o.decay(jnp.asarray(step))) == pytest.approx(want, rel=1e-6)
  assert Optimizer(1.0, 20, weight_decay=0.04).decay(jnp.asarray(7)) == 0.04
  params = {'head': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}}
  still = jax.tree.map(jnp.zeros_like, params)
  out, _ = Optimizer(0.1, 20, 0, 0.1, weight_decay=0.04, final_weight_decay=0.4).update(
      still, o.init(params), params, jnp.asarray(10))
  np.testing.assert_allclose(out['head']['kernel'], 1 - 0.1 * 0.22, rtol=1e-6)
  np.testing.assert_array_equal(out['head']['bias'], 1.0)


def test_lars_by_hand():
  """Barlow Twins' form: decay in the gradient, size 0.001 |w| / |g|, momentum, for matrices alone, block by block."""
  o = Optimizer(0.2, 100, 0, 0.2, b1=0.9, weight_decay=1e-2, name='lars')
  params, moments = tree(0), o.init(tree(0))
  kernel = np.asarray(params['encoder']['transformer']['blocks']['mlp']['kernel'], np.float64)
  bias = np.asarray(params['head']['bias'], np.float64)
  speed, bias_speed = np.zeros_like(kernel), np.zeros_like(bias)
  for i in range(3):
    grads = tree(i + 1)
    params, moments = o.update(grads, moments, params, jnp.asarray(i))
    for layer in range(DEPTH):
      g = np.asarray(grads['encoder']['transformer']['blocks']['mlp']['kernel'][layer], np.float64) + 1e-2 * kernel[layer]
      g *= 0.001 * np.linalg.norm(kernel[layer]) / np.linalg.norm(g)
      speed[layer] = 0.9 * speed[layer] + g
    bias_speed = 0.9 * bias_speed + np.asarray(grads['head']['bias'])
    kernel, bias = kernel - 0.2 * speed, bias - 0.2 * bias_speed
  np.testing.assert_allclose(params['encoder']['transformer']['blocks']['mlp']['kernel'], kernel, rtol=1e-5)
  np.testing.assert_allclose(params['head']['bias'], bias, rtol=1e-5)


def test_sgd_equals_optax():
  mine = Optimizer(0.1, 100, 0, 0.1, b1=0.9, weight_decay=0.0, name='sgd')
  theirs = optax.sgd(0.1, 0.9, nesterov=True)
  close(run(mine, 3), reference(theirs, 3)[0])


def test_frozen_parameters_rest_and_keep_no_memory_of_it():
  o = Optimizer(0.1, 100, 0, 0.1)
  params, moments = tree(0), o.init(tree(0))
  for i in range(4):
    before = params
    params, moments = o.update(tree(i + 1), moments, params, jnp.asarray(i), {'head': jnp.asarray(i < 2)})
    moved = float(jnp.abs(params['head']['kernel'] - before['head']['kernel']).max())
    assert (moved == 0) == (i < 2)
    assert float(jnp.abs(params['encoder']['norm']['scale'] - before['encoder']['norm']['scale']).max()) > 0
    if i < 2:
      assert not float(jnp.abs(moments['mu']['head']['kernel']).max())


def test_lengths_decay_where_they_are_matrices():
  """Without gradients AdamW takes rate * decay of what decays (DINOv2's weight_g [K, 1] is no vector)."""
  params = {'head': {'last': {'kernel': jnp.full((4, 3), 2.0), 'length': jnp.full(3, 2.0)}, 'bias': jnp.ones(3)}}
  for decays_too in (False, True):
    optimizer = Optimizer(0.1, 100, weight_decay=0.5, decay_lengths=decays_too, annealing='none')
    moved, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params, jnp.asarray(1))
    last = moved['head']['last']
    np.testing.assert_allclose(last['kernel'], 2 * (1 - 0.1 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(last['length'], 2 * (1 - 0.1 * 0.5 * decays_too), rtol=1e-6)
    assert (moved['head']['bias'] == 1).all()


def test_moments_of_what_is_frozen_may_go_on():
  """As a rate of 0 (DINOv2): its gradient counts for the norm of clipping, and Adam goes on; by hand in float64."""
  optimizer = Optimizer(0.1, 100, weight_decay=0.5, clip=1.0, frozen_moments=True, annealing='none')
  params = {'head': {'last': {'kernel': jnp.ones((2, 2))}}, 'rest': {'kernel': jnp.ones((2, 2))}}
  moments = optimizer.init(params)
  mu = nu = 0.0
  want = {'head': 1.0, 'rest': 1.0}
  for n, (g, frozen) in enumerate(((3.0, True), (0.01, True), (2.0, False)), 1):
    grads = jax.tree.map(lambda p, g=g: jnp.full_like(p, g), params)
    params, moments = optimizer.update(grads, moments, params, jnp.asarray(n - 1), {'head/last': jnp.asarray(frozen)})
    g = g * min(1.0, 1.0 / (8**0.5 * g))  # eight equal numbers
    mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g * g
    step = mu / (1 - 0.9**n) / ((nu / (1 - 0.999**n)) ** 0.5 + 1e-8)
    want = {k: v if k == 'head' and frozen else v - 0.1 * (step + 0.5 * v) for k, v in want.items()}
    np.testing.assert_allclose(params['head']['last']['kernel'], want['head'], rtol=1e-5)
    np.testing.assert_allclose(params['rest']['kernel'], want['rest'], rtol=1e-5)
  assert want['head'] < 1 and params['head']['last']['kernel'][0, 0] != params['rest']['kernel'][0, 0]


def test_biases_and_norms_have_a_rate_of_their_own():
  start, out = tree(0), run(Optimizer(0.1, 100, 0, 0.1, weight_decay=0.0, bias_scale=0.0), 1)
  np.testing.assert_array_equal(out['head']['bias'], start['head']['bias'])
  np.testing.assert_array_equal(out['encoder']['norm']['scale'], start['encoder']['norm']['scale'])
  assert float(jnp.abs(out['head']['kernel'] - start['head']['kernel']).max()) > 0.01


def test_the_patch_embedding_has_a_rate_of_its_own():
  one, fifth = (Optimizer(0.1, 100, 0, 0.1, weight_decay=0.0, patch_embed_scale=s) for s in (1.0, 0.2))
  a, b, start = run(one, 1), run(fifth, 1), tree(0)
  move = lambda x: np.asarray(x['encoder']['patch_embed']['kernel'] - start['encoder']['patch_embed']['kernel'])
  np.testing.assert_allclose(move(b), 0.2 * move(a), rtol=1e-4)
  np.testing.assert_array_equal(a['head']['kernel'], b['head']['kernel'])


@pytest.mark.parametrize('name', ['lars', 'sgd', 'lion'])
def test_any_rule_rests_with_its_parameters(name):
  """Momentum does not decay, and decay in the gradient gathers nothing, while a parameter rests."""
  o = Optimizer(0.1, 100, 0, 0.1, weight_decay=0.1, name=name)
  params, moments = tree(0), o.init(tree(0))
  params, moments = o.update(tree(1), moments, params, jnp.asarray(0))
  kept = [x for x in jax.tree.leaves(moments)]
  after, rested = o.update(tree(2), moments, params, jnp.asarray(1), {'head': jnp.asarray(True), 'encoder': True})
  same = [np.array_equal(a, b) for a, b in zip(kept, jax.tree.leaves(rested), strict=True)]
  close(after['head'], params['head'], 0)
  close(after['encoder'], params['encoder'], 0)
  arrays = len(jax.tree.leaves(params))
  moved = sum(not x for x in same) - (name == 'lion')  # which counts its steps
  assert moved == len(jax.tree.leaves(params['decoder'])) < arrays


def test_equals_optax_lion():
  mine = Optimizer(1e-2, 20, 0, 1e-2, weight_decay=0.0, name='lion', options=(('b2', 0.95),))
  theirs = optax.lion(1e-2, b2=0.95, weight_decay=0.0)
  close(run(mine, 3), reference(theirs, 3)[0])


def test_muon_orthogonalises_each_block_and_leaves_the_rest_to_adam():
  """Blocks one by one against optax's own Muon on plain matrices; embedding, head and biases against Adam."""
  mine = run(Optimizer(1e-2, 20, 0, 1e-2, weight_decay=0.0, name='muon'), 2)
  adam = run(Optimizer(1e-2, 20, 0, 1e-2, weight_decay=0.0), 2)
  theirs = contrib.muon(1e-2, consistent_rms=0.2)
  pick = lambda t: {str(i): t['encoder']['transformer']['blocks']['mlp']['kernel'][i] for i in range(DEPTH)}
  params, state = pick(tree(0)), theirs.init(pick(tree(0)))
  for i in range(2):
    updates, state = theirs.update(pick(tree(i + 1)), state, params)
    params = optax.apply_updates(params, updates)
  close(pick(mine), params, 1e-5)
  close(mine['head'], adam['head'])
  close(mine['encoder']['patch_embed'], adam['encoder']['patch_embed'])
  assert np.abs(mine['decoder']['transformer']['blocks']['mlp']['kernel'] -
                adam['decoder']['transformer']['blocks']['mlp']['kernel']).max() > 1e-4


def test_schedule_free_equals_optax():
  """Weights that are trained and weights to use (Defazio et al. 2024); decay of all matrices, without a cosine."""
  mine = Optimizer(1e-2, 20, 4, weight_decay=0.0, name='schedule_free_adamw')
  theirs = contrib.schedule_free_adamw(1e-2, warmup_steps=4)
  params, state = reference(theirs, 6)
  own, moments = tree(0), mine.init(tree(0))
  for i in range(6):
    own, moments = mine.update(tree(i + 1), moments, own, jnp.asarray(i))
  close(own, params, 1e-5)
  close(mine.averaged(moments, own), contrib.schedule_free_eval_params(state, params), 1e-5)
  assert float(mine.schedule(19)) == pytest.approx(1e-2)


def test_annealing_may_be_left_out():
  o = Optimizer(0.1, 100, 10, annealing='none')
  np.testing.assert_allclose([float(o.schedule(i)) for i in (0, 5, 10, 99)], [0, 0.05, 0.1, 0.1], rtol=1e-6)


@pytest.mark.parametrize('name', rules.names())
def test_every_rule_makes_a_step(name):
  o = Optimizer(1e-3, 10, name=name)
  params = tree(0)
  shapes = jax.eval_shape(lambda p: o.update(tree(1), o.init(p), p, jnp.asarray(0)), params)[0]
  assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)


def test_groups_divide_and_unite():
  o = Optimizer(0.1, 10, groups=(('a', Group(('encoder',))), ('b', Group(('encoder/norm', 'head')))))
  parts = rules.divide(tree(0), o.group_of)
  assert {k: sorted(v) for k, v in parts.items()} == {'a': ['encoder'], 'b': ['encoder', 'head'], 'rest': ['decoder']}
  assert sorted(parts['b']['encoder']) == ['norm']
  close(rules.unite(parts), tree(0), 0)


def test_one_group_of_all_equals_no_group():
  plain = Optimizer(0.1, 10, clip=0.5, layer_decay=0.7)
  grouped = Optimizer(0.1, 10, clip=0.5, layer_decay=0.7, groups=(('a', Group(('encoder', 'head'))),))
  close(run(plain, 3), run(grouped, 3), 0)


@pytest.mark.parametrize('scope', ['global', 'module', 'tensor'])
def test_groups_clip_and_rest_as_one(scope):
  """What rests is no part of a norm, and a module that two groups share has one norm."""
  fields = dict(clip=0.5, clip_scope=scope, weight_decay=0.0)
  groups = (('a', Group(('encoder/norm',))), ('b', Group(('head', 'decoder'))))
  plain, grouped = Optimizer(0.1, 10, **fields), Optimizer(0.1, 10, groups=groups, **fields)
  step = lambda o: o.update(tree(1), o.init(tree(0)), tree(0), jnp.asarray(0), {'head': jnp.asarray(True)})[0]
  close(step(plain), step(grouped), 0)
