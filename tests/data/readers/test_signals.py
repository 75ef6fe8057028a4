"""Steps on signals: sines and loops say what each must give; what lacks a rate, or is too short."""

import csv

import numpy as np
import pytest

from jaxmed.data.corpus.open import open_source
from jaxmed.data.prepare.prepare import prepare
from jaxmed.data.readers.signals import apply, parse
from jaxmed.errors import UserError

RATE = 500.0
TIME = np.arange(2500) / RATE


def done(x, steps, rate=RATE):
  return apply(np.asarray(x), rate, parse(steps))


def sine(hz, time=TIME):
  return np.sin(2 * np.pi * hz * time)


def test_another_rate_is_the_same_sine():
  """5 Hz at a fifth of the rate, and 120 Hz, which would come back as 20, is gone."""
  x, rate = done(np.stack([sine(5), sine(120)], axis=1), 'resample:100')
  assert rate == 100 and x.shape == (500, 2) and x.dtype == np.float32
  inner = slice(25, -25)
  np.testing.assert_allclose(x[inner, 0], sine(5, np.arange(500) / 100)[inner], atol=5e-3)
  assert np.abs(x[inner, 1]).max() < 5e-3
  assert done(sine(5)[:, None], 'resample:360')[0].shape == (1800, 1)


def test_the_baseline_by_a_loop_over_windows():
  """Medians of 21 and 61 steps at 100 Hz, with zeros beyond the ends, as MoRE's."""
  x = np.random.default_rng(0).normal(size=(150, 2)) + 3 * sine(0.1, np.arange(150) / 100)[:, None]
  median = lambda y, half: np.stack([np.median(np.pad(y, ((half, half), (0, 0)))[i : i + 2 * half + 1], axis=0)
                                     for i in range(len(y))])
  np.testing.assert_allclose(done(x, 'baseline', 100.0)[0], x - median(median(x, 10), 30), atol=1e-6)


@pytest.mark.parametrize('step, kept, gone', [('band:0.5:40', 10, 120), ('band:0.5:40', 10, 0.05), ('notch:50', 10, 50)])
def test_filters_keep_and_remove_without_a_delay(step, kept, gone):
  time = np.arange(20000) / RATE
  x = done(np.stack([sine(kept, time), sine(gone, time)], axis=1), step)[0][5000:-5000]
  np.testing.assert_allclose(x[:, 0], sine(kept, time)[5000:-5000], atol=0.02)
  assert np.abs(x[:, 1]).max() < 0.02


def test_scales():
  x = np.random.default_rng(1).normal(3, 2, (50, 3))
  x[:, 2] = 7
  z, r = done(x, 'zscore', None)[0], done(x, 'range', None)[0]
  np.testing.assert_allclose(z[:, :2], ((x - x.mean(0)) / x.std(0).clip(1e-9))[:, :2], atol=1e-6)
  np.testing.assert_allclose(r[:, :2], (2 * (x - x.min(0)) / np.ptp(x, axis=0).clip(1e-9) - 1)[:, :2], atol=1e-6)
  assert not z[:, 2].any() and not r[:, 2].any()
  order = done(x[:, :2], 'zscore,range', None)[0]
  np.testing.assert_allclose(order, r[:, :2], atol=1e-6)


def test_bad_steps():
  for text, words in (('resampel:100', "unknown step of signals 'resampel': did you mean 'resample'"),
                      ('resample', 'resample takes a number of Hz'), ('band:40:0.5', 'two numbers of Hz, the lower first'),
                      ('zscore:1', 'zscore takes no number'), ('notch:fifty', 'notch takes a number of Hz')):
    with pytest.raises(UserError, match=words):
      parse(text)
  for steps, x, rate, words in (('resample:100', TIME, None, 'give the table a column signal_rate'),
                                ('notch:50', TIME, 80.0, 'notch of 50 Hz needs a rate above 100 Hz, not 80'),
                                ('band:1:10', TIME[:20], RATE, '20 steps are too few to filter')):
    with pytest.raises(ValueError, match=words):
      done(x[:, None], steps, rate)


def test_prepare_stores_them_so(tmp_path):
  (tmp_path / 'in').mkdir()
  np.savez(tmp_path / 'in' / 'a.npz', image=np.zeros((4, 4, 1), np.uint8), channels=['x'])
  np.save(tmp_path / 'in' / 'a.npy', np.float32(sine(5)[:, None]))
  with open(tmp_path / 't.csv', 'w', newline='', encoding='utf-8') as f:
    csv.writer(f).writerows([['path', 'signal', 'signal_rate'], ['a.npz', 'a.npy', 500]])
  prepare([tmp_path / 'in'], tmp_path / 'c', table=tmp_path / 't.csv', progress=False, signals='resample:100,range')
  record = open_source(tmp_path / 'c')[0]
  assert record['signal'].shape == (500, 1) and record['signal_rate'] == 100
  assert (record['signal'].min(), record['signal'].max()) == (-1, 1)
