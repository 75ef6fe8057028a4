"""Losses, gradients and state of methods with several views, on one device and sharded over all; run as a process."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.parallel import mesh as mesh_lib
from tests.objectives.siamese_fakes import start
from tests.objectives.test_siamese import SMALL, clustered, views_for


def outcome(method, mesh):
  """(loss, gradients, extra) of a step at which clusters and queues are used; the batch is sharded over the mesh."""
  options = SMALL[method] | {k: v for k, v in {'rows': 16, 'chunk': 5}.items() if k in method.__dataclass_fields__}
  objective, variables, data = start(method, 'conv', views_for(method, 'conv', count=16), **options)
  variables = clustered(variables)
  if 'seen' in variables['extra']:
    bank = np.random.default_rng(0).normal(size=variables['extra']['bank'].shape)
    bank = bank / np.linalg.norm(bank, axis=-1, keepdims=True)
    variables['extra'] |= {'seen': jnp.ones(16, bool), 'bank': jnp.asarray(bank, jnp.float32)}
  if 'queue' in variables['extra']:
    variables['extra'] |= {'queued': jnp.int32(7)}
  if mesh is not None:
    variables = jax.device_put(variables, mesh_lib.replicated(mesh))
    data = jax.device_put(data, mesh_lib.batch_sharding(mesh))

  def loss(params, variables, data):
    return objective.loss(variables | {'params': params}, data, jax.random.key(0), 1000)

  (value, (_, extra)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'], variables, data)
  return jax.tree.map(np.asarray, (value, grads, extra))


def largest(tree):
  """The largest absolute value."""
  return max((float(np.abs(x).max()) for x in jax.tree.leaves(tree)), default=0.0)


def main():
  """Prints JSON {method: [loss, its error, error of gradients by the largest one, error of extra]}."""
  mesh, out = mesh_lib.make_mesh({'data': 0}), {}
  for method in SMALL:
    one, many = outcome(method, None), outcome(method, mesh)
    error = jax.tree.map(lambda a, b: a.astype(np.float64) - b.astype(np.float64), one, many)
    out[method.__name__] = [float(one[0]), largest(error[0]), largest(error[1]) / largest(one[1]), largest(error[2])]
  print(json.dumps(out | {'devices': jax.device_count()}))


if __name__ == '__main__':
  main()
