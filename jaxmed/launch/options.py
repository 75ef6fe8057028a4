"""The options of each launcher: typed fields whose help, defaults and bounds also make the command line."""

import argparse
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jaxmed.errors import UserError, choose


def _option(default: Any, text: str, metavar: str = '', least: int | None = None, pattern: str = '') -> Any:
  """A field: its help, and the smallest number or the form (regular expression, example) that it takes."""
  return dataclasses.field(default=default, metadata={
      'help': text, 'metavar': metavar, 'least': least, 'pattern': pattern})


_SETUP = "shell line to run first, such as 'module load cuda'; may be repeated"


@dataclasses.dataclass(frozen=True)
class Common:
  """What every launcher takes."""

  cache: str = _option('', 'folder of compiled programs that all processes share', 'DIR')
  env: tuple[str, ...] = _option((), 'variable of every process; may be repeated', 'NAME=VALUE',
                                 pattern=r'[A-Za-z_][A-Za-z0-9_]*=.*')
  restarts: int = _option(-1, 'restarts after exit code 75 at most; default: local 0, others 100', 'K', least=0)
  python: str = _option('', 'Python that has jaxmed; default: this one, python3 in containers and on VMs', 'PATH')


@dataclasses.dataclass(frozen=True)
class Local(Common):
  """Processes on this machine."""

  processes: int = _option(1, 'number of processes', 'N', least=1)
  gpus: int = _option(0, 'GPUs of a process or pod; default of local: all, in equal shares', 'G', least=0)
  grace: int = _option(60, 'seconds for processes to save and end; default: local 60, jobset 120', 'SECONDS', least=1)


@dataclasses.dataclass(frozen=True)
class Slurm(Common):
  """A batch job of SLURM."""

  nodes: int = _option(1, 'machines (slurm), or pods without TPU (jobset)', 'N', least=1)
  tasks_per_node: int = _option(1, 'processes on each machine', 'T', least=1)
  gpus_per_task: int = _option(0, 'GPUs of a process', 'G', least=0)
  cpus_per_task: int = _option(0, "CPU cores of a process; default: 1", 'C', least=1)
  mem: str = _option('', 'memory of each machine or pod (64G for slurm, 64Gi for jobset)', '64G', pattern=r'\d+[KMGT]?')
  time: str = _option('', 'time limit', 'D-HH:MM:SS', pattern=r'\d+(:\d{1,2}(:\d{1,2})?)?|\d+-\d{1,2}(:\d{1,2}){0,2}')
  lead: int = _option(120, 'seconds between SIGUSR1 and the time limit', 'SECONDS', least=1)
  partition: str = _option('', 'partition', 'NAME')
  account: str = _option('', 'account', 'NAME')
  qos: str = _option('', 'quality of service', 'NAME')
  sbatch: tuple[str, ...] = _option((), "another option of sbatch, such as '--constraint=a100'; may be repeated",
                                    'OPTION', pattern=r'-.*')
  setup: tuple[str, ...] = _option((), _SETUP, 'LINE')
  container: str = _option('', 'image: FILE.sif runs in Apptainer, any other in Enroot (pyxis)', 'IMAGE')
  mount: tuple[str, ...] = _option((), 'folder to mount in the container; may be repeated', 'DIR[:DIR]')


@dataclasses.dataclass(frozen=True)
class TpuVm(Common):
  """A Cloud TPU slice as a queued resource."""

  accelerator: str = _option('', 'type and size of the slice', 'v5litepod-16', pattern=r'v[0-9a-z]+-\d+')
  zone: str = _option('', 'zone of the slice', 'ZONE')
  project: str = _option('', "project; default: that of gcloud", 'PROJECT')
  runtime: str = _option('', 'software version of the VMs; default: by accelerator', 'VERSION')
  spot: bool = _option(False, 'cheaper machines that can be preempted')
  reserved: bool = _option(False, 'machines of a reservation')
  keep: bool = _option(False, 'keep the machines, and their bill, at the end')
  setup: tuple[str, ...] = _option((), _SETUP, 'LINE')


