"""Probes of patch tokens, as pure functions of arrays: neighbours, logistic regression, a linear head with batch norm.

All are fitted on patches: features [n, D] and the classes of their pixels [n, L], where a negative class is a pixel to
ignore. All answer whole maps: features [N, *grid, D] -> classes [N, *size].
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmed.data.resize import resize
from jaxmed.errors import UserError
from jaxmed.evaluate import overlap, probes

KNN_GRID = tuple((k, distance) for distance in ('cosine', 'L2') for k in (1, 3, 10, 30))  # CAPI: eval_segmentation.py
LOGISTIC_GRID = tuple(10.0 ** np.linspace(-6, 5, 8))  # the same file
RATES = (1e-3, 1e-2)  # DINOv3: 1e-3 for 40,000 steps; few steps may want more
_MOMENTUM, _CLIP, _WARM_UP, _INIT = 0.1, 35.0, 1500 / 40_000, 0.01  # DINOv3: eval/segmentation
_CHUNK = 2**24  # similarities, or votes of pixels, held at once


class Patches(NamedTuple):
  """Patches to fit on: x [n, D] features, pixels [n, L] the class of each pixel, negative where it is to be ignored."""

  x: np.ndarray
  pixels: np.ndarray


class Probe(NamedTuple):
  """A fitted probe.

  predict: maps [N, *grid, D] and a size -> classes [N, *size]. score: mIoU of the pixels of the validation patches.
  info: what was chosen, plain data. trouble: a note on the fit, '' for none.
  """

  predict: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
  score: float
  info: dict[str, Any]
  trouble: str = ''


def cell(size: Sequence[int], grid: Sequence[int]) -> tuple[int, ...]:
  """Pixels of a patch along each axis; a UserError where the grid does not divide the size."""
  if len(size) != len(grid) or any(g < 1 or n % g for n, g in zip(size, grid, strict=True)):
    text = lambda numbers: 'x'.join(map(str, numbers))
    raise UserError(f'a map of {text(grid)} patches does not divide images of {text(size)} pixels: expected a multiple '
                    'of the grid (another level, or another image size)')
  return tuple(n // g for n, g in zip(size, grid, strict=True))


def cut(maps: np.ndarray, grid: Sequence[int]) -> np.ndarray:
  """Patches [N, *grid, L] of pixels [N, *size], L of them in a patch in C order."""
  rank = len(grid)
  split = [k for pair in zip(grid, cell(maps.shape[1:], grid), strict=True) for k in pair]
  order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2)]
  return maps.reshape(len(maps), *split).transpose(order).reshape(len(maps), *grid, -1)


def joined(patches: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """Pixels [N, *size] of patches [N, *grid, L]; L may be 1, for one value in all pixels of a patch."""
  grid = patches.shape[1:-1]
  rank, inner = len(grid), cell(size, grid)
  if patches.shape[-1] == 1:
    patches = np.broadcast_to(patches, (*patches.shape[:-1], int(np.prod(inner))))
  order = [0, *(k for i in range(1, rank + 1) for k in (i, i + rank))]
  return patches.reshape(len(patches), *grid, *inner).transpose(order).reshape(len(patches), *size)


def commonest(pixels: np.ndarray, classes: int) -> np.ndarray:
  """The commonest class [n] of pixels [n, L]: the smallest of several, -1 where ignored pixels outnumber each class."""
  count = counted(pixels, classes)
  best = count.argmax(axis=1)
  lost = pixels.shape[1] - count.sum(axis=1) > count.max(axis=1)
  return np.where(lost, -1, best)


def counted(pixels: np.ndarray, classes: int) -> np.ndarray:
  """How many pixels [n, K] of each class pixels [n, L] hold, int32."""
  return np.stack([(pixels == c).sum(axis=1, dtype=np.int32) for c in range(classes)], axis=1)


def knn(train: Patches, val: Patches, classes: int,
        grid: Sequence[tuple[int, str]] = KNN_GRID) -> Probe:
  """Nearest patches, each pixel of which votes for the pixel in its place (CAPI, facebookresearch/capi
  eval_segmentation.py).

  Features are standardised by the patches that are fitted on. Number and distance ('cosine' or 'L2') of the neighbours
  are those of `grid` with the highest mIoU on the validation patches, the first of several; the final neighbours are of
  training and validation patches together. Patches that are mostly ignored are left out, and an ignored pixel of
  another one has the class of its patch. Of equally frequent classes the smallest wins.

  Raises:
    UserError: no patch is left.
  """
  fit, both = (_voters(p, classes) for p in (train, _together(train, val)))
  if not len(fit.x):
    raise UserError('knn: every training patch is mostly ignored; expected a patch with a class')
  mean, scale = probes.standardiser(fit.x)
  stored, asked = _scaled(fit.x, mean, scale), _scaled(val.x, mean, scale)
  scores = []
  for distance in dict.fromkeys(d for _, d in grid):
    found = neighbours(stored, asked, max(k for k, d in grid if d == distance), distance)
    scores += [(miou(val.pixels, votes(fit.pixels, found[:, :k], classes), classes), k, distance)
               for k, d in grid if d == distance]
  score, k, distance = max(scores, key=lambda s: s[0])
  mean, scale = probes.standardiser(both.x)
  stored = _scaled(both.x, mean, scale)

  def predict(maps: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    found = neighbours(stored, _scaled(maps.reshape(-1, maps.shape[-1]), mean, scale), k, distance)
    pixels = votes(both.pixels, found, classes)
    return joined(pixels.reshape(*maps.shape[:-1], -1), size)

  told = {f'{d} {n}': s for s, n, d in scores}
  return Probe(predict, score, {'k': k, 'distance': distance, 'val_miou': score, 'grid_val_miou': told})


def neighbours(stored: np.ndarray, asked: np.ndarray, k: int, distance: str) -> np.ndarray:
  """The k nearest of stored [n, D] to each of asked [m, D], nearest first, by 'cosine' or 'L2': places [m, min(k, n)].

  Which of several equally near ones is the k-th is not defined.
  """
  k = min(k, len(stored))
  if distance == 'cosine':
    stored, asked, half = probes.unit(stored), probes.unit(asked), np.float32(0)
  else:
    half = np.square(stored).sum(axis=1) / 2
  out = np.zeros((len(asked), k), np.int64)
  step = max(1, _CHUNK // len(stored))
  for start in range(0, len(asked), step):
    near = asked[start:start + step] @ stored.T - half
    top = np.argpartition(near, len(stored) - k, axis=1)[:, -k:]
    order = np.argsort(-np.take_along_axis(near, top, axis=1), axis=1, kind='stable')
    out[start:start + step] = np.take_along_axis(top, order, axis=1)
  return out


def votes(pixels: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
  """The commonest class [m, L] of each pixel over the patches [m, k] out of pixels [n, L]; the smallest of several."""
  out = np.zeros((len(found), pixels.shape[1]), pixels.dtype)
  step = max(1, _CHUNK // (max(found.shape[1], classes) * pixels.shape[1]))
  for start in range(0, len(found), step):
    many = pixels[found[start:start + step]]  # [m, k, L]
    count = np.stack([(many == c).sum(axis=1, dtype=np.int32) for c in range(classes)])  # [K, m, L]
    out[start:start + step] = count.argmax(axis=0)
  return out


def logistic(train: Patches, val: Patches, classes: int, grid: Sequence[float] = LOGISTIC_GRID,
             max_iter: int = 1000) -> Probe:
  """Multinomial logistic regression (L-BFGS) of the commonest class of each patch, as CAPI's eval_segmentation.py.

  Features are standardised by the patches that are fitted on. The penalty C is that of `grid` with the highest mIoU on
  the validation patches, of several that with the lower log loss of their pixels, then the strongest; the model is then
  fitted again on training and validation patches together. Patches that are mostly ignored are left out. A prediction
  holds for all pixels of its patch.

  Raises:
    UserError: the training patches have fewer than two classes.
  """
  y = commonest(train.pixels, classes)
  if len(np.unique(y[y >= 0])) < 2:
    raise UserError('logistic: the commonest pixels of all training patches are of one class; expected two or more '
                    '(smaller patches, or larger images)')
  fits, scores = probes.Fits(max_iter), []
  mean, scale = probes.standardiser(train.x[y >= 0])
  stored, asked = _scaled(train.x[y >= 0], mean, scale), _scaled(val.x, mean, scale)
  for c in sorted(grid):
    p = fits.fit(stored, y[y >= 0], c).probabilities(asked, classes)
    loss = -(counted(val.pixels, classes) * np.log(np.clip(p, 1e-12, 1))).sum()
    guess = np.broadcast_to(p.argmax(axis=1)[:, None], val.pixels.shape)
    scores.append((miou(val.pixels, guess, classes), -loss, float(c)))
  score, _, c = max(scores, key=lambda s: s[:2])
  both = _together(train, val)
  y = commonest(both.pixels, classes)
  mean, scale = probes.standardiser(both.x[y >= 0])
  fits.restart()
  fits.fit(_scaled(both.x[y >= 0], mean, scale), y[y >= 0], c)

  def predict(maps: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    x = _scaled(maps.reshape(-1, maps.shape[-1]), mean, scale)
    return joined(fits.probabilities(x, classes).argmax(axis=1).reshape(*maps.shape[:-1], 1), size)

  info = {'C': c, 'val_miou': score, 'grid_val_miou': {f'{c:.3g}': s for s, _, c in scores},
          'iterations': fits.iterations, 'unconverged': fits.unconverged}
  trouble = f'{fits.unconverged} of {len(grid) + 1} fits did not converge' if fits.unconverged else ''
  return Probe(predict, score, info, trouble)


def linear(train: Patches, val: Patches, classes: int, *, seed: int = 0, steps: int = 500, batch: int = 1024,
           rates: Sequence[float] = RATES, weight_decay: float = 1e-3, dropout: float = 0.1) -> Probe:
  """A linear head with batch norm, as DINOv2 and DINOv3 (facebookresearch/dinov3 dinov3/eval/segmentation): dropout,
  batch norm, 1x1 convolution, AdamW with a short warm-up and a cosine, gradients clipped at 35.

  The loss is the cross entropy of a patch's logits with each of its pixels, over those that are not ignored. The peak
  rate is that of `rates` with the highest mIoU on the validation patches, the first of several; the head is then
  trained again on training and validation patches together. Logits are interpolated linearly between patches.

  Other than there: features are first standardised by the training patches; batches are patches of all images rather
  than whole crops, so that dropout is by patch, logits are not interpolated in the loss, and images are not augmented;
  steps and rates are for a laptop. Patches that are ignored whole are left out, as the batch norm would see them.

  Raises:
    UserError: no patch is left.
  """
  train, both = _told(train), _told(_together(train, val))
  if not len(train.x):
    raise UserError('linear: every pixel of the training patches is ignored; expected some that are not')
  count = counted(both.pixels, classes).astype(np.float32)
  mean, scale = probes.standardiser(train.x)
  x, weights = jnp.asarray(_scaled(both.x, mean, scale)), jnp.asarray(count)

  def fitted(rows: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    w, b = map(np.asarray, _train(x, weights, rows, rate, jax.random.key(seed), steps, batch, weight_decay, dropout))
    return w / scale[:, None], b - (mean / scale) @ w

  scores = []
  for rate in rates:
    w, b = fitted(len(train.x), rate)
    guess = (val.x @ w + b).argmax(axis=1)
    scores.append((miou(val.pixels, np.broadcast_to(guess[:, None], val.pixels.shape), classes), float(rate)))
  score, rate = max(scores, key=lambda s: s[0])
  w, b = fitted(len(both.x), rate)

  def predict(maps: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    cell(size, maps.shape[1:-1])
    return np.stack([resize(np.asarray(m, np.float32) @ w + b, size).argmax(axis=-1) for m in maps])

  info = {'learning_rate': rate, 'val_miou': score, 'grid_val_miou': {f'{r:g}': s for s, r in scores}, 'steps': steps,
          'batch': min(batch, len(both.x)), 'weight_decay': weight_decay, 'dropout': dropout}
  trouble = '' if np.isfinite(w).all() and np.isfinite(b).all() else 'the head diverged'
  return Probe(predict, score, info, trouble)


def miou(truth: np.ndarray, predicted: np.ndarray, classes: int) -> float:
  """Mean over the classes that occur of the intersection over union of all pixels; negative truths are ignored."""
  table = overlap.confusion(np.reshape(truth, (1, -1)), np.reshape(predicted, (1, -1)), classes)
  return overlap.score(table, [True] * classes)['miou']


@functools.partial(jax.jit, static_argnames=('steps', 'batch', 'weight_decay', 'dropout'))
def _train(x, count, rows, rate, key, steps, batch, weight_decay, dropout):
  """(weights [D, K], bias [K]) of the head on raw features, of x [n, D] and pixels of each class [n, K].

  Batches are drawn from the first `rows` patches with replacement. The batch norm is folded in.
  """
  batch = min(batch, len(x))
  warm = max(1, round(_WARM_UP * steps))
  shape = optax.warmup_cosine_decay_schedule(1e-6, 1.0, warm, max(steps, warm + 1))
  rule = optax.chain(optax.clip_by_global_norm(_CLIP), optax.scale_by_adam(),
                     optax.add_decayed_weights(weight_decay), optax.scale_by_schedule(shape))
  first, key = jax.random.split(key)
  width = x.shape[1]
  params = {'gain': jnp.ones(width), 'shift': jnp.zeros(width), 'bias': jnp.zeros(count.shape[1]),
            'kernel': _INIT * jax.random.normal(first, (width, count.shape[1]))}

  def loss(params, x, count):
    mean, var = x.mean(axis=0), x.var(axis=0)
    x = (x - mean) * jax.lax.rsqrt(var + 1e-5) * params['gain'] + params['shift']
    logits = jax.nn.log_softmax(x @ params['kernel'] + params['bias'])
    return -(count * logits).sum() / jnp.maximum(count.sum(), 1.0), (mean, var)

  def step(carry, key):
    params, state, mean, var = carry
    chosen, dropped = jax.random.split(key)
    index = jax.random.randint(chosen, (batch,), 0, rows)
    keep = jax.random.bernoulli(dropped, 1 - dropout, (batch, width))
    seen = jnp.where(keep, x[index] / (1 - dropout), 0.0)
    slope, (now, spread) = jax.grad(loss, has_aux=True)(params, seen, count[index])
    change, state = rule.update(slope, state, params)
    params = jax.tree.map(lambda p, u: p - rate * u, params, change)
    mean, var = mean + _MOMENTUM * (now - mean), var + _MOMENTUM * (spread - var)
    return (params, state, mean, var), None

  carry = params, rule.init(params), jnp.zeros(width), jnp.ones(width)
  (params, _, mean, var), _ = jax.lax.scan(step, carry, jax.random.split(key, steps))
  scale = params['gain'] * jax.lax.rsqrt(var + 1e-5)
  return scale[:, None] * params['kernel'], (params['shift'] - mean * scale) @ params['kernel'] + params['bias']


def _voters(patches: Patches, classes: int) -> Patches:
  """The patches that have a class, ignored pixels of which are given it."""
  y = commonest(patches.pixels, classes)
  x, pixels, y = (a[y >= 0] for a in (patches.x, patches.pixels, y))
  return Patches(x, np.where(pixels < 0, y[:, None], pixels).astype(patches.pixels.dtype))


def _told(patches: Patches) -> Patches:
  """The patches with a pixel that is not ignored."""
  some = (patches.pixels >= 0).any(axis=1)
  return Patches(patches.x[some], patches.pixels[some])


def _together(a: Patches, b: Patches) -> Patches:
  return Patches(np.concatenate([a.x, b.x]), np.concatenate([a.pixels, b.pixels]))


def _scaled(x: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
  return (np.asarray(x, np.float32) - mean) / scale
