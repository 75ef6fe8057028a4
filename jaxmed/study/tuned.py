"""Fine-tuning as a judge of a cell: the encoder that the cell trained learns a task, and is scored on test records."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxmed import config as config_lib
from jaxmed.data.corpus.source import Source
from jaxmed.errors import UserError
from jaxmed.evaluate.protocols.tasks import TRAINED
from jaxmed.train import finetune, loop

FINETUNE = 'finetune'
OWN = ('task', 'fraction', 'freeze')  # options that are no config values


@dataclasses.dataclass(frozen=True)
class Tuned:
  """The judge `finetune` of a study.

  Attributes:
    task: one of `train.finetune.TASKS`. fraction: of the training records, by whole subjects. freeze: whether the
      encoder stays as it is. values: config values over the recipe's, such as {'steps': 200}.
  """

  task: str = 'segment'
  fraction: float = 1.0
  freeze: bool = False
  values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  labelled: ClassVar[bool] = True

  def __post_init__(self):
    self._request('RUN', 'CORPUS', 'mask' if self.task == 'segment' else 'label', 0)  # which checks task and fraction

  @classmethod
  def of(cls, options: Mapping[str, Any]) -> 'Tuned':
    """The judge with the options of a study file; a UserError for a task that does not exist."""
    own = {k: options[k] for k in OWN if k in options}
    return cls(**own, values=config_lib.nested({k: v for k, v in options.items() if k not in OWN}))

  def check(self, source: Source, label: str, seed: int = 0) -> None:
    """A UserError where the corpus has no test records with the label."""
    self._request('RUN', str(source.path), label, seed)
    for split in ('train', 'test'):
      if label not in source.table.column_names or not len(source.select(split=split, label=label)):
        raise UserError(f'judge {FINETUNE}: {source.path} has no record of split {split} with {label!r}')

  def run(self, cell: pathlib.Path, data: str, label: str, seed: int, out: pathlib.Path) -> dict[str, Any]:
    """Fine-tunes the run `cell` in `out`, or goes on with it: {'rows': [{features, method, metrics}], ...}."""
    if (out / 'config.json').is_file():
      loop.resume(out, quiet=True)
    else:
      loop.train(finetune.recipe(self._request(str(cell), data, label, seed)), out, quiet=True)
    found = finetune.scores(out)
    return {'rows': [{'features': TRAINED, 'method': self.task, 'metrics': found['metrics']}],
            'records': found['records'], 'subjects': found['subjects']}

  def _request(self, path: str, data: str, label: str, seed: int) -> finetune.Request:
    user = config_lib.merge({'seed': seed}, self.values)
    return finetune.Request(path, data, self.task, label, user, freeze=self.freeze, fraction=self.fraction)
