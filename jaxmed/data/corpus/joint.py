"""Several corpora as one source."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.data.corpus.manifest import Joint, Manifest
from jaxmed.data.corpus.source import Source
from jaxmed.errors import UserError
from jaxmed.files import unique_names


def join(sources: Sequence[Source]) -> Source:
  """The rows of all, one corpus after the other, with a column `dataset` (the name of its folder).

  Equal names get a number: a, a-2. Identifiers and subjects have the name before them.

  Raises:
    UserError: images here and volumes there, or a column of different types.
  """
  if len(sources) == 1:
    return sources[0]
  names = unique_names([source.path.resolve().name for source in sources])
  first: dict[int, str] = {}
  for source, name in zip(sources, names):
    for shape in source.distinct('shape')[1]:
      first.setdefault(len(shape) - 1, name)
  if len(first) > 1:
    told = ' and '.join(f'{name} of rank {rank}' for rank, name in first.items())
    raise UserError(f'images and volumes cannot be trained on together: {told}; prepare both with the same --volumes')
  keyed = lambda field: {f'{name}/{k}': v for source, name in zip(sources, names)
                         for k, v in getattr(source, field).items()}
  labels = {name: found for source, name in zip(sources, names) for found in source.labels.values()}
  table = Manifest(Joint([source.table for source in sources], names))
  path = pathlib.Path(','.join(str(source.path) for source in sources))
  return Source(path, table, merged([source.stats for source in sources]), keyed('readers'), keyed('bricks'),
                keyed('shards'), tuple(names), labels, keyed('places'))


def merged(stats: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
  """Statistics of channels over all corpora, {channel: count, mean, std, low, high, split}.

  Count, mean and std are those of all pixels together, as Chan et al. 1979 add them. The percentiles cannot be found
  from those of parts: they are their means, weighted with the counts. A channel's numbers are those of train splits
  where one has it in train.
  """
  out: dict[str, dict[str, Any]] = {}
  for name in dict.fromkeys(name for part in stats for name in part):
    every = [part[name] for part in stats if name in part]
    split = 'train' if any(s['split'] == 'train' for s in every) else 'other'
    own = [s for s in every if s['split'] == split]
    if len(own) == 1:
      out[name] = dict(own[0])
      continue
    out[name] = _pooled(own) | {'split': split}
  return out


def _pooled(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  weights = np.array([s['count'] for s in parts], np.float64)
  over = lambda values: float(np.average(values, weights=weights))
  mean, low, high = (over([s[key] for s in parts]) for key in ('mean', 'low', 'high'))
  spread = over([s['std'] ** 2 + (s['mean'] - mean) ** 2 for s in parts])
  return {'count': int(sum(s['count'] for s in parts)), 'mean': mean, 'std': spread**0.5, 'low': low, 'high': high}
