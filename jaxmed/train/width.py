"""muP: first values and rates that follow the width, so that the best rates of a narrow network serve a wide one.

Yang et al. 2022, Tensor Programs V (arXiv 2203.03466), table 3, and microsoft/mup (mup/optim.py, mup/init.py). What a
parameter is follows from its shape in the model and in the same model at the base width, as by mup's set_base_shapes.
With a and b the factors by which its fan-in and fan-out grew, in the form that has no multipliers in the network:

              fan-in   fan-out   variance of first values   rate of AdamW   rate of SGD
  input         -        b             1                        1               b
  hidden        a        b             1 / a                    1 / a           b / a
  output        a        -             1 / a^2                  1 / a           1 / a

each as a factor on what the parameter has at the base width. Biases, norms, tokens and tables of embeddings are inputs;
where nothing grew all is 1. Logits of attention go by 1 / d instead of 1 / sqrt(d) for heads of width d; as queries are
linear, that is a factor sqrt(d_base / d) on first values and rates of what makes them (twice on SGD's). Weight decay
times rate stays what it is at the base width, as in mup/optim.py.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np

from jaxmed.contracts import Objective
from jaxmed.errors import UserError
from jaxmed.models.encoders.vit import ViT

SCALINGS = ('standard', 'mup')
RULES = ('adamw', 'sgd')  # those whose rates table 3 gives
STACKED = ('layers', 'channels', 'stack')  # logical axes of kernels that are several matrices
QUERIES = {'qkv': (True, False, False), 'look_q': (True,)}  # of the parts [.., parts, heads, head_dim] of a projection


@dataclasses.dataclass(frozen=True)
class Growth:
  """How one parameter grew over its base.

  Attributes:
    fan_in, fan_out: factors; 1 for what has none, or has not grown.
    query: sqrt(d_base / d), for parts of a projection [.., parts, heads, head_dim] that make queries of width d; () for
      what makes none.
  """

  fan_in: float = 1.0
  fan_out: float = 1.0
  query: tuple[float, ...] = ()

  @property
  def kind(self) -> str:
    """'input', 'hidden' or 'output'."""
    return 'input' if self.fan_in == 1 else 'output' if self.fan_out == 1 else 'hidden'

  @property
  def deviation(self) -> Any:
    """Factor on the deviation of the first values; an array over parts where some make queries."""
    return {'input': 1.0, 'hidden': self.fan_in**-0.5, 'output': 1 / self.fan_in}[self.kind] * self._queries(1)

  def rate(self, rule: str) -> Any:
    """Factor on the rate of one of RULES; an array over parts where some make queries."""
    if rule == 'sgd':
      return self.fan_out / self.fan_in * self._queries(2)
    return 1 / self.fan_in * self._queries(1)

  def _queries(self, power: int) -> Any:
    return np.power(self.query, power, dtype=np.float32).reshape(-1, 1, 1) if self.query else 1.0


@dataclasses.dataclass(frozen=True)
class Width:
  """A method at its width and at the base width.

  Attributes:
    base: the method with the encoder of the base width. growth: (path, Growth) of the parameters that grew, in order.
  """

  base: Objective
  growth: tuple[tuple[str, Growth], ...]

  def scaled(self, objective: Objective, variables: Any, views: Any) -> Any:
    """Fresh variables of the method with the deviations of muP; targets begin as the parameters that they follow.

    Laws that know the shape of what they draw, such as Xavier's, are taken as they are at the base width.
    """
    grown, have, wanted = dict(self.growth), sizes(objective, views), sizes(self.base, views)

    def scale(path, boxed):
      name = name_of(path)
      law = jnp.where(have[name] > 0, wanted[name] / jnp.maximum(have[name], 1e-30), 1.0)
      factor = law * grown.get(name, Growth()).deviation
      return jax.tree.map(lambda x: (x * factor).astype(x.dtype), boxed)

    params = jax.tree_util.tree_map_with_path(scale, variables['params'], is_leaf=_boxed)
    target = {name: jax.tree.map(jnp.copy, params[name]) for name in variables['target']}
    return {**variables, 'params': params, 'target': target}


def check(scaling: str, rules: Iterable[str]) -> None:
  """Raises a UserError where muP has no rates for one of the rules of the optimizer and its groups."""
  other = [rule for rule in rules if rule not in RULES]
  if scaling == 'mup' and other:
    raise UserError(f'optimizer.scaling=mup has the rates of {" and ".join(RULES)}, not of {other[0]}: take one of '
                    'them, or optimizer.scaling=standard')


def base_of(model: Any, width: int, heads: int = 0) -> ViT:
  """The encoder at the base width, with so many heads; 0 for heads as wide as the encoder's.

  Raises:
    UserError: a family without these rules, or a width that does not divide into heads.
  """
  if not isinstance(model, ViT):
    raise UserError(f'optimizer.scaling=mup has rules for vit, channel_vit and bag, not for {type(model).__name__}: '
                    'take optimizer.scaling=standard')
  dim = model.embed_dim // model.num_heads
  if heads and width % heads:
    near = max(round(width / heads), 1) * heads
    raise UserError(f'optimizer.base_heads={heads} does not divide optimizer.base_width={width}: nearest width is '
                    f'{near}')
  if not heads and width % dim:
    near = max(round(width / dim), 1) * dim
    raise UserError(f'optimizer.base_width={width} does not divide into heads of {dim}, as the encoder has them: '
                    f'nearest is {near}, or set optimizer.base_heads')
  return model.clone(embed_dim=width, num_heads=heads or width // dim)


def compared(objective: Objective, width: int, heads: int, views: Any) -> Width | None:
  """The method beside itself at a base width; None where nothing grew, and muP is the standard.

  Args:
    views: shapes of what the method is trained on.
  Raises:
    UserError: see `base_of`; or the method cannot be made at the base width, as one of its options fits its own only.
  """
  base: Any = objective
  try:
    base = dataclasses.replace(base, encoder=base_of(objective.encoder, width, heads))
    before, after = shapes(base, views), shapes(objective, views)
  except (UserError, ValueError) as e:
    known = str(e).startswith('optimizer.')
    raise UserError(str(e) if known else f'optimizer.base_width={width}: at that width {e}') from e
  odd = sorted(before.keys() ^ after.keys())
  if odd:
    raise UserError(f'optimizer.base_width={width}: the method has {odd[0]} at one width and not at the other')
  growth = tuple((name, of_shapes(name, before[name], after[name])) for name in sorted(after))
  growth = tuple((name, g) for name, g in growth if g != Growth())
  return Width(base, growth) if growth else None


def of_shapes(path: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Growth:
  """The growth of a parameter: `before` and `after` are its {'shape', 'names'}, names of logical axes or None.

  Raises:
    ValueError: shapes of different rank.
  """
  names, last = after['names'], path.rpartition('/')[2]
  grown = [b / a for a, b in zip(before['shape'], after['shape'], strict=True)]
  axes = [i for i in range(len(grown)) if not (last == 'kernel' and names[i] in STACKED) and names[i] != 'layers']
  ins = axes[:1] if last == 'kernel' else []
  product = lambda some: math.prod(grown[i] for i in some)
  parts = QUERIES.get(path.split('/')[-2] if '/' in path else '', ())
  wider = grown[-1] if parts and names[-1] == 'head_dim' else 1.0
  query = tuple(wider**-0.5 if part else 1.0 for part in parts) if wider != 1 else ()
  return Growth(product(ins), product(axes[len(ins):]), query)


def shapes(objective: Objective, views: Any) -> dict[str, dict[str, Any]]:
  """{path: {'shape', 'names'}} of a method's parameters."""
  params = jax.eval_shape(lambda key, views: objective.init(key, views)['params'], jax.random.key(0), views)
  out = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_boxed):
    names = leaf.names if _boxed(leaf) else (None,) * leaf.ndim
    out[name_of(path)] = {'shape': nn.unbox(leaf).shape, 'names': names}
  return out


