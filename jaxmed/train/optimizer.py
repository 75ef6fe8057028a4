"""The optimizer: a chain of optax transformations, with decay of matrices alone, rates by layer, groups by path."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from jaxmed.errors import UserError, choose
from jaxmed.models.layers.adapters import is_adapter
from jaxmed.objectives.networks import cosine
from jaxmed.train import rules, width
from jaxmed.train.width import Growth, name_of

CLIP_SCOPES = ('global', 'module', 'tensor')
MOMENTS = ('float32', 'bfloat16')
ANNEALING = ('cosine', 'poly', 'none')
POWER = 0.9  # of the polynomial (nnU-Net, PolyLRScheduler)
TRUST = 0.001  # of LARS: share of a weight's norm that an update has, times the rate (You et al. 2017)
REST = 'rest'  # the group of what no other group has
HELD = 'held'  # the group of what is never trained beside adapters: it has no moments


@dataclasses.dataclass(frozen=True)
class Group:
  """Parameters with a rule, rate or period that differs from the rest.

  Attributes:
    paths: where they lie, such as 'head' or 'encoder/patch_embed'. name: their rule; '' for the optimizer's.
    rate: factor on the learning rate. every: steps from one update to the next; between them all rests, moments too.
    options: of the rule.
  """

  paths: tuple[str, ...]
  name: str = ''
  rate: float = 1.0
  every: int = 1
  options: tuple[tuple[str, Any], ...] = ()

  def __post_init__(self):
    if self.name:
      rules.check('optimizer.groups.*.name', self.name)
    if self.rate < 0 or self.every < 1:
      raise UserError(f'optimizer.groups: rate {self.rate} must be at least 0, and every {self.every} at least 1')


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An optimizer with warm-up and cosine schedules that depend on the step alone.

  Attributes:
    moments: 'float32', or 'bfloat16' for half the memory of AdamW's; sums are taken in float32 and stored rounded.
    name: 'adamw'; 'lars' (momentum on updates of the size of their weights, biases and norms as in SGD: the form of
      facebookresearch/barlowtwins and vicreg), 'sgd' (Nesterov), both with b1 as momentum and decay in the gradient;
      any rule of optax, see `rules.names`, such as 'muon' or 'lion'; or one of these after 'schedule_free_' (Defazio et
      al. 2024), which has b1 as the share of its average in the weights that are trained.
    options: of a rule of optax.
    learning_rate: peak; `warmup_steps` linear from 0, then with annealing 'cosine' to `final_learning_rate` at `steps`,
      with 'poly' along (1 - t)^0.9 of the steps after warm-up, with 'none' constant, as schedule-free rules always are.
    layer_decay: factor a layer below the top of the encoder (BEiT's rule): patch embedding d^(L+1), block i
      d^(L-i), norm and everything outside of the encoder 1. For convolutional encoders a layer is a stage, with the
      reduction before it, and the stem is the patch embedding.
    weight_decay, final_weight_decay: at the first and the last step, by a cosine; a negative final one means the same.
    decay_lengths: whether the lengths of weight-normalised layers decay as kernels do (DINO, iBOT and DINOv2, where
      they are matrices [K, 1] and only vectors are exempt).
    frozen_moments: whether what a method freezes at first counts for the norm of clipping and has moments that go on,
      as a rate of 0 would have it (DINOv2, DINOv3); otherwise it is as without a gradient (DINO).
    patch_embed_scale, bias_scale: factors on the rate of the patch embedding, and of what does not decay.
    clip, clip_scope: largest gradient norm, of all ('global'), of each part such as encoder and decoder
      ('module', as DINOv2), or of each tensor, layer by layer ('tensor', as DINO).
    groups: (name, Group) of parameters that are trained in their own way.
    towers: the parts of the parameters that have depth, for layer_decay and patch_embed_scale.
    freeze: paths that are never trained; 'encoder/blocks/0..8' are blocks 0 to 8, both included.
    growth: (path, Growth) of parameters that grew over a base width, whose rates follow by muP, see `width`.
    adapted: towers whose adapters alone are trained, and parameters that have one of the names in `beside`.
  """

  learning_rate: float
  steps: int
  warmup_steps: int = 0
  final_learning_rate: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  weight_decay: float = 0.05
  final_weight_decay: float = -1.0
  decay_lengths: bool = False
  frozen_moments: bool = False
  layer_decay: float = 1.0
  patch_embed_scale: float = 1.0
  bias_scale: float = 1.0
  clip: float = 0.0
  clip_scope: str = 'global'
  name: str = 'adamw'
  moments: str = 'float32'
  annealing: str = 'cosine'
  options: tuple[tuple[str, Any], ...] = ()
  groups: tuple[tuple[str, Group], ...] = ()
  towers: tuple[str, ...] = ('encoder',)
  freeze: tuple[str, ...] = ()
  growth: tuple[tuple[str, Growth], ...] = ()
  adapted: tuple[str, ...] = ()
  beside: tuple[str, ...] = ()

  def __post_init__(self):
    rules.check('optimizer.name', self.name)
    choose('optimizer.clip_scope', self.clip_scope, CLIP_SCOPES)
    choose('optimizer.moments', self.moments, MOMENTS)
    choose('optimizer.annealing', self.annealing, ANNEALING)
    if self.learning_rate <= 0:
      raise UserError(f'learning_rate {self.learning_rate} must be positive')
    if not 0 < self.layer_decay <= 1:
      raise UserError(f'optimizer.layer_decay {self.layer_decay} must lie in (0, 1]')
    free = {(group.name or self.name).startswith(rules.FREE) for group in self._all.values()}
    if free == {True, False}:
      raise UserError(f'optimizer.groups: either all rules begin with {rules.FREE} or none does')
    for group in self._all.values():
      self._rule(group)  # which looks at its options
    width.check('mup' if self.growth else 'standard', map(self._name_of, self._all.values()))

  @property
  def free(self) -> bool:
    """Whether the weights to use are an average that the rule keeps, see `averaged`."""
    return self.name.startswith(rules.FREE)

  def schedule(self, step: jax.Array) -> jax.Array:
    """Learning rate at a step."""
    warmup = min(self.warmup_steps, max(self.steps - 1, 0))
    if self.free or self.annealing == 'none':
      return optax.warmup_constant_schedule(0.0 if warmup else self.learning_rate, self.learning_rate, warmup)(step)
    if self.annealing == 'poly':
      rise = optax.linear_schedule(0.0, self.learning_rate, max(warmup, 1))
      fall = optax.polynomial_schedule(self.learning_rate, self.final_learning_rate, POWER, max(self.steps - warmup, 1))
      return optax.join_schedules([rise, fall], [warmup])(step)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else self.learning_rate, self.learning_rate, warmup, max(self.steps, warmup + 1),
        self.final_learning_rate)(step)

  def decay(self, step: jax.Array) -> jax.Array | float:
    """Weight decay at a step."""
    end = self.final_weight_decay
    return self.weight_decay if end < 0 else cosine(self.weight_decay, end, step, max(self.steps, 1))

  def init(self, params: Any) -> Any:
    """Moments: the state of the rule, with groups {group: state}; of the structure of params (boxed or not)."""
    states = {name: self._rule(self._all[name]).init(part) for name, part in self._divided(params).items()
              if name != HELD}
    return states if self.groups else states[REST]

  def update(self, grads: Any, moments: Any, params: Any, step: jax.Array,
             frozen: Mapping[str, jax.Array] | None = None,
             slowdown: jax.Array | float = 1.0) -> tuple[Any, Any]:
    """One step: (new params, new moments).

    `frozen` maps paths such as 'head/last' to whether what lies below them stays as it is at this step, its moments
    and their count too, as for PyTorch's parameters without a gradient (but see `frozen_moments`); `slowdown` is a
    factor on the learning rate.
    """
    depths = {tower: _depth(params[tower]) for tower in self.towers if tower in params}
    frozen = frozen or {}
    still = lambda path: _either(self._between(path, step), _blocks_at_rest(path, self.freeze, depths),
                                 False if self.frozen_moments else _frozen(path, frozen))
    kept = lambda path: _either(still(path), _frozen(path, frozen))
    grads = jax.tree_util.tree_map_with_path(lambda path, g: _unless(still(path), g, jnp.zeros_like(g)), grads)
    if self.clip:
      grads = clip_gradients(grads, self.clip, self.clip_scope)
    grads, states = self._divided(grads), moments if self.groups else {REST: moments}
    rate, decay, out = slowdown * self.schedule(step), self.decay(step), {}
    parts = self._divided(params)
    held = {name: parts.pop(name) for name in (HELD,) if name in parts}
    for name, part in parts.items():
      group = self._all[name]
      before, after = self._around(group, decay, rate * group.rate, depths)
      out[name] = self._step(self._rule(group, after), before, after, grads[name], states[name], part)
      if frozen or self.freeze or any(g.every > 1 for _, g in self.groups):
        out[name] = _held(out[name], (part, states[name]), kept, still)
    fresh = {name: state for name, (_, state) in out.items()}
    new = self._united({name: part for name, (part, _) in out.items()} | held)
    return new, fresh if self.groups else fresh[REST]

  def averaged(self, moments: Any, params: Any) -> Any:
    """The weights to use of a schedule-free rule (Defazio et al. 2024: x; params are y)."""
    states = moments if self.groups else {REST: moments}
    return self._united({name: part if name == HELD else contrib.schedule_free_eval_params(states[name], part)
                         for name, part in self._divided(params).items()})

  def group_of(self, path: tuple[str, ...]) -> str:
    """The group of a parameter: the last one with a path that the parameter lies below."""
    name = '/'.join(path)
    return next((group for group, g in reversed(self.groups) if any(_below(name, p) for p in g.paths)), REST)

  def holds(self, path: tuple[str, ...]) -> bool:
    """Whether a parameter is never trained, as adapters beside it are."""
    names = path[1:]
    return path[0] in self.adapted and not is_adapter(names) and not any(name in self.beside for name in names)

  def part_of(self, path: tuple[str, ...]) -> str:
    """The group of a parameter, or HELD."""
    return HELD if self.holds(path) else self.group_of(path)

  def only_trained(self, params: Any) -> Any:
    """The parameters, of which those that are held give no gradients."""
    if not self.adapted:
      return params
    still = lambda path, x: jax.lax.stop_gradient(x) if self.holds(tuple(str(k.key) for k in path)) else x
    return jax.tree_util.tree_map_with_path(still, params)

  def check_paths(self, params: Any) -> None:
    """Raises a UserError where a path of a group or of `freeze` is none of the parameters'."""
    leaves = [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    known = {'/'.join(leaf.split('/')[:n]) for leaf in leaves for n in range(1, leaf.count('/') + 2)}
    for name, group in self.groups:
      for path in group.paths:
        choose(f'optimizer.groups.{name}.paths', path, sorted(known))
    for path in self.freeze:
      tower, blocks = _blocks(path)
      if blocks is None:
        choose('freeze', path, sorted(known))
        continue
      parts = params[choose('freeze', tower, self.towers)]
      if 'transformer' not in parts:
        raise UserError(f'freeze={path}: {tower} is not made of equal blocks; its parts are {", ".join(parts)}')
      if not blocks[0] <= blocks[1] < _depth(parts):
        raise UserError(f'freeze={path}: {tower} has blocks 0..{_depth(parts) - 1}')

  @property
  def _all(self) -> dict[str, Group]:
    return {REST: Group(())} | dict(self.groups)

  def _divided(self, tree: Any) -> dict[str, Any]:
    """{group: its part of a tree of parameters}."""
    return rules.divide(tree, self.part_of) if self.groups or self.adapted else {REST: tree}

  def _united(self, parts: dict[str, Any]) -> Any:
    """The inverse of `_divided`."""
    return rules.unite(parts) if self.groups or self.adapted else parts[REST]

  def _between(self, path: tuple, step: jax.Array) -> jax.Array | bool:
    """Whether a parameter's group rests at a step, between two of its updates."""
    every = self._all[self.group_of(tuple(str(k.key) for k in path))].every if self.groups else 1
    return step % every != 0 if every > 1 else False

  def _step(self, rule: optax.GradientTransformation, before: optax.GradientTransformation,
            after: optax.GradientTransformation, grads: Any, moments: Any, params: Any) -> tuple[Any, Any]:
    """(new params, new state of the rule) of a group, by the chain: decay, trust | rule | decay, rates."""
    updates, _ = before.update(grads, before.init(params), params)
    updates, fresh = rule.update(updates, moments, params)
    if not self.free:
      updates, _ = after.update(updates, after.init(params), params)
    return jax.tree.map(lambda p, u: p + u, params, updates), fresh

  def _around(self, group: Group, decay: Any, rate: Any,
              depths: Mapping[str, int]) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """What comes before the rule, gradients to gradients, and after it, directions to updates; neither has a state."""
    name, grown = self._name_of(group), dict(self.growth)
    widened = lambda path: grown[name_of(path)].rate(name) if name_of(path) in grown else 1.0

    def pulled(path, update, param):
      if not decays(path, self.decay_lengths):
        return update
      return update + (decay / widened(path) if grown else decay) * param  # times the rate it is as at the base width

    def scaled(path, update, param):
      scale = layer_scale(path, param.shape, self.layer_decay, depths)
      if path[0].key in self.towers and path[1].key == 'patch_embed':
        scale = scale * self.patch_embed_scale
      if not decays(path, self.decay_lengths):
        scale = scale * self.bias_scale
      return -(rate * (scale * widened(path) if grown else scale) * update)

    if name == 'lars':
      return optax.chain(_by_path(pulled), _by_path(_trusted)), _by_path(scaled)
    if name == 'sgd':
      return _by_path(pulled), _by_path(scaled)
    return optax.identity(), optax.chain(_by_path(pulled), _by_path(scaled))

  def _name_of(self, group: Group) -> str:
    return (group.name or self.name).removeprefix(rules.FREE)

  def _rule(self, group: Group, after: optax.GradientTransformation | None = None) -> optax.GradientTransformation:
    """The rule of a group; a schedule-free one holds what comes after it, as it averages whole updates."""
    name, options = self._name_of(group), dict(group.options if group.name else self.options)
    if not self.free:
      return rules.make(name, self.b1, self.b2, self.moments, options)
    rule = rules.make(name, 0.0, self.b2, self.moments, options)
    apply = lambda u, p: u if after is None else after.update(u, after.init(p), p)[0]
    return contrib.schedule_free(optax.chain(rule, optax.stateless(apply)), self.schedule, self.b1)


def _by_path(change: Callable) -> optax.GradientTransformation:
  """A transformation without a state: change(path, update, param) of each parameter."""
  return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(change, updates, params))


