"""Measures of collapse against their definitions, on features whose answer is known, and what is made of them."""

import numpy as np
import pytest

from jaxmed.evaluate import health
from jaxmed.evaluate.probes import ridge

RNG = np.random.default_rng(0)


def test_rankme_of_known_spectra():
  q, _ = np.linalg.qr(RNG.normal(size=(64, 16)))
  assert health.rankme(q) == pytest.approx(16, rel=1e-3)  # equal singular values
  values = np.array([4.0, 2.0, 1.0, 1.0])
  p = values / values.sum()
  assert health.rankme(q[:, :4] * values) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
  assert health.rankme(np.outer(RNG.normal(size=30), RNG.normal(size=8))) == pytest.approx(1, abs=1e-3)
  assert health.rankme(np.zeros((5, 3))) == 1.0


@pytest.mark.parametrize('alpha', [0.5, 1.0, 2.5])
def test_alpha_of_a_power_law(alpha):
  q, _ = np.linalg.qr(RNG.normal(size=(200, 20)) - 0)
  q -= q.mean(axis=0)
  q, _ = np.linalg.qr(q)  # centred, orthonormal columns
  x = q * np.arange(1, 21) ** (-alpha / 2)
  assert health.alpha_req(x) == pytest.approx(alpha, rel=0.01)
  assert health.alpha_req(np.ones((9, 4))) == 0.0


def test_lidar_counts_directions_that_views_keep():
  """Of 12 directions, 5 tell images apart; the others are noise of the views, large or small."""
  images = np.zeros((300, 1, 12))
  images[:, 0, :5] = RNG.normal(size=(300, 5))
  noise = RNG.normal(size=(300, 6, 12)) * 0.05
  assert health.lidar(images + noise) == pytest.approx(5, abs=0.4)
  loud = noise.copy()
  loud[..., :3] *= 400  # three of the five drown in the views
  assert 1.8 < health.lidar(images + loud) < 3.2
  assert health.lidar(np.ones((10, 4, 3))) == pytest.approx(1.0)


def test_likeness_and_spread():
  x = RNG.normal(size=(7, 5, 6))
  unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
  gram = np.einsum('ntd,nsd->nts', unit, unit)
  want = np.mean([g[~np.eye(5, dtype=bool)].mean() for g in gram])
  assert health.likeness(x) == pytest.approx(want)
  assert health.likeness(np.ones((4, 3))) == pytest.approx(1.0)
  assert np.isnan(health.likeness(np.ones((1, 3))))
  assert health.spread(RNG.normal(size=(4000, 32))) == pytest.approx(1.0, abs=0.02)
  assert health.spread(np.ones((5, 4))) == 0.0


HEALTHY = {'rankme': 40.0, 'gram_offdiagonal': 0.3, 'feature_std': 0.7}


@pytest.mark.parametrize('change, word, hard', [
    ({}, None, None),
    ({'prototype_entropy_share': 0.05}, 'few prototypes', True),
    ({'teacher_entropy_share': 0.05}, None, None),  # sharp, and that is how it should be
    ({'teacher_entropy_share': 0.9999, 'teacher_kl': 1e-4}, 'uniform', True),
    ({'teacher_entropy_share': 0.9999, 'teacher_kl': 0.5}, None, None),
    ({'gram_offdiagonal': 0.999, 'feature_std': 0.004}, 'same features', True),
    ({'rankme': 1.3}, 'effective rank of 1.30', True),
    ({'rankme': 6.0}, 'effective rank of 6.0', False),
    ({'folded_share': 0.04, 'empty_crops': 0.2}, None, None),
    ({'folded_share': 0.06}, 'fold 6.0%', False),
    ({'empty_crops': 0.3}, '30% of the crops', False),
])
def test_signs(change, word, hard):
  sign = health.diagnose(HEALTHY | change, 128, 128, HEALTHY)
  assert (sign is None) == (word is None)
  if sign:
    assert word in sign.sign and sign.hard is hard
    assert any(key in sign.cause for key in ('learning_rate', 'temperature', 'smooth_weight', '--min-content'))


def test_what_an_untrained_network_shows_is_no_sign():
  low = {'rankme': 1.5, 'gram_offdiagonal': 0.9999, 'feature_std': 0.002}
  assert health.diagnose(low, 128, 128, low) is None
  assert health.diagnose(low | {'feature_std': 0.0015}, 128, 128, low) is None
  assert health.diagnose(low | {'feature_std': 0.0005}, 128, 128, low).hard
  assert health.diagnose(HEALTHY | {'rankme': 6.0}, 128, 16, HEALTHY) is None  # 16 features cannot have much more


def test_ridge_is_the_penalty_of_least_leave_one_out_error():
  from sklearn.linear_model import Ridge
  from sklearn.preprocessing import StandardScaler
  x, w = RNG.normal(size=(60, 8)) * np.arange(1, 9), RNG.normal(size=(8, 3))
  y = (x @ w + 2 * RNG.normal(size=(60, 3))).argmax(axis=1)
  test = RNG.normal(size=(20, 8)) * np.arange(1, 9)
  scaler, target = StandardScaler().fit(x), np.eye(3)[y]
  grid, errors = 10.0 ** np.linspace(-4, 2, 7), []
  z = scaler.transform(x)
  for penalty in grid:
    off = [target[i] - target[np.arange(60) != i].mean(0) * 0 - Ridge(alpha=penalty * 60).fit(
        np.delete(z, i, 0), np.delete(target, i, 0)).predict(z[i:i + 1])[0] for i in range(60)]
    errors.append(np.square(off).mean())
  want = Ridge(alpha=grid[np.argmin(errors)] * 60).fit(z, target).predict(scaler.transform(test))
  np.testing.assert_allclose(ridge(x, y, test, 3), want, atol=2e-3)
