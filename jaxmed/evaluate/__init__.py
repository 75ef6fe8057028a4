"""Judging encoders after and during a run. The package is a function, too: `jaxmed.evaluate(...)`, see `judge`."""

import sys
import types
from typing import Any


class _Function(types.ModuleType):
  """A package that can be called."""

  def __call__(self, *args: Any, **options: Any) -> dict[str, Any]:
    from jaxmed.evaluate.judge import evaluate
    return evaluate(*args, **options)


sys.modules[__name__].__class__ = _Function