def _held(new: tuple[Any, Any], old: tuple[Any, Any], kept: Callable, still: Callable) -> tuple[Any, Any]:
  """(parameters, state of a rule): the old ones of parameters that are kept, and of states that are still."""
  # A later start is a start: with the counts held, the bias of empty moments is corrected then.
  form: Any = jax.tree.structure(new[0])
  alike = lambda tree: jax.tree.structure(tree) == form
  hold = lambda rests, *trees: jax.tree_util.tree_map_with_path(lambda path, n, o: _unless(rests(path), n, o), *trees)
  state = jax.tree.map(lambda n, o: hold(still, n, o) if alike(n) else n, new[1], old[1], is_leaf=alike)
  return hold(kept, new[0], old[0]), state


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


def _below(name: str, prefix: str) -> bool:
  return name == prefix or name.startswith(prefix + '/')


def _frozen(path: tuple, frozen: Mapping[str, jax.Array]) -> jax.Array | bool:
  name = name_of(path)
  return next((value for prefix, value in frozen.items() if _below(name, prefix)), False)


def _blocks(path: str) -> tuple[str, tuple[int, int] | None]:
  """'encoder/blocks/0..8' -> ('encoder', (0, 8)); (path, None) for what names no blocks."""
  found = re.fullmatch(r'(.+)/blocks/(\d+)(?:\.\.(\d+))?', path)
  return (found[1], (int(found[2]), int(found[3] or found[2]))) if found else (path, None)


