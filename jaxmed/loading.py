"""`jaxmed.load`: an encoder from a run directory or from an exported file."""

import os
import pathlib

from jaxmed.errors import UserError
from jaxmed.evaluate.encoder import Encoder


def load(path: str | os.PathLike, checkpoint: str = 'latest') -> Encoder:
  """Loads an encoder.

  Args:
    path: a run directory, or a file that `jaxmed export` or `jaxmed import` wrote.
    checkpoint: of a run: 'latest', 'best' or a step.
  Returns:
    An Encoder; `embed(images, channels=...)` gives class, mean-pooled and patch features.
  Raises:
    UserError: the path is neither, or damaged.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    from jaxmed.train.run import load_encoder
    return load_encoder(path, checkpoint)
  if not path.exists():
    raise UserError(f'{path} does not exist: expected a run directory or an exported file')
  from jaxmed.interop.layouts import load_file
  from jaxmed.models.channel_embed import unnamed
  model, params, info = load_file(path)
  channels = info.get('channels') or [{'name': n, 'mean': 0.0, 'std': 1.0} for n in unnamed(model.in_channels)]
  return Encoder(model, params, tuple(channels), info.get('normalize', 'none'), info.get('feature', 'cls'), info)
