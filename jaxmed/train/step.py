"""The training state and the one jitted step, for every objective and any mesh."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxmed.augment.channels import cosines
from jaxmed.augment.views import ViewMaker
from jaxmed.contracts import Objective
from jaxmed.errors import UserError
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.train import rules
from jaxmed.train.monitor import spikes
from jaxmed.train.optimizer import HELD, Optimizer
from jaxmed.train.width import Width


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that must survive a restart.

  step: int32. params: trained by gradient. target: following by EMA. extra: queues, centres, prototypes.
  moments: of the optimizer. average: EMA of params, {} when off. rng: raw key data. rate: float32 factor on the
  learning rate, less than 1 after a rollback. skipped, skipped_in_row: int32 counts of updates left out because loss
  or gradient was not finite, or the loss a spike.
  """

  step: jax.Array
  params: Any
  target: Any
  extra: Any
  moments: Any
  average: Any
  rng: jax.Array
  rate: jax.Array
  skipped: jax.Array
  skipped_in_row: jax.Array

  def variables(self, fixed: Any = None) -> dict:
    """What an objective takes; `fixed` is what it only reads, None for nothing."""
    return {'params': self.params, 'target': self.target, 'extra': self.extra, 'fixed': fixed or {}}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SkippingState(TrainState):
  """The state of a run that skips spikes, with the last losses that were none [100] float32, see `spikes.judge`."""

  losses: jax.Array


