"""AdamW, LARS and SGD as the methods use them: decay of weight matrices alone, rates by layer, clipping by scope."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxmed.errors import UserError, choose
from jaxmed.objectives.networks import cosine

CLIP_SCOPES = ('global', 'module', 'tensor')
NAMES = ('adamw', 'lars', 'sgd')
MOMENTS = ('float32', 'bfloat16')
TRUST = 0.001  # of LARS: share of a weight's norm that an update has, times the rate (You et al. 2017)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An optimizer with warm-up and cosine schedules that depend on the step alone.

  Attributes:
    moments: 'float32', or 'bfloat16' for half the memory of AdamW's; sums are taken in float32 and stored rounded.
    name: 'adamw'; 'lars' (momentum on updates of the size of their weights, biases and norms as in SGD: the form of
      facebookresearch/barlowtwins and vicreg) or 'sgd' (Nesterov), both with b1 as momentum and decay in the gradient.
    learning_rate: peak; `warmup_steps` linear from 0, then cosine to `final_learning_rate` at `steps`.
    layer_decay: factor a layer below the top of the encoder (BEiT's rule): patch embedding d^(L+1), block i
      d^(L-i), norm and everything outside of the encoder 1. For convolutional encoders a layer is a stage, with the
      reduction before it, and the stem is the patch embedding.
    weight_decay, final_weight_decay: at the first and the last step, by a cosine; a negative final one means the same.
    patch_embed_scale, bias_scale: factors on the rate of the patch embedding, and of what does not decay.
    clip, clip_scope: largest gradient norm, of all ('global'), of each part such as encoder and decoder
      ('module', as DINOv2), or of each tensor, layer by layer ('tensor', as DINO).
  """

  learning_rate: float
  steps: int
  warmup_steps: int = 0
  final_learning_rate: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  weight_decay: float = 0.05
  final_weight_decay: float = -1.0
  layer_decay: float = 1.0
  patch_embed_scale: float = 1.0
  bias_scale: float = 1.0
  clip: float = 0.0
  clip_scope: str = 'global'
  name: str = 'adamw'
  moments: str = 'float32'

  def __post_init__(self):
    choose('optimizer.name', self.name, NAMES)
    choose('optimizer.clip_scope', self.clip_scope, CLIP_SCOPES)
    choose('optimizer.moments', self.moments, MOMENTS)
    if self.learning_rate <= 0:
      raise UserError(f'learning_rate {self.learning_rate} must be positive')
    if not 0 < self.layer_decay <= 1:
      raise UserError(f'optimizer.layer_decay {self.layer_decay} must lie in (0, 1]')

  def schedule(self, step: jax.Array) -> jax.Array:
    """Learning rate at a step."""
    warmup = min(self.warmup_steps, max(self.steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else self.learning_rate, self.learning_rate, warmup, max(self.steps, warmup + 1),
        self.final_learning_rate)(step)

  def decay(self, step: jax.Array) -> jax.Array | float:
    """Weight decay at a step."""
    end = self.final_weight_decay
    return self.weight_decay if end < 0 else cosine(self.weight_decay, end, step, max(self.steps, 1))

  def init(self, params: Any) -> Any:
    """Moments, of the structure of params (boxed or not)."""
    return self._rule.init(params)

  def update(self, grads: Any, moments: Any, params: Any, step: jax.Array,
             frozen: Mapping[str, jax.Array] | None = None,
             slowdown: jax.Array | float = 1.0) -> tuple[Any, Any]:
    """One step: (new params, new moments).

    `frozen` maps paths such as 'head/last' to whether what lies below them stays as it is at this step, its moments
    and their count too, as for PyTorch's parameters without a gradient; `slowdown` is a factor on the learning rate.
    """
    still = lambda path: _frozen(path, frozen or {})
    grads = jax.tree_util.tree_map_with_path(lambda path, g: _unless(still(path), g, jnp.zeros_like(g)), grads)
    if self.clip:
      grads = clip_gradients(grads, self.clip, self.clip_scope)
    decay = self.decay(step)
    if self.name != 'adamw':
      pulled = lambda path, g, p: g + decay * p if decays(path) else g
      grads = jax.tree_util.tree_map_with_path(pulled, grads, params)
    if self.name == 'lars':
      grads = jax.tree_util.tree_map_with_path(_trusted, grads, params)
    updates, fresh = self._rule.update(grads, moments, params)
    if self.name == 'adamw' and frozen:  # a later start is a start: the bias of empty moments is corrected then
      hold = lambda path, new, old: _unless(still(path), new, old)
      fresh = {k: jax.tree_util.tree_map_with_path(hold, fresh[k], moments[k]) for k in fresh}
    moments = fresh
    rate, depth = slowdown * self.schedule(step), _depth(params)

    def apply(path, param, update):
      if decays(path) and self.name == 'adamw':
        update = update + decay * param
      scale = layer_scale(path, param.shape, self.layer_decay, depth)
      if path[0].key == 'encoder' and path[1].key == 'patch_embed':
        scale = scale * self.patch_embed_scale
      if not decays(path):
        scale = scale * self.bias_scale
      return _unless(still(path), param - rate * scale * update, param)

    return jax.tree_util.tree_map_with_path(apply, params, updates), moments

  @property
  def _rule(self) -> optax.GradientTransformation:
    if self.name == 'adamw':
      return _adam(self.b1, self.b2, jnp.dtype(self.moments))
    return optax.trace(self.b1, nesterov=self.name == 'sgd')


def _adam(b1: float, b2: float, dtype: Any, epsilon: float = 1e-8) -> optax.GradientTransformation:
  """Adam's direction (Kingma, Ba 2015), with a count of the steps of each parameter, as PyTorch has it."""
  def init(params):
    boxed = lambda x: isinstance(x, nn.meta.AxisMetadata)
    count = jax.tree.map(lambda _: jnp.zeros((), jnp.int32), params, is_leaf=boxed)
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros_like(x, dtype), params)
    return {'count': count, 'mu': zeros(), 'nu': zeros()}

  def update(grads, moments, params=None):
    del params
    count = jax.tree.map(lambda n: n + 1, moments['count'])
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, moments['mu'], grads)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), moments['nu'], grads)
    direction = lambda n, m, v: m / (1 - b1**n) / (jnp.sqrt(v / (1 - b2**n)) + epsilon)
    stored = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    return jax.tree.map(direction, count, mu, nu), {'count': count, 'mu': stored(mu), 'nu': stored(nu)}

  return optax.GradientTransformation(init, update)


