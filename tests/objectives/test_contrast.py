"""Losses between views against float64 NumPy, values and gradients; memory of the chunked form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.objectives.losses import contrast as c
from tests.objectives.siamese_fakes import check_gradient, close, log_softmax, numpy_norm, unit

RNG = np.random.default_rng(0)


def info_nce_reference(q, k, temperature, exclude=False):
  """Row i's positive is key i + 1 where it looks for another, else key i."""
  scores = q @ k.T / temperature
  if exclude:
    np.fill_diagonal(scores, -np.inf)
  positive = (np.arange(len(q)) + exclude) % len(k)
  return -log_softmax(scores)[np.arange(len(q)), positive].mean()


@pytest.mark.parametrize('exclude', [False, True])
@pytest.mark.parametrize('chunk', [0, 4, 5, 100, -1])
def test_info_nce_and_its_gradient(chunk, exclude):
  q, k = unit(RNG.normal(size=(11, 6))), unit(RNG.normal(size=(11, 6)))
  own = jnp.arange(11) if exclude else None

  def loss(q, k):
    return c.info_nce(q, k, jnp.roll(k, -int(exclude), axis=0)[:, None], 0.1, own, chunk)[0]

  close(jax.jit(loss)(jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32)),
        info_nce_reference(q, k, 0.1, exclude))
  check_gradient(loss, lambda q, k: info_nce_reference(q, k, 0.1, exclude), q, k)


def test_accuracy_counts_queries_whose_positive_is_nearest():
  k = unit(RNG.normal(size=(8, 16)))
  q = k.copy()
  q[:3] = k[3:6]  # three look like others
  for chunk in (0, 3):
    got = c.info_nce(jnp.asarray(q), jnp.asarray(k), jnp.asarray(k)[:, None], 0.2, chunk=chunk)[1]
    assert float(got) == pytest.approx(5 / 8)


def nt_xent_reference(z, temperature):
  """By plain loops over anchors and positives."""
  size, views, _ = z.shape
  z = unit(z)
  total = []
  for i in np.ndindex(size, views):
    others = [j for j in np.ndindex(size, views) if j != i]
    scores = np.array([z[i] @ z[j] for j in others]) / temperature
    log_p = dict(zip(others, log_softmax(scores)))
    total += [-log_p[(i[0], v)] for v in range(views) if v != i[1]]
  return np.mean(total)


@pytest.mark.parametrize('views', [2, 3])
@pytest.mark.parametrize('chunk', [0, 4])
def test_nt_xent(views, chunk):
  z = RNG.normal(size=(5, views, 7))
  close(jax.jit(c.nt_xent, static_argnums=(1, 2))(jnp.asarray(z, jnp.float32), 0.2, chunk)[0],
        nt_xent_reference(z, 0.2))
  check_gradient(lambda z: c.nt_xent(z, 0.2, chunk)[0], lambda z: nt_xent_reference(z, 0.2), z)


def test_large_batches_are_visited_in_parts(monkeypatch):
  z = jnp.asarray(RNG.normal(size=(40, 2, 8)), jnp.float32)
  plain = c.nt_xent(z, 0.1, 0)[0]
  monkeypatch.setattr(c, 'LARGE', 16)
  monkeypatch.setattr(c, 'CHUNK', 16)
  jaxpr = str(jax.make_jaxpr(lambda z: c.nt_xent(z, 0.1)[0])(z))
  assert 'scan' in jaxpr and '80,80' not in jaxpr and '80,16' in jaxpr
  close(c.nt_xent(z, 0.1)[0], float(plain))


def test_chunks_save_memory():
  q = jnp.zeros((2048, 32))

  def temporary(chunk):
    loss = lambda q, k: c.info_nce(q, k, k[:, None], 0.1, chunk=chunk)[0]
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(q, q).compile().memory_analysis().temp_size_in_bytes

  plain, chunked = temporary(0), temporary(128)
  assert chunked < plain / 4, (chunked, plain)


