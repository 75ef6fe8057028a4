"""Cheaper attention over channel tokens, against softmax over the pairs that each kind allows, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.models.layers import channel_attention

RNG = np.random.default_rng(11)
B, P, C, N, H, D = 2, 2, 3, 4, 4, 5
OPERANDS = RNG.normal(size=(3, B, P + C * N, H, D)).astype(np.float32)
THERE = np.array([[1, 1, 1], [1, 0, 1]], bool)
MASK = np.concatenate([np.ones((B, P), bool), np.repeat(THERE, N, axis=1)], axis=1)
PLACE = np.array([(-1, -1)] * P + [(c, n) for c in range(C) for n in range(N)])


def softmax(logits, allowed):
  logits = np.where(allowed, logits, -np.inf)
  weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return weight / weight.sum(axis=-1, keepdims=True)


def by_pairs(allowed):
  """[B, T, H, D] where query i of head h may look at key j if allowed[h, i, j] and it is there."""
  q, k, v = OPERANDS.astype(np.float64)
  weight = softmax(np.einsum('bihd,bjhd->bhij', q, k) / D**0.5, allowed[None] & MASK[:, None, None])
  return np.einsum('bhij,bjhd->bihd', weight, v)


def factorised():
  (ci, ni), (cj, nj) = PLACE[:, None].transpose(2, 0, 1), PLACE[None].transpose(2, 0, 1)
  free = (ci < 0) | (cj < 0)
  return by_pairs(np.stack([free | (ci == cj)] * 2 + [free | (ni == nj)] * 2))


def mean_over_channels(x):
  weight = THERE[:, :, None, None, None].astype(np.float64)
  return (x[:, P:].reshape(B, C, N, H, D) * weight).sum(axis=1) / weight.sum(axis=1)  # [B, N, H, D]


def pooled():
  q, k, v = OPERANDS.astype(np.float64)
  k, v = (np.concatenate([x[:, :P], mean_over_channels(x)], axis=1) for x in (k, v))
  weight = softmax(np.einsum('bihd,bjhd->bhij', q, k) / D**0.5, True)
  return np.einsum('bhij,bjhd->bihd', weight, v)


def shared():
  q = OPERANDS[0].astype(np.float64)
  mean = np.repeat(mean_over_channels(q)[:, None], C, axis=1).reshape(B, C * N, H, D)
  q = np.concatenate([q[:, :P], mean], axis=1)
  _, k, v = OPERANDS.astype(np.float64)
  weight = softmax(np.einsum('bihd,bjhd->bhij', q, k) / D**0.5, MASK[:, None, None])
  return np.einsum('bhij,bjhd->bihd', weight, v)


@pytest.mark.parametrize('kind,reference', [('factorised', factorised), ('pooled', pooled), ('shared', shared)])
def test_each_kind_is_its_reference(kind, reference):
  have = channel_attention.attend(*map(jnp.asarray, OPERANDS), jnp.asarray(MASK), 'auto', (kind, C, P))
  want = reference()
  rows = MASK.copy()
  if kind == 'pooled':  # prefix tokens see every token in all kinds
    want[:, :P] = by_pairs(np.ones((H, P + C * N, P + C * N), bool))[:, :P]
  np.testing.assert_allclose(np.asarray(have)[rows], want[rows], atol=1e-5)


@pytest.mark.parametrize('kind', ['factorised', 'pooled', 'shared'])
def test_gradients_and_missing_channels(kind):
  """A missing channel, NaN aside, has no effect on any token that is there, and gets no gradient."""
  q, k, v = map(jnp.asarray, OPERANDS)
  weight = jnp.asarray(RNG.normal(size=q.shape) * MASK[..., None, None], jnp.float32)
  f = lambda q, k, v: (channel_attention.attend(q, k, v, jnp.asarray(MASK), 'auto', (kind, C, P)) * weight).sum()
  grads = jax.jit(jax.grad(f, argnums=(0, 1, 2)))(q, k, v)
  for g in grads:
    assert np.isfinite(g).all() and np.abs(g).any()
    assert not np.abs(np.asarray(g)[~MASK]).any()


def test_one_channel_is_joint_attention():
  """With the same weights, except that half of the heads of 'factorised' see a position's own token alone."""
  image = RNG.normal(size=(2, 16, 16, 1)).astype(np.float32)
  options = dict(embed_dim=16, depth=2, num_heads=4)
  joint = create_model('channel_vit_micro/8', 16, 3, **options)
  params = jax.jit(joint.init)(jax.random.key(0), image)
  want = joint.apply(params, image).cls
  for kind in ('pooled', 'shared'):
    np.testing.assert_allclose(joint.clone(channel_attention=kind).apply(params, image).cls, want, atol=1e-5)


@pytest.mark.parametrize('kind', channel_attention.KINDS)
def test_a_missing_channel_is_one_that_is_not_there(kind):
  """An encoder sees of three slots with one missing what it sees of two."""
  image = RNG.normal(size=(2, 16, 16, 3)).astype(np.float32)
  model = create_model('channel_vit_micro/8', 16, 3, embed_dim=16, depth=2, num_heads=4, channel_attention=kind)
  params = jax.jit(model.init)(jax.random.key(0), image)
  ids = jnp.asarray([[0, 1, 2]] * 2)
  mask = jnp.asarray([[True, False, True]] * 2)
  some = model.apply(params, jnp.asarray(image).at[..., 1].set(jnp.nan), ids, mask)
  few = model.apply(params, image[..., [0, 2]], ids[:, [0, 2]])
  np.testing.assert_allclose(some.cls, few.cls, atol=1e-5)
  np.testing.assert_allclose(some.mean, few.mean, atol=1e-5)


def test_methods_that_leave_tokens_out():
  from jaxmed.objectives.masked.mae import MAE
  encoder = create_model('channel_vit_micro/8', 16, 2, embed_dim=16, depth=1, num_heads=4, pos='sincos',
                         channel_attention='factorised')
  batch = {'image': jnp.zeros((2, 16, 16, 2)), 'channels': jnp.tile(jnp.arange(2), (2, 1))}
  objective = MAE(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=2)
  with pytest.raises(UserError, match='the method leaves some out: take joint'):
    jax.eval_shape(lambda: objective.loss(objective.init(jax.random.key(0), batch), batch, jax.random.key(0), 0))
