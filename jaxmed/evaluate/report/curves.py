"""Figures of an evaluation: ROC, reliability, confusion, few labels, features on a plane, numbers. Each is one PNG."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.evaluate import tables
from jaxmed.evaluate.report.figures import COLOURS, figure_of, save_figure

_INK, _QUIET = '#222222', '#666666'
_STYLES = ('-', '--', ':', '-.')
_MOST = 20  # classes with numbers in their cells


def roc_curves(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
  """A panel a probe: true against false positive rate of each kind of features, the trained ones also class by class.

  Args:
    rows: of a result, with 'roc' {name: true positive rates at even false positive rates}; the first name of a row is
      its curve.
  """
  axes, save = _panels(rows, 'roc', path)
  for ax, (method, some) in axes:
    for i, row in enumerate(some):
      for j, (name, tpr) in enumerate(row['roc'].items()):
        thin = j > 0
        label = row['features'] + ('' if len(row['roc']) == 1 or not thin else f', {name}')
        drawn: dict[str, Any] = (dict(linewidth=0.7, linestyle=_STYLES[(j - 1) % 4], alpha=0.6) if thin
                                 else dict(linewidth=1.6))
        fpr = np.linspace(0, 1, len(tpr))
        ax.plot([0, *fpr], [0, *tpr], color=COLOURS[i % len(COLOURS)], label=label, **drawn)
    ax.plot([0, 1], [0, 1], color=_QUIET, linewidth=0.7, linestyle=':')
    first = next(iter(some[0]['roc']))
    _dressed(ax, f'{method}: {first}', 'false positive rate', 'true positive rate')
  save()


def reliability(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
  """A panel a probe: accuracy against confidence by bins of confidence, with the diagonal of calibrated answers.

  Args:
    rows: of a result, with 'reliability', see `calibration.reliability`.
  """
  axes, save = _panels(rows, 'reliability', path)
  for ax, (method, some) in axes:
    for i, row in enumerate(some):
      x, y, n = (np.array([b[k] for b in row['reliability']]) for k in ('confidence', 'accuracy', 'rows'))
      ece = row['metrics'].get('ece', {}).get('value')
      label = row['features'] + ('' if ece is None else f', ECE {ece:.3f}')
      ax.plot(x, y, color=COLOURS[i % len(COLOURS)], linewidth=1.2, alpha=0.8)
      ax.scatter(x, y, s=6 + 60 * n / n.sum(), color=COLOURS[i % len(COLOURS)], label=label)
    ax.plot([0, 1], [0, 1], color=_QUIET, linewidth=0.7, linestyle=':')
    ax.set_xlim(0, 1.02)
    ax.set_ylim(-0.02, 1.02)
    _dressed(ax, method, 'confidence', 'accuracy; area of a dot: rows')
  save()


def confusions(rows: Sequence[Mapping[str, Any]], classes: Sequence[str], path: str | os.PathLike) -> None:
  """A panel a probe of the trained features: rows of each class by what was predicted, shaded by the row's fractions.

  Args:
    rows: of a result, with 'confusion' [K][K]. classes: K names.
  """
  rows = [r for r in rows if r['features'] == rows[0]['features']]
  side = min(9.0, 2.2 + 0.42 * len(classes))
  axes, save = _panels(rows, 'confusion', path, side + 0.4, side)
  for ax, (method, some) in axes:
    table = np.array(some[0]['confusion'], np.float64)
    part = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    ax.imshow(part, cmap='Blues', vmin=0, vmax=1)
    for i, j in np.ndindex(*table.shape) if len(classes) <= _MOST else ():
      ax.text(j, i, f'{table[i, j]:.0f}', ha='center', va='center', fontsize=7,
              color='white' if part[i, j] > 0.6 else _INK)
    names = [c if len(c) <= 16 else c[:15] + '…' for c in classes]
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set_title(method, color=_INK, loc='left', fontsize=11)
    ax.set_xlabel('predicted', color=_QUIET)
    ax.set_ylabel('true', color=_QUIET)
  save()


def few_labels(found: Mapping[str, Any], path: str | os.PathLike) -> None:
  """A panel a probe: the headline metric against the fraction of training subjects, with intervals.

  Args:
    found: 'few_labels' of a result.
  """
  axes, save = _panels(found['curves'], 'points', path)
  for ax, (method, some) in axes:
    for i, curve in enumerate(some):
      points = [p for p in curve['points'] if p['value'] is not None]
      x, colour = [p['fraction'] for p in points], COLOURS[i % len(COLOURS)]
      ax.plot(x, [p['value'] for p in points], color=colour, linewidth=1.6, marker='o', markersize=3.5,
              label=curve['features'])
      if points and all(p['low'] is not None for p in points):
        low, high = ([p[k] for p in points] for k in ('low', 'high'))
        ax.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    ax.set_xscale('log')
    ax.set_xticks(found['fractions'], [f'{f:g}' for f in found['fractions']])
    ax.minorticks_off()
    _dressed(ax, method, 'percentage of training subjects', tables.NAMES.get(found['metric'], found['metric']))
  save()


def plane(found: Mapping[str, Any], classes: Sequence[str], path: str | os.PathLike) -> None:
  """Test rows on the first two principal components of their features, coloured by class.

  Args:
    found: {'points': [n][2], 'classes': [n] places among `classes`}.
  """
  points, of = np.array(found['points']), np.array(found['classes'])
  figure = figure_of(6.4, 4.8)
  ax = figure.subplots()
  many = len(classes) > len(COLOURS)
  for k, name in enumerate(classes):
    if (of == k).any():
      kwargs: dict[str, Any] = {'marker': 'osv^D*'[k // len(COLOURS) % 6], 'color': COLOURS[k % len(COLOURS)]}
      ax.scatter(*points[of == k].T, s=12, alpha=0.75, linewidths=0, label=name, **kwargs)
  _dressed(ax, 'Trained features of test rows', 'first principal component', 'second')
  ax.legend(frameon=False, fontsize=7, ncols=2 if many else 1, loc='center left', bbox_to_anchor=(1.0, 0.5))
  save_figure(figure, path)


def numbers(rows: Sequence[Mapping[str, Any]], label: str, path: str | os.PathLike) -> None:
  """A panel a probe of the trained features: what is told against what is true.

  Args:
    rows: of a result, with 'pairs' [n] of (true, told).
  """
  axes, save = _panels(rows, 'pairs', path)
  for ax, (method, some) in axes:
    pairs = np.array(some[0]['pairs'])
    ax.scatter(*pairs.T, s=10, alpha=0.6, linewidths=0, color=COLOURS[0])
    ends = [pairs[:, 0].min(), pairs[:, 0].max()]
    ax.plot(ends, ends, color=_QUIET, linewidth=0.7, linestyle=':')
    _dressed(ax, method, f'{label}, true', f'{label}, told')
  save()


def _panels(rows: Sequence[Mapping[str, Any]], key: str, path: str | os.PathLike, width: float = 5.0,
            height: float = 4.2) -> tuple[list, Any]:
  """[(axes, (name of the probe, its rows that have the key))] and what saves the figure."""
  methods = list(dict.fromkeys(r['method'] for r in rows if r.get(key)))
  figure = figure_of(width * len(methods), height)
  axes = figure.subplots(1, len(methods), squeeze=False).flat
  some = [(tables.METHODS.get(m, m), [r for r in rows if r['method'] == m and r.get(key)]) for m in methods]
  return list(zip(axes, some, strict=True)), lambda: save_figure(figure, path)


def _dressed(ax: Any, title: str, x: str, y: str) -> None:
  ax.set_title(title, color=_INK, loc='left', fontsize=11)
  ax.set_xlabel(x, color=_QUIET)
  ax.set_ylabel(y, color=_QUIET)
  ax.spines[['top', 'right']].set_visible(False)
  if ax.get_legend_handles_labels()[1]:
    ax.legend(frameon=False, fontsize=8)
