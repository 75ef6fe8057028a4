"""jaxmed: foundation models for medical images of any number of channels, in JAX."""

from typing import TYPE_CHECKING, Any

__version__ = '0.5.0'
__all__ = ['create_model', 'load']

if TYPE_CHECKING:
  from jaxmed.loading import load
  from jaxmed.models import create_model


def __getattr__(name: str) -> Any:
  """Imports on first use, so that `jaxmed --help` does not wait for JAX."""
  if name == 'load':
    from jaxmed.loading import load
    return load
  if name == 'create_model':
    from jaxmed.models import create_model
    return create_model
  raise AttributeError(f'module jaxmed has no attribute {name!r}')
