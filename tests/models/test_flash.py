"""Kernels of accelerators against float64 NumPy: Pallas interpreted, and cuDNN's call with XLA in the place of cuDNN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu

from jaxmed.models.layers import flash, kernels

from .common import normal
from .test_kernels import attend, backward, close

MASK = np.arange(130)[None] % np.array([3, 1000, 1])[:, None] != 0
MASK[2] = False  # 0 mod 1


@pytest.mark.parametrize('form', ['pallas', 'library'])
@pytest.mark.parametrize('rows, keys, masked', [(130, 130, True), (7, 130, True), (128, 64, False)])
def test_forms_are_attention(form, rows, keys, masked):
  """Values and gradients at lengths that do not divide, with a sample that has no key."""
  f = flash.by_pallas if form == 'pallas' else functools.partial(flash.by_library, implementation='xla')
  mask = MASK if masked else None
  q, g = (2 * normal((3, 2, rows, 16), i) for i in (0, 1))
  k, v = (2 * normal((3, 2, keys, 16), i) for i in (2, 3))
  with tpu.force_tpu_interpret_mode():
    value, back = jax.vjp(jax.jit(lambda q, k, v: f(q, k, v, None if mask is None else jnp.asarray(mask))), q, k, v)
    grads = back(g)
  turn = lambda x: np.asarray(x, np.float64).swapaxes(1, 2)
  close(turn(value), attend(turn(q), turn(k), turn(v), mask), 1e-5)
  for got, want in zip(grads, backward(*map(turn, (q, k, v, g)), mask), strict=True):
    close(turn(got), want, 1e-5)
  if masked:
    assert not np.asarray(value[2]).any() and not any(np.asarray(x[2]).any() for x in grads)


def test_the_option_lowers_to_the_kernel_of_a_tpu(monkeypatch):
  """Forwards and backwards, over a mesh; elsewhere the option changes nothing."""
  mesh = jax.make_mesh((1, 1), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  qkv = jax.ShapeDtypeStruct((2, 300, 3, 2, 64), jnp.bfloat16)
  slope = lambda form: jax.grad(lambda x: kernels.self_attention(x, None, form).astype(jnp.float32).sum())
  text = lambda form: jax.jit(slope(form)).trace(qkv).lower(lowering_platforms=('tpu',)).as_text()
  with jax.set_mesh(mesh):
    assert 'tpu_custom_call' not in text('flash')  # the mesh is one of CPUs
    monkeypatch.setattr(flash, 'platform', lambda: 'tpu')
    assert text('flash').count('tpu_custom_call') >= 3  # forwards, and backwards for queries and for keys
    assert 'tpu_custom_call' not in text('auto')
