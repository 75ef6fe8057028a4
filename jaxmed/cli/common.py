"""What several verbs share: types of options, options of an encoder, channels that it was not trained on."""

import argparse
import math
import sys
from typing import Any

from jaxmed.errors import UserError


def positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise ValueError
  return value


def millimetres(option: str, text: str, rank: int) -> tuple[float, ...]:
  """A spacing of `rank` axes, '3,1,1', or one number for all; a UserError names the option of another text."""
  try:
    values = tuple(map(float, text.split(',')))
  except ValueError:
    values = ()
  values = values * rank if len(values) == 1 else values
  if len(values) != rank or not all(0 < value < math.inf for value in values):
    raise UserError(f'{option} {text}: expected {rank} numbers of mm above 0, one for each stored axis')
  return values


def names(text: str | None) -> tuple[str, ...] | None:
  return tuple(n.strip() for n in text.split(',')) if text else None


def left_out(summary: dict[str, Any], data: str) -> None:
  """Says on standard error what `prepare` left out of a folder of images, and why; nothing where it read all."""
  suffixes = ', '.join(f'{suffix or "no suffix"} {count}' for suffix, count in summary['others'].items())
  why = {'ignored': f'of kinds that no reader takes ({suffixes})' if suffixes else 'that are no images',
         'empty': 'without an image or content', 'rejected': 'unreadable'}
  parts = [f'{summary[key]} {what}' for key, what in why.items() if summary[key]]
  if parts:
    print(f'jaxmed: left out files of {data}: {", ".join(parts)}', file=sys.stderr, flush=True)


def which(p: argparse.ArgumentParser) -> None:
  p.add_argument('path', metavar='RUN|FILE', help='run directory or exported file')
  p.add_argument('--checkpoint', default='latest', help='checkpoint of a run: latest, best or a step; default latest')


def tower(p: argparse.ArgumentParser) -> None:
  p.add_argument('--tower', default='image', help='network of a run whose method trains several; image+text: '
                 'both of a run of images and texts; default image, the encoder')


def unseen(p: argparse.ArgumentParser) -> None:
  p.add_argument('--unseen', choices=('error', 'allow'), default='error', help='action when the encoder was not '
                 'trained on a channel; allow takes the hash of its name, or the mean of a table; default error')


def for_channels(encoder: Any, args: argparse.Namespace, source: Any) -> Any:
  """The encoder for the channels of a source, also those that it was not trained on if --unseen=allow."""
  if args.unseen == 'error':
    return encoder
  fresh = [name for name in source.channels if name not in encoder.ids]
  if fresh:
    print(f'jaxmed: {args.path} was not trained on {", ".join(fresh)}', file=sys.stderr)
  return encoder.extended({name: source.stats[name] for name in fresh})
