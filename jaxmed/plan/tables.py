"""Plans as text."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

_UNITS = ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'))


def amount(value: float, unit: str) -> str:
  """1234567890, 'B' -> '1.23 GB'."""
  for size, letter in _UNITS:
    if abs(value) >= size:
      return f'{value / size:.3g} {letter}{unit}'
  return f'{value:.3g} {unit}'


def grouped(collectives: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, int, float, int]]:
  """(kind, axes, largest group, bytes moved, operations) by kind and axes, most bytes first."""
  total: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0])
  for c in collectives:
    row = total[c['kind'], ' + '.join(c['axes']) or '?']
    row[:] = [max(row[0], c['group']), row[1] + c['moved'], row[2] + c['times']]
  return sorted(((kind, axes, int(g), moved, int(n)) for (kind, axes), (g, moved, n) in total.items()),
                key=lambda row: -row[3])


def table(rows: Sequence[Sequence[str]]) -> str:
  """Columns, the first to the left and the others to the right."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  line = lambda row: '  '.join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
  return '\n'.join(line(row).rstrip() for row in rows)


def render(plan: Mapping[str, Any]) -> str:
  """One plan."""
  mesh = ' x '.join(f'{k} {v}' for k, v in plan['mesh'].items() if v > 1) or 'one device'
  how = ('compiled by XLA:TPU' if plan['how'] == 'compiled' else
         'ANALYTIC: exact FLOPs and state, least communication, activations estimated; nothing was compiled')
  size = 'x'.join(map(str, plan['image_size']))
  head = (f'{plan["method"]} {plan["model"]} at {size} on {plan["cluster"]} ({plan["chips"]} chips, {plan["hosts"]} '
          f'hosts; {mesh}), batch {plan["batch_size"]}, {plan["dtype"]}, remat {plan["remat"] or "none"}\n{how}')
  return '\n\n'.join([head, _memory(plan), _work(plan), _network(plan), _time(plan)])


def _memory(plan: Mapping[str, Any]) -> str:
  memory = plan['memory']
  rows = [('memory of a device', '')]
  rows += [(name, amount(memory[name], 'B')) for name in
           ('parameters', 'optimizer', 'target', 'average', 'extra', 'activations') if memory[name]]
  rows += [('peak', f'{amount(memory["peak"], "B")} of {amount(memory["chip"], "B")}')]
  advice = 'DOES NOT FIT: try --search, encoder.remat=full, mesh.fsdp or a smaller batch_size'
  fits = 'fits' if memory['fits'] else advice
  if not memory['compiler']:
    fits += ' (the compiler refused it; sizes are estimates)' if plan.get('refused') else ' (estimate)'
  return f'{table(rows)}\n{fits}'


def _work(plan: Mapping[str, Any]) -> str:
  flops = plan['flops']
  rows = [('work of a step', ''), ('model', amount(flops['model'], 'FLOP'))]
  if flops['compiled']:
    rows += [('compiled', f'{amount(flops["compiled"], "FLOP")}, {flops["ratio"]:.3f} x model')]
  return table(rows)


def _network(plan: Mapping[str, Any]) -> str:
  network = plan['network']
  least = f'least that the sharding needs: {amount(network["least"], "B")}'
  if plan['collectives'] is None:
    return f'bytes sent by a device in a step, {least}'
  rows = [('bytes sent by a device in a step', 'axes', 'group', 'bytes', 'operations')]
  for kind, axes, group, moved, count in grouped(plan['collectives']):
    rows.append((kind, axes, str(group), amount(moved, 'B'), str(count)))
  if network['least']:
    least += f'; this is {network["moved"] / network["least"]:.2f} x that'
  return f'{table(rows)}\n{least}'


def _time(plan: Mapping[str, Any]) -> str:
  seconds = plan['seconds']
  rows = [('least seconds of a step', '')]
  rows += [(name, f'{seconds[name]:.4f}') for name in ('compute', 'memory', 'network')]
  feed = plan['input']
  return (f'{table(rows)}\nbound by {plan["bound_by"]}: MFU at most {100 * plan["mfu"]:.1f} %, '
          f'{plan["images_per_second"]:.4g} images/s, {plan["samples"]:.4g} images in {plan["days"]:.3g} days or more\n'
          f'each host must read {feed["images_per_second"]:.4g} images/s, {amount(feed["bytes_per_second"], "B/s")}')


def render_search(result: Mapping[str, Any]) -> str:
  """What a search looked at, best first, and the best plan."""
  rows = [('mesh', 'batch', 'remat', 'memory', 'MFU', 'images/s', 'how')]
  for p in result['tried'][:12]:
    mesh = ' '.join(f'{k}={v}' for k, v in p['mesh'].items() if v > 1) or 'one device'
    fits = '' if p['memory']['fits'] else ' too much'
    rows.append((mesh, str(p['batch_size']), p['remat'], amount(p['memory']['peak'], 'B') + fits,
                 f'{100 * p["mfu"]:.1f} %', f'{p["images_per_second"]:.4g}', p['how']))
  best = result['best']
  last = render(best) + f'\n\ntake: {" ".join(result["words"])}' if best else 'nothing that was tried fits in memory'
  return f'{len(result["tried"])} tried\n{table(rows)}\n\n{last}'