def _blocks_at_rest(path: tuple, freeze: tuple[str, ...], depths: Mapping[str, int]) -> np.ndarray | bool:
  """Whether `freeze` holds a parameter; of stacked ones an array over the blocks."""
  name, rest = name_of(path), np.zeros(depths.get(path[0].key, 0), bool)
  for entry in freeze:
    tower, blocks = _blocks(entry)
    if blocks is None and _below(name, entry):
      return True
    if blocks is not None and _below(name, f'{tower}/transformer/blocks'):
      rest[blocks[0] : blocks[1] + 1] = True
  return rest if rest.any() else False


def _either(*parts: Any) -> Any:
  """Whether any holds; False and True stay Python's, so that nothing is computed for them."""
  if any(part is True for part in parts):
    return True
  parts = tuple(part for part in parts if part is not False)
  if len(parts) < 2:
    return parts[0] if parts else False
  widest = max(jnp.ndim(part) for part in parts)
  return functools.reduce(jnp.logical_or, (jnp.reshape(p, (-1, *[1] * (widest - 1))) if widest else p for p in parts))


def _unless(still: Any, moved: jax.Array, at_rest: jax.Array) -> jax.Array:
  if isinstance(still, bool):
    return at_rest if still else moved
  if jnp.ndim(still) > moved.ndim:  # a count of all blocks goes on until all rest
    still = jnp.all(still)
  return jnp.where(jnp.reshape(still, (*jnp.shape(still), *[1] * (moved.ndim - jnp.ndim(still)))), at_rest, moved)


def decays(path: tuple, lengths: bool = False) -> bool:
  """Whether weight decay applies: to kernels alone (and `lengths`), not to biases, norms, tokens or embeddings."""
  return path[-1].key == 'kernel' or (lengths and path[-1].key == 'length')


def layer_scale(path: tuple, shape: tuple[int, ...], decay: float, depths: Mapping[str, int]) -> jax.Array | float:
  """Factor on the learning rate of one parameter; an array over the leading axis where layers are stacked.

  `depths` are the layers of each tower, see `_depth`.
  """
  if decay == 1.0 or path[0].key not in depths or path[1].key in ('norm', 'norm_local'):
    return 1.0
  depth = depths[path[0].key]
  if path[1].key != 'transformer' or path[2].key != 'blocks':
    return decay ** (depth - _stage(path[1].key))
  power = (depth - jnp.arange(depth)).astype(jnp.float32)
  return (decay**power).reshape(-1, *[1] * (len(shape) - 1))


def _depth(encoder: Any) -> int:
  """Number of stacked blocks of an encoder's parameters, or of its stages."""
  if 'transformer' in encoder:
    return jax.tree.leaves(encoder['transformer']['blocks'])[0].shape[0]
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