def sizes(objective: Objective, views: Any) -> dict[str, jax.Array]:
  """{path: root mean square} of first values that are all one quantile of their laws: deviations up to a constant."""
  params = nn.unbox(objective.init(_quantile(), views)['params'])
  return {name_of(path): jnp.sqrt(jnp.square(x).mean()) for path, x in jax.tree_util.tree_leaves_with_path(params)}


def _quantile() -> jax.Array:
  """A random key all of whose numbers are the upper quartile of their law."""
  law = jax.extend.random.define_prng_impl(
      key_shape=(1,), name='quantile', tag='quantile', seed=lambda seed: jnp.zeros((1,), jnp.uint32),
      split=lambda key, shape: jnp.zeros((*shape, 1), jnp.uint32), fold_in=lambda key, data: key,
      random_bits=lambda key, bits, shape: jnp.full(shape, 3 << (bits - 2), f'uint{bits}'))
  return jax.random.wrap_key_data(jnp.zeros((1,), jnp.uint32), impl=law)


def name_of(path: tuple) -> str:
  """The path of a leaf in words: 'encoder/norm/scale'."""
  return '/'.join(str(k.key) for k in path)


def _boxed(x: Any) -> bool:
  return isinstance(x, nn.LogicallyPartitioned)


def told(base_width: int, width: Width | None) -> str:
  """In a line, how a run differs from the base width."""
  if width is None:
    return f'muP from width {base_width}: nothing grew, as with optimizer.scaling=standard'
  kinds = [g.kind for _, g in width.growth]
  counts = ', '.join(f'{kinds.count(kind)} {kind}' for kind in ('input', 'hidden', 'output'))
  return f'muP from width {base_width}: {len(kinds)} parameters grew ({counts})'


def table(width: Width) -> str:
  """What grew and the factors on it: growth of the fans, factors on deviations and rates, a slash between parts."""
  rows: list[tuple[str, ...]] = [('parameter', 'kind', 'fan-in', 'fan-out', 'deviation', 'adamw', 'sgd')]
  shown = lambda x: '/'.join(f'{v:.4g}' for v in np.ravel(x))
  for name, g in width.growth:
    factors = (g.fan_in, g.fan_out, g.deviation, g.rate('adamw'), g.rate('sgd'))
    rows.append((name, g.kind, *map(shown, factors)))
  wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join('  '.join(word.ljust(n) for word, n in zip(row, wide, strict=True)).rstrip() for row in rows)
