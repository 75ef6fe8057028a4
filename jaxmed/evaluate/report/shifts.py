"""Figures of robustness: indices, drops, corruptions, concepts. Each is one PNG file."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmed.evaluate.report.figures import COLOURS, figure_of, save_figure

_INK, _QUIET = '#222222', '#666666'


def bars(result: Mapping[str, Any], metrics: Mapping[str, str], methods: Mapping[str, str], path: str | os.PathLike,
         title: str) -> None:
  """A panel a method: metrics {name: label} with their intervals, for each kind of features."""
  shown = [m for m in methods if any(r['method'] == m for r in result['rows'])]
  kinds = list(dict.fromkeys(r['features'] for r in result['rows']))
  cells = {(r['features'], r['method']): r['metrics'] for r in result['rows']}
  figure = figure_of(3.6 * len(shown), 3.6)
  for ax, method in zip(figure.subplots(1, len(shown), squeeze=False, sharey=True).flat, shown, strict=True):
    for i, (metric, label) in enumerate(metrics.items()):
      own = [cells[kind, method][metric] for kind in kinds]
      at = np.arange(len(kinds)) + (i - (len(metrics) - 1) / 2) * 0.8 / len(metrics)
      ax.bar(at, [_nan(c['value']) for c in own], 0.8 / len(metrics), color=COLOURS[i % len(COLOURS)], label=label)
      for x, c in zip(at, own, strict=True):
        if c['low'] is not None:
          ax.plot([x, x], [c['low'], c['high']], color=_INK, linewidth=1)
    ax.set_xticks(np.arange(len(kinds)), kinds, fontsize=8)
    _plain(ax, methods[method], '', 'balanced accuracy')
    ax.legend(frameon=False, fontsize=8)
  figure.suptitle(title, color=_INK, fontsize=11)
  save_figure(figure, path)


def severities(result: Mapping[str, Any], methods: Mapping[str, str], path: str | os.PathLike) -> None:
  """A panel a corruption: accuracy against severity, from 0 (clean), for each kind of features and probe."""
  kinds = list(dict.fromkeys(r['features'] for r in result['severities']))
  columns = min(4, len(result['kinds']))
  lines = -(-len(result['kinds']) // columns)
  figure = figure_of(3.0 * columns, 2.6 * lines)
  axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
  for ax in axes.flat[len(result['kinds']):]:
    ax.set_axis_off()
  styles = dict(zip(methods, ('-', '--', ':', '-.'), strict=False))
  for ax, kind in zip(axes.flat, result['kinds'], strict=False):
    for i, name in enumerate(kinds):
      for method, style in styles.items():
        rows = sorted((r['severity'], r['accuracy']['value']) for r in result['severities']
                      if (r['features'], r['method']) == (name, method) and r['kind'] in ('clean', kind))
        ax.plot(*np.array(rows).T, style, color=COLOURS[i % len(COLOURS)], linewidth=1.5, marker='.',
                label=f'{name}, {methods[method]}')
    _plain(ax, kind.replace('_', ' '), 'severity', 'balanced accuracy')
  axes.flat[0].legend(frameon=False, fontsize=6)
  save_figure(figure, path)


def index_curves(result: Mapping[str, Any], path: str | os.PathLike) -> None:
  """Robustness index and accuracy of the neighbours against k, for each kind of features."""
  figure = figure_of(8.4, 3.6)
  found = result['index']
  for ax, key, label in zip(figure.subplots(1, 2), ('index', 'accuracy'), ('robustness index',
                                                                          'balanced accuracy of the neighbours'),
                            strict=True):
    for i, (name, curve) in enumerate(found['features'].items()):
      ax.plot(curve['k'], [_nan(v) for v in curve[key]], color=COLOURS[i % len(COLOURS)], linewidth=1.6, marker='.',
              label=name)
    ax.axvline(found['k'], color=_QUIET, linewidth=0.8, linestyle=':')
    _plain(ax, label, 'k, neighbours of other subjects', '')
    ax.set_xscale('log')
    ax.set_ylim(-0.02, 1.02)
  ax.legend(frameon=False, fontsize=8)
  save_figure(figure, path)


def drop_curves(result: Mapping[str, Any], path: str | os.PathLike) -> None:
  """Accuracy against the correlation of label and origin in training: the mean over draws, and their range."""
  found = result['drop']
  tests = list(next(iter(found['features'].values())))
  figure = figure_of(4.2 * len(tests), 3.6)
  for ax, test in zip(figure.subplots(1, len(tests), squeeze=False, sharey=True).flat, tests, strict=True):
    for i, (name, scores) in enumerate(found['features'].items()):
      values, colour = np.array(scores[test]), COLOURS[i % len(COLOURS)]
      ax.plot(found['correlations'], values.mean(axis=1), color=colour, linewidth=1.6, marker='.', label=name)
      ax.fill_between(found['correlations'], values.min(axis=1), values.max(axis=1), color=colour, alpha=0.12,
                      linewidth=0)
    _plain(ax, test.upper(), 'correlation of label and origin in training', 'balanced accuracy')
  ax.legend(frameon=False, fontsize=8)
  save_figure(figure, path)


def heat(tables: Mapping[str, Sequence[Sequence[float]]], lines: Sequence[str], columns: Sequence[str],
         path: str | os.PathLike) -> None:
  """Tables of values in -1 .. 1 below each other, blue to red, with their numbers."""
  figure = figure_of(max(4.0, 0.7 * len(columns) + 2), len(tables) * (0.4 * len(lines) + 1.1))
  for ax, (title, table) in zip(figure.subplots(len(tables), 1, squeeze=False).flat, tables.items(), strict=True):
    ax.imshow(np.array(table), cmap='coolwarm', vmin=-1, vmax=1, aspect='auto')
    ax.set_xticks(range(len(columns)), columns, rotation=30, ha='right', fontsize=8)
    ax.set_yticks(range(len(lines)), lines, fontsize=8)
    for i, row in enumerate(table):
      for j, value in enumerate(row):
        ax.text(j, i, f'{value:.2g}', ha='center', va='center', fontsize=7, color=_INK)
    ax.set_title(title, color=_INK, loc='left', fontsize=10)
  save_figure(figure, path)


def tiles(lines: Mapping[str, Sequence[np.ndarray]], columns: Sequence[str], names: Sequence[str],
          path: str | os.PathLike) -> None:
  """Images [*grid, C] in lines with names; the first of a line sets its gray levels. Of a volume the middle slice.

  Red, green and blue are shown in colour, of other channels the first one.
  """
  from jaxmed.augment.color import rgb_ids
  figure = figure_of(1.5 * len(columns), 1.5 * len(lines) + 0.3)
  axes = figure.subplots(len(lines), len(columns), squeeze=False)
  rgb = list(rgb_ids(names)[:3]) or [0]
  for row, (title, images) in zip(axes, lines.items(), strict=True):
    flat = [np.asarray(x if x.ndim == 3 else x[len(x) // 2], np.float64)[..., rgb] for x in images]
    low, high = flat[0].min(), flat[0].max()
    for ax, image in zip(row, flat, strict=True):
      shown = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
      ax.imshow(shown if len(rgb) == 3 else shown[..., 0], cmap='gray', vmin=0, vmax=1, interpolation='nearest')
      ax.set(xticks=[], yticks=[])
      ax.spines[:].set_visible(False)
    row[0].set_ylabel(title.replace('_', ' '), fontsize=8, color=_QUIET)
  for ax, label in zip(axes[0], columns, strict=True):
    ax.set_title(label, fontsize=8, color=_QUIET)
  save_figure(figure, path)


def _plain(ax: Any, title: str, across: str, up: str) -> None:
  ax.set_title(title, color=_INK, loc='left', fontsize=10)
  ax.set_xlabel(across, color=_QUIET, fontsize=8)
  ax.set_ylabel(up, color=_QUIET, fontsize=8)
  ax.spines[['top', 'right']].set_visible(False)


def _nan(value: float | None) -> float:
  return np.nan if value is None else value

