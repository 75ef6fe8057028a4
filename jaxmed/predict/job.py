"""Predicts the masks of a folder or a corpus: a file for each image, on its own grid. What is done is kept."""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxmed import files
from jaxmed.data.readers import numbered
from jaxmed.errors import UserError, choose
from jaxmed.owner import NAME as OWNER
from jaxmed.predict import dicomseg, masks, volumes
from jaxmed.predict.cases import Case, cases_of
from jaxmed.segmenter import Segmenter

FORMATS = ('auto', 'dicomseg')
RECORD = 'prediction.json'
Change = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Options:
  """How masks are predicted.

  Attributes:
    channels: names of the channels of all images; by default those that files tell, or the run's in order.
    split: of a corpus, to predict alone.
    step: largest distance of two tiles, as a share of their size.
    flips: axes to mirror; None for those that the run was trained with, see `Segmenter.mirrored`.
    batch_size: tiles in one pass on each device.
    volumes: a CSV file for what `volumes` measures.
    overwrite: whether masks of another run, or of other options, are replaced.
    format: 'auto' for what goes with the image, or 'dicomseg' for DICOM segmentations of series, see `dicomseg`.
  """

  channels: tuple[str, ...] | None = None
  split: str | None = None
  step: float = 0.5
  flips: tuple[int, ...] | None = None
  batch_size: int = 1
  volumes: str | None = None
  overwrite: bool = False
  format: str = 'auto'

  @property
  def asked(self) -> dict[str, Any]:
    """Arguments of `Segmenter.logits`."""
    return {'step': self.step, 'flips': self.flips, 'batch_size': self.batch_size}


def predict(segmenter: Segmenter, data: str | os.PathLike, out: str | os.PathLike, options: Options = Options(), *,
            change: Change | None = None, changed: str = '', progress: bool = False) -> dict[str, Any]:
  """Writes OUT/NAME for each image, where the mask is not there yet.

  Args:
    change: what makes a better mask of a predicted one, and `changed` its name; see `postprocess`.
  Returns:
    {'out', 'images', 'written', 'kept'} and, if asked for, 'volumes'.
  Raises:
    UserError: a folder that another run or other options filled, an image that the run does not take (the masks before
      it stay).
  """
  out = pathlib.Path(out)
  segments = choose('--format', options.format, FORMATS) == 'dicomseg'
  if segments:
    dicomseg.check(segmenter.values)
  cases = cases_of(data, out, options.channels or segmenter.encoder.vocabulary, options.split, segments)
  if not cases:
    raise UserError(f'{data} has no image{f" in split {options.split}" if options.split else ""}')
  if options.volumes:
    files.check_place(options.volumes)
  own = identity(segmenter, options, changed)
  _claim(out, own, cases, options.overwrite)
  rows: list[list[Any]] = []
  written = 0
  for case in _shown(cases, progress):
    path = out / case.name
    mask, record = None, None
    if not path.exists():
      record = _read(case, options.channels, segmenter)
      mask = segmenter.mask_of(record, case.name, **options.asked)
      mask = change(mask) if change else mask
      if case.group:
        dicomseg.write(path, mask, case.group, segmenter.values, segmenter.names, json.dumps(own, sort_keys=True))
      else:
        masks.write(path, mask, record, case.file)
      written += 1
    if options.volumes:
      record = record or _read(case, options.channels, segmenter)
      if mask is None:
        mask = dicomseg.read(path, case.group, segmenter.values) if case.group else masks.read(path)
      rows += volumes.rows(case.name, mask, record, segmenter.values, segmenter.names, segmenter.encoder.vocabulary)
  if options.volumes:
    files.write_csv(options.volumes, [volumes.head(segmenter.encoder.vocabulary), *rows])
  return {'out': str(out), 'images': len(cases), 'written': written, 'kept': len(cases) - written} | (
    {'volumes': options.volumes} if options.volumes else {})


def identity(segmenter: Segmenter, options: Options, changed: str = '') -> dict[str, Any]:
  """What masks depend on beside the image: weights and options, plain data."""
  digest = hashlib.blake2b(digest_size=16)
  for leaf in jax.tree.leaves(segmenter.params):
    digest.update(np.asarray(leaf).tobytes())
  flips = segmenter.mirrored if options.flips is None else options.flips
  return {'weights': digest.hexdigest(), 'model': segmenter.info.get('model'), 'steps': segmenter.info.get('steps'),
          'values': list(segmenter.values), 'names': list(segmenter.names), 'step': options.step, 'flips': list(flips),
          'postprocess': changed} | ({'format': options.format} if options.format != 'auto' else {})


def _claim(out: pathlib.Path, own: dict[str, Any], cases: Sequence[Case], overwrite: bool) -> None:
  """Makes OUT a place of these masks, without any of others. A UserError where it holds such and may not lose them."""
  path = out / RECORD
  if out.exists() and not out.is_dir():
    raise UserError(f'{out} is a file: expected a folder for masks')
  if not path.is_file():
    if out.exists() and any(p.name != OWNER for p in out.iterdir()):
      raise UserError(f'{out} exists and holds no masks of jaxmed predict: choose another --out')
    files.write_json(path, own)
    return
  before = files.read_json(path)
  other = [key for key in own if not isinstance(before, dict) or before.get(key) != own[key]]
  if other and not overwrite:
    what = 'another run or checkpoint' if other[0] in ('weights', 'model', 'steps') else f'another {other[0]}'
    raise UserError(f'{out} holds masks of {what}: choose another --out, or say --overwrite')
  if other:
    for case in cases:
      (out / case.name).unlink(missing_ok=True)
    files.write_json(path, own)


def _read(case: Case, channels: Sequence[str] | None, segmenter: Segmenter) -> dict[str, Any]:
  """The record of a case with channels that the run knows, in the order of its vocabulary."""
  record = case.read()
  names, count = list(record['channels']), record['image'].shape[-1]
  if channels is not None:
    names = list(channels)
  elif names == numbered(count) and count == len(segmenter.channels):  # a file that does not name them
    names = list(segmenter.encoder.vocabulary)
  ids = segmenter.encoder.ids
  order = sorted(range(len(names)), key=lambda i: ids.get(names[i], -1))
  try:
    segmenter.encoder.channel_ids([names[i] for i in order], count)
  except UserError as e:
    raise UserError(f'{case.name}: {e}') from e
  image = record['image'] if order == list(range(count)) else record['image'][..., order]
  return record | {'image': image, 'channels': [names[i] for i in order]}


def _shown(cases: Sequence[Case], progress: bool) -> Iterator[Case]:
  from tqdm import tqdm
  yield from tqdm(cases, unit='image', disable=not progress, file=sys.stderr)
