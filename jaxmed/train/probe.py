"""What a run measures of itself while it trains: the loss on held-out records, and kNN on labelled ones."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from jaxmed.data.pipeline import eval_batches
from jaxmed.evaluate.probes import knn
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.train import setup
from jaxmed.train.step import TrainState

PROBE_ROWS = 1024  # of each split, so that a probe costs seconds


@dataclasses.dataclass(frozen=True)
class Probe:
  """Measures a training state on the corpus's `val` split.

  Attributes:
    source: the whole corpus. check: called between batches; raises to stop.
  """

  trainer: Any
  config: Any
  spec: setup.DataSpec
  source: Any
  mesh: Any
  check: Callable[[], None]

  def __call__(self, state: TrainState) -> dict[str, float]:
    """{'val_loss', 'knn'}, each where the corpus allows it."""
    out = {}
    if len(self._val):
      out['val_loss'] = self._loss(state, self._val)
    train, val = self._labelled
    if len(train) and len(val):
      out['knn'] = self._knn(state, train, val, self.config.loader.label)
    return out

  @functools.cached_property
  def _val(self) -> Any:
    """Held-out rows whose channels are all in the vocabulary."""
    source, known = self.source.select(split='val'), set(self.spec.vocabulary)
    keep = [known.issuperset(names) for names in source.table.column('channels').to_pylist()]
    return thin(dataclasses.replace(source, table=source.table.filter(pa.array(keep, pa.bool_()))), PROBE_ROWS)

  @functools.cached_property
  def _labelled(self) -> tuple[Any, Any]:
    """Labelled rows of train and val; none without a label."""
    label = self.config.loader.label
    if not label:
      return (), ()
    train, val = (thin(self.source.select(split=s, label=label), PROBE_ROWS) for s in ('train', 'val'))
    return train, val

  def _loss(self, state: TrainState, source: Any) -> float:
    """The objective's loss without augmentation, always with the same random masks."""
    shards = mesh_lib.batch_shards(self.mesh)
    size = min(self.config.batch_size, len(source) // shards * shards)
    if size < 1:
      return float('nan')
    losses = []
    for i, batch in enumerate(self._batches(source, size)):
      self.check()
      if (batch['index'] < 0).any():
        break  # a partly blank batch would weigh differently
      losses.append(_loss(self.trainer, state.variables, mesh_lib.put_batch(batch, self.mesh), i, state.step))
    return float(np.mean(jax.device_get(losses))) if losses else float('nan')

  def _batches(self, source: Any, size: int):
    for batch in eval_batches(source, batch_size=size, **setup.reading(self.config, self.spec)):
      yield fitted(batch, self.spec)

  def _knn(self, state: TrainState, train: Any, val: Any, label: str) -> float:
    from jaxmed.train.run import encoder_of
    encoder = encoder_of(self.trainer, self.config, self.spec, state)
    classes = self.source.classes(label)
    features = []
    for part in (train, val):
      self.check()
      features.append(encoder.embed_source(part)[encoder.feature])
    truth = [np.asarray(part.codes(label, classes)) for part in (train, val)]
    scores = knn(features[0], truth[0], features[1], len(classes))
    return float((scores.argmax(axis=1) == truth[1]).mean())


def thin(source: Any, most: int) -> Any:
  """At most `most` rows, evenly spaced."""
  if len(source) <= most:
    return source
  rows = np.linspace(0, len(source) - 1, most).astype(int)
  return dataclasses.replace(source, table=source.table.take(rows))


def fitted(batch: dict[str, np.ndarray], spec: setup.DataSpec) -> dict[str, np.ndarray]:
  """A pipeline batch in the layout that the step was compiled for (see `setup.batch_shapes`)."""
  short = spec.slots - batch['channels'].shape[1]
  out = dict(batch)
  if short > 0:
    for key in ('image', 'channels', 'channel_mask'):
      out[key] = np.pad(out[key], [(0, 0)] * (out[key].ndim - 1) + [(0, short)])
  out['image'] = out['image'].astype(spec.dtype, copy=False)
  if not spec.masked:
    del out['channel_mask']
  return out


def _val_loss(trainer, variables, batch, seed, step):
  view_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(0), seed))
  return trainer.objective.loss(variables, trainer.view.held_out(view_key, batch), loss_key, step, False)[0]


_loss = jax.jit(_val_loss, static_argnums=0)
