"""What a run must know of its data: channels, shapes, classes, saved beside the run."""

import collections
import dataclasses
import difflib
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxmed import config as config_lib
from jaxmed import objectives
from jaxmed.data.corpus import joint, vocabulary
from jaxmed.data.corpus import labels as labels_lib
from jaxmed.data.corpus.labels import Labels
from jaxmed.data.corpus.vocabulary import Vocabulary
from jaxmed.data.feed import fields, lacking
from jaxmed.errors import UserError, choose

NO_VOCABULARY = Vocabulary()
NO_LABELS = Labels((), ())
UNKNOWN = config_lib.CHOICES['loader.unknown']
_SLICE = 1_000_000  # rows whose texts are joined at a time: Arrow's hold 2 GiB


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """What a run must know of its data, saved in RUN/data.json so that a run can be read without its corpus.

  channels: [{'name', 'mean', 'std'}], the vocabulary; where a vocabulary file knows more, 'aliases' and 'features' too,
  see `data.vocabulary`. slots: most channels of a record. masked: whether some
  records have fewer. mixed: whether records differ in their channels. dtype: of batches. rows: records to train on.
  classes: of the label, () for none. holds: what records have beside images, see `feed.fields.held`; signal: steps
  and channels of the first signal, () for none; boxes: the most boxes of a record; uneven: whether some record has
  another aspect than `size`; digest: of the records, see `digest_of`, '' in runs of earlier versions; mask_values,
  mask_names: the classes of masks, see `data.corpus.labels`, () where the method does not ask for them; number: mean
  and standard deviation of the label, where the method takes it as a number, else (); spacing: mm that all records
  have, see `spacing_of`, where the method trains on masks; texts: what texts are and their tokenizer, see `wording`,
  where the method takes them.
  """

  channels: tuple[dict[str, Any], ...]
  slots: int
  masked: bool
  dtype: str
  rows: int
  size: tuple[int, ...]  # median grid of the records
  classes: tuple[str, ...] = ()
  summary: dict[str, Any] = dataclasses.field(default_factory=dict)
  mixed: bool = False
  holds: tuple[str, ...] = ()
  signal: tuple[int, ...] = ()
  boxes: int = 0
  uneven: bool = False
  digest: str = ''
  mask_values: tuple[int, ...] = ()
  mask_names: tuple[str, ...] = ()
  number: tuple[float, ...] = ()
  spacing: tuple[float, ...] = ()
  texts: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def labels(self) -> Labels:
    """The classes of masks."""
    return Labels(self.mask_values, self.mask_names)

  @property
  def vocabulary(self) -> tuple[str, ...]:
    """Channel names by id."""
    return tuple(c['name'] for c in self.channels)

  @property
  def ids(self) -> dict[str, int]:
    """The id of each channel by its name and aliases."""
    return vocabulary.ids_of(self.channels)


def describe(source: Any, label: str, known: Vocabulary = NO_VOCABULARY,
             lack: lacking.Lack | None = None, labels: Labels = NO_LABELS,
             numeric: bool = False) -> DataSpec:
  """Looks at the manifest and statistics of a `data.corpus.source.Source` (already reduced to the rows to train on).

  Channels that `known` gives one name are one channel; a UserError where a record has two of them. With `lack`
  (loader.missing) records differ in their channels. `labels` are the classes of masks. With `numeric` the
  label is a number and has no classes.
  """
  if not len(source):
    raise UserError('the corpus has no record to train on')
  codes, sets = source.distinct('channels')
  places, shapes = source.distinct('shape')
  of_set, of_shape = (np.bincount(x, minlength=len(y)) for x, y in ((codes, sets), (places, shapes)))
  if len({len(s) for s in shapes}) > 1:
    raise UserError(f'the corpus mixes images and volumes (shapes {shapes[0]} and others): prepare them separately')
  channels = _channels(source, sets, known)
  counts = {len(row) for row in sets}
  dtypes = source.distinct('dtype')[1]
  dtype = dtypes[0] if len(dtypes) == 1 else 'float32'
  size = tuple(_median(axis, of_shape) for axis in np.array([s[:-1] for s in shapes]).T)
  classes = tuple(source.classes(label)) if label and not numeric else ()
  summary = {
      'records': len(source), 'subjects': pc.count_distinct(source.column('subject'), mode='all').as_py(),
      'sources': _counted(*source.distinct('source')),
      'channel_sets': _commonest(('+'.join(row) for row in sets), of_set),
      'sizes': _commonest(('x'.join(map(str, s[:-1])) for s in shapes), of_shape),
  }
  lacks, holds = lack is not None, fields.held(source)
  return DataSpec(channels, max(counts), len(counts) > 1 or lacks,
                  dtype if dtype in ('uint8', 'uint16', 'int16') else 'float32', len(source), size, classes, summary,
                  len(sets) > 1 or lacks, holds, _signal(source) if 'signal' in holds else (),
                  _most_boxes(source, len(size)) if 'boxes' in holds else 0,
                  not all(same_aspect(shape[:-1], size) for shape in shapes), digest_of(source),
                  labels.values, labels.names, _moments(source, label) if numeric and label else (),
                  spacing_of(source) if labels.values else ())


