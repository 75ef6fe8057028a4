"""Stages of dilated convolutions over time: MS-TCN and its causal form, TeCNO, on features of the frames of a video.

Farha and Gall 2019 (yabufarha/ms-tcn, model.py) and Czempiel et al. 2020 (tobiascz/TeCNO, models/mstcn.py). A causal
model looks at no later frame, so that it runs frame by frame: `step` gives what `__call__` gives of the whole video.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxmed.errors import choose
from jaxmed.models.layers.convolution import conv_init
from jaxmed.models.layers.initial import patch_laws
from jaxmed.models.layers.transformer import Dense

KERNEL = 3
SIZES: dict[str, dict[str, Any]] = {
    'ms_tcn': dict(stages=4, layers=10, width=64, causal=False),
    'ms_tcn_causal': dict(stages=4, layers=10, width=64, causal=True),
    'tecno': dict(stages=2, layers=8, width=32, causal=True),
}


def receptive_field(layers: int) -> int:
  """Frames that an output of a stage depends on: 511 for 8 layers of kernel 3 and dilations 1, 2, 4, ..."""
  return 1 + (KERNEL - 1) * (2**layers - 1)


def create_stages(name: str, num_classes: int, **options: Any) -> 'MultiStage':
  """The published sizes by name, of SIZES, with other fields of `MultiStage` as options."""
  return MultiStage(num_classes, **{**SIZES[choose('temporal head', name, SIZES)], **options})


class DilatedLayer(nn.Module):
  """x + dropout(1x1(relu(convolution of kernel 3))) over time, zeros before the video (and behind, if not causal)."""

  width: int
  dilation: int
  causal: bool
  dropout: float = 0.5
  dtype: Any = 'float32'

  def setup(self):
    boxed, shape = nn.with_logical_partitioning, (KERNEL, self.width, self.width)
    self.kernel = self.param('kernel', boxed(conv_init('torch'), (None, None, 'embed')), shape, jnp.float32)
    law = patch_laws('torch', '', math.prod(shape[:2]))[1]
    self.bias = self.param('bias', boxed(law, ('embed',)), (self.width,), jnp.float32)
    self.out = _dense(self.width, self.width, self.dtype)
    self.drop = nn.Dropout(self.dropout)

  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps x [B, T, W] to [B, T, W]."""
    reach = self.dilation * (KERNEL - 1)
    ends = (reach, 0) if self.causal else (reach // 2, reach // 2)
    y = lax.conv_general_dilated(x, self.kernel.astype(x.dtype), (1,), [ends], rhs_dilation=(self.dilation,),
                                 dimension_numbers=('NWC', 'WIO', 'NWC'))
    return self._end(x, y, train)

  def step(self, past: jax.Array, x: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(past, output [B, W]) of a frame x [B, W]; frame t is at t modulo 2 * dilation of `past` [B, 2 * dilation, W]."""
    at = lambda ago: lax.dynamic_index_in_dim(past, (time - ago) % past.shape[1], 1, keepdims=False)
    kernel = self.kernel.astype(x.dtype)
    y = at(2 * self.dilation) @ kernel[0] + at(self.dilation) @ kernel[1] + x @ kernel[2]
    return lax.dynamic_update_index_in_dim(past, x, time % past.shape[1], 1), self._end(x, y, False)

  def _end(self, x: jax.Array, y: jax.Array, train: bool) -> jax.Array:
    y = self.out(nn.relu(y + self.bias.astype(x.dtype)))
    return x + self.drop(y, deterministic=not train)


class Stage(nn.Module):
  """A projection, `layers` dilated layers of dilations 1, 2, 4, ..., and logits."""

  inputs: int
  num_classes: int
  layers: int
  width: int
  causal: bool
  dropout: float = 0.5
  dtype: Any = 'float32'

  def setup(self):
    self.project = _dense(self.inputs, self.width, self.dtype)
    self.layer = [DilatedLayer(self.width, 2**i, self.causal, self.dropout, self.dtype) for i in range(self.layers)]
    self.out = _dense(self.width, self.num_classes, self.dtype)

  def __call__(self, x: jax.Array, mask: jax.Array | None = None, train: bool = False) -> jax.Array:
    """Logits [B, T, K] float32 of x [B, T, inputs]; zeros before and after every layer where `mask` [B, T] is False.

    So padding changes nothing of a video; MS-TCN's code does not mask the projection, whose bias the first layer sees.
    """
    kept = (lambda y: y) if mask is None else (lambda y: jnp.where(mask[..., None], y, 0))
    x = kept(self.project(x))
    for layer in self.layer:
      x = kept(layer(x, train))
    return kept(self.out(x)).astype(jnp.float32)

  def step(self, past: tuple[jax.Array, ...], x: jax.Array, time: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """(past, logits [B, K]) of a frame x [B, inputs]."""
    x, kept = self.project(x), []
    for layer, state in zip(self.layer, past, strict=True):
      state, x = layer.step(state, x, time)
      kept.append(state)
    return tuple(kept), self.out(x).astype(jnp.float32)


class MultiStage(nn.Module):
  """Logits of every stage; each after the first sees the probabilities of the one before.

  Attributes:
    num_classes: K. stages, layers, width: see SIZES. causal: whether no output depends on a later frame.
    features: D of a frame. dropout: of each layer, 0.5 as published.
  """

  num_classes: int
  stages: int = 4
  layers: int = 10
  width: int = 64
  causal: bool = False
  dropout: float = 0.5
  features: int = 2048
  dtype: Any = 'float32'

  def setup(self):
    self.stage = [Stage(self.num_classes if i else self.features, self.num_classes, self.layers, self.width,
                        self.causal, self.dropout, self.dtype) for i in range(self.stages)]

  def __call__(self, x: jax.Array, mask: jax.Array | None = None, train: bool = False) -> jax.Array:
    """Logits [S, B, T, K] float32 of features [B, T, D]; `mask` [B, T] bool, False after the end of a video."""
    found = [self.stage[0](x.astype(self.dtype), mask, train)]
    for stage in self.stage[1:]:
      p = nn.softmax(found[-1])
      p = p if mask is None else jnp.where(mask[..., None], p, 0)
      found.append(stage(p.astype(self.dtype), mask, train))
    return jnp.stack(found)

  def cache(self, batch: int) -> dict[str, Any]:
    """What `step` remembers before the first frame of videos [B]: the inputs that its convolutions look back at."""
    if not self.causal:
      raise ValueError('a model that looks at later frames has no step')
    state = lambda i: jnp.zeros((batch, 2 * 2**i, self.width), self.dtype)
    return {'time': jnp.zeros((), jnp.int32),
            'past': tuple(tuple(state(i) for i in range(self.layers)) for _ in range(self.stages))}

  def step(self, cache: dict[str, Any], frame: jax.Array) -> tuple[dict[str, Any], jax.Array]:
    """(cache, logits [S, B, K]) of the next frame [B, D]: `module.apply(v, cache, frame, method='step')`."""
    x, past, found = frame.astype(self.dtype), [], []
    for stage, state in zip(self.stage, cache['past'], strict=True):
      state, logits = stage.step(state, x, cache['time'])
      past.append(state)
      found.append(logits)
      x = nn.softmax(logits).astype(self.dtype)
    return {'time': cache['time'] + 1, 'past': tuple(past)}, jnp.stack(found)


def _dense(inputs: int, outputs: int, dtype: Any) -> Dense:
  """A 1x1 convolution with PyTorch's first values."""
  return Dense((outputs,), (None, 'embed'), True, 'torch_uniform', jnp.dtype(dtype),
               bias_init=patch_laws('torch', '', inputs)[1])
