"""What the evaluators of a run share: its held-out and labelled records, its loss and features on them."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.data.feed import windows as windows_lib
from jaxmed.data.feed.pipeline import eval_batches
from jaxmed.data.feed.windows import Windows
from jaxmed.encoder import Encoder
from jaxmed.evaluate import health
from jaxmed.objectives import feature_of
from jaxmed.objectives.losses import segmentation
from jaxmed.objectives.networks import inputs
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.train.build import assemble, data_spec
from jaxmed.train.build.rundir import encoder_of
from jaxmed.train.step import TrainState

PROBE_ROWS = 1024  # of each split, so that a probe costs seconds
HEALTH_ROWS, HEALTH_VIEWS = 128, 4  # images whose features are compared, and views of each


@dataclasses.dataclass(frozen=True)
class Probe:
  """What evaluators look at of a run: mostly the corpus's `val` split.

  Attributes:
    source: the whole corpus. check: called between batches; raises to stop.
  """

  trainer: Any
  config: Any
  spec: data_spec.DataSpec
  source: Any
  mesh: Any
  check: Callable[[], None]
  fixed: Any = None  # {tower: weights} that the objective only reads

  def at(self, state: TrainState) -> 'Snapshot':
    """A training state as evaluators see it."""
    return Snapshot(self, state)

  @property
  def feature(self) -> str:
    """The vector that the method recommends; '' for a method without features, such as a generator."""
    return feature_of(self.trainer.objective)

  @property
  def _means(self) -> tuple[Any, Any]:
    """What programs are compiled for: not the trainer, so that runs of other seeds, lengths and rates share them."""
    return self.trainer.objective, self.trainer.view

  @property
  def health_rows(self) -> int:
    """How many images `health` looks at: a multiple of the devices."""
    shards = mesh_lib.batch_shards(self.mesh)
    return len(self._seen) // shards * shards

  def health(self, state: TrainState) -> dict[str, float]:
    """How well features tell images apart, on held-out images (or, without any, on training ones)."""
    if self.health_rows < 2:
      return {}
    self.check()
    batch = mesh_lib.put_batch(next(iter(self._batches(self._seen, self.health_rows))), self.mesh)
    objective, view = self._means
    view = single(view)
    params = objective.encoder_params(state.variables(self.fixed))
    found = _observe(objective.encoder, self.feature, view, self.mesh, params, batch)
    return health.measure(*(np.asarray(x) for x in jax.device_get(found)))

  def held_out(self, state: TrainState, most: int = PROBE_ROWS) -> float:
    """The loss on at most so many held-out rows, with the same views and masks each time; NaN without any."""
    return self._loss(state, self._thin(self.val, most))

  @property
  def shape(self) -> tuple[int, int]:
    """Rows and width of the features that `health` looks at."""
    rows = len(self.val) or self.spec.rows
    return min(rows, HEALTH_ROWS), self.trainer.objective.encoder.embed_dim

  @functools.cached_property
  def val(self) -> Any:
    """Held-out rows whose channels are all in the vocabulary."""
    return self._thin(self._known(self.source.select(split='val')), PROBE_ROWS)

  @functools.cached_property
  def _seen(self) -> Any:
    """The rows that `health` takes its images from."""
    rows = self.val if len(self.val) else self._known(self.source.select(split=self.config.loader.split))
    return thin(rows, HEALTH_ROWS)

  def _known(self, source: Any) -> Any:
    """The rows whose channels the run knows: it may train on some sources alone."""
    known = set(self.spec.ids)
    codes, sets = source.distinct('channels')
    return source.keep(np.array([known.issuperset(names) for names in sets], bool)[codes])

  @property
  def predicts(self) -> str:
    """What of a record the method predicts itself: 'mask', 'label' or 'number'; '' for nothing."""
    return self.trainer.objective.PREDICTS

  @functools.cached_property
  def told(self) -> Any:
    """Held-out rows that say what the method predicts."""
    column = 'mask' if self.predicts == 'mask' else self.config.loader.label if self.predicts else ''
    if not column or column not in self.source.table.column_names:
      return ()
    return thin(self._known(self.source.select(split='val', label=column)), PROBE_ROWS)

  def answers(self, state: TrainState, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the method predicts of rows, and what they say, with the averaged weights where the run keeps them.

    Of masks pixels [N, K] in truth and prediction and in the one plus the other (`losses.segmentation.overlap`); else
    answers [N] or [N, K] and truth [N].
    """
    variables = state.variables(self.fixed) | ({'params': state.average} if state.average else {})
    parts = []
    for batch in self._batches(rows, self.config.batch_size):
      self.check()
      batch = mesh_lib.put_batch(batch, self.mesh)
      found, index = jax.device_get(_answers(*self._means, self.mesh, variables, batch))
      parts.append([x[index >= 0] for x in found])
    first, second = (np.concatenate(x) for x in zip(*parts, strict=True))
    return first, second

  def videos(self, state: TrainState) -> list[tuple[np.ndarray, np.ndarray]]:
    """Truth and prediction [T] of the frames of each held-out group in order, of a method that predicts phases.

    Frames without a label, or of a class that training does not know, are left out. Of frames that are in several
    windows the later window counts.
    """
    source, variables = self.val, state.variables(self.fixed) | ({'params': state.average} if state.average else {})
    windows = assemble.windows(self.config, source)
    assert windows is not None  # such methods take windows alone
    truth, predicted = np.full((2, len(source)), -1)
    for batch in self._batches(source, self.config.batch_size, windows):
      self.check()
      batch = mesh_lib.put_batch(batch, self.mesh)
      found, label, index = map(np.asarray, jax.device_get(_phases(*self._means, self.mesh, variables, batch)))
      there = index >= 0
      truth[index[there]], predicted[index[there]] = label[there], found[there]
    groups = np.split(windows.order, windows.starts[1:-1])
    kept = [rows[(truth[rows] >= 0) & (predicted[rows] >= 0)] for rows in groups]
    return [(truth[rows], predicted[rows]) for rows in kept if len(rows)]

  @functools.cached_property
  def labelled(self) -> tuple[Any, Any]:
    """Labelled rows of train and val; none without a label."""
    label = self.config.loader.label
    if not label or self.spec.number:
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
      batch = mesh_lib.put_batch(batch, self.mesh)
      losses.append(_loss(*self._means, state.variables(self.fixed), batch, i, state.step))
    return float(np.mean(jax.device_get(losses))) if losses else float('nan')

  def _batches(self, source: Any, size: int, windows: Windows | None = None):
    """Batches of rows, or of windows of them."""
    return eval_batches(source, batch_size=size, windows=windows, **assemble.reading(self.config, self.spec))

  def _thin(self, source: Any, most: int) -> Any:
    """At most `most` rows, evenly spaced; where samples are windows, whole sequences."""
    loader = self.config.loader
    return windows_lib.thin(source, most, loader.window_group) if loader.window else thin(source, most)


