"""Temporal heads: published numbers of parameters, causality, receptive fields, streaming, a float64 loop."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models.decoders.temporal import MultiStage, create_stages, receptive_field
from tests.models.common import normal

KEY = jax.random.key(0)
SMALL = dict(stages=2, layers=3, width=4, features=5)


def params_of(model, *args):
  return nn.unbox(model.init(KEY, *args))


@pytest.mark.parametrize(('name', 'count'), [('tecno', 132_846), ('ms_tcn', 794_972), ('ms_tcn_causal', 794_972)])
def test_published_numbers_of_parameters(name, count):
  shapes = jax.eval_shape(create_stages(name, 7).init, KEY, jnp.zeros((1, 2, 2048)))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_unknown_head():
  with pytest.raises(UserError, match='tecno'):
    create_stages('tecn', 7)


def slow(params, x, causal):
  """Logits of each stage by loops over frames and layers, float64."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params['params'])
  dense = lambda q, v: v @ q['kernel'] + q['bias']
  out, x = [], np.asarray(x, np.float64)
  for s in range(SMALL['stages']):
    stage = p[f'stage_{s}']
    h = dense(stage['project'], x)
    for i in range(SMALL['layers']):
      layer, d = stage[f'layer_{i}'], 2**i
      shifts = (-2 * d, -d, 0) if causal else (-d, 0, d)
      y = np.tile(layer['bias'], (*h.shape[:2], 1))
      for t in range(h.shape[1]):
        for tap, shift in enumerate(shifts):
          if 0 <= t + shift < h.shape[1]:
            y[:, t] += h[:, t + shift] @ layer['kernel'][tap]
      h = h + dense(layer['out'], np.maximum(y, 0))
    logits = dense(stage['out'], h)
    out.append(logits)
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    x = e / e.sum(axis=-1, keepdims=True)
  return np.stack(out)


@pytest.mark.parametrize('causal', [True, False])
def test_slow_loop_and_mask(causal):
  model, x = MultiStage(3, causal=causal, **SMALL), normal((2, 21, 5))
  params = params_of(model, x)
  apply = jax.jit(model.apply)
  np.testing.assert_allclose(apply(params, x), slow(params, x, causal), atol=1e-5)
  mask = jnp.arange(21) < 16
  got = apply(params, jnp.where(mask[:, None], x, 7.0), jnp.broadcast_to(mask, (2, 21)))
  if causal:  # what follows a video changes nothing of it; without causality masked frames act as those beyond the end
    np.testing.assert_allclose(got[:, :, :16], apply(params, x)[:, :, :16], atol=1e-5)
  np.testing.assert_allclose(got[:, :, :16], slow(params, x[:, :16], causal), atol=1e-5)
  assert (got[:, :, 16:] == 0).all()


def test_causality_and_receptive_field():
  """The gradient of the first stage's output reaches exactly the frames of its receptive field and no later one."""
  assert receptive_field(8) == 511 and receptive_field(10) == 2047
  length, at, reach = 40, 30, receptive_field(3)
  for causal in (True, False):
    model, x = MultiStage(3, causal=causal, **(SMALL | dict(stages=1))), normal((1, length, 5))
    params = params_of(model, x)
    params = jax.tree.map(jnp.abs, params)  # positive weights, so that nothing cancels and no ReLU is shut
    grad = jax.grad(lambda x, m=model, p=params: m.apply(p, x)[0, 0, at].sum())(jnp.abs(x))
    seen = np.flatnonzero(np.abs(np.asarray(grad[0])).sum(axis=-1) > 0)
    first = at - reach + 1 if causal else at - reach // 2
    assert seen.tolist() == list(range(first, min(first + reach, length)))


def test_streaming_is_offline():
  model, x = MultiStage(3, causal=True, **SMALL), normal((2, 21, 5))
  params = params_of(model, x)
  step = lambda cache, frame: model.apply(params, cache, frame, method='step')
  _, got = jax.jit(lambda x: jax.lax.scan(step, model.cache(2), x.swapaxes(0, 1)))(x)  # [T, S, B, K]
  np.testing.assert_allclose(jnp.moveaxis(got, 0, 2), model.apply(params, x), atol=1e-5)
  with pytest.raises(ValueError, match='later frames'):
    MultiStage(3, **SMALL).cache(1)


def test_dropout_is_of_training_alone():
  model, x = MultiStage(3, causal=True, **SMALL), normal((1, 6, 5))
  params = params_of(model, x)
  run = lambda train, key: model.apply(params, x, train=train, rngs={'dropout': jax.random.key(key)})
  assert (run(False, 0) == run(False, 1)).all() and (run(True, 0) != run(True, 1)).any()
