"""Compiles small programs for eight CPU devices in a process of its own and prints {name: optimised HLO} as JSON."""

import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

LAYERS, BATCH, WIDTH = 3, 16, 32


def programs(mesh):
  """name -> (function, arguments as shapes with shardings)."""
  put = lambda spec, *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
  mapped = lambda fn, inside, out: jax.shard_map(fn, mesh=mesh, in_specs=inside, out_specs=out)
  loss = lambda w, x: jnp.square(jax.lax.scan(lambda c, k: (c @ k, None), x, w)[0]).sum()
  both = ('data', 'fsdp')
  ring = [(i, (i + 1) % 4) for i in range(4)]

  def loop(x):
    return jax.lax.fori_loop(0, 5, lambda i, c: jax.lax.psum(c, 'fsdp') / 4, x)

  return {
      'gradients': (jax.grad(loss), put(P(), LAYERS, WIDTH, WIDTH), put(P(both), BATCH, WIDTH)),
      'gather': (mapped(lambda x: jax.lax.all_gather(x, 'fsdp', tiled=True), P('fsdp'), P('fsdp')),
             put(P('fsdp'), 8, 6)),
      'scatter': (mapped(lambda x: jax.lax.psum_scatter(x, 'data', tiled=True), P('fsdp'), P(('fsdp', 'data'))),
              put(P('fsdp'), 32, 6)),
      'exchange': (mapped(lambda x: jax.lax.all_to_all(x, 'fsdp', 1, 0, tiled=True), P('fsdp'), P(None, 'fsdp')),
                   put(P('fsdp'), 8, 12)),
      'shift': (mapped(lambda x: jax.lax.ppermute(x, 'fsdp', ring), P('fsdp'), P('fsdp')), put(P('fsdp'), 8, 6)),
      'loop': (mapped(loop, P('data'), P('data')), put(P('data'), 8, 6)),
  }


def main():
  """Writes JSON."""
  mesh = jax.make_mesh((2, 4), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
  compiled = {}
  for name, (fn, *args) in programs(mesh).items():
    compiled[name] = jax.jit(fn).lower(*args).compile().as_text()
  print(json.dumps(compiled))


if __name__ == '__main__':
  main()
