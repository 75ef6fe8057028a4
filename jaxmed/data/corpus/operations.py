"""Which operation a frame of a surgical video is of, in which published sets it lies, and what was pretrained on it.

The manifest's column `video` holds ids such as `cholec80/12`, the same for a frame of Cholec80 and for one of a set
that was cut from it. Whether M2CAI16 or Endoscapes share operations with Cholec80 was not read, so it is not told.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

COLUMN = 'video'


@dataclasses.dataclass(frozen=True)
class Family:
  """Operations that several sets share.

  Attributes:
    videos: how many there are, 0 for not known. sets: published sets with frames of them.
    pretraining: {corpus of pretraining: what of the family it holds}.
  """

  videos: int
  sets: tuple[str, ...]
  pretraining: dict[str, str] = dataclasses.field(default_factory=dict)


# Sets by their papers and README files; SurgeNet's parts by TimJaspers0801/SurgeNet, which names no videos.
FAMILIES = {
  'cholec80': Family(80, ('Cholec80', 'CholecT45', 'CholecT50', 'CholecSeg8k', 'Cholec80-CVS'),
                     {'SurgeNet': '76 of its 80 videos, which is not published'}),
  'heichole': Family(0, ('HeiChole',), {'SurgeNet': '53,427 frames'}),
  'hsdb': Family(0, ('hSDB-instrument',), {'SurgeNet': 'the train and val splits'}),
  'surgtoolloc': Family(0, ('SurgToolLoc 2022',), {'SurgeNet': '741,516 frames'}),
}


def family_of(video: Any) -> str:
  """The name before the slash of an id, '' for what is no id."""
  return video.partition('/')[0] if isinstance(video, str) and '/' in video else ''


def counted(videos: Iterable[Any]) -> dict[str, int]:
  """{family: operations} of the values of the column, each id once."""
  return dict(sorted(Counter(filter(None, (family_of(v) for v in set(videos)))).items()))


def told(counts: dict[str, int]) -> list[str]:
  """A line for each family that other sets, or pretrained encoders, share."""
  lines = []
  for name, count in counts.items():
    if name not in FAMILIES:
      continue
    family = FAMILIES[name]
    of = f'{count} of {family.videos}' if family.videos else str(count)
    others = f'; sets with the same operations: {", ".join(family.sets)}' if len(family.sets) > 1 else ''
    seen = ''.join(f'; pretraining of {corpus} holds {what}' for corpus, what in family.pretraining.items())
    lines.append(f'operations of {family.sets[0]}: {of}{others}{seen}')
  return lines
