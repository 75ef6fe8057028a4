"""jaxmed: foundation models for medical images of any number of channels, in JAX."""

from typing import TYPE_CHECKING, Any

from jaxmed.version import __version__

__all__ = ['__version__', 'attention_maps', 'create_model', 'evaluate', 'load', 'load_segmenter']

if TYPE_CHECKING:
  from jaxmed.evaluate.attention import attention_maps
  from jaxmed.models import create_model
  from jaxmed.train.build.rundir import load, load_segmenter


def __getattr__(name: str) -> Any:
  """Imports on first use, so that `jaxmed --help` does not wait for JAX."""
  if name == 'load':
    from jaxmed.train.build.rundir import load
    return load
  if name == 'load_segmenter':
    from jaxmed.train.build.rundir import load_segmenter
    return load_segmenter
  if name == 'create_model':
    from jaxmed.models import create_model
    return create_model
  if name == 'evaluate':
    import jaxmed.evaluate  # a package that can be called
    return jaxmed.evaluate
  if name == 'attention_maps':
    from jaxmed.evaluate.attention import attention_maps
    return attention_maps
  raise AttributeError(f'module jaxmed has no attribute {name!r}')
