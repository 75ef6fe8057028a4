"""Metrics of masks beside MONAI and surface-distance themselves, on irregular shapes of many components."""

import warnings

import numpy as np
import pytest
from scipy import ndimage

from jaxmed.evaluate import segmentation, surface

torch = pytest.importorskip('torch')
monai = pytest.importorskip('monai.metrics')
SPACINGS = [(1.0, 1.0, 1.0), (1.0, 0.7, 3.0), (5.0, 0.8, 0.8)]


def shapes(seed, size=(14, 17, 12)):
  """A mask and a prediction that is a part of it moved, grown and broken up."""
  rng = np.random.default_rng(seed)
  field = lambda: ndimage.gaussian_filter(rng.normal(size=size), 1.2)
  a, b = field(), field()
  return a > 0.1, a + 0.4 * b > 0.1


def deepmind(a, b, spacing):
  reference = pytest.importorskip('surface_distance')
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)
    return reference, reference.compute_surface_distances(a, b, spacing)


@pytest.mark.parametrize('rank', [2, 3])
@pytest.mark.parametrize('spacing', SPACINGS)
@pytest.mark.parametrize('seed', [0, 1])
def test_surfels_are_those_of_surface_distance(rank, spacing, seed):
  a, b = (x if rank == 3 else x[..., 5] for x in shapes(seed))
  spacing = spacing[:rank]
  reference, wanted = deepmind(a, b, spacing)
  got = surface.distances(a, b, spacing)
  order = np.lexsort((got.truth_area, got.truth))
  np.testing.assert_allclose(got.truth[order], wanted['distances_gt_to_pred'], atol=1e-12)
  np.testing.assert_allclose(got.truth_area[order], wanted['surfel_areas_gt'], atol=1e-12)
  assert surface.directed(got) == pytest.approx(reference.compute_average_surface_distance(wanted))
  for percent in (50, 95, 100):
    assert surface.hausdorff(got, percent) == pytest.approx(reference.compute_robust_hausdorff(wanted, percent))
  for tolerance in (0.5, 1, 3):
    assert surface.nsd(got, tolerance) == pytest.approx(
      reference.compute_surface_dice_at_tolerance(wanted, tolerance))


@pytest.mark.parametrize('spacing', SPACINGS)
@pytest.mark.parametrize('seed', [0, 1])
def test_voxels_are_those_of_monai(spacing, seed):
  a, b = shapes(seed)
  both = [torch.tensor(x)[None, None].float() for x in (b, a)]
  got = segmentation.case(a.astype(int), b.astype(int), [1], spacing, segmentation.Ask(1.5, 'voxel'))
  ask = dict(include_background=True, spacing=spacing)
  assert got['hd95'][0] == pytest.approx(monai.compute_hausdorff_distance(*both, percentile=95, **ask).item(), rel=1e-5)
  assert got['nsd'][0] == pytest.approx(monai.compute_surface_dice(*both, class_thresholds=[1.5], **ask).item(), abs=1e-6)
  assert got['assd'][0] == pytest.approx(
    monai.compute_average_surface_distance(*both, symmetric=True, **ask).item(), rel=1e-5)
  assert got['dice'][0] == pytest.approx(monai.compute_dice(*both).item())
  surfels = segmentation.case(a.astype(int), b.astype(int), [1], spacing, segmentation.Ask(1.5, 'surfel'))
  wanted = monai.compute_surface_dice(*both, class_thresholds=[1.5], use_subvoxels=True, **ask).item()
  assert surfels['nsd'][0] == pytest.approx(wanted, abs=1e-6)