@dataclasses.dataclass(frozen=True)
class JobSet(Common):
  """A JobSet of Kubernetes."""

  image: str = _option('', 'container image that has jaxmed', 'IMAGE')
  tpu: str = _option('', 'gke-tpu-accelerator of the nodes', 'tpu-v6e-slice')
  topology: str = _option('', 'gke-tpu-topology of a slice', '4x4', pattern=r'\d+x\d+(x\d+)?')
  chips_per_node: int = _option(0, 'chips of a node; default: by type and topology', 'N', least=1)
  slices: int = _option(1, 'TPU slices', 'N', least=1)
  nodes: int = _option(1, 'pods without TPU, one on each node', 'N', least=1)
  gpus: int = _option(0, 'GPUs of a process or pod', 'G', least=0)
  gpu_type: str = _option('', 'gke-accelerator of the nodes', 'nvidia-h100-80gb')
  cpu: str = _option('', 'CPU cores of a pod', '8', pattern=r'\d+m?')
  mem: str = _option('', 'memory of each pod', '64Gi', pattern=r'\d+([KMGT]i?)?')
  namespace: str = _option('', 'namespace', 'NAME')
  queue: str = _option('', 'local queue of Kueue', 'NAME')
  service_account: str = _option('', 'Kubernetes service account of the pods', 'NAME')
  claim: tuple[str, ...] = _option((), 'persistent volume claim, mounted at a folder; may be repeated', 'NAME:/DIR',
                                   pattern=r'[a-z0-9.-]+:/.+')
  bucket: tuple[str, ...] = _option((), 'Cloud Storage bucket (GCS FUSE), mounted at a folder; may be repeated',
                                    'NAME:/DIR', pattern=r'[a-z0-9._-]+:/.+')
  spot: bool = _option(False, 'cheaper nodes that can be preempted')
  grace: int = _option(120, 'seconds for processes to save and end', 'SECONDS', least=1)
  setup: tuple[str, ...] = _option((), _SETUP, 'LINE')


LAUNCHERS: dict[str, type[Common]] = {'local': Local, 'slurm': Slurm, 'tpu-vm': TpuVm, 'jobset': JobSet}


def _flag(name: str) -> str:
  return '--' + name.replace('_', '-')


def add(parser: argparse.ArgumentParser) -> None:
  """Adds every option of every launcher to the parser; a flag of several is added once and names them."""
  owners: dict[str, list[str]] = {}
  for launcher, kind in LAUNCHERS.items():
    for field in dataclasses.fields(kind):
      owners.setdefault(field.name, []).append(launcher)
  groups: dict[str, Any] = {}
  for launcher, kind in LAUNCHERS.items():
    for field in dataclasses.fields(kind):
      names = owners[field.name]
      if names[0] != launcher:
        continue
      title = 'all launchers' if len(names) == len(LAUNCHERS) else ', '.join(names)
      group = groups.setdefault(title, parser.add_argument_group(title))
      _add(group, field)


def _add(group: Any, field: dataclasses.Field) -> None:
  meta: Mapping[str, Any] = field.metadata
  more: dict[str, Any] = {'help': meta['help'].replace('%', '%%'), 'default': None}
  if isinstance(field.default, bool):
    group.add_argument(_flag(field.name), action='store_true', **more)
  elif isinstance(field.default, tuple):
    group.add_argument(_flag(field.name), action='append', metavar=meta['metavar'], **more)
  else:
    group.add_argument(_flag(field.name), type=type(field.default), metavar=meta['metavar'], **more)


def of(launcher: str, args: argparse.Namespace) -> Any:
  """The options that were given for this launcher.

  Raises:
    UserError: an unknown launcher, an option of another one, or a value of the wrong form.
  """
  kind = LAUNCHERS[choose('launcher', launcher, LAUNCHERS)]
  own = {f.name: f for f in dataclasses.fields(kind)}
  values: dict[str, Any] = {}
  for name in {f.name for other in LAUNCHERS.values() for f in dataclasses.fields(other)}:
    value = getattr(args, name, None)
    if value is None:
      continue
    if name not in own:
      takes = [k for k, other in LAUNCHERS.items() if name in other.__dataclass_fields__]
      raise UserError(f'{_flag(name)} is an option of launch {" and ".join(takes)}, not of launch {launcher}')
    values[name] = tuple(value) if isinstance(value, list) else value
    _check(own[name], values[name])
  return kind(**values)


def _check(field: dataclasses.Field, value: Any) -> None:
  least, pattern = field.metadata['least'], field.metadata['pattern']
  if least is not None and value < least:
    raise UserError(f'{_flag(field.name)} must be {least} or more, not {value}')
  for text in value if isinstance(value, tuple) else (value,):
    if isinstance(text, str) and ('\n' in text or (pattern and not re.fullmatch(pattern, text))):
      raise UserError(f'{_flag(field.name)} {text!r} must look like {field.metadata["metavar"]}')


def require(options: Any, launcher: str, *names: str) -> None:
  """Raises a UserError for the first option of these that was not given."""
  for name in names:
    if not getattr(options, name):
      field = options.__dataclass_fields__[name]
      example = field.metadata['metavar']
      raise UserError(f'launch {launcher} needs {_flag(name)} {example}: {field.metadata["help"]}')
