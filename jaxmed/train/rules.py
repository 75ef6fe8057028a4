"""Update rules by name: AdamW, LARS and SGD as the methods use them, and whatever optax has.

A rule is an `optax.GradientTransformation` that gives the direction to step against, before decay and rates.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxmed.errors import UserError, choose

OURS = ('adamw', 'lars', 'sgd')
FREE = 'schedule_free_'  # before the name of another rule
# Rules of optax that need what a step does not have: the loss as a function, or its value.
_NOT_HERE = ('backtracking_linesearch', 'zoom_linesearch', 'lbfgs', 'polyak', 'schedule', 'learning_rate',
             'distance_over_gradients', 'momo', 'momo_adam', 'sophia', 'sam', 'normalize', 'mechanize')
_MUON_RMS = 0.2  # size of Muon's updates, so that AdamW's rates serve (Liu et al. 2025, arXiv 2502.16982, section 2.2)


def names() -> tuple[str, ...]:
  """The rules that `make` knows, ours first; each may follow FREE."""
  return OURS + tuple(sorted((_parts() | _whole()).keys() - set(OURS)))


def check(key: str, name: str) -> None:
  """Raises a UserError where no rule has this name."""
  choose(key, name.removeprefix(FREE), names())


def make(name: str, b1: float, b2: float, dtype: Any, options: Mapping[str, Any]) -> optax.GradientTransformation:
  """The rule of a name.

  Args:
    b1, b2: of AdamW; b1 is the momentum of LARS and SGD. dtype: of AdamW's moments. options: of a rule of optax, by
      optax's names.
  Raises:
    UserError: an option that the rule has not.
  """
  if name in ('lars', 'sgd'):
    _check_options(name, options, ())
    return optax.trace(b1, nesterov=name == 'sgd')
  if name == 'adamw':
    _check_options(name, options, ('epsilon',))
    return adam(b1, b2, jnp.dtype(dtype), **options)
  if name == 'muon':
    return _muon(b1, b2, jnp.dtype(dtype), options)
  rule = _parts().get(name)
  if rule is not None:
    _check_options(name, options, inspect.signature(rule).parameters)
    return rule(**options)
  rule = _whole()[name]
  _check_options(name, options, inspect.signature(rule).parameters)
  return optax.chain(rule(learning_rate=1.0, **options), optax.scale(-1.0))


def adam(b1: float, b2: float, dtype: Any, epsilon: float = 1e-8) -> optax.GradientTransformation:
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


def _muon(b1: float, b2: float, dtype: Any, options: Mapping[str, Any]) -> optax.GradientTransformation:
  """Muon on the weight matrices of blocks, Adam on all else: embeddings, heads, biases (Jordan et al. 2024).

  Parameters of scanned blocks have the block as their first axis; each block is orthogonalised alone.
  """
  _check_options('muon', options, ('consistent_rms', *inspect.signature(contrib.scale_by_muon).parameters))
  rms = options.get('consistent_rms', _MUON_RMS)
  shape = lambda tree: jax.tree.map(lambda x: contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), tree)
  rule = contrib.scale_by_muon(**{k: v for k, v in options.items() if k != 'consistent_rms'},
                               weight_dimension_numbers=shape)

  def sized(updates, params):
    del params
    return jax.tree.map(lambda x: x * rms * max(x.shape[-2:]) ** 0.5, updates)

  matrices = optax.chain(rule, optax.stateless(sized))
  kind = lambda path: 'muon' if 'blocks' in path and path[-1] == 'kernel' else 'adam'
  return divided({'muon': matrices, 'adam': adam(b1, b2, dtype)}, kind)


def _parts() -> dict[str, Callable]:
  """{name: `scale_by_NAME`} of optax, of those that need no argument."""
  found = {n.removeprefix('scale_by_'): getattr(module, n) for module in (contrib, optax) for n in dir(module)
           if n.startswith('scale_by_')}
  free = lambda rule: all(p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
                          for p in inspect.signature(rule).parameters.values())
  return {name: rule for name, rule in found.items() if name not in _NOT_HERE and free(rule)}


def _whole() -> dict[str, Callable]:
  """{name: optimizer} of optax.contrib, of those that need at most a learning rate."""
  out: dict[str, Callable] = {}
  for name in dir(contrib):
    rule = getattr(contrib, name)
    if inspect.isfunction(rule) and not name.startswith(('scale_by', 'schedule_free')) and name not in _NOT_HERE:
      needs = [p for p in inspect.signature(rule).parameters.values() if p.default is p.empty]
      if 'learning_rate' in inspect.signature(rule).parameters and {p.name for p in needs} <= {'learning_rate'}:
        out[name] = rule
  return out


def _check_options(name: str, options: Mapping[str, Any], known: Any) -> None:
  for option in options:
    if not known:
      raise UserError(f'optimizer.options: {name} has none, not {option!r}; its values are keys of optimizer')
    choose(f'option of optimizer.name={name}', option, known)


# Parts of a tree by path. optax.partition puts placeholders into each state, which a checkpoint would have to hold.


def divided(rules: Mapping[str, optax.GradientTransformation],
            label: Callable[[tuple[str, ...]], str]) -> optax.GradientTransformation:
  """Each rule on its part of a nested dict of parameters; `label(path)` names the rule. States are {label: state}."""
  def init(params):
    return {name: rules[name].init(part) for name, part in divide(params, label).items()}

  def update(grads, states, params=None):
    grads, params = divide(grads, label), divide(params, label)
    out = {name: rules[name].update(grads[name], states[name], params[name]) for name in grads}
    return unite({name: updates for name, (updates, _) in out.items()}), {name: s for name, (_, s) in out.items()}

  return optax.GradientTransformation(init, update)


def divide(tree: Mapping[str, Any], label: Callable[[tuple[str, ...]], str]) -> dict[str, Any]:
  """A nested dict by the labels of its leaves' paths: {label: the dict of those leaves alone}, labels in order."""
  out: dict[str, Any] = {}

  def visit(node: Any, path: tuple[str, ...]) -> None:
    if isinstance(node, Mapping):
      for key, value in node.items():
        visit(value, (*path, key))
      return
    section = out.setdefault(label(path), {})
    for key in path[:-1]:
      section = section.setdefault(key, {})
    section[path[-1]] = node

  visit(tree, ())
  return dict(sorted(out.items()))


def unite(parts: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `divide`."""
  out: dict[str, Any] = {}

  def add(section: dict[str, Any], node: Mapping[str, Any]) -> None:
    for key, value in node.items():
      if isinstance(value, Mapping):
        add(section.setdefault(key, {}), value)
      else:
        section[key] = value

  for part in parts.values():
    add(out, part)
  return out
