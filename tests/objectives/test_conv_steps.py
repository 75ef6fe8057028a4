"""Methods on volumes with convolutional encoders: one contrastive and one masked step, and what reaches the weights."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models import create_model
from jaxmed.objectives.contrastive.simclr import SimCLR
from jaxmed.objectives.masked.mae import MAE
from jaxmed.objectives.masked.simmim import SimMIM
from jaxmed.train.optimizer import Optimizer
from tests.models.test_conv import TINY

SIZE = (8, 16, 24)  # a map of 1 x 2 x 3
METHODS = {
    'simclr': (SimCLR, dict(out_dim=8), {}),
    'mae': (MAE, dict(decoder_dim=16, decoder_depth=1, decoder_heads=2, mask_ratio=0.5), {'masking': 'sparse'}),  # SparK
    'simmim': (SimMIM, {}, {'masking': 'token', 'mask_token': True}),
}


def batch(many):
  rng = np.random.default_rng(0)
  shape = (4, 2) if many else (4,)
  group = {'image': jnp.asarray(rng.normal(size=(*shape, *SIZE, 2)), jnp.float32),
           'channels': jnp.broadcast_to(jnp.arange(2), (*shape, 2))}
  return {'global': group} if many else group


@pytest.mark.parametrize('name, method', [*((name, 'simclr') for name in TINY),
                                          ('resnet_micro', 'mae'), ('convnextv2_micro', 'mae'),
                                          ('caformer_micro', 'simmim'), ('pvt_v2_micro', 'mae'),
                                          ('swin_micro', 'simmim')])
def test_a_step_on_volumes(name, method):
  """A gradient reaches each weight, and a step against it lowers the loss."""
  kind, fields, options = METHODS[method]
  objective = kind(create_model(name, SIZE, 2, **TINY[name] | options), **fields)
  data, key = batch(method == 'simclr'), jax.random.key(1)
  variables = nn.unbox(jax.jit(objective.init)(jax.random.key(0), data))
  rng = np.random.default_rng(2)
  params = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), variables['params'])

  @jax.jit
  def gradient(params):
    return jax.value_and_grad(lambda p: objective.loss(variables | {'params': p}, data, key, jnp.int32(0))[0])(params)

  loss, grads = gradient(params)
  for path, g in flax.traverse_util.flatten_dict(grads, sep='/').items():
    assert np.isfinite(g).all(), path
    if path.split('/')[-1] not in ('mean', 'var'):  # running statistics
      assert np.abs(g).max() > 1e-9, path
  optimizer = Optimizer(1e-3, 10, weight_decay=0.0, warmup_steps=0)
  after, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params, jnp.int32(0))
  assert np.isfinite(loss) and float(gradient(after)[0]) < float(loss)
