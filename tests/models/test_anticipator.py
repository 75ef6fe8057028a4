"""The anticipating transformer and EndoNet's head: causality, windows, streaming, shapes and numbers by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models.decoders.anticipator import Anticipator, LocalAttention
from jaxmed.models.decoders.endonet import EndoNet
from tests.models.common import normal

KEY = jax.random.key(0)
MODEL = Anticipator(3, tokens=4, stride=30, dim=16, num_heads=2, hidden=20, window=5, pooled=6)
X = normal((2, 13, 7))
AT = jnp.arange(13)


@pytest.fixture(scope='module')
def params():
  variables = nn.unbox(jax.jit(MODEL.init)(KEY, X))
  large = lambda path, a: 0.3 * normal(a.shape, len(str(path))) if 'scale' not in str(path) else a
  return jax.tree_util.tree_map_with_path(large, variables)  # biases of distance begin at 0: see that they are used


def test_local_attention_by_a_loop():
  attention, x = LocalAttention(2, 3), normal((1, 8, 6))
  variables = nn.unbox(attention.init(KEY, x, None, 0))
  variables['params']['distance'] = normal((2, 3))
  got, _ = attention.apply(variables, x, None, 0)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables['params'])
  qkv = np.einsum('td,dphk->tphk', np.asarray(x[0], np.float64), p['qkv']['kernel']) + p['qkv']['bias']
  want = np.zeros((8, 2, 3))
  for t in range(8):
    for h in range(2):
      frames = range(max(t - 2, 0), t + 1)
      weight = np.exp([qkv[t, 0, h] @ qkv[s, 1, h] / 3**0.5 + p['distance'][h, t - s] for s in frames])
      want[t, h] = (weight / weight.sum()) @ qkv[list(frames), 2, h]
  np.testing.assert_allclose(got[0], want.reshape(8, 6) @ p['proj']['kernel'] + p['proj']['bias'], atol=1e-5)


def test_shapes_and_ranges(params):
  said = jax.eval_shape(lambda: MODEL.apply(params, X))
  assert said.current.shape == (2, 13, 3) and said.future.shape == (2, 1, 4, 4) and said.remaining.shape == (2, 13, 4)
  assert MODEL.horizon == 2 and Anticipator(7).horizon == 30
  with pytest.raises(UserError, match='num_heads 3'):
    Anticipator(7, num_heads=3)


def test_streaming_is_offline_and_causal(params):
  offline = jax.jit(lambda x: MODEL.apply(params, x, AT))
  whole, step = offline(X), lambda cache, frame: MODEL.apply(params, cache, frame, method='step')
  _, got = jax.jit(lambda x: jax.lax.scan(step, MODEL.cache(2), x.swapaxes(0, 1)))(X)
  for a, b in zip(got, whole, strict=True):
    np.testing.assert_allclose(jnp.moveaxis(a[:, :, 0], 0, 1), b, atol=1e-5)
  changed = offline(X.at[:, 8:].add(1.0))
  for a, b in zip(changed, whole, strict=True):
    assert (a[:, :8] == b[:, :8]).all() and (np.abs(a - b)[:, 8:].reshape(2, 5, -1).max(axis=-1) > 1e-4).all()
  assert ((whole.remaining > 0) & (whole.remaining < 2)).all()


def test_gradients_of_later_frames_are_zero(params):
  total = lambda x: sum(y[:, 6].sum() for y in MODEL.apply(params, x, AT))
  grad = np.abs(np.asarray(jax.jit(jax.grad(total))(X))).sum(axis=(0, 2))
  assert (grad[7:] == 0).all() and (grad[2:7] > 0).all()


def test_endonet_by_hand():
  x = normal((5, 4))
  params = nn.unbox(EndoNet(3, 2).init(KEY, x))
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params['params'])
  got = EndoNet(3, 2).apply(params, x)
  tools = np.asarray(x, np.float64) @ p['tools']['kernel'] + p['tools']['bias']
  both = np.concatenate([x, 1 / (1 + np.exp(-tools))], axis=1)
  np.testing.assert_allclose(got.tools, tools, atol=1e-5)
  np.testing.assert_allclose(got.phases, both @ p['phases']['kernel'] + p['phases']['bias'], atol=1e-5)
  assert jax.eval_shape(EndoNet(7).init, KEY, jnp.zeros((1, 4096)))['params']['phases']['kernel'].value.shape[0] == 4103
  slope = lambda detach: jax.grad(lambda v: EndoNet(3, 2, detach).apply(v, x).phases[:, 0].sum())(params)
  for detach in (True, False):
    grad = np.abs(np.asarray(slope(detach)['params']['tools']['kernel'])).max()
    assert (grad == 0) == detach
