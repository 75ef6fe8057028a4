"""`jaxmed doctor`: versions, devices, memory, advice."""

import argparse
import importlib.metadata
import importlib.util
import platform
import shutil
from collections.abc import Mapping
from typing import Any

from jaxmed import __version__
from jaxmed.cli.common import positive
from jaxmed.errors import UserError

DOES = 'show versions, devices, memory and advice'
EXAMPLE = 'jaxmed doctor --data corpus'
EXTRAS = {'cluster': ('distributed', 'dask_jobqueue'), 'curate': ('faiss',), 'demo': ('nilearn', 'skimage'),
          'microscopes': ('nd2',), 'mlflow': ('mlflow',), 'parity': ('torch', 'timm'), 'tpu-plan': ('libtpu',),
          'wandb': ('wandb',)}


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.add_argument('--data', metavar='CORPUS', help='corpus whose reading speed to measure; the other '
                 'options belong to it')
  p.add_argument('--size', type=positive, nargs='+', metavar='N', help='image_size of the run')
  p.add_argument('--fit', choices=('aspect', 'resize', 'crop'), default='resize',
                 help='loader.fit of the run; default resize')
  p.add_argument('--batch', type=positive, default=64, help='batch_size of the run; default 64')
  p.add_argument('--seconds', type=float, default=1.0, help='time of each measurement; default 1')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Versions, devices, memory, disk, extras, advice; of a corpus, how fast it is read."""
  if args.data:
    return _rates(args)
  import jax
  import psutil

  from jaxmed.parallel import mesh as mesh_lib
  packages = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tensorflow-datasets', 'numpy')
  versions = {name: importlib.metadata.version(name) for name in packages}
  devices = jax.devices()
  memory, disk = psutil.virtual_memory(), shutil.disk_usage('.')
  missing = {extra: [m for m in modules if importlib.util.find_spec(m) is None] for extra, modules in EXTRAS.items()}
  advice = [f"pip install 'jaxmed[{extra}]' adds {', '.join(m)}" for extra, m in missing.items() if m]
  if devices[0].platform == 'cpu':
    advice.append('no accelerator: models train with small defaults; pip install jax[cuda13] or jax[tpu] adds one')
  if disk.free < 5e9:
    advice.append(f'only {disk.free / 1e9:.1f} GB of disk are free here: checkpoints may not fit')
  out = {
      'jaxmed': __version__, 'python': platform.python_version(), 'versions': versions,
      'devices': [f'{d.platform}:{d.id} {d.device_kind}' for d in devices], 'processes': jax.process_count(),
      'mesh': dict(mesh_lib.make_mesh({'data': 0}).shape), 'memory_free_gb': round(memory.available / 1e9, 1),
      'memory_gb': round(memory.total / 1e9, 1), 'disk_free_gb': round(disk.free / 1e9, 1), 'advice': advice}
  stats = devices[0].memory_stats() if devices[0].platform != 'cpu' else None
  if stats:
    out['device_memory_gb'] = round(stats.get('bytes_limit', 0) / 1e9, 1)
  lines = [f'{k:16} ' + (', '.join(f'{a} {b}' for a, b in v.items()) if isinstance(v, Mapping)
                         else '; '.join(map(str, v)) if isinstance(v, list) else str(v)) for k, v in out.items()]
  return {'json': out, 'text': '\n'.join(lines)}


def _rates(args: argparse.Namespace) -> dict[str, Any]:
  """How fast batches of a corpus can be had, as a run with these values would read them."""
  from jaxmed.data.corpus.open import open_source
  from jaxmed.data.feed import rates
  from jaxmed.train.build import data_spec, resolve
  if not args.seconds > 0:
    raise UserError(f'--seconds is {args.seconds}: expected a positive number')
  source = open_source(args.data)
  source = trained if len(trained := source.select('train')) else source
  spec = data_spec.describe(source, '')
  user = {'image_size': tuple(args.size or ()), 'loader': {'fit': args.fit}}
  config = resolve.resolve(user, spec)
  found = rates.measure(source, size=tuple(config.loader.load_size), batch_size=args.batch, fit=args.fit,
                        threads=config.loader.threads, seconds=args.seconds)
  return {'json': found, 'text': rates.text(found)}
