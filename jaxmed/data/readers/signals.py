"""What is done to signals before they are stored: other rates, filters, scales; one after the other, in float64.

  resample:HZ    scipy.signal.resample_poly by the ratio of the rates, with its own low-pass (MoRE: 500 to 100 Hz)
  baseline       less its own baseline, medians of 0.2 s and then 0.6 s + 1 step (svthapa/MoRE, utils/create_dataset.py)
  band:LOW:HIGH  Butterworth of order 4 between two Hz, forwards and backwards, so without a delay
  notch:HZ       the mains, a notch of quality 30, forwards and backwards
  zscore         each channel to mean 0 and deviation 1
  range          each channel to [-1, 1]; one that is flat becomes 0
"""

import fractions
import math
from collections.abc import Callable

import numpy as np

from jaxmed.errors import UserError, choose

NUMBERS = {'resample': 1, 'baseline': 0, 'band': 2, 'notch': 1, 'zscore': 0, 'range': 0}  # by step, what follows it
_QUALITY = 30.0
_SMALL = 1e-9

Step = tuple[str, tuple[float, ...]]


def parse(text: str) -> tuple[Step, ...]:
  """'resample:100,baseline' -> (('resample', (100.0,)), ('baseline', ())); () for ''.

  Raises:
    UserError: an unknown step (the nearest is named), or other numbers than it takes.
  """
  steps = []
  for part in filter(None, (part.strip() for part in text.split(','))):
    name, *given = part.split(':')
    count = NUMBERS[choose('step of signals', name, NUMBERS)]
    try:
      values = tuple(float(v) for v in given)
    except ValueError:
      values = (math.nan,)
    if len(values) != count or not all(0 < v < math.inf for v in values) or list(values) != sorted({*values}):
      wants = {0: 'no number', 1: 'a number of Hz', 2: 'two numbers of Hz, the lower first'}[count]
      raise UserError(f'signals has the step {part!r}: {name} takes {wants}')
    steps.append((name, values))
  return tuple(steps)


def apply(signal: np.ndarray, rate: float | None, steps: tuple[Step, ...]) -> tuple[np.ndarray, float | None]:
  """A signal [T, K] after the steps, float32, and its new rate in Hz.

  Raises:
    ValueError: a step needs the rate and there is none, a frequency beyond half of it, or too few steps in time.
  """
  x = np.asarray(signal, np.float64)
  for name, values in steps:
    if name not in ('zscore', 'range'):
      if not rate:
        raise ValueError(f'signal: {name} needs its rate: give the table a column signal_rate, in Hz')
      if name in ('band', 'notch') and max(values) >= rate / 2:
        raise ValueError(f'signal: {name} of {max(values):g} Hz needs a rate above {2 * max(values):g} Hz, not '
                         f'{rate:g}')
    x = _STEPS[name](x, rate or 0.0, *values)
    rate = values[0] if name == 'resample' else rate
  return x.astype(np.float32), rate


def _resample(x: np.ndarray, rate: float, wanted: float) -> np.ndarray:
  from scipy.signal import resample_poly
  ratio = fractions.Fraction(wanted / rate).limit_denominator(1000)
  return resample_poly(x, ratio.numerator, ratio.denominator, axis=0)


def _baseline(x: np.ndarray, rate: float) -> np.ndarray:
  from scipy.signal import medfilt
  base = x
  for seconds in (0.2, 0.6):
    size = int(np.round(seconds * rate)) // 2 * 2 + 1  # odd; MoRE's own + 1 is, at its 100 Hz
    base = medfilt(base, (size, 1))
  return x - base


def _band(x: np.ndarray, rate: float, low: float, high: float) -> np.ndarray:
  from scipy.signal import butter, sosfiltfilt
  sections = butter(4, (low, high), 'bandpass', fs=rate, output='sos')
  _long_enough(x, 3 * (2 * len(sections) + 1))
  return sosfiltfilt(sections, x, axis=0)


def _notch(x: np.ndarray, rate: float, mains: float) -> np.ndarray:
  from scipy.signal import filtfilt, iirnotch
  _long_enough(x, 9)
  return filtfilt(*iirnotch(mains, _QUALITY, rate), x, axis=0)


def _long_enough(x: np.ndarray, least: int) -> None:
  if len(x) <= least:
    raise ValueError(f'signal: {len(x)} steps are too few to filter: expected more than {least}')


def _zscore(x: np.ndarray, rate: float) -> np.ndarray:
  del rate
  return (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), _SMALL)


def _range(x: np.ndarray, rate: float) -> np.ndarray:
  del rate
  low, high = x.min(axis=0), x.max(axis=0)
  flat = high - low < _SMALL
  return np.where(flat, 0, 2 * (x - low) / np.where(flat, 1, high - low) - 1)


_STEPS: dict[str, Callable[..., np.ndarray]] = {
    'resample': _resample, 'baseline': _baseline, 'band': _band, 'notch': _notch, 'zscore': _zscore, 'range': _range}