def _trusted(path: tuple, grad: jax.Array, param: jax.Array) -> jax.Array:
  """A gradient at TRUST times the size of its weight matrix (of each block where they are stacked)."""
  if not decays(path):
    return grad
  axes = tuple(range(_stacked(path), grad.ndim))
  norm = lambda x: jnp.sqrt(jnp.square(x).sum(axis=axes, keepdims=True))
  weight, size = norm(param), norm(grad)
  return grad * jnp.where((weight > 0) & (size > 0), TRUST * weight / jnp.maximum(size, 1e-30), 1.0)


def _stacked(path: tuple) -> int:
  """1 for parameters of scanned blocks, whose first axis is the block."""
  return int(any(getattr(k, 'key', '') == 'blocks' for k in path))  # JAX's keys of a path: one of a list has no `key`


def _frozen(path: tuple, frozen: Mapping[str, jax.Array]) -> jax.Array | bool:
  name = '/'.join(str(k.key) for k in path)
  for prefix, value in frozen.items():
    if name == prefix or name.startswith(prefix + '/'):
      return value
  return False


def _unless(still: jax.Array | bool, moved: jax.Array, at_rest: jax.Array) -> jax.Array:
  return moved if still is False else jnp.where(still, at_rest, moved)


def decays(path: tuple) -> bool:
  """Whether weight decay applies: to dense kernels alone, not to biases, norms, tokens or embeddings."""
  return path[-1].key == 'kernel'


def layer_scale(path: tuple, shape: tuple[int, ...], decay: float, depth: int) -> jax.Array | float:
  """Factor on the learning rate of one parameter; an array over the leading axis where layers are stacked."""
  if decay == 1.0 or path[0].key != 'encoder' or path[1].key in ('norm', 'norm_local'):
    return 1.0
  if path[1].key != 'transformer':
    return decay ** (depth - _stage(path[1].key))
  power = (depth - jnp.arange(depth)).astype(jnp.float32)
  return (decay**power).reshape(-1, *[1] * (len(shape) - 1))


def _depth(params: Any) -> int:
  """Number of stacked blocks of the encoder, or of its stages."""
  encoder = params.get('encoder', {})
  if 'transformer' in encoder:
    return jax.tree.leaves(encoder['transformer'])[0].shape[0]
  return max(map(_stage, encoder), default=-1) + 1


def _stage(name: str) -> int:
  """The stage that a module of a convolutional encoder belongs to, from 0 on; -1 for a stem and all else."""
  found = re.match(r'(stage|down|norm)(\d)|layer(\d)_', name)
  if not found:
    return -1
  return int(found[2]) if found[2] else int(found[3]) - 1


def clip_gradients(grads: Any, limit: float, scope: str) -> Any:
  """Scales gradients so that the norm over each scope is at most `limit`."""
  if scope == 'global':
    return _scaled(grads, optax.tree.norm(grads), limit)
  if scope == 'module':
    return {name: _scaled(part, optax.tree.norm(part), limit) for name, part in grads.items()}

  def one(path, grad):
    axes = tuple(range(_stacked(path), grad.ndim))
    return _scaled(grad, jnp.sqrt(jnp.square(grad).sum(axis=axes, keepdims=True)), limit)

  return jax.tree_util.tree_map_with_path(one, grads)


def _scaled(tree: Any, norm: jax.Array, limit: float) -> Any:
  factor = jnp.minimum(1.0, limit / (norm + 1e-6))
  return jax.tree.map(lambda g: g * factor, tree)
