"""Records that are trained on as if some of their channels had not been taken, for studies of missing channels."""

import dataclasses
import math
from collections.abc import Sequence

from jaxmed.errors import UserError, choose

_ODD = 0x9E3779B97F4A7C15
_WHOLE = 1 << 64


@dataclasses.dataclass(frozen=True)
class Lack:
  """What a share of the records lacks.

  Which records do is a function of their place among the rows alone, whatever the seed; those of a smaller share are
  among those of a larger one.
  """

  channels: tuple[str, ...]
  share: float

  def of(self, row: int) -> bool:
    """Whether a row lacks them: a number that is spread over the rows as evenly as can be (golden ratio) says so."""
    return (row + 1) * _ODD % _WHOLE < self.share * _WHOLE

  def shown(self, row: int, names: Sequence[str]) -> list[bool]:
    """Which of its channels a row shows; one that has no others keeps them."""
    kept = [name not in self.channels for name in names]
    return kept if self.of(row) and any(kept) else [True] * len(names)


def parse(text: str, channels: Sequence[str]) -> Lack | None:
  """'GM,WM=0.5' -> half of the records lack these channels; None for ''.

  Raises:
    UserError: another form, a share that is none, an unknown channel (the nearest is named), all channels.
  """
  if not text:
    return None
  named, equals, share = text.rpartition('=')
  names = tuple(name.strip() for name in named.split(',') if name.strip())
  try:
    value = float(share)
  except ValueError:
    value = math.nan
  if not equals or not names or not 0 <= value <= 1:
    raise UserError(f"loader.missing is {text!r}: expected CHANNEL,CHANNEL=SHARE with a share of the records, 0 to 1, "
                    f"such as '{channels[-1]}=0.5'")
  for name in names:
    choose('channel in loader.missing', name, channels)
  if not set(channels) - set(names):
    raise UserError(f'loader.missing={text} leaves no channel: the corpus has {", ".join(channels)}')
  return Lack(names, value)