def _moments(source: Any, column: str) -> tuple[float, float]:
  """Mean and standard deviation (of the population) of a column of numbers."""
  known = fields.numbers(source, column)
  known = known[~np.isnan(known)]
  if not len(known) or not known.std() > 0:
    some = f'only {known[0]:g}' if len(known) else 'no number'
    raise UserError(f'column {column!r} of {source.path} holds {some} in the records to train on: expected different '
                    'numbers')
  return float(known.mean()), float(known.std())


def numeric(user: Mapping[str, Any]) -> bool:
  """Whether the method of a config takes loader.label as a number."""
  return 'number' in objectives.get(str(user.get('method', 'mae'))).FIELDS


def labels_of(user: Mapping[str, Any], corpus: Any) -> Labels:
  """The classes of a corpus's masks, where the method of a config asks which of them are annotated."""
  method = objectives.get(str(user.get('method', 'mae')))
  return labels_lib.labels_of(corpus) if 'annotated' in method.FIELDS else NO_LABELS


def digest_of(source: Any) -> str:
  """A digest of which records these are, in their order: ids, hashes of what they were made of, and shapes.

  Where the corpus lies plays no part, nor do other columns of its manifest.
  """
  found = hashlib.blake2b(digest_size=16)
  for name in ('id', 'sha256'):
    column = source.column(name).cast(pa.string()).fill_null('')
    for chunk in (part.slice(i, _SLICE) for part in column.chunks for i in range(0, len(part), _SLICE)):
      lines = pc.binary_join(pa.ListArray.from_arrays([0, len(chunk)], chunk), '\n')[0]  # not in Python: millions
      found.update(lines.as_buffer())
      found.update(b'\n')
  shapes = source.column('shape').cast(pa.list_(pa.int64()))
  for numbers in (pc.list_value_length(shapes), pc.list_flatten(shapes)):
    found.update(numbers.to_numpy().astype(np.int64).tobytes())
  return found.hexdigest()


def spacing_of(source: Any) -> tuple[float, ...]:
  """mm along each axis that all records have, up to 1 %; () where they differ or one does not say."""
  found = source.distinct('spacing')[1]
  if not found or any(not row or len(row) != len(found[0] or ()) for row in found):
    return ()
  table = np.array(found, np.float64)
  middle = np.median(table, axis=0)
  return tuple(float(f'{s:.6g}') for s in middle) if (np.abs(table - middle) <= 0.01 * middle).all() else ()


def same_aspect(grid: Sequence[int], size: Sequence[int]) -> bool:
  """Whether an image [*grid] that is resized to [*size] keeps its aspect, up to rounding."""
  share = max(n / have for n, have in zip(size, grid, strict=True))
  return all(abs(n - share * have) <= max(1.0, share) for n, have in zip(size, grid, strict=True))


def _signal(source: Any) -> tuple[int, ...]:
  """Steps and channels of the first signal."""
  row = int(np.argmax(source.column('signal').is_valid().to_numpy()))
  return tuple(source.record(row, ()).get('signal', np.zeros((0, 0))).shape)


