"""First values of weights, as PyTorch, timm and the published codes draw them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

STD = 0.02  # of tokens, tables of positions and most kernels
KERNELS = ('trunc_normal', 'trunc_normal_tf', 'beit', 'xavier_uniform', 'xavier_qkv', 'torch_uniform')
PATCHES = ('', 'torch', 'torch_bias', 'xavier')


def initializer(name: str) -> nn.initializers.Initializer:
  """Initialiser of a dense kernel by name.

  'trunc_normal' (timm's and PyTorch's trunc_normal_(std=0.02), which cuts at +-2 and so nowhere), 'trunc_normal_tf'
  (timm's of that name: cut at two deviations, 0.0176 remain), 'beit' (cut at one deviation, 0.0108 remain; the
  transformer divides what ends a branch by sqrt(2 * layer)), 'xavier_uniform' (as MAE), 'xavier_qkv' (the same, with
  queries, keys and values as three matrices, as MoCo v3), 'torch_uniform' (in +-1 / sqrt(fan_in), PyTorch's default),
  'zeros' (what ends an adapter).
  """
  if name in ('trunc_normal', 'trunc_normal_tf', 'beit'):
    return normal(name)
  if name == 'xavier_uniform':
    return _xavier_uniform
  if name == 'xavier_qkv':
    return _xavier_qkv
  if name == 'torch_uniform':
    return nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform', in_axis=0, out_axis=-1)
  if name == 'zeros':
    return nn.initializers.zeros_init()
  raise ValueError(f'unknown kernel_init {name!r}')


def normal(kernel_init: str = 'trunc_normal', std: float = STD) -> nn.initializers.Initializer:
  """Law of tokens and tables beside kernels of that law: normal, cut off where the kernels' is."""
  cut = {'trunc_normal_tf': 2.0, 'beit': 1.0}.get(kernel_init)
  return nn.initializers.normal(std) if cut is None else truncated(std, cut)


def truncated(std: float, cut: float) -> nn.initializers.Initializer:
  """A normal law of deviation `std` before it is cut off at `cut` deviations; less than `std` remains."""
  return lambda key, shape, dtype=jnp.float32: std * jax.random.truncated_normal(key, -cut, cut, shape, dtype)


def patch_laws(patch_init: str, kernel_init: str, fan_in: int) -> tuple[str, nn.initializers.Initializer]:
  """(name of the kernel's law, law of the biases) of a patch embedding with `fan_in` inputs.

  '': kernels as `kernel_init`, biases zero; 'torch': both in +-1 / sqrt(fan_in), PyTorch's default of a convolution;
  'torch_bias': the biases alone; 'xavier': these, and kernels by Xavier's law (data2vec).
  """
  bound = fan_in**-0.5
  uniform = lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)
  kernels = {'torch': 'torch_uniform', 'xavier': 'xavier_uniform'}.get(patch_init, kernel_init)
  return kernels, uniform if patch_init else nn.initializers.zeros_init()


def _xavier_uniform(key, shape, dtype=jnp.float32, parts=1):
  """Uniform in +-sqrt(6 / (fan_in + fan_out)) with the fans of the kernel seen as `parts` matrices [shape[0], rest]."""
  bound = (6.0 / (shape[0] + np.prod(shape[1:]) / parts)) ** 0.5
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def _xavier_qkv(key, shape, dtype=jnp.float32):
  return _xavier_uniform(key, shape, dtype, parts=shape[1] if len(shape) == 4 else 1)  # [D, 3, heads, head_dim]
