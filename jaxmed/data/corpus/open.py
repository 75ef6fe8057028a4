"""Opening a corpus by its name: a folder, a selection of one, a URL, or several of them as one."""

import os
import pathlib
from typing import Any

import numpy as np

from jaxmed import files
from jaxmed.data.corpus import labels, manifest, selection, store
from jaxmed.data.corpus.corpus_format import COLUMNS, MANIFEST, is_corpus, shard_name
from jaxmed.data.corpus.joint import join
from jaxmed.data.corpus.manifest import Manifest
from jaxmed.data.corpus.remote import open_remote
from jaxmed.data.corpus.source import Source, check_counts, metadata
from jaxmed.errors import UserError


def open_source(uri: str | os.PathLike) -> Source:
  """Opens a corpus that `prepare` wrote: a folder, or a URL of an object store (see `remote`). 'A,B' opens
  several as one (see `joint`), where no folder has that very name.

  Records are all its rows, in the manifest's order; of CORPUS@NAME those of a selection (see jaxmed.data.curate),
  with the statistics of the whole corpus.

  Raises:
    UserError: the folder is missing, no corpus, or damaged, or has no such selection.
  """
  parts = os.fspath(uri).split(',')
  if len(parts) > 1 and elsewhere(os.fspath(uri)):
    return join([_open(part.strip()) for part in parts if part.strip()])
  return _open(uri)


def elsewhere(uri: str) -> bool:
  """Whether a name of a corpus is no path of one folder: a URL, or several corpora."""
  return '://' in uri or (',' in uri and not os.path.exists(uri))


def _open(uri: str | os.PathLike) -> Source:
  if '://' in os.fspath(uri):
    scheme, _, place = os.fspath(uri).partition('://')
    return _open(place) if scheme == 'file' else open_remote(os.fspath(uri))
  path, name = selection.split_uri(uri)
  if files.shown(str(path)) != str(path):
    raise UserError(f'{path} is no UTF-8, which the libraries of a corpus want: move it to a place with another name')
  if not path.exists():
    raise UserError(f'{path} does not exist: expected a corpus (a folder that `jaxmed prepare` writes)')
  if not is_corpus(path):
    raise UserError(f'{path} is no corpus: it has no {MANIFEST}; make one with `jaxmed prepare`')
  table = Manifest(manifest.Columns(path / MANIFEST))
  lost = [c for c in COLUMNS.names if c not in table.column_names]
  if lost:
    raise UserError(f'{path / MANIFEST} has no column {lost[0]!r}: prepare it again')
  stats = files.read_json(path / 'stats.json')
  shards, lengths = _open_shards(path, table)
  bricks = _beside(path, 'bricks', lengths, False)
  names = {path.name: labels.read(path / labels.FILE)} if (path / labels.FILE).is_file() else {}
  return Source(path, selection.filtered(path, name, table) if name else table, stats, shards, bricks, lengths,
                labels=names, places=_beside(path, 'places', lengths))


def _beside(path: pathlib.Path, kind: str, lengths: dict[str, np.ndarray], there: bool = True
            ) -> dict[str, store.Files]:
  """{split: files of a kind beside its shards}; with `there` only of splits that have them."""
  names = {split: [str(path / shard_name(f'{split}-{kind}', i, len(ends))) for i in range(len(ends))]
           for split, ends in lengths.items()}
  return {split: store.Files(own) for split, own in names.items() if not there or all(map(os.path.isfile, own))}


def _open_shards(path: pathlib.Path, table: Manifest) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """{split: TFDS data source} and {split: records up to the end of each shard}."""
  builder = metadata(path, path)
  lost = [f for info in builder.info.splits.values() for f in info.filepaths if not os.path.isfile(f)]
  if lost:
    raise UserError(f'{path} lacks the shard {os.path.basename(lost[0])}: prepare it again')
  check_counts(builder, table, path)
  splits = builder.info.splits
  lengths = {name: np.cumsum(info.shard_lengths) for name, info in splits.items()}
  return {name: builder.as_data_source(split=name) for name in splits}, lengths
