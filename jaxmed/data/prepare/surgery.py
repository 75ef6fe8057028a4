"""Synthetic videos of operations, with everything known exactly: for trials of phases, tools, boxes and masks.

A video has one frame a second. Its phases are a Markov chain: mostly forward, with pauses, skips and returns. In each
phase tools come and go by a chain of their own, at rates that depend on the phase; a tool enters from the border, works
on the organ and leaves. The background is a moving texture. Smoke follows the hook, blood the scissors; there is
blur, and some videos have a round mask and a label of the recorder. Masks and boxes say what lies there, whatever
smoke and blur hide.

Of a look the procedure (rates of phases and tools), tissue and instruments are its own, so that the diversity of
procedures can be studied: `looks` of them take turns. A column `cvs` holds which of three criteria are met: each after
a further quarter of the video's dissection, when a light spot appears on the organ.

What is learned here shows that a method works and transfers, nothing of any operation.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from jaxmed.errors import UserError, choose

PHASES = ('preparation', 'exposure', 'dissection', 'clipping', 'separation', 'packaging', 'cleaning')
TOOLS = ('grasper', 'hook', 'clipper', 'scissors', 'bag', 'suction')
CLASSES = ('background', 'organ', *TOOLS)
MASKS = ('classes', 'instrument')
CRITERIA = ('two_structures', 'cleared_triangle', 'plate')
TYPES = {'mask': pa.string(), 'video': pa.string(), 'procedure': pa.string(), 'phase': pa.string(),
         'tools': pa.string(), 'cvs': pa.string(), 'boxes': pa.string(), 'box_names': pa.string(),
         'remaining': pa.float64(), 'phase_remaining': pa.float64(), 'smoke': pa.float64(), 'blood': pa.float64(),
         'blur': pa.int32(), 'frame_seconds': pa.float64()}
SHARES = (0.1, 0.2)  # of the videos of a look in val and test
# Probability that a tool is in use in each phase.
_USE = np.array([[.1, 0, 0, 0, 0, .1], [.8, .1, 0, 0, 0, .2], [.8, .8, 0, 0, 0, .1], [.7, .1, .8, .3, 0, .1],
                 [.8, .7, 0, .2, 0, .2], [.6, 0, 0, 0, .9, .1], [.4, .1, 0, 0, .2, .9]])
# Relative length of each phase.
_LENGTH = np.array([.5, 1, 2, .8, 1.6, .6, .7])
_CHUNK = 256  # frames that are painted at once

Cut = tuple[dict[str, Any], str, str, str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What to make.

  Attributes:
    seed: of all that is drawn. videos, frames: how many, and seconds of each. size: pixels of a side. looks: procedures
      with an appearance of their own. masks: 'classes' (CLASSES), or 'instrument', 1 where any tool is.
  """

  seed: int = 0
  videos: int = 12
  frames: int = 64
  size: int = 64
  looks: int = 1
  masks: str = 'classes'

  def __post_init__(self):
    choose('--masks of surgery', self.masks, MASKS)
    if not 1 <= self.looks <= 1000:
      raise UserError(f'--looks {self.looks}: expected 1 to 1000')
    if not 3 * self.looks <= self.videos <= 100_000:
      raise UserError(f'--videos {self.videos}: expected {3 * self.looks} to 100000, of each of --looks {self.looks} '
                      'one for each split at least')
    if not 8 <= self.frames <= 100_000:
      raise UserError(f'--frames {self.frames}: expected 8 to 100000 seconds of a video')
    if not 24 <= self.size <= 512:
      raise UserError(f'--size {self.size}: expected 24 to 512 pixels a side')


