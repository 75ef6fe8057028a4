"""nnU-Net's planner: its official functions' results, limits of memory and of the data set, spacings, coarser plans."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed import config
from jaxmed.errors import UserError
from jaxmed.models import create_model, unet_plan
from jaxmed.models.decoders.dense import create_decoder
from jaxmed.models.unet_plan import plan
from tests.models.test_unet import count, shapes

# Of nnU-Net's own topology function and size estimator, for one channel and two classes.
CASES = [
    ('nnunet_plain', (1, 1, 1), (200, 200, 200), 100, (128, 128, 128), 2, (5, 5, 5), None),
    ('nnunet_plain', (1, 1, 1), (160, 192, 160), 100, (128, 128, 128), 2, (5, 5, 5), None),
    ('nnunet_plain', (5, 1, 1), (30, 300, 300), 100, (28, 256, 256), 2, (2, 6, 6), (1, 3, 3)),
    ('nnunet_plain', (3, 0.8, 0.8), (100, 512, 512), 100, (40, 224, 224), 2, (3, 5, 5), (1, 3, 3)),
    ('nnunet_plain', (1, 1, 1), (40, 56, 40), 200, (40, 56, 40), 10, (3, 3, 3), None),
    ('nnunet_plain', (10, 1.5, 1.5), (10, 256, 216), 100, (10, 256, 224), 5, (1, 5, 5), (1, 3, 3)),
    ('resenc_l', (1, 1, 1), (200, 200, 200), 100, (192, 192, 192), 2, (5, 5, 5), None),
    ('resenc_l', (1, 1, 1), (160, 192, 160), 100, (160, 192, 160), 3, (5, 5, 5), None),
    ('resenc_l', (5, 1, 1), (30, 300, 300), 100, (32, 320, 320), 3, (3, 6, 6), (1, 3, 3)),
    ('resenc_l', (3, 0.8, 0.8), (100, 512, 512), 100, (56, 320, 256), 2, (3, 6, 6), (1, 3, 3)),
    ('resenc_l', (1, 1, 1), (40, 56, 40), 200, (40, 56, 40), 173, (3, 3, 3), None),
    ('resenc_l', (10, 1.5, 1.5), (10, 256, 216), 100, (10, 256, 224), 16, (1, 5, 5), (1, 3, 3))]


@pytest.mark.parametrize('preset, spacing, shape, records, patch, batch, pools, first', CASES)
def test_plans_are_nnunets(preset, spacing, shape, records, patch, batch, pools, first):
  made = plan(spacing, shape, records, 2, preset)
  assert (made.patch, made.batch) == (patch, batch)
  assert made.pools == pools
  assert made.kernels[0] == (first or (3, 3, 3)) and made.kernels[-1] == (3, 3, 3)
  assert all(n % step == 0 for n, step in zip(made.patch, unet_plan.total(made.strides), strict=True))


@pytest.mark.parametrize('preset, millions, parameters', [('nnunet_plain', 450.7, 31_195_594),
                                                          ('resenc_l', 1874, 102_349_770)])
def test_the_network_of_a_plan(preset, millions, parameters):
  """Voxels of features as nnU-Net counts them; the words of the plan make the network."""
  made = plan((1, 1, 1), (200, 200, 200), 100, 2, preset)
  assert made.voxels / 1e6 == pytest.approx(millions, abs=0.5)
  given = config.parse_overrides(made.words)
  encoder = create_model(given['model'], given['image_size'], 1, **given['encoder'])
  tree, _ = shapes(encoder, create_decoder('unet', encoder, 2, True), jnp.zeros((1, *made.patch, 1)))
  assert count(tree) == parameters and encoder.patch_size == (32, 32, 32)


def test_an_anisotropic_plan_as_a_network():
  made = plan((5, 1, 1), (30, 300, 300), 100, 2)
  given = config.parse_overrides(made.words)
  encoder = create_model(given['model'], given['image_size'], 1, **given['encoder'])
  assert encoder.dims == (32, 64, 128, 256, 320, 320, 320) and encoder.patch_size == (4, 64, 64)
  found = nn.unbox(jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, *made.patch, 1)))['params'])
  assert found['stage1_0']['conv']['kernel'].shape == (1, 3, 3, 1, 32)
  assert found['stage7_1']['conv']['kernel'].shape == (3, 3, 3, 320, 320)


def test_axes_are_as_stored():
  """The same plan whichever axis is the coarsest."""
  first, last = plan((5, 1, 1), (30, 300, 300), 100, 2), plan((1, 1, 5), (300, 300, 30), 100, 2)
  turned = lambda values: tuple(values[1:] + values[:1])
  assert last.patch == turned(first.patch) and last.batch == first.batch
  assert last.kernels == tuple(map(turned, first.kernels)) and last.strides == tuple(map(turned, first.strides))


def test_memory_and_data_set_bound_a_plan():
  volumes = [math.prod(p.patch) * p.batch for p in (plan((1, 1, 1), (256,) * 3, 10_000, 2, gigabytes=g) for g in (4, 8, 24))]
  assert volumes == sorted(volumes) and volumes[0] < volumes[-1]
  many, few = (plan((1, 1, 1), (40, 56, 40), n, 2).batch for n in (10_000, 20))
  assert many > few == 2  # 5 % of 20 images would be one
  with pytest.raises(UserError, match='fits 1e-06 GB'):
    plan((1, 1, 1), (256,) * 3, 100, 2, gigabytes=1e-6)
  with pytest.raises(UserError, match="did you mean 'resenc_l'"):
    plan((1, 1, 1), (256,) * 3, 100, 2, 'resenc-l')
  with pytest.raises(UserError, match='positive numbers'):
    plan((1, 0, 1), (256,) * 3, 100, 2)


def test_two_axes():
  made = plan((1, 1), (512, 512), 1000, 2)
  assert made.patch == (512, 512) and made.dims[-1] == 512 and len(made.strides) == 8
  assert made.batch == round(85e6 / made.voxels * 12)


def test_target_spacing():
  """Medians; of an axis that is coarse and short the tenth percentile, and not finer than the others."""
  spacings = [(1, 1, 1), (3, 2, 2), (2, 1.5, 1.5)]
  assert unet_plan.target_spacing(spacings, [(100, 100, 100)] * 3) == (2, 1.5, 1.5)
  coarse = [(z, 1.5, 1.5) for z in (5, 10, 10, 10, 10, 10, 10, 10, 10, 6)]
  got = unet_plan.target_spacing(coarse, [(10, 256, 216)] * 10)
  np.testing.assert_allclose(got, (np.percentile([z for z, *_ in coarse], 10), 1.5, 1.5))
  thick = unet_plan.target_spacing(coarse, [(100, 256, 216)] * 10)  # coarse, but not short
  np.testing.assert_allclose(thick, (10, 1.5, 1.5))
  fine = [(0.5, 1, 1)] * 4 + [(10, 1, 1)] * 5
  np.testing.assert_allclose(unet_plan.target_spacing(fine, [(10, 256, 256)] * 9), (1 + 1e-5, 1, 1))


def test_resampling():
  assert unet_plan.resampled_shape((30, 300, 300), (5, 0.7, 0.7), (2.5, 1, 1)) == (60, 210, 210)
  assert unet_plan.separate_axis((5, 1, 1), (1, 1, 1)) == 0
  assert unet_plan.separate_axis((1, 1, 1), (1, 1, 4)) == 2
  assert unet_plan.separate_axis((3, 1, 1), (1, 1, 1)) is None
  assert unet_plan.separate_axis((4, 4, 1), (1, 1, 1)) is None  # two coarsest axes


def test_a_coarser_plan_shows_a_quarter_of_an_image():
  fine = plan((1, 0.7, 0.7), (400, 512, 512), 100, 2)
  coarse = unet_plan.low_resolution(fine, 100, 2)
  share = math.prod(coarse.patch) / math.prod(n * a / b for n, a, b in zip(fine.shape, fine.spacing, coarse.spacing, strict=True))
  assert 0.25 <= share < 0.35 and all(a > b for a, b in zip(coarse.spacing, fine.spacing, strict=True))
  assert unet_plan.low_resolution(plan((1, 1, 1), (160, 160, 160), 100, 2), 100, 2) is None
