"""Towers of signals, sound and tables: what is missing has no part, normalisation, log-mel against SciPy, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from scipy.special import erf

from jaxmed.cli import list_
from jaxmed.errors import UserError
from jaxmed.models.signals import spectrogram
from jaxmed.models.signals.registry import create_signal, create_table
from jaxmed.models.signals.signal import normalized

TINY = dict(embed_dim=16, depth=1, num_heads=2)
COLUMNS = [{'name': n, 'mean': m, 'std': s} for n, m, s in (('age', 50.0, 10.0), ('ph', 7.4, 0.1), ('na', 140.0, 4.0))]
RNG = np.random.default_rng(0)


def features(tower, *args, **kwargs):
  params = jax.jit(tower.init)(jax.random.key(0), *args)['params']
  return jax.jit(lambda *a: tower.apply({'params': params}, *a, **kwargs)), params


@pytest.mark.parametrize('name, options, tokens', [
    ('channel_vit_micro/5', TINY, 12), ('vit_micro/5', TINY | {'pos': 'rope'}, 4),
    ('resnet_micro', dict(depths=(1, 1), dims=(8, 16), stem_width=8), 5)])
def test_steps_that_a_signal_lacks_have_no_part(name, options, tokens):
  """22 steps of three leads: whatever lies after 12 of them changes nothing, in every family; NaN included."""
  tower = create_signal(name, 22, 3, **options)
  assert tower.encoder.image_size[0] == 22 // tower.encoder.patch_size[0] * tower.encoder.patch_size[0]
  signal, there = np.float32(RNG.normal(size=(2, 22, 3))), np.arange(22) < np.array([[22], [12]])
  run, _ = features(tower, signal, there)
  one, other = run(signal, there), run(np.where(there[..., None], signal, np.nan), there)
  assert one.patches.shape == (2, tokens, 16) and np.isfinite(one.mean).all()
  np.testing.assert_array_equal(one.mean, other.mean)
  if one.valid is not None:
    assert one.valid.sum(axis=1).tolist() == [tokens, tokens // 2]
  assert np.abs(run(signal, there | True).mean - one.mean)[1].max() > 1e-4


def test_leads_may_be_left_out_of_a_channel_vit():
  tower = create_signal('channel_vit_micro/5', 20, 3, **TINY)
  signal, leads = np.float32(RNG.normal(size=(1, 20, 3))), np.array([[True, False, True]])
  run, params = features(tower, signal)
  shown = tower.apply({'params': params}, signal, None, False, leads)
  other = tower.apply({'params': params}, np.where(leads[:, None], signal, 9.0), None, False, leads)
  np.testing.assert_allclose(shown.mean, other.mean, atol=1e-6)
  assert np.abs(shown.mean - run(signal).mean).max() > 1e-3


def test_normalisation_by_numpy():
  x, there = RNG.normal(2, 3, (2, 9, 4)), np.arange(9) < np.array([[9], [5]])
  x[0, :, 1] = 1.5  # a flat lead
  for b in range(2):
    real = x[b][there[b]]
    want = {'lead': (real - real.mean(0)) / np.maximum(real.std(0), 1e-6), 'none': real,
            'lead_range': 2 * (real - real.min(0)) / np.maximum(np.ptp(real, axis=0), 1e-6) - 1,
            'record_range': 2 * (real - real.min()) / np.ptp(real) - 1}
    if b == 0:
      want['lead_range'][:, 1] = 0
    for kind, value in want.items():
      have = np.asarray(normalized(jnp.asarray(np.where(there[..., None], x, np.nan)), jnp.asarray(there), kind))[b]
      np.testing.assert_allclose(have[there[b]], value, atol=2e-5)
      assert not have[~there[b]].any()


@pytest.mark.parametrize('rate, mels', [(1000.0, 12), (16000.0, 40)])
def test_log_mel_against_scipy(rate, mels):
  """Windows by scipy.signal.stft in float64, triangles by a loop."""
  size, hop = spectrogram.sizes(rate)
  steps = size + 6 * hop + 3
  wave = np.sin(2 * np.pi * 0.05 * np.arange(steps)) + 0.1 * RNG.normal(size=(2, steps))
  have = np.asarray(spectrogram.log_mel(jnp.asarray(wave, jnp.float32), rate, mels))
  _, _, found = scipy.signal.stft(wave, rate, 'hann', size, size - hop, size, False, True, None, False)
  power = np.abs(found.transpose(0, 2, 1) * scipy.signal.get_window('hann', size).sum()) ** 2
  edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + rate / 1400), mels + 2) / 2595) - 1)
  mel = lambda f: 2595 * np.log10(1 + f / 700)
  table = np.zeros((size // 2 + 1, mels))
  for m in range(mels):
    low, top, high = map(mel, edges[m : m + 3])
    for n in range(size // 2 + 1):
      f = mel(n * rate / size)
      table[n, m] = max(0, min((f - low) / (top - low), (high - f) / (high - top)))
  want = np.log(np.maximum(power @ table, 1e-10))
  assert have.shape == (2, spectrogram.frames_of(steps, rate), mels) == (2, 7, mels)
  strong = want > -6  # below, float32's rounding of the window's sum shows
  assert strong.mean() > 0.6
  np.testing.assert_allclose(have[strong], want[strong], atol=2e-3)


def test_sound_is_an_image_of_frames():
  tower = create_signal('audio_vit_micro/4', 250, 1, rate=1000.0, mels=8, **TINY)  # 23 frames of 25 steps, 10 apart
  wave, there = np.float32(RNG.normal(size=(2, 250, 1))), np.arange(250) < np.array([[250], [120]])
  run, _ = features(tower, wave, there)
  found = run(wave, there)
  assert tower.encoder.image_size == (20, 8) and found.patches.shape == (2, 10, 16)
  assert found.valid.sum(axis=1).tolist() == [10, 4]  # 10 whole frames of 120 steps are two patches of 4 by 2 of bands


def test_the_table_mlp_by_numpy_and_what_is_missing():
  tower = create_table('table_mlp', COLUMNS, embed_dim=5, hidden=(6, 7))
  table = np.array([[61.0, 7.2, np.nan], [40.0, np.nan, np.nan], [40.0, 7.4, 140.0]])
  run, params = features(tower, np.float32(table))
  found, gelu = run(np.float32(table)), lambda x: x * (1 + erf(x / 2**0.5)) / 2
  x = (np.nan_to_num(table) - [50, 7.4, 140]) / [10, 0.1, 4] * ~np.isnan(table)
  x = np.concatenate([x, ~np.isnan(table)], axis=1)
  for i in range(3):
    dense = params[f'dense{i}']
    x = (gelu(x) if i else x) @ np.asarray(dense['kernel'].unbox(), np.float64) + np.asarray(dense['bias'].unbox())
  np.testing.assert_allclose(found.mean, x, rtol=1e-4, atol=1e-5)
  assert found.patches.shape == (3, 1, 5)


def test_columns_as_tokens():
  tower = create_table('table_micro', COLUMNS, embed_dim=16, num_heads=2)
  table = np.float32([[60.0, 7.4, np.nan], [50.0, 7.4, np.nan], [50.0, 7.4, 140.0]])
  found = features(tower, table)[0](table)
  assert found.patches.shape == (3, 3, 16) and np.isfinite(found.patches).all()
  apart = lambda a, b: np.abs(found.mean[a] - found.mean[b]).max()
  assert min(apart(0, 1), apart(1, 2)) > 1e-4  # a mean is not what is missing


def test_names_and_bad_input():
  assert {'table_mlp', 'table_micro', 'text_micro'} <= set(list_.models())
  shown = list_.model('table_micro')
  assert shown['section'] == 'towers.table.options' and shown['options']['depth']['default'] == 2
  for make, words in (
      (lambda: create_signal('vit_micro/25', 10, 1), 'has patches of 25 steps, but signals have 10'),
      (lambda: create_signal('audio_vit_micro/4', 999, 1), 'needs the rate of the waveforms in Hz'),
      (lambda: create_signal('vit_micro/5', 20, 1, rate=10.0), 'rate and mels are for spectrograms'),
      (lambda: create_signal('vit_micro/5', 20, 1, normalize='leads'), "'leads'.*lead"),
      (lambda: create_table('table_mpl', COLUMNS), "unknown model of tables 'table_mpl'.*table_mlp"),
      (lambda: create_table('table_micro', COLUMNS, num_heads=3), 'num_heads 3 does not divide embed_dim 128')):
    with pytest.raises(UserError, match=words):
      make()