@dataclasses.dataclass(frozen=True)
class Look:
  """What all videos of a procedure share.

  Attributes:
    use: [phases, tools] probability that a tool is in use. next: [phases, phases] to which phase one leads.
    colours: [tissue, contrast of the texture, organ, tip], [4, 3] of 0 .. 255. widths: [tools] half widths, of a side.
    tips: [tools] radii. grains: [2] widths of the texture, of a side.
  """

  use: np.ndarray
  next: np.ndarray
  colours: np.ndarray
  widths: np.ndarray
  tips: np.ndarray
  grains: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tracks:
  """The state of each frame of a video, before anything is painted.

  Attributes:
    phase: [T] int. inside: [T, tools] in 0 .. 1, how far a tool has entered. tip, entry: [T, tools, 2] and [tools, 2]
      (y, x) in units of a side. camera: [T, 2] places of the texture. organ: [T, 4] centre and half axes. smoke,
      blood: [T] in 0 .. 1. blur: [T] 0, or 1 where the frame is blurred. criteria: [T, 3] bool.
  """

  phase: np.ndarray
  inside: np.ndarray
  tip: np.ndarray
  entry: np.ndarray
  camera: np.ndarray
  organ: np.ndarray
  smoke: np.ndarray
  blood: np.ndarray
  blur: np.ndarray
  criteria: np.ndarray


def told(wanted: Wanted) -> str:
  """What a card says of the corpus."""
  return (f'Synthetic: videos of operations painted by a generator (jaxmed.data.prepare.surgery, seed {wanted.seed}, '
          f'{wanted.looks} looks), by no camera. They show that a method works, and nothing of any operation.')


def names(wanted: Wanted) -> dict[int, str]:
  """{value of masks: name}."""
  return dict(enumerate(CLASSES if wanted.masks == 'classes' else ('background', 'instrument')))


def subjects(wanted: Wanted) -> list[tuple[str, str]]:
  """(split, subject) of each video, without making it; no split of a look is empty."""
  out = []
  for n in range(wanted.videos):
    count = len(range(n % wanted.looks, wanted.videos, wanted.looks))
    val, test = (max(1, round(count * share)) for share in SHARES)
    place = n // wanted.looks
    split = 'train' if place < count - val - test else 'val' if place < count - test else 'test'
    out.append((split, f'surgery-{wanted.seed}-{n:04d}'))
  return out


def records(wanted: Wanted) -> Iterator[Cut]:
  """Yields (record, split, path, sha256 of the pixels, extra columns) of all frames, in order."""
  for number, (split, subject) in enumerate(subjects(wanted)):
    tracks = tracked(wanted, number)
    left, in_phase = remaining(tracks.phase)
    for t, (image, mask) in enumerate(painted(wanted, number, tracks)):
      boxes = boxes_of(mask)
      extra = {'mask': 'generated', 'video': subject, 'procedure': f'look-{number % wanted.looks}',
               'phase': PHASES[tracks.phase[t]], 'tools': '|'.join(dict.fromkeys(name for name, _ in boxes)),
               'cvs': '|'.join(np.array(CRITERIA)[tracks.criteria[t]].tolist()),
               'boxes': json.dumps([box for _, box in boxes]), 'box_names': '|'.join(name for name, _ in boxes),
               'remaining': float(left[t]), 'phase_remaining': float(in_phase[t]), 'frame_seconds': float(t),
               'smoke': round(float(tracks.smoke[t]), 4), 'blood': round(float(tracks.blood[t]), 4),
               'blur': int(tracks.blur[t])}
      stored = mask if wanted.masks == 'classes' else (mask > 1).astype(np.uint8)
      record = {'image': image, 'channels': ['R', 'G', 'B'], 'spacing': None, 'mask': stored,
                'id': f'{subject}/{t:05d}', 'source': 'surgery', 'subject': subject}
      yield record, split, subject, hashlib.sha256(image.tobytes()).hexdigest(), extra


