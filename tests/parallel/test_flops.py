"""FLOPs by the jaxpr against counts by hand and XLA's own of what has no loop."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxmed.models import create_model
from jaxmed.models.layers import kernels
from jaxmed.parallel import chips, flops
from jaxmed.parallel.flops import count, taps

f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)


def xla(fn, *args):
  """XLA's count of the program as it is lowered; it adds a FLOP for each sum, so programs here are of products."""
  return jax.jit(fn).lower(*args).cost_analysis()['flops']


def block(n, d, ratio=4):
  """Products of one transformer block: qkv and projection, MLP, logits and weighted values, for one image."""
  return 2 * n * (4 + 2 * ratio) * d**2 + 4 * n**2 * d


@pytest.mark.parametrize('name, image, tokens, inputs, resample', [
    ('vit_micro/8', (2, 32, 32, 3), 16, 8 * 8 * 3, 0),
    ('channel_vit_micro/8', (2, 16, 16, 3), 12, 8 * 8, 2 * 2 * 2 * 4 * 32)])  # positions, as the official class does
def test_vit_by_hand(name, image, tokens, inputs, resample):
  model = create_model(name, image[1:3], 3, embed_dim=32, depth=3, num_heads=2, pos='sincos')
  ids = jax.ShapeDtypeStruct((2, 3), jnp.int32)
  variables = jax.eval_shape(lambda x, c: model.init(jax.random.key(0), x, c), f32(*image), ids)
  forward = lambda v, x, c: model.apply(v, x, c)
  want = 2 * (3 * block(tokens + 1, 32) + 2 * tokens * inputs * 32)
  assert count(forward, variables, f32(*image), ids) == want + resample
  # Backwards: two products for each one, but no gradient of the image.
  loss = lambda v, x, c: model.apply(v, x, c).cls.sum()
  assert count(jax.grad(loss), variables, f32(*image), ids) == 3 * want - 2 * 2 * tokens * inputs * 32 + resample


def test_remat_is_part_of_the_program():
  def total(remat):
    model = create_model('vit_micro/8', (32, 32), 3, embed_dim=32, depth=3, num_heads=2, remat=remat)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), f32(2, 32, 32, 3))
    return count(jax.grad(lambda v, x: model.apply(v, x).cls.sum()), variables, f32(2, 32, 32, 3))
  again = total('full') - total('none')
  # All of a block is computed again but the last product, whose result nobody needs.
  assert again == 2 * 3 * (block(17, 32) - 2 * 17 * 4 * 32**2)


@pytest.mark.parametrize('shape, kernel, options', [
    ((2, 9, 9, 4), (3, 3, 4, 8), dict(padding='SAME')),
    ((2, 9, 9, 4), (3, 3, 4, 8), dict(padding='VALID', window_strides=(2, 2))),
    ((2, 9, 9, 4), (3, 3, 1, 8), dict(padding='SAME', feature_group_count=4)),
    ((2, 5, 5, 4), (3, 3, 4, 8), dict(padding=((2, 2), (1, 1)), lhs_dilation=(2, 3), rhs_dilation=(2, 1))),
])
def test_convolutions_as_xla_counts(shape, kernel, options):
  options = {'window_strides': (1, 1), 'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')} | options
  convolve = lambda x, k: lax.conv_general_dilated(x, k, **options)
  assert count(convolve, f32(*shape), f32(*kernel)) == xla(convolve, f32(*shape), f32(*kernel))


def test_products_as_xla_counts():
  fn = lambda x, w, v: jnp.einsum('bnd,bmd->bnm', (x @ w), v)
  args = f32(3, 7, 8), f32(8, 16), f32(3, 5, 16)
  assert count(fn, *args) == xla(fn, *args) == 2 * 3 * 7 * 8 * 16 + 2 * 3 * 7 * 5 * 16


def test_loops_and_branches():
  x, w = f32(4, 8), f32(5, 8, 8)
  one = 2 * 4 * 8 * 8
  assert count(lambda x, w: lax.scan(lambda c, k: (c @ k, None), x, w)[0], x, w) == 5 * one
  either = lambda p, x, w: lax.cond(p, lambda: x @ w[0] @ w[1], lambda: x @ w[0])
  assert count(either, jax.ShapeDtypeStruct((), bool), x, w) == 2 * one
  places = lambda x, w: lax.platform_dependent(x, cpu=lambda x: x @ w[0] @ w[1], default=lambda x: x @ w[0])
  assert count(places, x, w) == one
  rounds = lambda x, w: lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w[0], x)
  assert count(rounds, x, w) == one


def test_what_xla_leaves_out_is_not_counted():
  x, w = f32(4, 8), f32(8, 8)
  one = 2 * 4 * 8 * 8
  def unused(x, w):
    _ = x @ w
    return x
  assert count(unused, x, w) == 0
  assert count(lambda x, w: x @ w + jnp.sin(x @ w), x, w) == one
  def scan(x, w):  # of two carries only one is asked for, and it needs the other through a third
    body = lambda c, _: ((c[0] @ w, c[0], c[2] @ w), None)
    return lax.scan(body, (x, x, x), None, length=3)[0][1]
  assert count(scan, x, w) == 3 * one


def test_attention_makes_logits_once():
  q = f32(1, 6, 2, 4)
  assert count(lambda q: kernels.attention(q, q, q), q) == 2 * 2 * 2 * 6 * 6 * 4


@pytest.mark.parametrize('args, want', [((9, 3, 9, 1, 1), 25), ((9, 1, 9), 9), ((4, 4, 4, 3, 0, 4), 4),
                                        ((2, 3, 5, 1, 1, 2, 2), 3)])
def test_taps(args, want):
  assert taps(*args) == want


@pytest.mark.parametrize('kind, name', [
    ('TPU v5 lite', 'v5e'), ('TPU v5', 'v5p'), ('TPU v5p', 'v5p'), ('TPU v4', 'v4'), ('TPU v6 lite', 'v6e'),
    ('NVIDIA H100 80GB HBM3', 'h100'), ('NVIDIA A100-SXM4-40GB', 'a100-40g'), ('cpu', None)])
def test_chip_of(kind, name):
  chip = chips.of(kind)
  assert (chip and chip.name) == name


def test_public_names():
  assert flops.count_jaxpr(jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 3)), jnp.ones((3, 4))).jaxpr) == 2 * 2 * 3 * 4
