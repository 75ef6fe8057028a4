"""AdamW as the methods use it: decay only of weight matrices, layer-wise rates, clipping by scope, one schedule."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmed.errors import UserError, choose

CLIP_SCOPES = ('global', 'module', 'tensor')


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW with a warm-up and cosine schedule that depends on the step alone.

  Attributes:
    learning_rate: peak; `warmup_steps` linear from 0, then cosine to `final_learning_rate` at `steps`.
    layer_decay: factor a layer below the top of the encoder (BEiT's rule): patch embedding d^(L+1), block i
      d^(L-i), norm and everything outside of the encoder 1.
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
  layer_decay: float = 1.0
  clip: float = 0.0
  clip_scope: str = 'global'

  def __post_init__(self):
    choose('optimizer.clip_scope', self.clip_scope, CLIP_SCOPES)
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

  def init(self, params: Any) -> Any:
    """Moments, of the structure of params (boxed or not)."""
    return self._adam.init(params)

  def update(self, grads: Any, moments: Any, params: Any, step: jax.Array) -> tuple[Any, Any]:
    """One step: (new params, new moments)."""
    if self.clip:
      grads = clip_gradients(grads, self.clip, self.clip_scope)
    updates, moments = self._adam.update(grads, moments, params)
    rate, depth = self.schedule(step), _depth(params)

    def apply(path, param, update):
      if decays(path):
        update = update + self.weight_decay * param
      return param - rate * layer_scale(path, param.shape, self.layer_decay, depth) * update

    return jax.tree_util.tree_map_with_path(apply, params, updates), moments

  @property
  def _adam(self) -> optax.GradientTransformation:
    return optax.scale_by_adam(self.b1, self.b2)


def decays(path: tuple) -> bool:
  """Whether weight decay applies: to dense kernels alone, not to biases, norms, tokens or embeddings."""
  return path[-1].key == 'kernel'


def layer_scale(path: tuple, shape: tuple[int, ...], decay: float, depth: int) -> jax.Array | float:
  """Factor on the learning rate of one parameter; an array over the leading axis where layers are stacked."""
  if decay == 1.0 or path[0].key != 'encoder' or path[1].key == 'norm':
    return 1.0
  if path[1].key != 'transformer':
    return decay ** (depth + 1)
  power = (depth - jnp.arange(depth)).astype(jnp.float32)
  return (decay**power).reshape(-1, *[1] * (len(shape) - 1))


def _depth(params: Any) -> int:
  """Number of stacked blocks of the encoder."""
  blocks = params.get('encoder', {}).get('transformer', {})
  return jax.tree.leaves(blocks)[0].shape[0] if blocks else 0


def clip_gradients(grads: Any, limit: float, scope: str) -> Any:
  """Scales gradients so that the norm over each scope is at most `limit`."""
  if scope == 'global':
    return _scaled(grads, optax.global_norm(grads), limit)
  if scope == 'module':
    return {name: _scaled(part, optax.global_norm(part), limit) for name, part in grads.items()}

  def one(path, grad):
    stacked = any(getattr(k, 'key', '') == 'blocks' for k in path)
    axes = tuple(range(1 if stacked else 0, grad.ndim))
    return _scaled(grad, jnp.sqrt(jnp.square(grad).sum(axis=axes, keepdims=True)), limit)

  return jax.tree_util.tree_map_with_path(one, grads)


def _scaled(tree: Any, norm: jax.Array, limit: float) -> Any:
  factor = jnp.minimum(1.0, limit / (norm + 1e-6))
  return jax.tree.map(lambda g: g * factor, tree)