def remaining(phase: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Seconds [T] until the video ends, and until the phase of each frame ends (1 at its last frame)."""
  count = len(phase)
  ends = np.append(np.flatnonzero(np.diff(phase)) + 1, count)
  return count - np.arange(count), ends[np.searchsorted(ends, np.arange(count), side='right')] - np.arange(count)


def boxes_of(mask: np.ndarray) -> list[tuple[str, list[int]]]:
  """(tool, [y, x, y end, x end]) of the tools that a mask [S, S] of CLASSES shows."""
  found = []
  for value in range(2, len(CLASSES)):
    rows, columns = (mask == value).any(axis=1), (mask == value).any(axis=0)
    if rows.any():
      (top, bottom), (first, last) = (np.flatnonzero(x)[[0, -1]].tolist() for x in (rows, columns))
      found.append((CLASSES[value], [top, first, bottom + 1, last + 1]))
  return found


@functools.lru_cache(maxsize=32)
def look(seed: int, number: int) -> Look:
  """A procedure and its appearance; number 0 has the rates of _USE."""
  rng = np.random.default_rng((seed, 1, number))
  n = len(PHASES)
  use = _USE if number == 0 else np.clip(_USE[:, rng.permutation(len(TOOLS))] + rng.normal(0, .05, _USE.shape), 0, .95)
  forward = np.eye(n, k=1) + .08 * np.eye(n, k=2) + .08 * np.eye(n, k=-1)
  forward[-1] = np.eye(n)[-1]
  colours = np.array([[165, 75, 65], [50, 30, 25], [150, 130, 70], [190, 195, 200]], float)
  colours += rng.normal(0, 18, colours.shape) * [[1], [.4], [1], [.5]]
  return Look(use, forward / forward.sum(axis=1, keepdims=True), colours.clip(10, 230),
              rng.uniform(.02, .045, len(TOOLS)), rng.uniform(.035, .09, len(TOOLS)),
              rng.uniform([.02, .1], [.05, .25]))


def tracked(wanted: Wanted, number: int) -> Tracks:
  """The state of each frame of a video; it does not depend on the size of the frames."""
  own, rng = look(wanted.seed, number % wanted.looks), np.random.default_rng((wanted.seed, 2, number))
  count = wanted.frames
  phase = _phases(own, count, rng)
  on = _in_use(own.use[phase], rng)
  inside = _smooth(on.astype(float), .5)
  centre = np.array([.5, .5]) + rng.normal(0, .05, 2)
  camera = np.cumsum(rng.normal(0, .004, (count, 2)), axis=0) + rng.uniform(0, 1, 2)
  sway = camera - camera.mean(axis=0)
  cut = np.cumsum(np.isin(phase, (2, 4))) / max(np.isin(phase, (2, 4)).sum(), 1)  # share of the organ that is free
  axes = rng.uniform(.16, .22, 2) * (1 - .45 * cut[:, None]) * np.where(phase >= 5, .4, 1)[:, None]
  organ = np.concatenate([np.clip(centre - sway, .3, .7), axes], axis=1)
  angle = rng.uniform(0, 2 * np.pi) + np.arange(len(TOOLS)) * 2 * np.pi / len(TOOLS) + rng.normal(0, .2, len(TOOLS))
  entry = .5 + .8 * np.stack([np.sin(angle), np.cos(angle)], axis=-1)
  wander = _smooth(rng.normal(0, .35, (count, len(TOOLS), 2)), .25)
  target = organ[:, None, :2] + wander
  tip = entry + (target - entry) * inside[..., None]
  smoke = _smooth(on[:, 1] * rng.uniform(.3, 1) * (rng.uniform(size=count) < .6), .3)
  blood = _smooth(((on[:, 3] | (on[:, 1] & (phase == 4))) & (rng.uniform(size=count) < .15)).astype(float), .12)
  blur = _in_use(np.full((count, 1), .08), rng)[:, 0].astype(np.int32)
  dissected = np.cumsum(phase == 2) / max((phase == 2).sum(), 1)
  criteria = dissected[:, None] > np.arange(1, 4) / 4
  return Tracks(phase, inside, tip, entry, camera, organ, smoke, np.minimum(3 * blood, 1), blur, criteria)


def _phases(own: Look, count: int, rng: np.random.Generator) -> np.ndarray:
  """[T] of a chain that stays in a phase about as long as _LENGTH says and begins in the first."""
  stay = 1 - 1 / np.maximum(count * _LENGTH / _LENGTH.sum(), 1.5)
  out, now, draws = np.zeros(count, np.int64), 0, rng.uniform(size=(count, 2))
  ways = np.cumsum(own.next, axis=1)
  for t in range(count):
    out[t] = now
    if draws[t, 0] > stay[now]:
      now = min(int(np.searchsorted(ways[now], draws[t, 1], side='right')), len(PHASES) - 1)
  return out


def _in_use(rates: np.ndarray, rng: np.random.Generator, keep: float = .85) -> np.ndarray:
  """Bool [T, K]: chains that are on at the rates [T, K], and keep their state with that probability."""
  draws = rng.uniform(size=(len(rates), 2, rates.shape[1]))
  fresh = draws[:, 0] < rates
  out, now = np.zeros(rates.shape, bool), fresh[0]
  for t in range(len(rates)):
    now = np.where(draws[t, 1] < keep, now & (rates[t] > 0), fresh[t])
    out[t] = now
  return out


def _smooth(x: np.ndarray, rate: float) -> np.ndarray:
  """An exponential mean along the first axis that begins at its first value."""
  out, now = np.empty_like(x), x[0]
  for t in range(len(x)):
    now = now + rate * (x[t] - now)
    out[t] = now
  return out


def painted(wanted: Wanted, number: int, tracks: Tracks) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (image [S, S, 3] uint8, mask [S, S] uint8 of CLASSES) of each frame."""
  texture = textured(wanted, number)
  rng = np.random.default_rng((wanted.seed, 3, number))
  framed = rng.uniform(size=2) < .5
  for first in range(0, len(tracks.phase), _CHUNK):
    part = Tracks(**{name: x if name == 'entry' else x[first:first + _CHUNK] for name, x in vars(tracks).items()})
    images, masks = layers(look(wanted.seed, number % wanted.looks), part, texture, wanted.size)
    images = _disturbed(images, part, framed, rng)
    yield from zip(images, masks, strict=True)


def textured(wanted: Wanted, number: int) -> np.ndarray:
  """The tissue of a video [2 S, 2 S, 3] float32, periodic."""
  own, rng = look(wanted.seed, number % wanted.looks), np.random.default_rng((wanted.seed, 4, number))
  side = 2 * wanted.size
  frequency = np.fft.fftfreq(side)
  squared = frequency[:, None] ** 2 + frequency**2
  total = np.zeros((side, side))
  for grain in own.grains * wanted.size:
    kept = np.exp(-2 * (np.pi * grain) ** 2 * squared)
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(side, side))) * kept).real
    total += (noise - noise.mean()) / noise.std()
  tissue = own.colours[0] + rng.normal(0, 10, 3)
  return (tissue + total[..., None] * own.colours[1] / 2).clip(0, 255).astype(np.float32)