@dataclasses.dataclass(frozen=True)
class Trainer:
  """What a step is made of; all fields are static.

  `offload` keeps the optimizer's moments in the host's memory between steps, where the backend has that: two copies
  of the parameters fewer on each device, for one transfer of them each way a step. `skip_spikes` leaves out the update
  of a step whose loss is a spike (`spikes.judge`). `sizes` are views of several sizes, of which each step sees one,
  drawn with the probabilities `shares` or, with `firsts`, the last one whose first step was reached; `view` remains
  what shapes, probes and held-out losses are made with. `width`: muP's first values; None for the standard ones.
  """

  objective: Objective
  optimizer: Optimizer
  view: ViewMaker
  seed: int = 0
  accumulate: int = 1
  ema: float = 0.0
  offload: bool = False
  skip_spikes: bool = False
  sizes: tuple[ViewMaker, ...] = ()
  shares: tuple[float, ...] = ()
  firsts: tuple[int, ...] = ()
  width: Width | None = None

  def create(self, batch: Any, key: Any = None) -> TrainState:
    """A boxed initial state (parameters carry logical axes); only the shapes of `batch` matter.

    `key`: raw data of the key to draw from; that of the seed by default.
    """
    rng = jax.random.key(self.seed) if key is None else jax.random.wrap_key_data(key)
    views = self.view(rng, batch)
    variables = self.objective.init(rng, views)
    if self.width is not None:
      variables = self.width.scaled(self.objective, variables, views)
    params = variables['params']
    keeps = self.ema or self.optimizer.free
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(
        step=zero, params=params, target=variables['target'], extra=variables['extra'],
        moments=self.optimizer.init(params), average=jax.tree.map(jnp.copy, params) if keeps else {},
        rng=jax.random.key_data(rng), rate=jnp.ones((), jnp.float32), skipped=zero, skipped_in_row=zero)
    return SkippingState(**vars(state), losses=spikes.empty()) if self.skip_spikes else state

  def abstract(self, batch: Any, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the state on a mesh."""
    return _abstract(_beginning(self), *_frozen(_shapes(batch)), mesh)

  def initialize(self, abstract: TrainState, batch: Any) -> TrainState:
    """The initial state, made on the devices that will hold it, as `abstract` says."""
    where = jax.tree.map(lambda x: x.sharding, abstract)
    make = jax.jit(_initial, static_argnums=(0, 1, 2), out_shardings=where)
    return make(_beginning(self), *_frozen(_shapes(batch)), _key(self.seed))

  def compile(self, abstract: TrainState, batch: Any, mesh: Mesh, fixed: Any = None) -> Callable:
    """Compiles (state, batch) -> (state, metrics); the state is donated. Equal trainers share one program.

    With `fixed`, what the objective only reads, the program takes it as a third argument, which is not donated.
    """
    same = dataclasses.replace(self, seed=0)  # the state has the key
    return _compiled(same, _frozen(abstract), _frozen(batch), _frozen(fixed or {}), mesh)

  def step(self, state: TrainState, batch: Any, fixed: Any = None) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update; left out, and counted, when a loss or a gradient is not finite, or the loss a spike.

    `fixed` is what the objective only reads, None for nothing.
    """
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    (loss, (metrics, extra)), grads = self._gradients(state, batch, rng, fixed or {})
    norms = {f'grad_norm/{k}': optax.tree.norm(g) for k, g in grads.items()}
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if isinstance(state, SkippingState):
      spike, losses = spikes.judge(state.losses, loss)
      good, state = good & ~spike, dataclasses.replace(state, losses=losses)
    stats = metrics.pop('stats', {})
    frozen = self.objective.frozen(state.step)
    if self.offload:
      state = dataclasses.replace(state, moments=jax.device_put(state.moments, jax.memory.Space.Device))
    params, moments = self.optimizer.update(grads, state.moments, state.params, state.step, frozen, state.rate)
    params = overlay(params, stats)
    target = self._follow(state.target, params, state.step)
    average = self._averaged(state.average, params, moments)
    fresh = dict(params=params, target=target, moments=moments, average=average, extra=extra)
    old = {name: vars(state)[name] for name in fresh}
    kept = jax.tree.map(lambda new, was: jnp.where(good, new, was), fresh, old)
    if self.offload:
      kept['moments'] = jax.device_put(kept['moments'], jax.memory.Space.Host)
    bad = 1 - good.astype(jnp.int32)
    state = dataclasses.replace(state, step=state.step + 1, skipped=state.skipped + bad,
                                skipped_in_row=(state.skipped_in_row + 1) * bad, **kept)
    rate = state.rate * self.optimizer.schedule(state.step - 1)
    metrics = dict(metrics, loss=loss, grad_norm=norm, learning_rate=rate, skipped=state.skipped,
                   skipped_in_row=state.skipped_in_row, **norms)
    return state, metrics

  def _averaged(self, average: Any, params: Any, moments: Any) -> Any:
    """The weights to use after a step, {} where they are the trained ones."""
    if self.optimizer.free:
      return self.optimizer.averaged(moments, params)
    return self._mean(self.ema, average, params) if self.ema else {}

  def _follow(self, target: Any, params: Any, step: jax.Array) -> Any:
    """The target, a part of the parameters, one step of its moving average further."""
    if not target:
      return target
    return self._mean(self.objective.momentum(step), target, {k: params[k] for k in target})

  def _mean(self, keep: Any, mean: Any, params: Any) -> Any:
    """A moving average one step further; of what is held it is that, to the bit."""
    adapted = self.optimizer is not None and self.optimizer.adapted
    held = lambda path: bool(adapted) and self.optimizer.holds(tuple(str(k.key) for k in path))
    return jax.tree_util.tree_map_with_path(
        lambda path, m, p: m if held(path) else keep * m + (1 - keep) * p, mean, params)

  def _gradients(self, state: TrainState, batch: Any, rng: jax.Array, fixed: Any = None):
    """Loss, metrics, extra and gradients; with a mixture of sizes, of the size drawn, which the metrics name."""
    if not self.sizes:
      return self._gradients_of(self.view, state, batch, rng, fixed)
    firsts = jnp.asarray(self.firsts, jnp.int32)
    index = jnp.sum(firsts <= state.step) - 1 if self.firsts else drawn(rng, self.shares)
    branches = [functools.partial(self._gradients_of, view, state, batch, rng, fixed) for view in self.sizes]
    (loss, (metrics, extra)), grads = jax.lax.switch(index, branches)
    size = jnp.asarray([view.size[-1] for view in self.sizes])[index]
    return (loss, (metrics | {'view_size': size}, extra)), grads

  def _gradients_of(self, view: ViewMaker, state: TrainState, batch: Any, rng: jax.Array, fixed: Any):
    """Loss, metrics, extra and gradients with these views, averaged over microbatches."""
    def loss(params, extra, part, key):
      params = self.optimizer.only_trained(params)
      view_key, loss_key = jax.random.split(key)
      variables = {'params': params, 'target': state.target, 'extra': extra, 'fixed': fixed}
      if view.channel_sampling == 'diverse':
        known = self.objective.encoder_params(variables)
        vectors = self.objective.encoder.apply({'params': known}, method='channel_vectors')
        part = part | {'similarity': cosines(vectors)}
      views = view(view_key, part)
      value, (metrics, extra) = self.objective.loss(variables, views, loss_key, state.step)
      penalty = self._penalty(variables)
      if not isinstance(value, Mapping):
        return value if penalty is None else value + penalty, (metrics | _named(penalty=penalty), extra)
      # A loss of each group; the penalty is the encoder's.
      owner = self.optimizer.group_of(('encoder',))
      value = {k: v + penalty if penalty is not None and k == owner else v for k, v in value.items()}
      return value, (metrics | _named(penalty=penalty) | {f'loss/{k}': v for k, v in value.items()}, extra)

    gradient = functools.partial(gradients, loss, self.optimizer.part_of)
    if self.accumulate == 1:
      return gradient(state.params, state.extra, batch, rng)
    count = self.accumulate
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

    def body(carry, xs):
      extra, total = carry
      (value, (metrics, extra)), grads = gradient(state.params, extra, *xs)
      return (extra, jax.tree.map(lambda t, g: t + g / count, total, grads)), (value, metrics)

    start = (state.extra, jax.tree.map(jnp.zeros_like, state.params))
    (extra, grads), (values, metrics) = jax.lax.scan(body, start, (parts, jax.random.split(rng, count)))
    mean = lambda tree: jax.tree.map(lambda x: x.mean(axis=0), tree)
    return (mean(values), (mean(metrics), extra)), grads

  def _penalty(self, variables: Any) -> jax.Array | None:
    """What the encoder that is trained, of whatever method, itself adds to the loss."""
    encoder: Any = self.objective.encoder
    return encoder.penalty(variables['params']['encoder']) if encoder.supports.penalty else None


def _named(**values: Any) -> dict[str, Any]:
  return {name: value for name, value in values.items() if value is not None}


def gradients(loss: Callable, group_of: Callable[[tuple[str, ...]], str], params: Any, *args: Any):
  """((value, aux), gradients) of `loss(params, *args) -> (value, aux)`.

  Where the value is {group: scalar}, each parameter has the gradient of the loss of its own group, by `group_of(path)`,
  and the value given back is their sum. The forward pass is computed once.

  Raises:
    UserError: a group of the losses without parameters, or the reverse.
  """
  form = jax.eval_shape(loss, params, *args)[0]
  if not isinstance(form, Mapping):
    return jax.value_and_grad(loss, has_aux=True)(params, *args)
  values, back, aux = jax.vjp(lambda p: loss(p, *args), params, has_aux=True)
  divided = rules.divide(params, group_of)
  parts = {name: jax.tree.map(jnp.zeros_like, divided.pop(name)) for name in (HELD,) if name in divided}
  groups = divided.keys()
  if set(groups) != set(form):
    raise UserError(f'the losses of the method are of {", ".join(sorted(form))}, the groups of parameters are '
                    f'{", ".join(groups)}: see optimizer.groups')
  for group in groups:
    one = {name: jnp.ones_like(v) if name == group else jnp.zeros_like(v) for name, v in values.items()}
    parts[group] = rules.divide(back(one)[0], group_of)[group]
  return (sum(values.values()), aux), rules.unite(parts)


def _frozen(tree: Any) -> tuple[tuple, Any]:
  """The leaves and the structure of a tree of shapes, as keys of a cache."""
  leaves, structure = jax.tree.flatten(tree)
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', None))  # arrays have no hash
  return tuple(map(shape, leaves)), structure


def _shapes(batch: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def _key(seed: int) -> np.ndarray:
  """Raw data of a seed's key; as an array of NumPy it is the same on all processes."""
  return np.asarray(jax.random.key_data(jax.random.key(seed)))


# A trainer is static: what was traced, lowered and compiled for one serves every equal one of the process.


def _beginning(trainer: Trainer) -> Trainer:
  """A trainer as far as the first state depends on it: runs of other seeds, rates and lengths begin by one program."""
  plain: dict[str, Any] = dict(learning_rate=1.0, steps=1, warmup_steps=0, final_learning_rate=0.0)
  optimizer = dataclasses.replace(trainer.optimizer, **plain)
  return dataclasses.replace(trainer, optimizer=optimizer, seed=0, accumulate=1, sizes=(), shares=(), firsts=())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _created(trainer: Trainer, shapes: tuple, structure: Any, key: Any) -> TrainState:
  """Traced once for the shapes and for the values."""
  zeros = [jnp.zeros(x.shape, x.dtype) for x in shapes]
  return trainer.create(jax.tree.unflatten(structure, zeros), key)


@functools.lru_cache(maxsize=64)
def _abstract(trainer: Trainer, shapes: tuple, structure: Any, mesh: Mesh) -> TrainState:
  boxed = jax.eval_shape(functools.partial(_created, trainer, shapes, structure), _key(0))
  where = mesh_lib.shardings(boxed, mesh)
  if trainer.offload:
    where = dataclasses.replace(where, moments=jax.tree.map(mesh_lib.on_host, where.moments))
  return mesh_lib.placed(boxed, where)


def _initial(trainer: Trainer, shapes: tuple, structure: Any, key: Any) -> TrainState:
  return nn.unbox(_created(trainer, shapes, structure, key))


@functools.lru_cache(maxsize=4)
def _compiled(trainer: Trainer, abstract: tuple, batch: tuple, fixed: tuple, mesh: Mesh) -> Callable:
  state, batch, fixed = (jax.tree.unflatten(structure, leaves) for leaves, structure in (abstract, batch, fixed))
  where = jax.tree.map(lambda x: x.sharding, state)
  read = (fixed,) if fixed else ()
  step = jax.jit(Trainer.step, static_argnums=0, donate_argnums=1, out_shardings=(where, mesh_lib.replicated(mesh)))
  with jax.set_mesh(mesh):  # which models ask where activations lie
    return step.lower(trainer, state, batch, *read).compile()


def drawn(rng: jax.Array, shares: tuple[float, ...]) -> jax.Array:
  """Which of a mixture a step takes, int32, by the step's key alone, which seed and step make."""
  return jax.random.categorical(jax.random.fold_in(rng, 0), jnp.log(jnp.asarray(shares)))


def overlay(params: Any, values: Any) -> Any:
  """`params` with leaves replaced by `values`, a tree of some of the same paths."""
  if not isinstance(values, Mapping):
    return values
  return params | {name: overlay(params[name], value) for name, value in values.items()}
