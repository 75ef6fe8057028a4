"""Towers of signals, sound and tables by name: `vit_micro/25`, `resnet18`, `audio_vit_micro/16`, `table_mlp`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmed.errors import UserError, choose
from jaxmed.models import registry
from jaxmed.models.signals import spectrogram
from jaxmed.models.signals.signal import NORMALIZE, SignalEncoder
from jaxmed.models.signals.table import TableEncoder

AUDIO = 'audio_'  # how the names of encoders of spectrograms begin
KINDS = {'signal': 'channel_vit_micro/25', 'table': 'table_mlp'}  # towers, with an example of their models
TABLES: dict[str, dict[str, Any]] = {
    'table_mlp': dict(embed_dim=256), 'table_micro': dict(embed_dim=128, depth=2, num_heads=4),
    'table_base': dict(embed_dim=256, depth=4, num_heads=8)}
_STATED = ('parent', 'name', 'columns', 'mean', 'std')  # what the run fills in
_LONG = 1 << 16  # steps that the strides of every family divide


def create_signal(name: str, steps: int, leads: int, normalize: str = 'lead', rate: float = 0.0, mels: int = 0,
                  **options: Any) -> SignalEncoder:
  """An encoder of signals of so many steps and leads, e.g. `create_signal('channel_vit_micro/25', 5000, 12)`.

  Args:
    name: a model of the registry; 'audio_vit_micro/16' for one that sees the spectrogram of a waveform.
    normalize: of NORMALIZE. rate: Hz of a waveform. mels: bands of its spectrogram, 0 for 128.
    **options: of the model. What is left of the steps after the last whole patch is cut off.
  Raises:
    UserError: an unknown name or option, a waveform without a rate, fewer steps than a patch.
  """
  choose('towers.signal.options.normalize', normalize, NORMALIZE)
  if not name.startswith(AUDIO):
    if rate or mels:
      raise UserError(f'towers.signal.options: rate and mels are for spectrograms, model={AUDIO}{name}')
    size = _whole(name, steps, 'steps', options)
    return SignalEncoder(registry.create_model(name, (size,), leads, **options), normalize)
  if rate <= 0:
    raise UserError(f'towers.signal.model={name} needs the rate of the waveforms in Hz: '
                    'towers.signal.options.rate=16000')
  mels, inner = mels or spectrogram.MELS, name.removeprefix(AUDIO)
  frames = _whole(inner, spectrogram.frames_of(steps, rate), 'frames of a spectrogram', options)
  return SignalEncoder(registry.create_model(inner, (frames, mels), 1, **options), normalize, float(rate))


def _whole(name: str, count: int, what: str, options: Mapping[str, Any]) -> int:
  """The steps of whole patches."""
  patch = name.partition('/')[2].partition('x')[0]
  known = patch.isdigit() and int(patch)
  size = int(patch) if known else registry.create_model(name, (_LONG,), 1, **options).patch_size[0]
  if count < size:
    raise UserError(f'towers.signal.model={name} has patches of {size} {what}, but signals have {count}: take a '
                    'smaller patch, or set loader.signal_length')
  return count // size * size


def table_options(name: str) -> dict[str, Any]:
  """The fields of the named model of tables that a config may set, with their defaults for that size."""
  sizes = TABLES[choose('model of tables', name, TABLES)]
  return {f.name: f.default for f in dataclasses.fields(TableEncoder) if f.name not in _STATED} | sizes


def create_table(name: str, columns: Sequence[Mapping[str, Any]], **options: Any) -> TableEncoder:
  """An encoder of tables of `columns`, {'name', 'mean', 'std'} each.

  Raises:
    UserError: unknown name or option, or sizes that do not fit together.
  """
  fields = table_options(name)
  for key, value in options.items():
    choose('option of a model of tables', key, fields)
    fields[key] = tuple(value) if isinstance(value, list) else value
  if fields['depth'] and fields['embed_dim'] % fields['num_heads']:
    raise UserError(f'num_heads {fields["num_heads"]} does not divide embed_dim {fields["embed_dim"]}')
  return TableEncoder(**fields, **{part: tuple(c[key] for c in columns)
                                   for part, key in (('columns', 'name'), ('mean', 'mean'), ('std', 'std'))})