def layers(own: Look, part: Tracks, texture: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Images [T, S, S, 3] float32 and masks [T, S, S] uint8 of what lies there."""
  side, count = 2 * size, len(part.phase)
  places = np.floor(part.camera * size).astype(int)
  rows, columns = ((places[:, a, None] + np.arange(size)) % side for a in (0, 1))
  images = texture[rows[:, :, None], columns[:, None, :]]
  masks = np.zeros((count, size, size), np.uint8)
  y, x = np.meshgrid(*[((np.arange(size) + .5) / size).astype(np.float32)] * 2, indexing='ij')
  cy, cx, ay, ax = (part.organ[:, k, None, None].astype(np.float32) for k in range(4))
  away = np.hypot((y - cy) / ay, (x - cx) / ax)
  _lay(images, masks, away < 1, own.colours[2], 1, 1.15 - .4 * away)
  spot = np.minimum(part.blood, 1)[:, None, None] * .3
  red = np.hypot(y - cy - ay, x - cx) < spot
  images[red] = images[red] * .3 + np.array([150, 10, 10], np.float32) * .7
  for k in range(part.criteria.shape[1]):
    light = np.hypot(y - cy, x - cx - (k - 1) * .6 * ax) < .03
    images[light & part.criteria[:, k, None, None]] = [235, 225, 150]
  for tool in range(len(TOOLS)):
    _tool(images, masks, (y, x), own, part, tool)
  return images, masks


def _tool(images, masks, grid, own: Look, part: Tracks, tool: int) -> None:
  """Lays a shaft from the border to the tip of a tool, and the tip, whose brightness differs from tool to tool."""
  seen = part.inside[:, tool] > .05
  if not seen.any():
    return
  tip, entry = part.tip[seen, tool].astype(np.float32), part.entry[tool].astype(np.float32)
  way = entry - tip
  length = np.maximum(np.hypot(*way.T), 1e-3)[:, None, None]
  uy, ux = way[:, 0, None, None] / length, way[:, 1, None, None] / length
  dy, dx = grid[0] - tip[:, 0, None, None], grid[1] - tip[:, 1, None, None]
  along, across = dy * uy + dx * ux, np.abs(dx * uy - dy * ux)
  shaft = (along > 0) & (across < own.widths[tool])
  head = np.hypot(dy, dx) < own.tips[tool]
  some, value = np.flatnonzero(seen), 2 + tool
  image, mask = images[some], masks[some]
  _lay(image, mask, shaft, own.colours[3] * .45, value, 1.3 - across / own.widths[tool])
  shade = np.array([1, .75, 1.1]) if tool % 3 == 0 else np.array([.8, .95, 1.25]) if tool % 3 == 1 else np.ones(3)
  stripes = 1 + .25 * np.sin((along if tool < 3 else across) * (60 + 25 * tool))
  _lay(image, mask, head, own.colours[3] * shade, value, stripes)
  images[some], masks[some] = image, mask


def _lay(images, masks, where: np.ndarray, colour: np.ndarray, value: int, light: np.ndarray) -> None:
  """Lays a colour under a light [T, S, S] over images, and a value over masks."""
  images[where] = (colour * light[where][:, None]).clip(0, 255)
  masks[where] = value


def _disturbed(images: np.ndarray, part: Tracks, framed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Smoke, blur, noise, and for `framed` a round mask and a label of the recorder; uint8."""
  size = images.shape[1]
  axis = (np.arange(size) + .5) / size
  waves = np.sin(2 * np.pi * (axis[:, None] * 1.5 + part.camera[:, :1, None] * 9)) * np.cos(
    2 * np.pi * (axis[None, :] + part.camera[:, 1:, None] * 7))
  veil = (part.smoke[:, None, None] * (.6 + .3 * waves))[..., None].astype(np.float32)
  images = images * (1 - veil) + 215 * veil
  blurred = part.blur > 0
  if blurred.any():
    x = np.pad(images[blurred], ((0, 0), (2, 2), (2, 2), (0, 0)), mode='edge')
    x = np.mean([x[:, k:k + size] for k in range(5)], axis=0)
    images[blurred] = np.mean([x[:, :, k:k + size] for k in range(5)], axis=0)
  images = images + rng.normal(0, 4, images.shape).astype(np.float32)
  if framed[0]:
    images[:, np.hypot(axis[:, None] - .5, axis - .5) > .56] = 0
  if framed[1]:
    high, wide = max(size // 16, 1), size // 4
    images[:, 1:1 + high, 1:1 + wide] = 250 * (np.arange(wide) % 3 > 0)[:, None]
  return images.round().clip(0, 255).astype(np.uint8)
