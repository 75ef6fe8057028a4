"""How fast a corpus can be read, and what stands in the way: what `jaxmed doctor --data` measures."""

import dataclasses
import os
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxmed.data.corpus.source import Source
from jaxmed.data.feed import pipeline, sampling
from jaxmed.parallel import devices

FAR = 16  # threads to go up to for an object store
STAGES = ('disk', 'read', 'decode', 'fit', 'batch')
_ENOUGH = 0.9  # of the best rate: more threads than that takes are not advised
_SCALES = 1.3  # of one thread's rate, that more threads must reach to be worth it


def measure(source: Source, *, size: Sequence[int], batch_size: int = 64, fit: str = 'resize', threads: int = 2,
            seconds: float = 1.0, cores: int | None = None, transfer: bool = True) -> dict[str, Any]:
  """Rates of each stage of the way from the disk to the device.

  Every stage holds those before it: `read` gets a record's bytes (unpacked from the shard; `disk` the same from files
  that the system was told to forget), `decode` makes the record of them, `fit` resizes or crops, `batch` is the
  pipeline as training runs it. `transfer` takes a batch to the first device.

  Args:
    source: records, in part read several times.
    size: of the images in batches.
    batch_size: of a batch.
    fit: as for `pipeline.train_batches`.
    threads: those of the run, for the advice.
    seconds: for each of some 4 log2(cores) + 3 measurements.
    cores: threads to go up to; by default those that this process may use.
    transfer: whether to measure the device too.

  Returns:
    records, cores, size, stored (median grid), record_bytes (mean, unpacked), bricks (whether pixels lie in files of
    their own, see jaxmed.data.corpus.store: `decode` and `fit` read them, `read` does not), rates {stage: {threads:
    images/s}}, read_bytes_per_second, milliseconds {stage: of one image on one thread, alone}, transfer_images and
    transfer_bytes (a second), images_per_second, bound, threads, advice.

  Raises:
    UserError: an empty source, or a size of another rank.
  """
  cores = cores or devices.cores()
  most = cores if isinstance(source.path, pathlib.Path) else max(cores, FAR)  # a store is waited for, not worked for
  counts = sorted({1, *(2**k for k in range(1, 10) if 2**k < most), most})
  vocabulary = source.channels
  elements = pipeline.elements(source, size, vocabulary, fit)
  raw = _Raw(source)
  steps: dict[str, Callable[[int], int]] = {
      'read': raw, 'decode': lambda i: source[i]['image'].nbytes,
      'fit': lambda i: pipeline.one(elements, i, np.random.default_rng(i))['image'].nbytes}
  found: dict[str, dict[int, float]] = {}
  forgotten = raw.forget()
  if forgotten:
    found['disk'] = {1: _rate(raw, len(source), 1, seconds)[0]}
  if fit == 'crop':
    del steps['decode']  # a crop may never unpack the whole record
  bytes_read = 0.0
  for name, work in steps.items():
    found[name] = {}
    for n in counts:
      rate, through = _rate(work, len(source), n, seconds)
      found[name][n] = rate
      bytes_read = max(bytes_read, through) if name == 'read' else bytes_read
  batch_size = min(batch_size, max(len(source), 1))
  found['batch'] = {n: _batches(source, size, vocabulary, fit, n, batch_size, seconds) for n in counts}
  out: dict[str, Any] = {
      'records': len(source), 'cores': cores, 'size': list(size), 'stored': _stored(source), 'batch_size': batch_size,
      'fit': fit, 'record_bytes': round(bytes_read / max(max(found['read'].values()), 1e-9)),
      'read_bytes_per_second': round(bytes_read), 'bricks': raw.bricks(), 'rates': found, 'milliseconds': _costs(found)}
  if transfer:
    out |= _transfer(source, size, vocabulary, fit, batch_size, seconds)
  return out | _judged(out, threads)


