"""What all tests share: the CPU, one cache of compiled programs, a tiny corpus of real images, a tiny run."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

# Before JAX is imported, and for every process that a test starts: programs are compiled once.
os.environ['JAX_PLATFORMS'] = 'cpu'
# Programs that run for milliseconds are not worth optimizing: they compile three times faster without.
if 'JAXMED_TEST_CACHE' not in os.environ:  # a worker of pytest-xdist has it from the process that started it
  os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0'
  if importlib.metadata.version('jaxlib').startswith('0.10.'):  # a flag that a jaxlib does not know ends the process
    # One module for LLVM a program: cores that other tests keep busy gain nothing from parts.
    os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
  os.environ['JAXMED_TEST_CACHE'] = tempfile.mkdtemp(prefix='jaxmed-test-cache-')
  atexit.register(shutil.rmtree, os.environ['JAXMED_TEST_CACHE'], ignore_errors=True)
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.environ['JAXMED_TEST_CACHE']
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '0'
os.environ['JAX_TRACEBACK_IN_LOCATIONS_LIMIT'] = '0'  # no test reads which line of Python an operation came from

import csv  # noqa: E402
import fcntl  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import pathlib  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

from tests.tiers import *  # noqa: E402, F403  the hooks of the two tiers

gc.set_threshold(20_000, 10, 10)

TILE = 24
MOST_MAPS = 25_000
MOST_BYTES = 3 << 30
# The run that tests train. Its step takes milliseconds and is compiled once, also for other processes; other values
# of what the step is made of (steps and learning rate among them) cost a compilation.
TINY = {
    'method': 'mae', 'model': 'channel_vit_micro/8', 'image_size': 16, 'batch_size': 8, 'steps': 20, 'learning_rate': 1e-3,
    'log_every': 1, 'checkpoint_every': 5, 'eval_every': 10, 'loader': {'threads': 1},
    'encoder': {'embed_dim': 32, 'depth': 2, 'num_heads': 2},
    'objective': {'decoder_dim': 32, 'decoder_depth': 1, 'decoder_heads': 2},
}
SUPERVISED = TINY | {'method': 'supervised', 'objective': {}, 'loader': {'threads': 1, 'label': 'tissue'}}


def pytest_collection_finish(session):
  """What was imported stays: searching it for garbage, again and again while JAX traces, is a twelfth of the time."""
  gc.collect()
  gc.freeze()


@pytest.fixture(autouse=True, scope='module')
def few_programs():
  """Lets go of compiled programs before Linux runs out of memory maps (65,530 a process) or of memory."""
  yield
  maps, pages = pathlib.Path('/proc/self/maps'), pathlib.Path('/proc/self/statm')
  if not maps.exists():
    return
  held = int(pages.read_text(encoding='utf-8').split()[1]) * os.sysconf('SC_PAGE_SIZE')
  if held > MOST_BYTES or sum(1 for _ in maps.open(encoding='utf-8')) > MOST_MAPS:
    import ctypes

    import jax
    jax.clear_caches()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed


def _skimage(name: str) -> np.ndarray:
  import skimage
  with Image.open(pathlib.Path(skimage.__file__).parent / 'data' / name) as image:
    return np.asarray(image)


def _tiles(image: np.ndarray, count: int, step: int) -> list[np.ndarray]:
  """Square tiles from the middle of an image, where there is something to see."""
  low = image.shape[0] // 4
  per_row = image.shape[1] // 2 // step
  at = [(low + step * (i // per_row), image.shape[1] // 4 + step * (i % per_row)) for i in range(count)]
  return [image[y : y + TILE, x : x + TILE] for y, x in at]


@pytest.fixture(scope='session')
def tiles(tmp_path_factory) -> pathlib.Path:
  """A folder of 96 real RGB tiles (stained colon, retina), with table.csv: path, subject, split, tissue."""
  place = tmp_path_factory.mktemp('tiles')
  rows = []
  for tissue, name, step in (('colon', 'ihc.png', 24), ('retina', 'retina.jpg', 48)):
    for i, tile in enumerate(_tiles(_skimage(name), 48, step)):
      path = f'{tissue}{i:02}.png'
      Image.fromarray(tile).save(place / path)
      split = ('train', 'train', 'train', 'train', 'val', 'test')[i // 2 % 6]
      rows.append({'path': path, 'subject': f'{tissue}{i // 2}', 'split': split, 'tissue': tissue})
  with open(place / 'table.csv', 'w', newline='', encoding='utf-8') as f:
    table = csv.DictWriter(f, rows[0])
    table.writeheader()
    table.writerows(rows)
  return place


def _shared(tmp_path_factory, name: str, make) -> pathlib.Path:
  """What `make(place)` makes in a new folder, once for all workers of pytest-xdist."""
  base = tmp_path_factory.getbasetemp()
  base = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
  with open(base / f'{name}.lock', 'w', encoding='utf-8') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    place, done = base / name, base / f'{name}.done'
    if not done.exists():
      shutil.rmtree(place, ignore_errors=True)  # what a worker left that failed
      make(place)
      done.touch()
  return place


def _prepare(folder: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
  from jaxmed.data.prepare.prepare import prepare
  prepare([folder], out, table=folder / 'table.csv', progress=False)
  return out


@pytest.fixture(scope='session')
def corpus(tiles, tmp_path_factory) -> pathlib.Path:
  """The tiles as a corpus: 64 train, 16 val, 16 test records of 3 channels, label 'tissue'."""
  return _shared(tmp_path_factory, 'rgb', lambda place: _prepare(tiles, place))


@pytest.fixture(scope='session')
def mixed_corpus(tiles, tmp_path_factory) -> pathlib.Path:
  """The same with every second tile as a single grey channel."""
  place = tmp_path_factory.mktemp('mixed')
  shutil.copy(tiles / 'table.csv', place)
  for i, path in enumerate(sorted(tiles.glob('*.png'))):
    with Image.open(path) as image:
      (image.convert('L') if i % 2 else image).save(place / path.name)
  return _prepare(place, tmp_path_factory.mktemp('corpora') / 'mixed')


@pytest.fixture(scope='session')
def demo_corpus(tmp_path_factory) -> pathlib.Path:
  """The demo corpus; what prepare said of it is beside it, with the suffix .json."""
  def make(place):
    from jaxmed.data.prepare.prepare import prepare
    place.with_suffix('.json').write_text(json.dumps(prepare(['demo'], place, progress=False)), encoding='utf-8')
  return _shared(tmp_path_factory, 'demo', make)


@pytest.fixture(scope='session')
def trained(corpus, tmp_path_factory) -> pathlib.Path:
  """A run of TINY, trained to its end. Tests that write into a run copy it first."""
  from jaxmed.train import loop
  return _shared(tmp_path_factory, 'trained', lambda out: loop.train(TINY | {'data': str(corpus)}, out, quiet=True))


@pytest.fixture(scope='module')
def no_figures(trained):
  """Runs of this process draw no figures, which are the half of a tiny run's time; tests/test_cli.py looks at them.

  `trained` comes first: it has its figures.
  """
  from jaxmed.train import pictures
  with pytest.MonkeyPatch.context() as m:
    m.setattr(pictures, 'views', lambda run, state: None)
    m.setattr(pictures, 'end', lambda run, state: None)
    yield


@pytest.fixture(scope='session')
def server():
  """Starts real processes of the command quickly, see tests/forks.py."""
  from tests.forks import Server
  server = Server()
  yield server
  server.close()
