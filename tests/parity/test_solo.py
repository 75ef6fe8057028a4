"""Losses, values and gradients, against those of solo-learn in float64 PyTorch."""

import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.objectives import DeepCluster
from jaxmed.objectives.clustering.swav import swapped
from jaxmed.objectives.distillation.self_distillation import centred, cross_view, update_centre
from jaxmed.objectives.losses import contrast as c
from jaxmed.objectives.losses.clustering import sinkhorn
from tests.parity.test_contrast import A, B, compare

torch = pytest.importorskip('torch')
LOSSES = pathlib.Path(sys.prefix) / 'peers' / 'solo' / 'losses'
pytestmark = pytest.mark.skipif(not LOSSES.is_dir(), reason='`make parity` puts solo-learn into the folder peers')
RNG = np.random.default_rng(2)


def load(name):
  """A file of solo/losses by itself: the package around it wants an old PyTorch Lightning, and is called `tests` too."""
  spec = importlib.util.spec_from_file_location(f'solo_{name}', LOSSES / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize('chunk', [0, 7])
def test_simclr(chunk):
  compare(lambda a, b: c.nt_xent(jnp.stack([a, b], axis=1), 0.2, chunk)[0],
          lambda a, b: load('simclr').simclr_loss_func(a, b, temperature=0.2), A, B)


def test_byol():
  ours = lambda p, z: c.cosine_distance(p, jax.lax.stop_gradient(z)) + 1e-3 * z.sum()
  compare(ours, lambda p, z: load('byol').byol_loss_func(p, z) + 1e-3 * z.sum(), A, B)


@pytest.fixture
def double():
  """PyTorch makes its modules in float64."""
  torch.set_default_dtype(torch.float64)
  yield
  torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures('double')
def test_barlow_twins():
  def ours(a, b):
    on, off = c.redundancy(c.cross_correlation(a, b))
    return 0.025 * (on + 5e-3 * off)
  compare(ours, lambda a, b: load('barlow').barlow_loss_func(a, b, lamb=5e-3, scale_loss=0.025), A, B)


def test_vicreg():
  def ours(a, b):
    return 25 * jnp.square(a - b).mean() + 25 * (c.variance(a) + c.variance(b)) + c.covariance(a) + c.covariance(b)
  compare(ours, lambda a, b: load('vicreg').vicreg_loss_func(a, b, 25.0, 25.0, 1.0), 0.7 * A, 0.7 * B)


def test_swav():
  views = 0.4 * RNG.normal(size=(2, 12, 6))

  def ours(*views):
    codes = jnp.stack([sinkhorn(v, 0.05) for v in views], axis=1)
    return swapped(codes, jnp.stack(views, axis=1) / 0.1)

  def theirs(*views):
    codes = [torch.tensor(np.asarray(sinkhorn(v.detach().numpy(), 0.05)), dtype=torch.float64) for v in views]
    return load('swav').swav_loss_func(list(views), codes, temperature=0.1)

  compare(ours, theirs, *views)


def test_deepcluster():
  """Two sets of prototypes, two views; images without a cluster count for nothing."""
  centroids = np.asarray(c.normalize(RNG.normal(size=(2, 5, 6))), np.float64)
  labels = RNG.integers(0, 5, (2, 12))
  labels[:, ::4] = -1
  method = DeepCluster(None, temperature=0.1, num_prototypes=5, rows=12)

  def ours(a, b):
    z = c.normalize(jnp.stack([a, b], axis=1))
    return sum(method._cross_entropy(z, jnp.float32(k), jnp.asarray(i)) for k, i in zip(centroids, labels)) / 2

  def theirs(a, b):
    z = torch.nn.functional.normalize(torch.stack([a, b]), dim=-1)  # [V, N, D]
    scores = torch.einsum('vnd,pkd->pvnk', z, torch.tensor(centroids))
    return load('deepclusterv2').deepclusterv2_loss_func(scores, torch.tensor(labels), temperature=0.1)

  compare(ours, theirs, A, B)


def test_dino():
  """Three views of the student, two of the teacher, a warm teacher temperature; the centre afterwards too."""
  student, teacher = RNG.normal(size=(12, 3, 8)), RNG.normal(size=(12, 2, 8))
  start = RNG.normal(size=(1, 8))
  loss = load('dino').DINOLoss(8, 0.04, 0.07, 4, 10, num_large_crops=3)
  loss.epoch, loss.center = 2, torch.tensor(start)
  warm = float(np.linspace(0.04, 0.07, 4)[2])
  major = lambda x: x.swapaxes(0, 1).reshape(-1, 8)  # theirs are view by view

  def ours(s):
    return cross_view(s, centred(jnp.float32(teacher), jnp.float32(start), warm), 0.1)

  compare(ours, lambda s: loss(s.transpose(0, 1).reshape(-1, 8), torch.tensor(major(teacher))), student)
  centre = update_centre(jnp.float32(start), jnp.float32(teacher.reshape(-1, 8)), 0.9)
  np.testing.assert_allclose(np.asarray(centre), loss.center.numpy(), rtol=1e-5, atol=1e-6)