@dataclasses.dataclass
class _Raw:
  """The bytes of a record as they lie in a shard, unpacked but not parsed."""

  source: Source

  def __call__(self, i: int) -> int:
    reader, place = self.source.reader(i)
    return len(getattr(reader, 'data_source', reader)[place])

  def bricks(self) -> bool:
    """Whether the pixels of the first record lie elsewhere."""
    shape, dtype = self.source.table['shape'][0].as_py(), self.source.distinct('dtype')[1][0]
    return bool(self(0) < np.prod(shape, dtype=np.int64) * np.dtype(dtype).itemsize)

  def forget(self) -> bool:
    """Has the system drop the shards from its memory; False where that cannot be."""
    if not hasattr(os, 'posix_fadvise') or not self.source.path.is_dir():
      return False
    for path in self.source.path.glob('*array_record*'):
      descriptor = os.open(path, os.O_RDONLY)
      try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
      finally:
        os.close(descriptor)
    return True


def _rate(work: Callable[[int], int], rows: int, threads: int, seconds: float) -> tuple[float, float]:
  """Calls and bytes a second of so many threads on rows in a random order, after one call each.

  Where not one call ends within those seconds the first one that does is waited for.
  """
  lock, state = threading.Lock(), {'next': 0}
  done = [[0, 0] for _ in range(threads)]
  end, last = [0.0], [0.0]

  def loop(k: int) -> None:
    while True:
      with lock:
        n = state['next']
        state['next'] += 1
      size = work(sampling.permuted(n % rows, rows, (7, n // rows)))
      with lock:
        now = time.perf_counter()
        if now > end[0] and any(n for n, _ in done):
          return
        done[k][0] += 1
        done[k][1] += size
        last[0] = now

  work(0)
  with ThreadPoolExecutor(threads) as executor:
    begin = time.perf_counter()
    end[0] = begin + seconds
    for future in [executor.submit(loop, k) for k in range(threads)]:
      future.result()
  seconds = max(seconds, last[0] - begin)
  return sum(n for n, _ in done) / seconds, sum(b for _, b in done) / seconds


def _batches(source: Source, size: Sequence[int], vocabulary: Sequence[str], fit: str, threads: int, batch_size: int,
             seconds: float) -> float:
  batches = pipeline.train_batches(source, batch_size=batch_size, size=size, vocabulary=vocabulary, seed=0, fit=fit,
                                   threads=threads)
  begin = time.perf_counter()
  next(batches)
  first = time.perf_counter() - begin
  # What was read ahead is not to be counted: it is used up first.
  until = time.perf_counter() + min(first * 2, seconds)
  while time.perf_counter() < until:
    next(batches)
  count, begin = 0, time.perf_counter()
  while (spent := time.perf_counter() - begin) < seconds or not count:
    next(batches)
    count += 1
  return count * batch_size / max(spent, 1e-9)


def _transfer(source: Source, size: Sequence[int], vocabulary: Sequence[str], fit: str, batch_size: int,
              seconds: float) -> dict[str, Any]:
  import jax

  batch = next(pipeline.train_batches(source, batch_size=batch_size, size=size, vocabulary=vocabulary, seed=0, fit=fit))
  device = jax.local_devices()[0]
  jax.block_until_ready(jax.device_put(batch, device))
  count, begin = 0, time.perf_counter()
  while (spent := time.perf_counter() - begin) < seconds or not count:
    jax.block_until_ready(jax.device_put({k: v.copy() for k, v in batch.items()}, device))
    count += 1
  size_of = sum(v.nbytes for v in batch.values())
  return {'device': f'{device.platform} {device.device_kind}', 'transfer_images': count * batch_size / spent,
          'transfer_bytes': round(count * size_of / spent)}


def _costs(found: dict[str, dict[int, float]]) -> dict[str, float]:
  """Milliseconds of one image on one thread that each stage adds to the one before."""
  out: dict[str, float] = {}
  before = 0.0
  for name in ('read', 'decode', 'fit'):
    if name in found:
      whole = 1000 / max(found[name][1], 1e-9)
      out[name] = max(whole - before, 0.0)
      before = max(whole, before)
  return out


def _stored(source: Source) -> list[int]:
  shapes = source.distinct('shape')[1]
  return [int(n) for n in np.median([s[:-1] for s in shapes], axis=0)]


def _judged(out: dict[str, Any], threads: int) -> dict[str, Any]:
  """The bound and what to do about it."""
  rates, cores = out['rates'], out['cores']
  best = max(rates['batch'].values())
  wanted = min(n for n, rate in rates['batch'].items() if rate >= _ENOUGH * best)
  costs, advice = out['milliseconds'], []
  bound = max(costs, key=lambda name: costs[name])
  if rates.get('disk', {1: best})[1] < 0.5 * rates['read'][1] and rates['disk'][1] * max(rates['batch']) < best:
    bound = 'disk'
    advice.append(f'the disk gives {rates["disk"][1]:.0f} images/s a thread, memory {rates["read"][1]:.0f}: keep the '
                  'corpus on a local SSD, or in memory where it fits')
  if out.get('transfer_images', best) < best:
    bound = 'transfer'
    advice.append('the way to the device is the bound: prepare smaller images or narrower types (uint8, uint16)')
  scaled = best / max(rates['batch'][1], 1e-9)
  if wanted != threads:
    advice.append(f'loader.threads={wanted} reads {rates["batch"][wanted]:.0f} images/s'
                  + (f', {threads} thread(s) {rates["batch"][threads]:.0f}' if threads in rates['batch'] else ''))
  if cores > 1 and scaled < _SCALES:
    advice.append(f'{cores} threads read only {scaled:.2f} times as fast as one: several processes, one a device, read '
                  'in parallel (jaxmed launch local)')
  ratio = float(np.prod(out['stored']) / np.prod(out['size']))
  if out['fit'] == 'resize' and ratio > 2:
    advice.append(f'records of {"x".join(map(str, out["stored"]))} are shrunk to {"x".join(map(str, out["size"]))} in '
                  f'every epoch: prepare images {ratio:.1f} times smaller, or raise loader.load_size')
  if not advice:
    advice.append(f'nothing to mend: {wanted} thread(s) read {best:.0f} images/s')
  return {'images_per_second': best, 'bound': bound, 'threads': wanted, 'advice': advice}


def text(out: dict[str, Any]) -> str:
  """What `measure` found, as a table and advice."""
  counts = sorted(out['rates']['batch'])
  show = lambda x: f'{x:,.0f}' if x >= 100 else f'{x:.3g}'
  grid = lambda size: 'x'.join(map(str, size))
  lines = [f'{out["records"]:,} records of {grid(out["stored"])}, {out["record_bytes"] / 1e3:,.1f} kB each, '
           f'{out["fit"]} to {grid(out["size"])}, batches of {out["batch_size"]}; images/s by threads:',
           f'{"":10}' + ''.join(f'{n:>10}' for n in counts)]
  for name in STAGES:
    if name in out['rates']:
      rates = out['rates'][name]
      lines.append(f'{name:10}' + ''.join(f'{show(rates[n]) if n in rates else "":>10}' for n in counts))
  lines.append('one image on one thread: ' + ', '.join(f'{k} {v:.2f} ms' for k, v in out['milliseconds'].items())
               + f'; shards are read at up to {out["read_bytes_per_second"] / 1e6:,.0f} MB/s')
  if out['bricks']:
    lines.append('pixels lie in bricks: reading them is part of the stage after read')
  if 'transfer_images' in out:
    through = out['transfer_bytes'] / 1e6
    lines.append(f'to {out["device"]}: {show(out["transfer_images"])} images/s, {through:,.0f} MB/s')
  lines.append(f'bound: {out["bound"]}, {show(out["images_per_second"])} images/s with {out["threads"]} thread(s)')
  return '\n'.join([*lines, *(f'advice: {line}' for line in out['advice'])])

