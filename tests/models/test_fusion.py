"""Fusion of modalities: one alone is an MLP, a missing one has no part, what each kind can learn; completion of graphs."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmed.models.decoders.fusion import KINDS, Fusion, TypedAttention

SMALL = dict(num_outputs=3, dim=8, hidden=12, depth=1, num_heads=2, tensor_dim=4)
RNG = np.random.default_rng(0)
TOKENS = [np.float32(RNG.normal(size=(4, t, d))) for t, d in ((3, 5), (2, 6), (4, 7))]
MASK = np.array([[True, True, True], [True, False, True], [True, True, False], [False, False, True]])


def start(kind, tokens=TOKENS, **options):
  head = Fusion(kind, **SMALL | options)
  shapes = jax.eval_shape(head.init, jax.random.key(0), tokens, np.ones((4, len(tokens)), bool))['params']
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), nn.unbox(shapes))
  return params, jax.jit(lambda p, tokens, mask: head.apply({'params': p}, tokens, mask))


@pytest.mark.parametrize('kind', [*KINDS, 'completed'])
def test_a_missing_modality_has_no_part(kind):
  """Bit by bit, whatever it holds, NaN included; nor has it a gradient."""
  params, run = start('graph', prompts=2) if kind == 'completed' else start(kind)
  one = run(params, TOKENS, MASK)
  other = run(params, [np.where(MASK[:, m, None, None], x, np.nan) for m, x in enumerate(TOKENS)], MASK)
  np.testing.assert_array_equal(one, other)
  assert np.isfinite(one).all() and one.shape == (4, 3)
  assert np.abs(run(params, TOKENS, np.ones((4, 3), bool)) - one)[1:].max(axis=1).min() > 1e-4
  slopes = jax.grad(lambda x: run(params, x, MASK).sum())(TOKENS)
  for m, slope in enumerate(slopes):
    assert not np.any(slope[~MASK[:, m]]) and np.all(np.any(slope[MASK[:, m]], axis=(1, 2)))


def mlp(head, x):
  for i in (0, 1):
    x = x if i == 0 else np.maximum(x, 0)
    x = x @ np.asarray(head[f'dense{i}']['kernel'], np.float64) + np.asarray(head[f'dense{i}']['bias'], np.float64)
  return x


@pytest.mark.parametrize('kind', ['early', 'late', 'tensor'])
def test_one_modality_is_an_mlp_of_its_mean_and_several_are_joined(kind):
  def want(params, tokens, mask):
    z = [(x @ np.asarray(params[f'project{m}']['kernel'], np.float64) + np.asarray(params[f'project{m}']['bias'])
          ).mean(axis=1) * mask[:, m, None] for m, x in enumerate(tokens)]
    if kind == 'early':
      return mlp(params['head'], np.concatenate(z, axis=1))
    if kind == 'late':
      weights = np.exp(np.asarray(params['weights'], np.float64)) * mask
      weights /= weights.sum(axis=1, keepdims=True)
      return sum(weights[:, m, None] * mlp(params[f'head{m}'], x) for m, x in enumerate(z))
    z = [np.concatenate([x, np.ones((4, 1))], axis=1) for x in z]
    return mlp(params['head'], functools.reduce(lambda a, b: np.einsum('bi,bj->bij', a, b).reshape(4, -1), z))

  for tokens, mask in ((TOKENS[:1], np.ones((4, 1), bool)), (TOKENS, MASK)):
    params, run = start(kind, tokens)
    np.testing.assert_allclose(run(params, tokens, mask), want(params, tokens, mask), rtol=1e-4, atol=1e-5)


def test_messages_by_a_loop_over_edges():
  """Types of edges have their own keys and values; one softmax over all nodes."""
  nodes, there = [RNG.normal(size=(2, t, 8)) for t in (2, 3)], [np.ones((2, 2), bool), np.array([[1, 1, 0], [0, 1, 1]], bool)]
  module = TypedAttention(2)
  shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), nodes, there))['params']
  params = jax.tree.map(lambda x: 0.5 * RNG.normal(size=x.shape), shapes)
  have = jax.jit(module.apply)({'params': jax.tree.map(jnp.float32, params)}, [np.float32(x) for x in nodes], there)

  def normed(m, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * params[f'norm{m}']['scale'] + params[f'norm{m}']['bias']

  heads = lambda name, x: np.einsum('d,dhe->he', x, params[name]['kernel']) + params[name]['bias']
  for b, n in np.ndindex(2, 2):
    for i, x in enumerate(nodes[n][b]):
      if not there[n][b, i]:
        assert not np.any(have[n][b, i])
        continue
      q, out = heads(f'query{n}', normed(n, x)), np.zeros((2, 4))
      edges = [(m, j) for m in range(2) for j in range(len(nodes[m][b])) if there[m][b, j]]
      k = [heads(f'key{n}_{m}', normed(m, nodes[m][b, j])) for m, j in edges]
      v = [heads(f'value{n}_{m}', normed(m, nodes[m][b, j])) for m, j in edges]
      for h in range(2):
        w = np.exp([q[h] @ key[h] / 2 for key in k])
        out[h] = sum(a * value[h] for a, value in zip(w / w.sum(), v))
      want = x + out.reshape(-1) @ params[f'proj{n}']['kernel'].reshape(8, 8) + params[f'proj{n}']['bias']
      np.testing.assert_allclose(have[n][b, i], want, rtol=2e-4, atol=2e-5)


def test_types_have_no_order():
  """Modalities in another order with their weights renamed give the same."""
  params, run = start('graph', prompts=2)
  order = [2, 0, 1]  # the new places of modalities
  back = {old: new for new, old in enumerate(order)}

  def renamed(tree, key=''):
    if key == 'prompts':
      return tree[np.array(order)]
    if not isinstance(tree, dict):
      return tree
    new = lambda name: re.sub(r'\d+', lambda d: str(back[int(d[0])]), name)
    return {name if name.startswith(('round', 'dense', 'head')) or key == 'head' else new(name): renamed(x, name)
            for name, x in tree.items()}

  other = run(renamed(params), [TOKENS[m] for m in order], MASK[:, order])
  np.testing.assert_allclose(other, run(params, TOKENS, MASK), rtol=1e-4, atol=1e-5)


def test_prompts_are_for_what_is_missing():
  params, run = start('graph', prompts=2)
  whole = np.ones((4, 3), bool)
  plain = start('graph')[1]
  np.testing.assert_allclose(run(params, TOKENS, whole), plain({k: v for k, v in params.items() if k != 'completion'},
                                                               TOKENS, whole), atol=1e-6)
  used = jax.grad(lambda p, mask: run(p, TOKENS, mask).sum())
  assert not any(np.any(x) for x in jax.tree.leaves(used(params, whole)['completion']))
  slope = used(params, MASK)['completion']
  assert all(np.any(x) for x in slope['prompts']) and np.any(slope['value2']['kernel'])


@pytest.mark.parametrize('kind', KINDS)
def test_only_late_fusion_cannot_learn_xor(kind):
  """The label is whether two modalities, one bit each, differ: no sum of functions of each can tell."""
  bits = np.array([[0, 0], [0, 1], [1, 0], [1, 1]] * 4)
  tokens = [np.float32((2 * bits[:, m] - 1)[:, None, None] * np.ones((1, 1, 4))) for m in range(2)]
  mask, label = np.ones((16, 2), bool), bits.sum(axis=1) % 2
  head = Fusion(kind, **SMALL | {'num_outputs': 2, 'hidden': 16})
  params = nn.unbox(jax.jit(head.init)(jax.random.key(0), tokens, mask))
  rule = optax.adam(1e-2)

  @jax.jit
  def train(params):
    def cost(p):
      logits = head.apply(p, tokens, mask)
      return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), logits

    def step(carry, _):
      (value, logits), slope = jax.value_and_grad(cost, has_aux=True)(carry[0])
      change, state = rule.update(slope, carry[1])
      return (optax.apply_updates(carry[0], change), state), (value, (logits.argmax(-1) == label).mean())

    return jax.lax.scan(step, (params, rule.init(params)), None, length=300)[1]

  losses, right = train(params)
  if kind == 'late':
    assert losses.min() > 0.69 and right.max() <= 0.75
  else:
    assert losses[-1] < 0.05 and right[-1] == 1
