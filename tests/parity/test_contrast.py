"""Losses between views, values and gradients, against those of lightly in float64 PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.objectives.clustering.swav import swapped
from jaxmed.objectives.losses import contrast as c
from jaxmed.objectives.losses.clustering import sinkhorn

torch = pytest.importorskip('torch')
lightly = pytest.importorskip('lightly.loss', reason='pip install --no-deps lightly')

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(2, 12, 6))


def compare(ours, theirs, *arrays):
  """Values to 1e-5, gradients with respect to each array to 1e-4 of the largest."""
  tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
  want = theirs(*tensors)
  want.backward()
  have, grads = jax.jit(jax.value_and_grad(ours, argnums=tuple(range(len(arrays)))))(
      *(jnp.asarray(a, jnp.float32) for a in arrays))
  assert float(have) == pytest.approx(want.item(), rel=1e-5)
  for gradient, tensor in zip(grads, tensors, strict=True):
    expected = tensor.grad.numpy()
    np.testing.assert_allclose(np.asarray(gradient), expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-6


@pytest.mark.parametrize('temperature', [0.1, 0.5])
@pytest.mark.parametrize('chunk', [0, 5])
def test_nt_xent(temperature, chunk):
  compare(lambda a, b: c.nt_xent(jnp.stack([a, b], axis=1), temperature, chunk)[0],
          lightly.NTXentLoss(temperature=temperature), A, B)


def test_negative_cosine_similarity():
  compare(c.cosine_distance, lambda a, b: 2 + 2 * lightly.NegativeCosineSimilarity()(a, b), A, B)


def test_barlow_twins():
  def ours(a, b):
    on, off = c.redundancy(c.cross_correlation(a, b))
    return on + 0.0051 * off
  compare(ours, lightly.BarlowTwinsLoss(lambda_param=0.0051), A, B)


def test_vicreg():
  def ours(a, b):
    spread, redundant = c.variance(a) + c.variance(b), c.covariance(a) + c.covariance(b)
    return 25 * jnp.square(a - b).mean() + 25 * spread / 2 + redundant
  compare(ours, lightly.VICRegLoss(), 0.7 * A, 0.7 * B)


def test_sinkhorn():
  from lightly.loss.swav_loss import sinkhorn as theirs
  want = theirs(torch.tensor(A), iterations=3, epsilon=0.3).numpy()
  np.testing.assert_allclose(np.asarray(sinkhorn(A, 0.3)), want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize('local', [0, 3])
def test_swav(local):
  views = 0.4 * RNG.normal(size=(2 + local, 12, 6))
  loss = lightly.SwaVLoss(temperature=0.1, sinkhorn_iterations=3, sinkhorn_epsilon=0.05)

  def ours(*views):
    codes = jnp.stack([sinkhorn(v, 0.05) for v in views[:2]], axis=1)
    return swapped(codes, jnp.stack(views, axis=1) / 0.1)

  compare(ours, lambda *v: loss(list(v[:2]), list(v[2:])), *views)


def test_lejepa():
  views = 1.2 * RNG.normal(size=(5, 12, 6))
  key = jax.random.key(0)
  loss = lightly.LeJEPALoss(sigreg_num_vectors=16).double()
  drawn = np.asarray(jax.random.normal(key, (6, 16)), np.float64)
  unit = torch.tensor(drawn / np.linalg.norm(drawn, axis=0))
  loss.sigreg._generate_unit_vectors = lambda *args, **kwargs: unit

  def ours(z):
    return 0.95 * jnp.square(z - z[:2].mean(axis=0)).mean() + 0.05 * c.sigreg(z, key, 16)

  compare(ours, lambda z: loss(global_proj=z[:2], local_proj=z[2:]), views)


def test_moco():
  """MoCo v3's InfoNCE with keys that carry no gradient, against PyTorch's cross-entropy."""
  functional = torch.nn.functional

  def ours(q, k):
    q, k = c.normalize(q), jax.lax.stop_gradient(c.normalize(k))
    return c.info_nce(q, k, k[:, None], 0.2, chunk=5)[0]

  def theirs(q, k):
    scores = functional.normalize(q) @ functional.normalize(k).detach().T / 0.2
    return functional.cross_entropy(scores, torch.arange(12)) + 1e-3 * k.sum()

  compare(lambda q, k: ours(q, k) + 1e-3 * k.sum(), theirs, A, B)
