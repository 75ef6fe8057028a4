"""FLOPs of a program, counted exactly from its jaxpr: two for each multiplication with its addition.

Counted are `dot_general` and `conv_general_dilated` wherever they stand: in calls, in a `scan` times its length, in a
`cond` the dearest branch, of `lax.platform_dependent` the default one, in a `while` one round (its number is not
known). What XLA would not compute is left out: values that nobody uses, and the second of two equal expressions.
Everything else (sums, exponentials, sorting) is free here, as it is in the peak rates of accelerators.

Rematerialisation is part of the program: trace with it off for the model's own FLOPs, which MFU is about.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core


def count(fn: Callable, *args: Any) -> int:
  """FLOPs of `fn(*args)` over all devices; the arguments may be arrays or `jax.ShapeDtypeStruct`s."""
  return count_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)


def count_jaxpr(jaxpr: Any) -> int:
  """FLOPs of a `jax.extend.core.Jaxpr` with all outputs used."""
  return _count(jaxpr, [True] * len(jaxpr.outvars))[0]


def taps(size: int, kernel: int, out: int, stride: int = 1, low: int = 0, dilate: int = 1, spread: int = 1) -> int:
  """Products of a convolution along one axis: pairs of output and kernel element that meet a stored input element.

  Padding and the holes of a dilated input are not multiplied. low: padding before the input; dilate: of the input;
  spread: dilation of the kernel. The definition is that of XLA's HloCostAnalysis.
  """
  if kernel == 1 and stride == 1 and dilate == 1 and low == 0:
    return min(size, out)
  place = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * spread - low
  return int(((place >= 0) & (place <= (size - 1) * dilate) & (place % dilate == 0)).sum())


def _count(jaxpr: Any, live_out: Sequence[bool]) -> tuple[int, list[bool]]:
  """FLOPs of a jaxpr when only some outputs are used, and which of its inputs that takes."""
  eqns, same = _unique(jaxpr)
  name = lambda v: same.get(v, v)
  live = {name(v) for v, used in zip(jaxpr.outvars, live_out, strict=True) if used and not isinstance(v, core.Literal)}
  total = 0
  for eqn in reversed(eqns):
    used = [v in live for v in eqn.outvars]
    if not any(used) and not eqn.effects:
      continue
    flops, needs = _equation(eqn, used)
    total += flops
    live |= {name(v) for v, need in zip(eqn.invars, needs, strict=True) if need and not isinstance(v, core.Literal)}
  return total, [v in live for v in jaxpr.invars]


def _unique(jaxpr: Any) -> tuple[list[Any], dict[Any, Any]]:
  """The equations without repetitions, and for each output of a repetition the one that it equals."""
  seen: dict[Any, Any] = {}
  same: dict[Any, Any] = {}
  kept = []
  for eqn in jaxpr.eqns:
    key = _key(eqn, same)
    if key is not None and key in seen:
      same |= dict(zip(eqn.outvars, seen[key].outvars, strict=True))
      continue
    if key is not None:
      seen[key] = eqn
    kept.append(eqn)
  return kept, same


def _key(eqn: Any, same: dict[Any, Any]) -> Any:
  """A key that is equal for equations with equal results; None where equality is unknown."""
  if eqn.effects:
    return None
  put = lambda v: ('literal', str(v.aval), str(v.val)) if isinstance(v, core.Literal) else same.get(v, v)
  key = (eqn.primitive, tuple(sorted(eqn.params.items(), key=lambda item: item[0])), tuple(map(put, eqn.invars)))
  try:
    hash(key)
  except TypeError:
    return None
  return key


def _equation(eqn: Any, used: list[bool]) -> tuple[int, list[bool]]:
  """FLOPs of one equation, and which inputs its used outputs take."""
  kind = eqn.primitive.name
  every = [True] * len(eqn.invars)
  if kind == 'dot_general':
    return _dot(eqn), every
  if kind == 'conv_general_dilated':
    return _convolution(eqn), every
  if kind == 'scan':
    return _scan(eqn, used)
  if kind == 'cond':
    branches = eqn.params['branches']
    where = eqn.params.get('branches_platforms')
    if where is not None and None in where:
      branches = (branches[where.index(None)],)
    counted = [_count(b.jaxpr, used) for b in branches]
    return max(n for n, _ in counted), [True, *(any(c) for c in zip(*(needs for _, needs in counted)))]
  inner = [_open(j) for j in core.jaxprs_in_params(eqn.params)]
  if len(inner) == 1 and len(inner[0].invars) == len(every) and len(inner[0].outvars) == len(used):
    return _count(inner[0], used)
  return sum(_count(j, [True] * len(j.outvars))[0] for j in inner), every


def _open(jaxpr: Any) -> Any:
  return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _scan(eqn: Any, used: list[bool]) -> tuple[int, list[bool]]:
  """A carry that a used one depends on is used too, so the body is looked at until nothing is added."""
  body, used = eqn.params['jaxpr'].jaxpr, list(used)
  # Told by ranks, as what a scan cuts or stacks has one more outside: JAX 0.10 and 0.12 name it differently.
  alike = lambda outside, inside: sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))
  carry = alike(eqn.outvars, body.outvars)
  consts = alike(eqn.invars, body.invars) - carry
  while True:
    flops, needs = _count(body, used)
    more = [a or b for a, b in zip(used[:carry], needs[consts : consts + carry], strict=True)]
    if more == used[:carry]:
      return eqn.params['length'] * flops, needs
    used[:carry] = more


def _dot(eqn: Any) -> int:
  (contract, _), _ = eqn.params['dimension_numbers']
  return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[d] for d in contract)


def _convolution(eqn: Any) -> int:
  p = eqn.params
  left, right, out = p['dimension_numbers']
  x, kernel, y = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
  macs = y[out[0]] * y[out[1]] * kernel[right[1]]
  for i, (a, b, c) in enumerate(zip(left[2:], right[2:], out[2:], strict=True)):
    macs *= taps(x[a], kernel[b], y[c], p['window_strides'][i], p['padding'][i][0], p['lhs_dilation'][i],
                 p['rhs_dilation'][i])
  return 2 * macs