def _most_boxes(source: Any, rank: int) -> int:
  values = source.column(fields.BOXES).to_pylist()
  return max(len(fields.parse_boxes(v, rank, f'{source.path}: record {i}')) for i, v in enumerate(values))


def _channels(source: Any, sets: list, known: Vocabulary) -> tuple[dict[str, Any], ...]:
  """The entries of `DataSpec.channels`, from the sets of channels of the records."""
  for row in sets:
    own = [known.name(c) for c in row]
    twice = [c for c in row if own.count(known.name(c)) > 1]
    if twice:
      raise UserError(f'{source.path} has records with the channels {" and ".join(twice)}, which are both '
                      f'{known.name(twice[0])!r} in the vocabulary: give one of them another name')
  by_name: dict[str, list[str]] = {}
  for name in source.channels:
    by_name.setdefault(known.name(name), []).append(name)
  out = []
  for name, own in by_name.items():
    stats = joint.merged([{name: source.stats[n]} for n in own])[name]
    entry = {'name': name, 'mean': stats['mean'], 'std': stats['std']}
    aliases = sorted({*known.aliases(name), *own} - {name})
    entry |= {'aliases': aliases} if aliases else {}
    out.append(entry | ({'features': known.features[name]} if name in known.features else {}))
  return tuple(out)


def vocabulary_of(user: Mapping[str, Any], source: Any) -> Vocabulary:
  """What the file of loader.vocabulary says; tells of channels that it lacks, or raises, as loader.unknown wants."""
  loader = dict(user.get('loader', {}))
  if not loader.get('vocabulary'):
    return NO_VOCABULARY
  known = vocabulary.read(str(loader['vocabulary']))
  action = choose('loader.unknown', str(loader.get('unknown', 'warn')), UNKNOWN)
  for name in known.unknown(source.channels):
    near = difflib.get_close_matches(name, list(known.names), n=3, cutoff=0.4)
    text = (f'{source.path} has the channel {name!r}, which {loader["vocabulary"]} does not name' +
            (f' (near it: {", ".join(near)})' if near else ''))
    if action == 'error':
      raise UserError(text)
    if action == 'warn' and jax.process_index() == 0:
      print(f'jaxmed: {text}', file=sys.stderr, flush=True)
  return known


def _median(values: np.ndarray, counts: np.ndarray) -> int:
  """The median of values that occur so often, rounded down."""
  order = np.argsort(values, kind='stable')
  ends, n = np.cumsum(counts[order]), int(counts.sum())
  low, high = (values[order][np.searchsorted(ends, k, side='right')] for k in ((n - 1) // 2, n // 2))
  return int((int(low) + int(high)) / 2)


def _counted(codes: np.ndarray, values: list) -> dict[str, int]:
  return dict(zip(map(str, values), np.bincount(codes, minlength=len(values)).tolist(), strict=True))


def _commonest(values: Iterable[str], counts: np.ndarray) -> dict[str, int]:
  """The ten most frequent values; equal ones by name."""
  total: collections.Counter[str] = collections.Counter()
  for value, n in sorted(zip(values, counts.tolist(), strict=True)):
    total[value] += n
  return dict(total.most_common(10))


def check_same(spec: DataSpec, source: Any) -> None:
  """Raises a UserError for other records than the run began with: what it learned, and their order, is of those."""
  if len(source) != spec.rows or {spec.ids.get(c, c) for c in source.channels} != set(spec.ids.values()):
    tell = lambda rows, names: f'{rows} records to train on with channels {", ".join(names)}'
    raise UserError(f'{source.path} has {tell(len(source), source.channels)}, but the run began with '
                    f'{tell(spec.rows, spec.vocabulary)}: give the same corpus with --data')
  if spec.digest and digest_of(source) != spec.digest:
    raise UserError(f'{source.path} has as many records as the corpus that the run began with, but others (by their '
                    'ids, hashes and shapes): give the same corpus with --data, or begin a new run with init=RUN')
  widest = max(map(len, source.distinct('channels')[1]))
  if widest > spec.slots:
    raise UserError(f'{source.path} has a record of {widest} channels, but the run began with at most {spec.slots}, '
                    'for which its batches have room: give the same corpus with --data')
