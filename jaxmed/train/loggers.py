"""Where the metrics of a run go: one protocol, and one class for each place."""

import contextlib
import importlib.util
import json
import os
import pathlib
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TextIO

from jaxmed import files
from jaxmed.errors import Stopped, UserError, need

IDS = 'loggers.json'  # in a run directory: the identity of the run in each tracker, so that a resumed run goes on there


class Logger(Protocol):
  """What a run tells as it goes on. A step may come again, after a run returned to an earlier checkpoint."""

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Logs the metrics of a step."""

  def figures(self, step: int, paths: Sequence[pathlib.Path]) -> None:
    """Logs images, PNG files."""

  def close(self) -> None:
    """Flushes everything."""


class JsonLines:
  """RUN/metrics.jsonl; `rows` are those to keep of a run that goes on."""

  def __init__(self, path: pathlib.Path, rows: Sequence[Mapping[str, Any]]):
    files.write_text(path, ''.join(json.dumps(row) + '\n' for row in rows))
    self._file: TextIO = open(path, 'a', encoding='utf-8')  # noqa: SIM115 (closed by close())

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    self._file.write(json.dumps({'step': step} | dict(values)) + '\n')
    self._file.flush()

  def figures(self, step: int, paths: Sequence[pathlib.Path]) -> None:
    """The figures are files of the run already."""

  def close(self) -> None:
    self._file.close()


class TensorBoard:
  """RUN/events; rows after `start` are purged."""

  def __init__(self, run: pathlib.Path, start: int):
    from tensorboardX import SummaryWriter
    self._events = SummaryWriter(str(run / 'events'), purge_step=start + 1)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self._events.add_scalar(name, value, step)

  def figures(self, step: int, paths: Sequence[pathlib.Path]) -> None:
    """The figures are files of the run already."""

  def close(self) -> None:
    with contextlib.suppress(OSError):  # a full disk: the rows are in metrics.jsonl
      self._events.close()


class WandB:
  """Weights & Biases. Its environment sets project, account and mode; WANDB_MODE=offline keeps all in RUN/wandb.

  `step` is a metric of its own, because W&B drops a step that comes again.
  """

  def __init__(self, run: pathlib.Path, config: Mapping[str, Any]):
    wandb = need('wandb', 'wandb')
    self._image = wandb.Image
    settings = wandb.Settings(silent=True, console='off', disable_git=True, save_code=False)
    self._run = wandb.init(project=os.environ.get('WANDB_PROJECT', 'jaxmed'), name=run.name, dir=str(run),
                           resume='allow', id=_identity(run, 'wandb', lambda: uuid.uuid4().hex[:8]),
                           config=dict(config), settings=settings)
    self._run.define_metric('*', step_metric='step')

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log({'step': step} | dict(values))

  def figures(self, step: int, paths: Sequence[pathlib.Path]) -> None:
    self._run.log({'step': step} | {f'figures/{path.stem}': self._image(str(path)) for path in paths})

  def close(self) -> None:
    self._run.finish()


class MLflow:
  """MLflow. MLFLOW_TRACKING_URI names a server; without it the store is the folder RUN/mlruns.

  'grad_norm/encoder' becomes 'grad_norm.encoder': a metric is a file there, and grad_norm cannot be a folder too.
  """

  def __init__(self, run: pathlib.Path, config: Mapping[str, Any]):
    uri = os.environ.get('MLFLOW_TRACKING_URI', '')
    if not uri:
      os.environ.setdefault('MLFLOW_ALLOW_FILE_STORE', 'true')  # MLflow 3.7 and later want to be told
      uri = (run.absolute() / 'mlruns').as_uri()
    self._entities = need('mlflow.entities', 'mlflow')
    self._client = need('mlflow.tracking', 'mlflow').MlflowClient(tracking_uri=uri)
    self._id = _identity(run, 'mlflow', lambda: self._create(run.name, config))

  def _create(self, name: str, config: Mapping[str, Any]) -> str:
    """A new run with the config as its parameters."""
    client, title = self._client, os.environ.get('MLFLOW_EXPERIMENT_NAME', 'jaxmed')
    known = client.get_experiment_by_name(title)
    made = client.create_run(known.experiment_id if known else client.create_experiment(title), run_name=name)
    params = [self._entities.Param(key, str(value)[:500]) for key, value in config.items()]
    for first in range(0, len(params), 100):  # most that a call takes
      client.log_batch(made.info.run_id, params=params[first:first + 100])
    return made.info.run_id

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    now = int(time.time() * 1000)  # milliseconds
    metrics = [self._entities.Metric(k.replace('/', '.'), float(v), now, step) for k, v in values.items()]
    self._client.log_batch(self._id, metrics=metrics)

  def figures(self, step: int, paths: Sequence[pathlib.Path]) -> None:
    for path in paths:
      self._client.log_artifact(self._id, str(path), 'figures')

  def close(self) -> None:
    self._client.set_terminated(self._id)


TRACKERS: dict[str, Any] = {'wandb': WandB, 'mlflow': MLflow}


def check(names: Sequence[str]) -> None:
  """Raises a UserError for a tracker whose package is not installed; says which extra installs it."""
  for name in names:
    if importlib.util.find_spec(name) is None:
      raise UserError(f"loggers={name}: {name} is not installed: pip install 'jaxmed[{name}]'")


def tracker(name: str, run: pathlib.Path, config: Mapping[str, Any]) -> Logger:
  """The logger of a service by its name; what it raises becomes a UserError that names it."""
  try:
    return TRACKERS[name](run, config)
  except (UserError, Stopped):
    raise
  except Exception as e:
    raise UserError(f'loggers={name}: {type(e).__name__}: {e}') from e


def _identity(run: pathlib.Path, name: str, make: Any) -> str:
  """The identity of a run in a tracker, made once and kept in the run directory."""
  path = run / IDS
  known = files.read_json(path) if path.exists() else {}
  if name not in known:
    known[name] = make()
    files.write_json(path, known)
  return str(known[name])
