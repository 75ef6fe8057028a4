"""Heads that the objectives put on an encoder's vectors; none of them is part of the product."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.models.layers import kernels
from jaxmed.models.layers.initial import initializer
from jaxmed.models.layers.norm import BatchNorm, normalize
from jaxmed.models.layers.transformer import Dense

LAST_NORMS = ('none', 'plain', 'affine')
CLASS_LOSSES = ('cross_entropy', 'proxy')
LAST_LAYERS = ('weight_norm', 'fixed_norm', 'linear')


class MLPHead(nn.Module):
  """Dense layers with batch normalisation and ReLU between them: projectors and predictors of contrastive methods.

  Attributes:
    features: width of each layer; the last is the output's.
    norm: whether hidden layers are batch-normalised. affine: whether these norms have scale and bias.
    last_norm: of the output: 'none', 'plain' (without scale and bias) or 'affine'.
    use_bias, last_bias: of the hidden dense layers and of the last one.
  """

  features: tuple[int, ...]
  norm: bool = True
  affine: bool = True
  last_norm: str = 'none'
  use_bias: bool = False
  last_bias: bool = True
  kernel_init: str = 'torch_uniform'
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps x [..., D] to [..., features[-1]]."""
    compute = jnp.dtype(self.dtype)
    last = len(self.features) - 1
    for i, width in enumerate(self.features):
      bias = self.last_bias if i == last else self.use_bias
      axes = ('mlp', 'embed') if i % 2 else ('embed', 'mlp')
      x = Dense((width,), axes, bias, self.kernel_init, compute, name=f'dense{i}')(x)
      if i < last:
        x = BatchNorm(self.affine, self.affine, dtype=compute, name=f'norm{i}')(x, train) if self.norm else x
        x = jax.nn.relu(x)
    if self.last_norm != 'none':
      affine = self.last_norm == 'affine'
      x = BatchNorm(affine, affine, dtype=compute, name=f'norm{last}')(x, train)
    return x


class DINOHead(nn.Module):
  """Vectors to prototype logits (facebookresearch/dino, vision_transformer.py; dinov2 and dinov3, layers/dino_head.py).

  GELU MLP to a bottleneck, L2 normalisation, then a layer without bias whose `last` form differs: 'weight_norm'
  (directions with trained lengths that start at 1: DINOv2), 'fixed_norm' (lengths stay 1: DINO with
  norm_last_layer) or 'linear' (DINOv3).
  """

  out_dim: int
  hidden_dim: int = 2048
  bottleneck_dim: int = 256
  num_layers: int = 3
  last: str = 'weight_norm'
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [..., D] to logits [..., out_dim], float32."""
    compute = jnp.dtype(self.dtype)
    for i in range(self.num_layers - 1):
      axes = ('mlp', 'embed') if i % 2 else ('embed', 'mlp')
      x = kernels.gelu(Dense((self.hidden_dim,), axes, dtype=compute, name=f'dense{i}')(x))
    x = Dense((self.bottleneck_dim,), ('mlp', None), dtype=compute, name='bottleneck')(x).astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return Prototypes(self.out_dim, self.last, compute, name='last')(x)


class Prototypes(nn.Module):
  """A dense layer without bias from a normalised bottleneck to logits; `last` as in DINOHead."""

  out_dim: int
  last: str = 'linear'
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    boxed, compute = nn.with_logical_partitioning, jnp.dtype(self.dtype)
    init = initializer('trunc_normal' if self.last == 'linear' else 'torch_uniform')  # v2 leaves PyTorch's default
    kernel = self.param('kernel', boxed(init, ('embed', 'prototypes')), (x.shape[-1], self.out_dim), jnp.float32)
    if self.last != 'linear':
      kernel = kernel / jnp.maximum(jnp.linalg.norm(kernel, axis=0, keepdims=True), 1e-12)
    if self.last == 'weight_norm':
      length = self.param('length', boxed(nn.initializers.ones_init(), ('prototypes',)), (self.out_dim,), jnp.float32)
      kernel = kernel * length
    return kernels.dense(x.astype(compute), kernel.astype(compute)).astype(jnp.float32)


class ClassHead(nn.Module):
  """Logits of classes [..., K], float32, from vectors (chaudatascience/cha_mae_vit, models/cha_mae_vit.py).

  Attributes:
    kind: 'cross_entropy', a GELU MLP of four times the width whose output is divided by the temperature; or 'proxy',
      minus the squared distances of the projected unit vector to a unit vector of each class, over the temperature.
  """

  num_classes: int
  kind: str = 'cross_entropy'
  temperature: float = 1.0
  dtype: Any = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dim, compute = x.shape[-1], jnp.dtype(self.dtype)
    if self.kind == 'cross_entropy':
      x = kernels.gelu(Dense((4 * dim,), ('embed', 'mlp'), dtype=compute, name='fc1')(x))
      x = Dense((self.num_classes,), ('mlp', None), dtype=compute, name='fc2')(x)
      return x.astype(jnp.float32) / self.temperature
    init = nn.with_logical_partitioning(nn.initializers.orthogonal(), (None, 'embed'))
    proxies = self.param('proxies', init, (self.num_classes, dim), jnp.float32)
    x = Dense((dim,), ('embed', None), dtype=compute, name='project')(x)
    return (2 * normalize(x) @ normalize(proxies).T - 2) / self.temperature
