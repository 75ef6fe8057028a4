"""The figures of a run: curves, image grids, reconstructions, patch features. Each is one PNG file.

Images keep their aspect and are shown without interpolation. Three channels named R, G, B are a colour image;
any other channels stand side by side in grey, each stretched between its own 0.5 and 99.5 percentiles over
all images of the figure. Of a volume the middle slice is shown. Missing (NaN) pixels are pale blue.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxmed.errors import UserError
from jaxmed.files import writing

# Okabe and Ito's palette, told apart by colour-blind readers.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
_MISSING = np.array([0.80, 0.87, 0.95])
_HEAT = np.array([0.90, 0.42, 0.0])
_INK, _QUIET = '#222222', '#666666'
_PANELS = {'loss': ('Training loss', 'loss'), 'learning_rate': ('Learning rate', 'learning rate'),
           'images_per_second': ('Throughput', 'images / s'), 'grad_norm': ('Gradient norm', 'L2 norm'),
           'val_loss': ('Held-out loss', 'loss'), 'knn': ('kNN, held out', 'accuracy'),
           'ridge': ('Ridge probe, held out', 'accuracy'), 'rankme': ('RankMe', 'effective rank'),
           'lidar': ('LiDAR', 'effective rank'), 'alpha_req': ('alpha-ReQ', 'decay of eigenvalues'),
           'feature_std': ('Spread of features', 'deviation x root of D'),
           'gram_offdiagonal': ('Likeness of images', 'mean cosine'),
           'token_cosine': ('Likeness of tokens', 'mean cosine'),
           'teacher_entropy': ('Entropy of the teacher', 'nats'), 'teacher_kl': ('KL of student to teacher', 'nats')}
_MOST_PANELS = 24
_NO_PANEL = ('step', 'epoch', 'time', 'images_seen')


def loss_curves(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
  """One panel for each number that metrics.jsonl has, over the step; at most _MOST_PANELS.

  Args:
    rows: dicts with 'step' and any of loss, learning_rate, images_per_second, grad_norm and other numbers. A
      row need not have every key. Values that are not finite are marked on the axis.

  Raises:
    UserError: no row has a step and a number.
  """
  names = _numeric(rows)
  if not names:
    raise UserError('loss_curves: no row has a step and a number; expected rows of metrics.jsonl')
  columns = min(2, len(names))
  lines = -(-len(names) // columns)
  figure = figure_of(5.2 * columns, 2.7 * lines)
  axes = figure.subplots(lines, columns, squeeze=False)
  steps = [r['step'] for r in rows if _is_number(r.get('step'))]
  margin = 0.03 * max(1, max(steps) - min(steps))
  for ax in axes.flat[len(names):]:
    ax.set_axis_off()
  for i, (ax, name) in enumerate(zip(axes.flat, names, strict=False)):
    _curve(ax, rows, name, COLOURS[i % len(COLOURS)])
    ax.set_xlim(min(steps) - margin, max(steps) + margin)  # the same in every panel
  save_figure(figure, path)


def method_curves(curves: Mapping[str, Mapping[str, Sequence[tuple[float, Sequence[float]]]]],
                  path: str | os.PathLike) -> None:
  """One panel a metric: for each method the mean over its runs and their range, over images seen.

  Args:
    curves: {metric: {method: [(images seen, values of the runs)]}}.
  """
  figure = figure_of(6.4 * len(curves), 4.6)
  methods = list(dict.fromkeys(m for panel in curves.values() for m in panel))
  styles = ('-', '--', ':', '-.')
  for ax, (metric, panel) in zip(figure.subplots(1, len(curves), squeeze=False).flat, curves.items(), strict=True):
    for method, points in panel.items():
      i = methods.index(method)
      colour, style = COLOURS[i % len(COLOURS)], styles[i // len(COLOURS) % len(styles)]
      x = [seen for seen, _ in points]
      ax.plot(x, [np.mean(v) for _, v in points], color=colour, linestyle=style, linewidth=1.6, label=method)
      low, high = ([end(v) for _, v in points] for end in (min, max))
      ax.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    ax.set_title(metric, color=_INK, loc='left', fontsize=11)
    ax.set_xlabel('images seen', color=_QUIET)
    ax.set_ylabel('accuracy on held-out images', color=_QUIET)
    ax.spines[['top', 'right']].set_visible(False)
    ax.legend(frameon=False, fontsize=8, ncols=2)
  save_figure(figure, path)


def channel_curves(results: Mapping[str, Mapping[str, Any]], path: str | os.PathLike, metric: str = 'accuracy') -> None:
  """One panel a probe: a metric against the number of channels shown, with its interval, and a dot for each subset.

  Args:
    results: {encoder: what `channels.ByChannels.run` returned}.
  """
  methods = list(next(iter(results.values()))['methods'])
  figure = figure_of(5.6 * len(methods), 4.2)
  for ax, method in zip(figure.subplots(1, len(methods), squeeze=False).flat, methods, strict=True):
    for i, (name, result) in enumerate(results.items()):
      colour, found = COLOURS[i % len(COLOURS)], result['methods'][method]
      x = [c['channels'] for c in found['counts']]
      cells = [c['metrics'][metric] for c in found['counts']]
      ax.plot(x, [c['value'] for c in cells], color=colour, linewidth=1.6, label=name)
      if all(c['low'] is not None for c in cells):
        ax.fill_between(x, [c['low'] for c in cells], [c['high'] for c in cells], color=colour, alpha=0.12, linewidth=0)
      ax.plot([len(s['channels']) + 0.04 * (i + 1) for s in found['subsets']],
              [s['metrics'][metric]['value'] for s in found['subsets']], '.', color=colour, alpha=0.4, markersize=4)
    ax.axhline(next(iter(results.values()))['chance'][metric], color=_QUIET, linewidth=0.8, linestyle=':')
    ax.set_title(method, color=_INK, loc='left', fontsize=11)
    ax.set_xlabel('channels shown', color=_QUIET)
    ax.set_ylabel(metric, color=_QUIET)
    ax.set_xticks(x)
    ax.spines[['top', 'right']].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
  save_figure(figure, path)


def image_grid(images: np.ndarray, names: Sequence[str], path: str | os.PathLike, title: str = '') -> None:
  """Images [N, H, W, C] or [N, D, H, W, C], numbers of any range, with C channel names."""
  images = _sliced('images', images, names)
  shown = _shown(images, names, _limits(images, names))  # [N, P, H, W, 3]
  n, panels = shown.shape[:2]
  across = max(
    1, round(np.sqrt(n * shown.shape[2] / (shown.shape[3] * panels)))
  )  # images in a line: near square
  across = min(n, max(across, -(-6 // panels)))
  tiles = [[shown[i, p] for i in range(start, min(start + across, n)) for p in range(panels)]
           for start in range(0, n, across)]
  _mosaic(tiles, _titles(names) * across, path, title, group=panels)


def reconstructions(original: np.ndarray, masked: np.ndarray, predicted: np.ndarray, names: Sequence[str],
                    path: str | os.PathLike, title: str = 'Reconstructions of masked images') -> None:
  """Original, masked and predicted images, [N, H, W, C] or [N, D, H, W, C] each, in the same units.

  All three share the grey levels of the original. Masked pixels may be NaN.
  """
  parts = [
    _sliced(n, x, names) for n, x in (('original', original), ('masked', masked), ('predicted', predicted))
  ]
  if len({p.shape for p in parts}) > 1:
    raise UserError(
      f'reconstructions: shapes {[p.shape for p in parts]} differ; expected the same three times'
    )
  limits = _limits(parts[0], names)
  shown = np.stack([_shown(p, names, limits) for p in parts], axis=2)  # [N, P, 3, H, W, 3]
  labels = [
    f'{name}\n{what}' if name else what
    for name in _titles(names)
    for what in ('original', 'masked', 'predicted')
  ]
  _mosaic([list(line.reshape(-1, *line.shape[2:])) for line in shown], labels, path, title, group=3)


def channel_similarity(cosine: np.ndarray, names: Sequence[str], path: str | os.PathLike) -> None:
  """Cosines [V, V] between the embeddings of channels, as a matrix with numbers."""
  side = 1.6 + 0.45 * len(names)
  figure = figure_of(side + 1.0, side)
  ax = figure.subplots()
  ax.imshow(cosine, cmap='RdBu_r', vmin=-1, vmax=1)
  ax.set_xticks(range(len(names)), list(names), rotation=90)
  ax.set_yticks(range(len(names)), list(names))
  for i, j in np.ndindex(*cosine.shape) if len(names) <= 24 else ():
    ax.text(j, i, f'{cosine[i, j]:.1f}', ha='center', va='center', fontsize=7,
            color='white' if abs(cosine[i, j]) > 0.6 else _INK)
  ax.set_title('cosine between channel embeddings', color=_INK, loc='left', fontsize=11)
  save_figure(figure, path)


def looked_at(images: np.ndarray, maps: np.ndarray, share: np.ndarray, names: Sequence[str], path: str | os.PathLike,
              title: str = 'Relevance of each patch of each channel to the feature, in orange') -> None:
  """Each channel of each image under its map, which is scaled to the image's largest value over all channels.

  Args:
    images: [N, H, W, C] or [N, D, H, W, C]. maps: [N, C, *grid], at least 0, with a grid of the images' rank.
    share: [N, C] of each channel of an image's map.
  """
  images, maps = _sliced('images', images, names), np.asarray(maps, np.float64)
  maps = maps if maps.ndim == 4 else maps[:, :, maps.shape[2] // 2]
  grey = np.moveaxis(images, -1, 1)[..., None]  # [N, C, H, W, 1]
  limits = _limits(images, [f'{n} ' for n in names]).reshape(1, -1, 1, 1, 1, 2)  # each channel by itself
  grey = np.clip((grey - limits[..., 0]) / np.maximum(limits[..., 1] - limits[..., 0], 1e-12), 0, 1)
  maps = maps / np.maximum(maps.max(axis=(1, 2, 3), keepdims=True), 1e-30)
  rows, columns = (np.arange(s) * g // s for s, g in zip(grey.shape[2:4], maps.shape[2:], strict=True))
  heat = np.sqrt(maps[:, :, rows][..., columns][..., None])  # the root: small values stay visible
  shown = (1 - 0.75 * heat) * grey + 0.75 * heat * _HEAT
  labels = [f'{name}\n{part:.0%}' for name, part in zip(names, share.mean(axis=0), strict=True)]
  _mosaic([list(line) for line in shown], labels, path, title, group=1)


def patch_pca(
  images: np.ndarray,
  patches: np.ndarray,
  path: str | os.PathLike,
  names: Sequence[str] = (),
  title: str = 'First three principal components of the patch features, as red, green, blue',
) -> None:
  """Each image beside its patch features, projected on the 3 principal components of all patches shown.

  Args:
    images: [N, H, W, C] or [N, D, H, W, C]. patches: [N, *grid, D] with a grid of the images' rank.
    names: channel names; without them, or when they are not R, G, B, the mean of the stretched channels
      is shown.
  """
  patches = np.asarray(patches, np.float64)
  names = list(names) or [str(c) for c in range(np.shape(images)[-1])]
  if patches.ndim != np.ndim(images) or len(patches) != len(images):
    raise UserError(
      f'patch_pca: patches {patches.shape} for images {np.shape(images)}; expected [N, *grid, D]'
    )
  images = _sliced('images', images, names)
  shown = _shown(images, names, _limits(images, names)).mean(axis=1)  # [N, H, W, 3]
  colours = _three_components(patches)  # [N, *grid, 3]
  if colours.ndim == 5:
    colours = colours[:, colours.shape[1] // 2]
  up = [np.linspace(0, g, s, endpoint=False).astype(int) for s, g in zip(shown.shape[1:3], colours.shape[1:3],
                                                                       strict=True)]
  colours = colours[:, up[0]][:, :, up[1]]  # nearest patch of each pixel
  n = len(shown)
  across = min(n, max(1, round(np.sqrt(n / 2))) + 1)
  tiles = [[t for i in range(start, min(start + across, n)) for t in (shown[i], colours[i])]
           for start in range(0, n, across)]
  _mosaic(tiles, ['image', 'patches'] * across, path, title, group=2)


def is_colour(names: Sequence[str]) -> bool:
  """Whether channel names are red, green, blue in this order ('R', 'red', 'fundus:R', ...)."""
  last = [str(n).replace('/', ':').replace('_', ':').split(':')[-1].strip().lower() for n in names]
  return last in (['r', 'g', 'b'], ['red', 'green', 'blue'])


def _numeric(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Keys with a number beside a step: the known ones first, then the others by name."""
  found = {k for r in rows if _is_number(r.get('step')) for k, v in r.items() if _is_number(v)} - set(
    _NO_PANEL
  )
  found -= {k for k in found if k.startswith('skipped') and not any(r.get(k) for r in rows)}  # nothing to see
  return ([k for k in _PANELS if k in found] + sorted(found - set(_PANELS)))[:_MOST_PANELS]


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _curve(ax, rows: Sequence[Mapping[str, Any]], name: str, colour: str) -> None:
  points = [(r['step'], r[name]) for r in rows if _is_number(r.get('step')) and _is_number(r.get(name))]
  step, value = (np.array(v, np.float64) for v in zip(*points, strict=True))
  ok = np.isfinite(value)
  many = np.count_nonzero(ok) > 60 and name != 'learning_rate'  # a schedule has no noise to smooth
  ax.plot(step[ok], value[ok], color=colour, lw=1 if many else 1.6, alpha=0.35 if many else 1,
          marker='o' if np.count_nonzero(ok) < 12 else None, ms=3.5)
  if many:
    ax.plot(step[ok], _smooth(value[ok]), color=colour, lw=1.8, label='running median')
    ax.legend(frameon=False, fontsize=8)
  if not ok.all():
    ax.plot(step[~ok], np.zeros(np.count_nonzero(~ok)), 'x', color='#D55E00', ms=6, clip_on=False,
            transform=ax.get_xaxis_transform(), label='not finite')
    ax.legend(frameon=False, fontsize=8)
  title, unit = _PANELS.get(name, (name.replace('_', ' '), name.replace('_', ' ').split('/')[-1]))
  if name == 'loss' and ok.any() and value[ok].min() > 0 and value[ok].max() > 30 * value[ok].min():
    ax.set_yscale('log')
  ax.set_title(title, fontsize=10, loc='left', color=_INK)
  ax.set_xlabel('step', fontsize=9)
  ax.set_ylabel(unit, fontsize=9)
  if ax.get_yscale() == 'linear':
    ax.ticklabel_format(axis='y', scilimits=(-3, 5))
  ax.grid(True, color='#dddddd', lw=0.6)
  ax.tick_params(labelsize=8, colors=_QUIET)
  for side in ('top', 'right'):
    ax.spines[side].set_visible(False)


