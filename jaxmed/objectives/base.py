"""What a training method need not say, with the values of one that does not."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from jaxmed.contracts import Batch, Variables


class Method:
  """Base of every `contracts.Objective`; it has no field, so that the options of a method are its own."""

  FEATURE: ClassVar[str] = 'mean'
  DEFAULTS: ClassVar[dict[str, Any]] = {}
  FIELDS: ClassVar[tuple[str, ...]] = ('image',)
  WINDOWS: ClassVar[bool] = False

  @property
  def feature(self) -> str:
    """The vector that the method recommends; an option of the same name takes its place."""
    return self.FEATURE

  def momentum(self, step: jax.Array) -> jax.Array:
    """Share of the target that stays after a step: a method with a target says it."""
    raise NotImplementedError(f'{type(self).__name__} has a target but no momentum')

  def frozen(self, step: jax.Array) -> Mapping[str, jax.Array]:
    """{path of parameters: whether they rest at this step}: none."""
    del step
    return {}

  def pictures(self, variables: Variables, batch: Batch, rng: jax.Array) -> Mapping[str, Any]:
    """Named image arrays for the report: none."""
    del variables, batch, rng
    return {}
