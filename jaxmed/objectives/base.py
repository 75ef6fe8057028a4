"""What a training method need not say, with the values of one that does not."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from jaxmed.contracts import Batch, Variables


class Method:
  """Base of every `contracts.Objective`; it has no field, so that all options stand in the method."""

  FEATURE: ClassVar[str] = 'mean'
  DEFAULTS: ClassVar[dict[str, Any]] = {}
  TOWERS: ClassVar[tuple[str, ...]] = ('image',)
  OPTIONAL: ClassVar[tuple[str, ...]] = ()
  WHOLE: ClassVar[Mapping[str, str]] = {}
  GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {}
  FIELDS: ClassVar[tuple[str, ...]] = ('image',)
  REQUIRED: ClassVar[tuple[str, ...]] = ()
  PREDICTS: ClassVar[str] = ''
  WINDOWS: ClassVar[bool] = False

  @classmethod
  def shaped_by(cls, rows: int) -> int:
    """What of the number of training records decides shapes: all of it where the method has a field `rows`."""
    return rows if 'rows' in {f.name for f in dataclasses.fields(cls)} else 0  # type: ignore[arg-type]

  @property
  def feature(self) -> str:
    """The vector that the method recommends; an option of the same name takes its place."""
    return self.FEATURE

  def momentum(self, step: jax.Array) -> jax.Array:
    """Share of the target that stays after a step: a method with a target says it."""
    raise NotImplementedError(f'{type(self).__name__} has a target but no momentum')

  def encoder_params(self, variables: Variables) -> Any:
    """The weights of the encoder, which are the product: those that are trained."""
    return variables['params']['encoder']

  def products(self, variables: Variables) -> dict[str, Any]:
    """{tower: weights} of the towers that are of use after the run: the encoder and each that is trained."""
    rest = {tower: variables['params'][tower] for tower in self.TOWERS[1:] if tower in variables['params']}
    return {self.TOWERS[0]: self.encoder_params(variables)} | rest

  def model_of(self, tower: str) -> Any:
    """The network whose weights `products` has by that name."""
    return self.encoder if tower == self.TOWERS[0] else self.towers[tower]  # type: ignore[attr-defined]

  def frozen(self, step: jax.Array) -> Mapping[str, jax.Array]:
    """{path of parameters: whether they rest at this step}: none."""
    del step
    return {}

  def pictures(self, variables: Variables, batch: Batch, rng: jax.Array) -> Mapping[str, Any]:
    """Named image arrays for the report: none."""
    del variables, batch, rng
    return {}