def _smooth(value: np.ndarray) -> np.ndarray:
  """Running median over about a twentieth of the points: a spike does not bend it."""
  half = max(2, len(value) // 40)
  padded = np.pad(value, half, mode='edge')
  return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


def _sliced(what: str, images: np.ndarray, names: Sequence[str]) -> np.ndarray:
  """[N, H, W, C] float64: volumes by their middle slice."""
  images = np.asarray(images, np.float64)
  if images.ndim not in (4, 5) or not len(images):
    raise UserError(
      f'{what} have the shape {images.shape}; expected [N, H, W, C] or [N, D, H, W, C] with N > 0'
    )
  if images.shape[-1] != len(names):
    raise UserError(
      f'{what} have {images.shape[-1]} channels and {len(names)} names; expected one name a channel'
    )
  return images if images.ndim == 4 else images[:, images.shape[1] // 2]


def _limits(images: np.ndarray, names: Sequence[str]) -> np.ndarray:
  """[C, 2] lowest and highest shown value; colour channels share one pair, so that hues stay true."""
  flat = images.reshape(-1, images.shape[-1])
  if is_colour(names):
    flat = np.broadcast_to(flat.reshape(-1, 1), (flat.size, 3))
  flat = np.where(np.isfinite(flat), flat, np.nan)
  out = np.zeros((images.shape[-1], 2))
  for c in range(len(out)):
    good = flat[:, c][~np.isnan(flat[:, c])]
    out[c] = np.percentile(good, [0.5, 99.5]) if good.size else (0, 1)
    if good.size and out[c, 1] <= out[c, 0]:  # nearly constant: the rare pixels that differ must not vanish
      out[c] = good.min(), good.max()
  return out


def _shown(images: np.ndarray, names: Sequence[str], limits: np.ndarray) -> np.ndarray:
  """[N, H, W, C] -> [N, P, H, W, 3] in 0..1; P = 1 for a colour image, else C."""
  low, high = limits.T
  span = np.where(high > low, high - low, 1)
  missing = ~np.isfinite(images)
  scaled = np.clip((np.where(missing, 0, images) - low) / span, 0, 1)
  if is_colour(names):
    return np.where(missing.any(axis=-1, keepdims=True), _MISSING, scaled)[:, None]
  grey = np.moveaxis(scaled, -1, 1)[..., None]  # [N, C, H, W, 1]
  return np.where(np.moveaxis(missing, -1, 1)[..., None], _MISSING, grey)


def _three_components(patches: np.ndarray) -> np.ndarray:
  """[N, *grid, D] -> [N, *grid, 3] in 0..1: principal components between their 1 and 99 percentiles."""
  flat = patches.reshape(-1, patches.shape[-1])
  if not np.isfinite(flat).all():
    raise UserError('patch_pca: patch features hold NaN or infinite values; expected finite numbers')
  flat = flat - flat.mean(axis=0)
  _, axes = np.linalg.eigh(flat.T @ flat)
  axes = axes[:, ::-1][:, :3]
  axes = axes * np.sign(
    axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])]
  )  # the sign is arbitrary: fix it
  part = flat @ axes
  part = np.pad(part, ((0, 0), (0, 3 - part.shape[1])))
  low, high = np.percentile(part, [1, 99], axis=0)
  scaled = np.clip((part - low) / np.where(high - low > 1e-12, high - low, 1), 0, 1)
  return scaled.reshape(*patches.shape[:-1], 3)


