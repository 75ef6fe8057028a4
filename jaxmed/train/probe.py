"""What a run measures of itself while it trains: held-out loss, the health of features, kNN and a linear probe."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.data.feed import windows as windows_lib
from jaxmed.data.feed.pipeline import eval_batches
from jaxmed.data.feed.windows import Windows
from jaxmed.evaluate import health
from jaxmed.evaluate.probes import knn, ridge
from jaxmed.objectives import feature_of
from jaxmed.objectives.networks import inputs
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.train.build import assemble, data_spec
from jaxmed.train.build.rundir import encoder_of
from jaxmed.train.step import TrainState

PROBE_ROWS = 1024  # of each split, so that a probe costs seconds
HEALTH_ROWS, HEALTH_VIEWS = 128, 4  # images whose features are compared, and views of each


@dataclasses.dataclass(frozen=True)
class Probe:
  """Measures a training state on the corpus's `val` split.

  Attributes:
    source: the whole corpus. check: called between batches; raises to stop.
  """

  trainer: Any
  config: Any
  spec: data_spec.DataSpec
  source: Any
  mesh: Any
  check: Callable[[], None]

  def __call__(self, state: TrainState) -> dict[str, float]:
    """{'val_loss', 'knn', 'ridge'}, each where the corpus allows it, and what `evaluate.health.measure` gives."""
    out = self.health(state)
    if len(self._val):
      out['val_loss'] = self._loss(state, self._val)
    train, val = self._labelled
    if len(train) and len(val):
      out |= self._labels(state, train, val, self.config.loader.label)
    return out

  def health(self, state: TrainState) -> dict[str, float]:
    """How well features tell images apart, on held-out images (or, without any, on training ones)."""
    rows = self._val if len(self._val) else self._known(self.source.select(split=self.config.loader.split))
    source = thin(rows, HEALTH_ROWS)
    shards = mesh_lib.batch_shards(self.mesh)
    size = len(source) // shards * shards
    if size < 2:
      return {}
    self.check()
    batch = next(iter(self._batches(source, size)))
    found = _observe(self.trainer, self.mesh, state.variables, mesh_lib.put_batch(batch, self.mesh))
    return health.measure(*(np.asarray(x) for x in jax.device_get(found)))

  def held_out(self, state: TrainState, most: int) -> float:
    """The loss on at most so many held-out rows, with the same views and masks each time; NaN without any."""
    return self._loss(state, self._thin(self._val, most))

  @property
  def shape(self) -> tuple[int, int]:
    """Rows and width of the features that `health` looks at."""
    rows = len(self._val) or self.spec.rows
    return min(rows, HEALTH_ROWS), self.trainer.objective.encoder.embed_dim

  @functools.cached_property
  def _val(self) -> Any:
    """Held-out rows whose channels are all in the vocabulary."""
    return self._thin(self._known(self.source.select(split='val')), PROBE_ROWS)

  def _known(self, source: Any) -> Any:
    """The rows whose channels the run knows: it may train on some sources alone."""
    known = set(self.spec.ids)
    codes, sets = source.distinct('channels')
    return source.keep(np.array([known.issuperset(names) for names in sets], bool)[codes])

  @functools.cached_property
  def _labelled(self) -> tuple[Any, Any]:
    """Labelled rows of train and val; none without a label."""
    label = self.config.loader.label
    if not label:
      return (), ()
    train, val = (thin(self._known(self.source.select(split=s, label=label)), PROBE_ROWS) for s in ('train', 'val'))
    return train, val

  def _loss(self, state: TrainState, source: Any) -> float:
    """The objective's loss without augmentation, always with the same random masks."""
    shards, windows = mesh_lib.batch_shards(self.mesh), assemble.windows(self.config, source)
    count = len(source if windows is None else windows)
    size = min(self.config.batch_size, count // shards * shards)
    if size < 1:
      return float('nan')
    losses = []
    # Whole batches alone: a partly blank one would weigh differently, and not all processes see its blanks.
    for i, batch in enumerate(itertools.islice(self._batches(source, size, windows), count // size)):
      self.check()
      losses.append(_loss(self.trainer, state.variables, mesh_lib.put_batch(batch, self.mesh), i, state.step))
    return float(np.mean(jax.device_get(losses))) if losses else float('nan')

  def _batches(self, source: Any, size: int, windows: Windows | None = None):
    """Batches of rows, or of windows of them."""
    return eval_batches(source, batch_size=size, windows=windows, **assemble.reading(self.config, self.spec))

  def _thin(self, source: Any, most: int) -> Any:
    """At most `most` rows, evenly spaced; where samples are windows, whole sequences."""
    loader = self.config.loader
    return windows_lib.thin(source, most, loader.window_group) if loader.window else thin(source, most)

  def _labels(self, state: TrainState, train: Any, val: Any, label: str) -> dict[str, float]:
    """Accuracy of two probes of the labels."""
    encoder = encoder_of(self.trainer, self.config, self.spec, state)
    classes = self.source.classes(label)
    features = []
    for part in (train, val):
      self.check()
      features.append(encoder.embed_source(part)[encoder.feature])
    truth = [np.asarray(part.codes(label, classes)) for part in (train, val)]
    scores = {p.__name__: p(features[0], truth[0], features[1], len(classes)) for p in (knn, ridge)}
    return {name: float((score.argmax(axis=1) == truth[1]).mean()) for name, score in scores.items()}


def thin(source: Any, most: int) -> Any:
  """At most `most` rows, evenly spaced."""
  if len(source) <= most:
    return source
  rows = np.linspace(0, len(source) - 1, most).astype(int)
  return dataclasses.replace(source, table=source.table.take(rows))


def _val_loss(trainer, variables, batch, seed, step):
  view_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(0), seed))
  return trainer.objective.loss(variables, trainer.view.held_out(view_key, batch), loss_key, step, False)[0]


_loss = jax.jit(_val_loss, static_argnums=0)


def _features(trainer, mesh, variables, batch):
  """Pooled features [N, D], tokens of the first channel [N, T, D], pooled features of some views [N, Q, D]."""
  objective = trainer.objective
  params, feature = objective.encoder_params(variables), feature_of(objective)
  view = dataclasses.replace(trainer.view, views=1, local_views=0, channel_sampling='none')

  def encode(b):
    return objective.encoder.apply({'params': params}, **inputs(b))

  plain = encode(view.plain(batch))
  keys = jax.random.split(jax.random.key(0), HEALTH_VIEWS)
  views = jax.lax.map(lambda key: encode(view(key, batch)).pooled(feature), keys)
  count = plain.patches.shape[1] // (batch['channels'].shape[1] if objective.encoder.per_channel else 1)
  found = plain.pooled(feature), plain.patches[:, :count].astype(jnp.float32), views.swapaxes(0, 1)
  return jax.lax.with_sharding_constraint(found, mesh_lib.replicated(mesh))  # every process reads all of it


_observe = jax.jit(_features, static_argnums=(0, 1))
