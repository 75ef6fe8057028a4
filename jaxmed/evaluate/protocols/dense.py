"""Segmentation by frozen patch tokens: neighbours, logistic regression and a linear head, with masks as the truth."""

import collections
import dataclasses
import html
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxmed.data.corpus.source import Source
from jaxmed.errors import UserError, choose
from jaxmed.evaluate import dense, overlap, pixels, tables
from jaxmed.evaluate import metrics as statistics
from jaxmed.evaluate.protocols import compared, masks
from jaxmed.evaluate.protocols.masks import MaskTask, Part
from jaxmed.evaluate.protocols.protocol import lone_subject
from jaxmed.evaluate.protocols.tasks import PIXELS, SPLITS, TRAINED, UNTRAINED, plain

HELD = 0.1  # of the training subjects choose where there is no val split: CAPI, eval_segmentation.py
EXAMPLES = 6
BACKGROUND = 0  # value of a mask that 'dice_foreground' leaves out
Maps = Callable[[Any], np.ndarray]  # source -> maps [n, *grid, D] of its rows


@dataclasses.dataclass(frozen=True)
class Dense:
  """Probes of patch tokens, with the masks of records as the truth.

  Probes are fitted on patches of split 'train', what they choose is judged by the mIoU of split 'val' (without one, of
  10 % of the training subjects), and the maps of split 'test' are scored pixel by pixel at the encoder's native size,
  to which masks are brought by the nearest pixel. See `dense` for the probes, `overlap` for the scores.

  Attributes:
    ignore: values of masks that are no class, such as 255 or (0, 255); -1 never is one. Nothing else is ignored.
    methods: probes, comma-separated.
    levels: levels of the encoder whose maps are joined, as numbers; by default its final map.
    patches: patches of a training record at most, drawn by the seed; 0 for all.
    most: patches of all training records at most; beyond it each record gives fewer. The same holds for 'val'.
    steps: of the linear head. batch: its patches in a step. weight_decay: of AdamW. dropout: of its features.
  """

  ignore: tuple[int, ...] = ()
  methods: str = 'knn,logistic,linear'
  levels: tuple[int, ...] = ()
  patches: int = 64
  most: int = 10_000
  steps: int = 500
  batch: int = 1024
  weight_decay: float = 1e-3
  dropout: float = 0.1

  name: ClassVar[str] = 'dense'
  labelled: ClassVar[bool] = False  # the masks are the labels
  task: ClassVar[str] = 'segmentation by probes of patches, with masks as the truth'
  metrics: ClassVar[Mapping[str, str]] = overlap.LABELS
  probes: ClassVar[Mapping[str, str]] = {'knn': 'kNN', 'logistic': 'logistic', 'linear': 'linear + BN'}

  def __post_init__(self):
    for field in ('ignore', 'levels'):
      object.__setattr__(self, field, _integers(f'dense.{field}', getattr(self, field)))
    for name in self._methods:
      choose('probe of dense.methods', name, self.probes)
    for field, least in (('patches', 0), ('most', 1), ('steps', 1), ('batch', 1)):
      value = getattr(self, field)
      if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f'dense.{field} is {value!r}: expected a whole number of at least {least}')
    for field, high in (('weight_decay', float('inf')), ('dropout', 1)):
      value = getattr(self, field)
      if not isinstance(value, (int, float)) or not 0 <= value < high:
        raise UserError(f'dense.{field} is {value!r}: expected a number of at least 0'
                        + (' and below 1' if high == 1 else ''))

  @property
  def _methods(self) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in str(self.methods).split(',')))

  def check(self, source: Source, label: str = '', seed: int = 0) -> None:
    """A UserError where splits or masks are missing; masks are not read."""
    masks.check(source)

  def run(self, encoder: Any, source: Source, label: str = '', *, untrained: Any = None,
          beside: Mapping[str, Any] = {}, feature: str = 'map', batch_size: int = 64, seed: int = 0, draws: int = 1000,
          pixels: bool = True) -> dict[str, Any]:
    """Scores frozen patch tokens beside the untrained encoder, the raw pixels of the patches (PCA), and other encoders.

    Args:
      encoder: has `embed_source(source, batch_size, dense, levels)` that gives 'map' or 'levels', image_size and
        vocabulary. source: with splits and masks.
      label, feature: of no effect; the classes are those of the masks, the features those of the patches.
      untrained: the same encoder with its initial weights. beside: other encoders by name, of the same image size and
        grid. draws: bootstrap resamples. pixels: whether to score raw pixels too.

    Returns:
      A dict ready for JSON: label 'mask', feature, classes (values of masks), size and patch (pixels), patches {what
      the probes were fitted on}, splits and subjects {split: count}, chance (the commonest class everywhere), rows
      [{features, method, metrics: {metric: {value, low, high}}, chosen, classes: [{class, iou, dice, both, missed,
      hallucinated, absent}]}], differences, examples (the worst test records), notes, draws, seed. Intervals are 95 %
      by bootstrap over test subjects.

    Raises:
      UserError: as of `masks.make_task`; patches that do not divide the image; a level that the encoder lacks; features
        that are not finite; training patches of one class.
    """
    del label, feature
    task = masks.make_task(source, tuple(encoder.image_size), self.ignore, HELD, seed)
    kinds = {TRAINED: self._maps(encoder, TRAINED, batch_size)}
    if untrained is not None:
      kinds[UNTRAINED] = self._maps(untrained, UNTRAINED, batch_size)
    sample = _sampled(task, self._grid(kinds[TRAINED], task, batch_size), self, seed)
    if pixels:
      kinds[PIXELS] = _pixel_maps(encoder, source, task, sample, batch_size)
    for name, other in beside.items():
      if name in kinds:
        raise UserError(f'two encoders are called {name!r}; expected a name each')
      kinds[name] = self._maps(other, name, batch_size)
      text = lambda size, grid: f'{"x".join(map(str, grid))} patches of images of {"x".join(map(str, size))}'
      shape = tuple(other.image_size), self._grid(kinds[name], task, batch_size)
      if shape != (task.test.size, sample.grid):
        raise UserError(f'{name}: its map has {text(*shape)}, that of the encoder {text(task.test.size, sample.grid)}; '
                        'expected the same to be compared')
    scored = {kind: self._scored(maps, task, sample, batch_size, seed, kind == TRAINED) for kind, maps in kinds.items()}
    return self._result(task, sample, scored, draws, seed)

  def _maps(self, encoder: Any, name: str, batch_size: int) -> Maps:
    """The maps of an encoder."""
    def maps(source: Any) -> np.ndarray:
      found = encoder.embed_source(source, batch_size, dense=True, levels=self.levels)
      x = _joined_levels(found['levels'], source, len(encoder.image_size)) if self.levels else found['map']
      if not np.isfinite(x).all():
        raise UserError(f'{name} encoder: a map holds NaN or infinite values; expected finite numbers (did the '
                        'training diverge?)')
      return np.asarray(x, np.float32)
    return maps

  def _grid(self, maps: Maps, task: MaskTask, batch_size: int) -> tuple[int, ...]:
    """Of the maps; a UserError where it does not divide the images."""
    first = np.arange(len(task.train.packed)) < batch_size
    grid = maps(task.train.source.keep(first)).shape[1:-1]
    dense.cell(task.train.size, grid)
    return grid

  def _fitted(self, x: np.ndarray, task: MaskTask, sample: '_Sample', seed: int) -> dict[str, dense.Probe]:
    """Every probe, fitted on the features [n, D] of the sampled patches."""
    train, val = (dense.Patches(x[rows], sample.pixels[rows]) for rows in (sample.fit, ~sample.fit))
    classes = len(task.values)
    ask: dict[str, Any] = dict(seed=seed, steps=self.steps, batch=self.batch, weight_decay=self.weight_decay,
                               dropout=self.dropout)
    make = {'knn': lambda: dense.knn(train, val, classes), 'logistic': lambda: dense.logistic(train, val, classes),
            'linear': lambda: dense.linear(train, val, classes, **ask)}
    return {name: make[name]() for name in self._methods}

  def _scored(self, maps: Maps, task: MaskTask, sample: '_Sample', batch_size: int, seed: int,
              shown: bool) -> '_Scored':
    """The probes of one kind of features, what they predict of the test records, and the worst of these."""
    probes = self._fitted(sample.features(maps, task, batch_size), task, sample, seed)
    best = max(probes, key=lambda name: probes[name].score)
    classes, tables_ = len(task.values), collections.defaultdict(list)
    examples: list[dict[str, Any]] = []
    for rows, part in _chunks(task.test.source, batch_size):
      x, truth = maps(part), task.test.codes(rows)
      for name, probe in probes.items():
        predicted = probe.predict(x, task.test.size)
        table = overlap.confusion(truth, predicted, classes)
        tables_[name].append(table)
        if shown and name == best:
          worst = [_example(task.test, i, *pair) for i, *pair in zip(rows, truth, predicted, overlap.dice(table))]
          examples = sorted([*examples, *filter(None, worst)], key=lambda e: e['dice'])[:EXAMPLES]
    return _Scored(probes, {n: np.concatenate(t) for n, t in tables_.items()}, best, examples)

  def _result(self, task: MaskTask, sample: '_Sample', scored: Mapping[str, '_Scored'], draws: int,
              seed: int) -> dict[str, Any]:
    """What `run` returns."""
    names = [str(v) for v in task.values.tolist()]
    foreground = task.values != BACKGROUND
    rows, found, notes = [], {}, []
    for kind, s in scored.items():
      for method, table in s.tables.items():
        value = overlap.score(table, foreground)
        drawn = overlap.resampled(table, task.test.subjects, foreground, draws=draws, seed=seed)
        found[kind, method] = value, drawn
        rows.append(dict(features=kind, method=method, metrics=plain(statistics.summarised(value, drawn)),
                         chosen=_without_nan(s.probes[method].info), classes=_by_class(table, names)))
        if s.probes[method].trouble:
          notes.append(f'{method} on {kind}: {s.probes[method].trouble}')
    differences = compared.rows_of(found)['differences']
    first = next(iter(scored[TRAINED].tables.values()))
    constant = overlap.constant(first, int(np.bincount(sample.pixels[sample.pixels >= 0]).argmax()))
    chance = overlap.score(constant, foreground)
    sizes = {s: (len(p.packed), len(set(p.subjects))) for s, p in task.parts.items()}
    return dict(label='mask', feature='levels ' + '+'.join(map(str, self.levels)) if self.levels else 'map',
                classes=names, ignored=list(self.ignore), size=list(task.test.size), patch=list(sample.cell),
                patches=sample.told, splits={s: sizes.get(s, (0, 0))[0] for s in SPLITS},
                subjects={s: sizes.get(s, (0, 0))[1] for s in SPLITS}, rows=rows, differences=differences,
                chance={m: v if np.isfinite(v) else None for m, v in chance.items()},
                examples=dict(method=scored[TRAINED].best, cases=scored[TRAINED].examples),
                notes=self._notes(task, sample, scored) + notes, draws=draws, seed=seed,
                headline=next(iter(self.metrics)))

  def _notes(self, task: MaskTask, sample: '_Sample', scored: Mapping[str, '_Scored']) -> list[str]:
    """What a reader must know of the rows, the patches and the classes."""
    size, patch = ('x'.join(map(str, n)) for n in (task.test.size, sample.cell))
    told = sample.told
    notes = [*task.notes, f'scored by pixels at {size}, the native size of the encoder; a patch has {patch} pixels',
             f'fitted on {told["fit"]:,} patches, chosen on {told["val"]:,}, fitted again on both: at most '
             f'{told["per_record"]} of the {told["of"]} of a record']
    named = lambda some: ', '.join(str(v) for v in task.values[some])
    if not task.known.all():
      notes.append(f'classes of test masks that no other mask has, counted as errors: {named(~task.known)}')
    seen = np.isin(np.arange(len(task.values)), dense.commonest(sample.pixels, len(task.values)))
    if (task.known & ~seen).any():
      notes.append('classes that are the commonest of no fitted patch, which logistic regression cannot predict: '
                   + named(task.known & ~seen))
    if UNTRAINED not in scored:
      notes.append(compared.MISSING)
    return notes + lone_subject(task)

  def tables(self, result: Mapping[str, Any]) -> str:
    """What `run` returned as aligned text: scores, then the classes of the trained encoder by its best probe."""
    return f'{tables.text_table(result, self.metrics, self.probes)}\n{self._classes(result)}\n'

  def html(self, result: Mapping[str, Any]) -> str:
    """The same as HTML."""
    return f'{tables.html_table(result, self.metrics, self.probes)}\n<pre>{html.escape(self._classes(result))}</pre>'

  def _classes(self, result: Mapping[str, Any]) -> str:
    """A line a class, of the trained encoder by the probe that is the best on val."""
    method = result['examples']['method']
    row = next(r for r in result['rows'] if (r['features'], r['method']) == (TRAINED, method))
    head = ['class', 'IoU', 'Dice', *overlap.OUTCOMES]
    number = lambda v: 'n/a' if v is None else f'{v:.3f}' if isinstance(v, float) else str(v)
    body = [[number(c[k]) for k in ('class', 'iou', 'dice', *overlap.OUTCOMES)] for c in row['classes']]
    width = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    title = (f'{self.probes[method]} on {TRAINED} features (the best on val), class by class: IoU of areas pooled,\n'
             'Dice of records, and how many of these have the class in mask and prediction')
    return '\n'.join([title, *(tables.text_row(r, width) for r in (head, *body))])

  def csv_rows(self, result: Mapping[str, Any]) -> list[list[str]]:
    """What `run` returned as rows of a table: a line a metric of all classes, and of each class."""
    cell = lambda v: '' if v is None else f'{v:.6g}' if isinstance(v, float) else str(v)
    head, *rows = tables.csv_rows(result)
    out = [[*head[:3], 'class', *head[3:]], *([*row[:3], 'all', *row[3:]] for row in rows)]
    for row in result['rows']:
      out += [[row['features'], '', row['method'], c['class'], m, cell(v), '', ''] for c in row['classes']
              for m, v in c.items() if m != 'class']
    return out

  def drawings(self, result: Mapping[str, Any], source: Source) -> dict[str, Callable[[Any], None]]:
    """{name: what writes a picture}: the worst test records with their masks and predictions over them."""
    from jaxmed.evaluate.report import overlays
    cases = result['examples']['cases']
    return {'worst_test_records': lambda path: overlays.masks(result, source, path)} if cases else {}