def _titles(names: Sequence[str]) -> list[str]:
  return [''] if is_colour(names) else [str(n) for n in names]


def _mosaic(tiles: list[list[np.ndarray]], labels: Sequence[str], path: str | os.PathLike, title: str,
            group: int) -> None:
  """Lines of tiles [H, W, 3] on one canvas, a wider gap after each `group`, `labels` above the first."""
  h, w = tiles[0][0].shape[:2]
  gap = max(2, round(0.06 * w))
  left, x = [], 0
  for i in range(len(tiles[0])):
    left.append(x)
    x += w + (2 * gap if (i + 1) % group == 0 and group > 1 else gap // 2 if group > 1 else gap)
  width = left[-1] + w
  canvas = np.ones((len(tiles) * (h + gap) - gap, width, 3))
  for r, line in enumerate(tiles):
    for tile, start in zip(line, left, strict=False):
      canvas[r * (h + gap):r * (h + gap) + h, start:start + w] = tile
  inches = min(12.0, max(4.0, 1.15 * len(tiles[0])))
  head = (0.35 if title else 0) + (0.38 if any('\n' in n for n in labels) else 0.22 if any(labels) else 0)
  body = inches * canvas.shape[0] / width
  figure = figure_of(inches, body + head, layout=None)
  ax = figure.add_axes((0, 0, 1, body / (body + head)))
  ax.imshow(canvas, interpolation='nearest', aspect='auto', extent=(0, width, canvas.shape[0], 0))
  ax.set_axis_off()
  size = min(9.0, 72 * inches * w / width / 5)
  for start, label in zip(left, labels, strict=False):
    ax.text(
      start + w / 2, -0.04 * h, label, ha='center', va='bottom', fontsize=size, color=_QUIET, clip_on=False
    )
  if title:
    figure.text(
      0.004,
      1 - 0.06 / (body + head),
      title,
      ha='left',
      va='top',
      fontsize=min(10.5, 13 * inches / 8 + 2),
      color=_INK,
    )
  save_figure(figure, path)


def figure_of(width: float, height: float, layout: Literal['constrained'] | None = 'constrained') -> Any:
  """A figure of so many inches."""
  from matplotlib.figure import Figure  # without pyplot: no global state, no display
  return Figure(figsize=(width, height), layout=layout, facecolor='white')


def save_figure(figure: Any, path: str | os.PathLike) -> None:
  """Writes a PNG, whole or not at all."""
  with writing(path) as part:
    figure.savefig(part, format='png', dpi=130, metadata={'Software': None})