class Labelled(NamedTuple):
  """Features [N, D], [M, D] and labels [N], [M] of rows of train and val, and the number of classes."""

  train_x: np.ndarray
  train_y: np.ndarray
  val_x: np.ndarray
  val_y: np.ndarray
  classes: int


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """A training state as evaluators see it; what several of them need is computed once.

  Attributes:
    probe: the run. state: its state.
  """

  probe: Probe
  state: TrainState

  @functools.cached_property
  def encoder(self) -> Encoder:
    """The product, as `jaxmed.load` would give it."""
    return encoder_of(self.probe.trainer, self.probe.config, self.probe.spec, self.state)

  @functools.cached_property
  def labelled(self) -> Labelled:
    """The labelled rows by their features; only where `probe.labelled` has some of both splits."""
    label = self.probe.config.loader.label
    classes = self.probe.source.classes(label)
    features = []
    for part in self.probe.labelled:
      self.probe.check()
      features.append(self.encoder.embed_source(part)[self.encoder.feature])
    truth = [np.asarray(part.codes(label, classes)) for part in self.probe.labelled]
    return Labelled(features[0], truth[0], features[1], truth[1], len(classes))


def thin(source: Any, most: int) -> Any:
  """At most `most` rows, evenly spaced."""
  if len(source) <= most:
    return source
  rows = np.linspace(0, len(source) - 1, most).astype(int)
  return dataclasses.replace(source, table=source.table.take(rows))


def _val_loss(objective, view, variables, batch, seed, step):
  view_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(0), seed))
  return objective.loss(variables, view.held_out(view_key, batch), loss_key, step, False)[0]


_loss = jax.jit(_val_loss, static_argnums=(0, 1))


def _answered(objective, view, mesh, variables, batch):
  batch = view.plain(batch)
  if objective.PREDICTS == 'mask':
    found = segmentation.overlap(objective.logits(variables, batch)[0][0], objective.truth(batch))
  else:
    found = objective.predict(variables, batch), batch[objective.PREDICTS]
  return jax.lax.with_sharding_constraint((found, batch['index']), mesh_lib.replicated(mesh))


_answers = jax.jit(_answered, static_argnums=(0, 1, 2))


def _frames(objective, view, mesh, variables, batch):
  batch = view.plain(batch)
  found = objective.phases(variables, batch).argmax(axis=-1), batch['label'], batch['index']
  return jax.lax.with_sharding_constraint(found, mesh_lib.replicated(mesh))


_phases = jax.jit(_frames, static_argnums=(0, 1, 2))


def single(view: Any) -> Any:
  """A maker of one view of a record, by the crops and changes of `view`."""
  return dataclasses.replace(view, views=1, local_views=0, tiles=(), channel_sampling='none')


def _features(encoder, feature, view, mesh, params, batch):
  """Pooled features [N, D], tokens of the first channel [N, T, D], pooled features of some views [N, Q, D]."""
  def encode(b):
    return encoder.apply({'params': params}, **inputs(b))

  plain = encode(view.plain(batch))
  keys = jax.random.split(jax.random.key(0), HEALTH_VIEWS)
  views = jax.lax.map(lambda key: encode(view(key, batch)).pooled(feature), keys)
  count = plain.patches.shape[1] // (batch['channels'].shape[1] if encoder.per_channel else 1)
  found = plain.pooled(feature), plain.patches[:, :count].astype(jnp.float32), views.swapaxes(0, 1)
  return jax.lax.with_sharding_constraint(found, mesh_lib.replicated(mesh))  # every process reads all of it


_observe = jax.jit(_features, static_argnums=(0, 1, 2, 3))