def test_cross_correlation_and_redundancy():
  a, b = RNG.normal(size=(9, 5)), RNG.normal(size=(9, 5))

  def reference(a, b):
    m = numpy_norm(a).T @ numpy_norm(b) / len(a)
    diagonal = np.diagonal(m)
    return ((diagonal - 1) ** 2).sum() + 0.1 * ((m**2).sum() - (diagonal**2).sum())

  def loss(a, b):
    on, off = c.redundancy(c.cross_correlation(a, b))
    return on + 0.1 * off

  close(loss(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)), reference(a, b))
  check_gradient(loss, reference, a, b)
  on, off = c.redundancy(c.cross_correlation(jnp.asarray(a), jnp.asarray(a)))
  assert float(on) < 1e-6 and float(off) > 0.1  # a view is correlated with itself


def test_variance_and_covariance():
  z = RNG.normal(size=(9, 5)) * np.array([0.1, 0.5, 0.9, 1.5, 3])
  hinge = lambda z: np.maximum(0, 1 - np.sqrt(z.var(axis=0, ddof=1) + 1e-4)).mean()

  def redundant(z):
    m = np.cov(z, rowvar=False)
    return ((m - np.diag(np.diag(m))) ** 2).sum() / z.shape[1]

  close(c.variance(jnp.asarray(z, jnp.float32)), hinge(z))
  close(c.covariance(jnp.asarray(z, jnp.float32)), redundant(z))
  check_gradient(c.variance, hinge, z)
  check_gradient(c.covariance, redundant, z)


def epps_pulley_reference(x, knots, limit):
  """Over [-limit, limit], by NumPy's trapezoid."""
  t = np.linspace(-limit, limit, 2 * knots - 1)
  distance = np.abs(np.exp(1j * x[..., None] * t).mean(axis=-3) - np.exp(-(t**2) / 2)) ** 2
  return x.shape[-2] * np.trapezoid(distance * np.exp(-(t**2) / 2), t, axis=-1)


def test_epps_pulley():
  x = RNG.normal(size=(2, 30, 4)) * 1.3 + 0.2
  got = jax.jit(c.epps_pulley)(jnp.asarray(x, jnp.float32))
  assert got.shape == (2, 4)
  np.testing.assert_allclose(np.asarray(got), epps_pulley_reference(x, 17, 3.0), rtol=1e-5)
  check_gradient(lambda x: c.epps_pulley(x).sum(), lambda x: epps_pulley_reference(x, 17, 3.0).sum(), x)
  fine = epps_pulley_reference(x, 4000, 3.0)
  np.testing.assert_allclose(np.asarray(got), fine, rtol=2e-3)  # 17 points are enough


def test_sigreg_tells_a_gaussian_from_others():
  key = jax.random.key(0)
  z = jax.random.normal(key, (1, 4096, 8))
  value = lambda z: float(c.sigreg(z, jax.random.key(1), 64))
  good = value(z)
  assert good < 1.0
  for bad in (2 * z, z + 0.3, z.at[..., 0].set(0.0), jnp.sign(z), jnp.zeros_like(z)):
    assert value(bad) > 5 * good
  assert value(z) == good and float(c.sigreg(z, jax.random.key(2), 64)) != good
  turn = jnp.linalg.qr(jax.random.normal(key, (8, 8)))[0]
  many = lambda z: float(c.sigreg(z, key, 4096))
  assert many(z[:, :200] @ turn) == pytest.approx(many(z[:, :200]), rel=0.05)  # no direction is special


def test_cosine_distance():
  a, b = RNG.normal(size=(4, 3)), RNG.normal(size=(4, 3))
  reference = lambda a, b: (2 - 2 * (unit(a) * unit(b)).sum(axis=-1)).mean()
  close(c.cosine_distance(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)), reference(a, b))
  check_gradient(c.cosine_distance, reference, a, b)


@pytest.mark.parametrize('z', [np.zeros((2, 2, 4)), np.ones((3, 2, 4)), np.repeat(RNG.normal(size=(1, 2, 4)), 4, 0)])
def test_nothing_breaks_on_constant_rows(z):
  key = jax.random.key(0)

  def total(z):
    a, b = z[:, 0], z[:, 1]
    return (c.nt_xent(z, 0.1, 0)[0] + c.nt_xent(z, 0.1, 2)[0] + c.cosine_distance(a, b) + c.variance(a)
            + c.covariance(a) + sum(c.redundancy(c.cross_correlation(a, b))) + c.sigreg(z.swapaxes(0, 1), key, 8))

  value, gradient = jax.jit(jax.value_and_grad(total))(jnp.asarray(z, jnp.float32))
  assert np.isfinite(float(value)) and np.isfinite(np.asarray(gradient)).all()