@dataclasses.dataclass(frozen=True)
class _Scored:
  """Of one kind of features: its probes, {method: confusion [N, K, K]} of test records, the best probe on val, and the
  worst test records by it."""

  probes: Mapping[str, dense.Probe]
  tables: Mapping[str, np.ndarray]
  best: str
  examples: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Sample:
  """The patches that probes see: `taken` {split: {row: places of patches}}, the classes of their pixels [n, L], which
  of them are fitted on (bool [n]), the grid, pixels along each axis of a patch, and the numbers as told in results."""

  taken: Mapping[str, Mapping[int, np.ndarray]]
  pixels: np.ndarray
  fit: np.ndarray
  grid: tuple[int, ...]
  cell: tuple[int, ...]
  told: Mapping[str, int]

  def features(self, maps: Maps, task: MaskTask, batch_size: int) -> np.ndarray:
    """Their features [n, D], in their order."""
    out = []
    for split, taken in self.taken.items():
      source, rows = task.parts[split].source, np.array(list(taken))
      for places, part in _chunks(source.keep(np.isin(np.arange(len(source)), rows)), batch_size):
        found = maps(part)
        found = found.reshape(len(found), -1, found.shape[-1])
        out += [x[taken[int(i)]] for x, i in zip(found, rows[places], strict=True)]
    return np.concatenate(out)


