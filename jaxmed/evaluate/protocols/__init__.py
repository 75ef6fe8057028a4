"""Ways to judge a run by name: most fit on features of an encoder of some splits and score another.

PROTOCOLS has them, see `contracts.EvaluationProtocol`; `PROTOCOLS['mine'] = Mine()` adds an own one. A protocol is a
frozen dataclass whose simple fields are its options. Splits, features and baselines are in `tasks`, the base of
protocols of frozen features in `protocol`; `channels.ByChannels` wraps any of those.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmed.contracts import EvaluationProtocol
from jaxmed.errors import UserError, choose
from jaxmed.evaluate.protocols.bottleneck import Bottleneck
from jaxmed.evaluate.protocols.classify import Classify
from jaxmed.evaluate.protocols.confounded import Confounded
from jaxmed.evaluate.protocols.corruptions import Corruptions
from jaxmed.evaluate.protocols.dense import Dense
from jaxmed.evaluate.protocols.retrieve import Retrieve
from jaxmed.evaluate.protocols.retrieve_text import RetrieveText
from jaxmed.evaluate.protocols.robustness import Robustness
from jaxmed.evaluate.protocols.segment import Segment
from jaxmed.evaluate.protocols.zero_shot import ZeroShot

ENCODER, SEGMENTER = 'encoder', 'segmenter'
PROTOCOLS: dict[str, EvaluationProtocol] = {
    p.name: p for p in (Classify(), Dense(), Retrieve(), Robustness(), Corruptions(), Confounded(), Bottleneck(),
                        Segment(), ZeroShot(), RetrieveText())}


def get(names: str, options: Mapping[str, Any] = {}) -> list[Any]:
  """The protocols of 'classify,retrieve' in that order, with options {'retrieve.gallery': 'test'}.

  Raises:
    UserError: an unknown protocol or option (naming the nearest), an option of a protocol that is not among the names,
      a value that the option does not take.
  """
  chosen = [choose('protocol', name.strip(), PROTOCOLS) for name in names.split(',')]
  if len(set(chosen)) < len(chosen):
    raise UserError(f'protocols {names}: each can stand there once')
  known = {f'{name}.{f.name}': (name, f.name) for name in chosen for f in fields(name)}
  changes: dict[str, dict[str, Any]] = {name: {} for name in chosen}
  for key, value in options.items():
    if not known:
      raise UserError(f'{", ".join(chosen)} has no options: leave {key} out')
    name, field = known[choose('option', key, known)]
    changes[name][field] = value
  return [dataclasses.replace(PROTOCOLS[name], **changes[name]) for name in chosen]  # type: ignore[type-var]


def judges(chosen: Sequence[Any]) -> str:
  """What protocols judge, 'encoder' or 'segmenter'; a UserError where some judge the one and some the other."""
  kinds = {getattr(p, 'judges', ENCODER): p.name for p in chosen}
  if len(kinds) > 1:
    raise UserError(f'the task {kinds[SEGMENTER]} judges masks that a run predicts, {kinds[ENCODER]} features of an '
                    'encoder: ask for them one after the other')
  return next(iter(kinds))


def fields(name: str) -> tuple[dataclasses.Field, ...]:
  """The options of a protocol."""
  return dataclasses.fields(PROTOCOLS[name])  # type: ignore[arg-type]
