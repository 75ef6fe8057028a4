"""Which mesh, batch and rematerialisation a cluster should be used with: arithmetic ranks, the compiler decides."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from jaxmed import config as config_lib
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.plan import plan as planning
from jaxmed.plan.plan import Job, Request

BATCHES = (1, 2, 4)  # times the batch of the config, which is the smallest that is tried
MOST_TENSOR, MOST_FSDP = 8, 512
HEADROOM = 0.92  # share of the memory that an estimate may take: XLA needs some for itself


def search(request: Request, top: int = 3) -> dict[str, Any]:
  """Tries splits of the mesh over data, fsdp and tensor, larger batches, and rematerialisation.

  All are ranked by images/s of the analytic plan among those that fit; of equal ones the one that sends least. The
  first `top` are compiled where there is a compiler, and the best compiled one that fits is taken.

  Returns:
    {'tried': plans, best first; 'best': the plan or None; 'words': the overrides that give it}.
  """
  ranked = sorted(_plans(request), key=_rank)
  if request.cluster.compiled and top:
    fitting = [p for p in ranked if _fits(p)][:top] or ranked[:1]
    compiled = []
    for p in fitting:
      print(f'compiling {" ".join(words(p))} ...', file=sys.stderr, flush=True)
      user = config_lib.merge(request.user, config_lib.parse_overrides(words(p)))
      compiled.append(planning.plan(dataclasses.replace(request, user=user)))
    rest = [p for p in ranked if not any(p is q for q in fitting)]
    ranked = sorted(compiled, key=_rank) + rest
    best = next((p for p in ranked[: len(compiled)] if p['memory']['fits']), None)
  else:
    best = next((p for p in ranked if _fits(p)), None)
  return {'tried': ranked, 'best': best, 'words': words(best) if best else []}


def words(plan: dict[str, Any]) -> list[str]:
  """The overrides that make a run what was planned."""
  out = [f'mesh.{a}={n}' for a, n in plan['mesh'].items() if a in ('data', 'fsdp', 'tensor')]
  return [*out, f'batch_size={plan["batch_size"]}', *([f'encoder.remat={plan["remat"]}'] if plan['remat'] else [])]


def _fits(plan: dict[str, Any]) -> bool:
  share = 1.0 if plan['how'] == 'compiled' else HEADROOM
  return plan['memory']['fits'] and plan['memory']['peak'] <= share * plan['memory']['chip']


def _rank(plan: dict[str, Any]) -> tuple:
  speed = float(f'{plan["images_per_second"]:.2g}')  # what differs by a percent does not differ
  sent = plan['network']['least'] / plan['batch_size']
  return not _fits(plan), -speed, plan['remat'] == 'full', plan['batch_size'], sent


def splits(chips: int) -> Iterator[tuple[int, int]]:
  """(fsdp, tensor) that divide the chips, powers of two."""
  powers = lambda most: [2**n for n in range(10) if 2**n <= most]
  for fsdp, tensor in itertools.product(powers(MOST_FSDP), powers(MOST_TENSOR)):
    if chips % (fsdp * tensor) == 0:
      yield fsdp, tensor


def _plans(request: Request) -> Iterator[dict[str, Any]]:
  """Analytic plans of all candidates; the jaxpr is looked at once a kind of rematerialisation."""
  alone = {'mesh': dict.fromkeys(mesh_lib.AXES, 1) | {'data': 0}}
  base = planning.prepare(dataclasses.replace(request, user=config_lib.merge(request.user, alone)))
  for remat in ('none', 'full') if 'remat' in base.config.encoder else ('',):
    change = alone | ({'encoder': {'remat': remat}} if remat else {})
    first = planning.prepare(dataclasses.replace(request, user=config_lib.merge(request.user, change)))
    traced = planning.trace(first.config, first.spec)
    heads = getattr(first.trainer.objective.encoder, 'num_heads', 1)
    for (fsdp, tensor), times in itertools.product(splits(request.cluster.chips), BATCHES):
      job = _candidate(first, fsdp, tensor, times)
      whole = heads % tensor == 0 if isinstance(heads, int) else tensor == 1
      if whole and job.config.batch_size <= request.rows and not job.config.batch_size % job.shards:
        yield planning.analyse(job, traced.times(times))


def _candidate(first: Job, fsdp: int, tensor: int, times: int) -> Job:
  """The same job on another mesh, with a batch `times` as large."""
  config = ConfigDict(config_lib.to_dict(first.config))
  config.batch_size *= times
  mesh = first.mesh | {'data': first.cluster.chips // fsdp // tensor, 'fsdp': fsdp, 'tensor': tensor}
  return dataclasses.replace(first, config=config, mesh=mesh)