def _sampled(task: MaskTask, grid: tuple[int, ...], options: Dense, seed: int) -> _Sample:
  """Draws patches with a pixel that is not ignored, the same ones for every kind of features."""
  total = int(np.prod(grid))
  taken: dict[str, dict[int, np.ndarray]] = {}
  found: list[np.ndarray] = []
  fit: list[bool] = []
  per: dict[str, int] = {}
  for k, split in enumerate(SPLITS[:2]):
    if split not in task.parts:
      continue
    part, rng = task.parts[split], np.random.default_rng([seed, k])
    count = len(part.packed)
    per[split] = max(1, min(options.patches or total, total, options.most // count))
    rows = np.arange(count) if count <= options.most else np.sort(rng.choice(count, options.most, replace=False))
    taken[split] = {}
    for i in rows.tolist():
      patches = dense.cut(part.codes([i]), grid).reshape(total, -1)
      some = np.flatnonzero((patches >= 0).any(axis=1))
      places = np.sort(rng.choice(some, min(per[split], len(some)), replace=False)) if len(some) else some
      if len(places):
        taken[split][i] = places
        found.append(patches[places])
        fit += [split == 'train' and bool(task.fit[i])] * len(places)
  chosen = np.array(fit, bool)
  for what, some in (('train', chosen), ('val', ~chosen)):
    if not some.any():
      raise UserError(f'every pixel of the {what} masks is ignored; expected some that are not')
  told = {'fit': int(chosen.sum()), 'val': int((~chosen).sum()), 'per_record': per['train'], 'of': total}
  return _Sample(taken, np.concatenate(found), chosen, grid, dense.cell(task.train.size, grid), told)


def _pixel_maps(encoder: Any, source: Any, task: MaskTask, sample: _Sample, batch_size: int) -> Maps:
  """The raw pixels of each patch, by the principal axes of those that probes are fitted on."""
  grid = sample.grid

  def raw(part: Any) -> np.ndarray:
    image = np.concatenate([x for x, _ in pixels.batches(encoder, part, source.channels, batch_size)])
    flat = np.moveaxis(image, -1, 1)
    cut = dense.cut(flat.reshape(-1, *flat.shape[2:]), grid).reshape(*flat.shape[:2], *grid, -1)  # [n, C, *grid, L]
    return np.moveaxis(cut, 1, -2).reshape(len(image), *grid, -1)

  axes = pixels.fit_pca(sample.features(raw, task, batch_size))

  def maps(part: Any) -> np.ndarray:
    found = raw(part)
    return axes.project(found.reshape(-1, found.shape[-1])).reshape(*found.shape[:-1], -1)

  return maps


def _joined_levels(levels: Mapping[int, np.ndarray], source: Any, rank: int) -> np.ndarray:
  """Maps [n, *grid, D] of levels side by side, each repeated to the finest grid; channel tokens by their mean."""
  codes, names = source.distinct('channels')
  count = np.array([len(n) for n in names])[codes]
  maps = []
  for x in levels.values():
    if x.ndim == rank + 3:  # [n, C, *grid, D]: the channels of a row come first
      there = (np.arange(x.shape[1]) < count[:, None]).reshape(*x.shape[:2], *[1] * (rank + 1))
      x = (x * there).sum(axis=1) / there.sum(axis=1)
    maps.append(x)
  finest = max((x.shape[1:-1] for x in maps), key=np.prod)
  for i, x in enumerate(maps):
    for axis, times in enumerate(dense.cell(finest, x.shape[1:-1]), start=1):
      maps[i] = np.repeat(maps[i], times, axis=axis)
  return np.concatenate(maps, axis=-1)


def _chunks(source: Any, rows: int) -> Iterator[tuple[np.ndarray, Any]]:
  """Row numbers and rows of a source, about so many at a time: what is left over goes with the last of them."""
  place = np.arange(len(source))
  group = np.minimum(place // rows, max(len(source) // rows, 1) - 1)
  for i in range(group[-1] + 1 if len(group) else 0):
    yield np.flatnonzero(group == i), source.keep(group == i)


def _by_class(table: np.ndarray, names: list[str]) -> list[dict[str, Any]]:
  """IoU of pooled areas, mean Dice over cases, and what cases have of each class."""
  pooled, cases = overlap.iou(table.sum(axis=0)), overlap.dice(table)
  there = ~np.isnan(cases)
  mean = [float(cases[some, k].mean()) if some.any() else None for k, some in enumerate(there.T)]
  counts = overlap.outcomes(table)
  return [{'class': name, 'iou': float(pooled[k]) if np.isfinite(pooled[k]) else None, 'dice': mean[k]}
          | {what: int(n[k]) for what, n in counts.items()} for k, name in enumerate(names)]


def _example(part: Part, row: int, truth: np.ndarray, predicted: np.ndarray,
             dice: np.ndarray) -> dict[str, Any] | None:
  """A test record with its prediction; of a volume the slice with most errors. None where all is ignored."""
  if np.isnan(dice).all():
    return None
  place = None
  if truth.ndim == 3:
    place = int(((truth != predicted) & (truth >= 0)).sum(axis=(1, 2)).argmax())
    predicted = predicted[place]
  flat = part.values[predicted].ravel()
  ends = np.flatnonzero(np.append(flat[1:] != flat[:-1], True))
  lengths = np.diff(ends, prepend=-1)
  return dict(id=str(part.source.table['id'][int(row)].as_py()), subject=str(part.subjects[row]),
              dice=float(np.nanmean(dice)), slice=place, shape=list(predicted.shape), values=flat[ends].tolist(),
              lengths=lengths.tolist())


def _integers(name: str, value: Any) -> tuple[int, ...]:
  """5 or (5, 6) as a tuple."""
  found = tuple(value) if isinstance(value, (tuple, list)) else (value,)
  if not all(isinstance(v, int) and not isinstance(v, bool) for v in found):
    raise UserError(f'{name} is {value!r}: expected whole numbers such as 0,255')
  return found


def _without_nan(value: Any) -> Any:
  """NaN is not JSON."""
  if isinstance(value, Mapping):
    return {k: _without_nan(v) for k, v in value.items()}
  return None if isinstance(value, float) and not np.isfinite(value) else value
