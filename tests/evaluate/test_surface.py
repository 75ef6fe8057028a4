"""Surface distances: reference vectors of other programs, brute force over small shapes, and what must not change."""

import itertools

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

from jaxmed.errors import UserError
from jaxmed.evaluate import surface

GRID = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing='ij'), -1)
# HD95, NSD at 1 mm, both directed means, MASD, ASSD of two spheres, as surface-distance 0.1 (surfel) and MetricsReloaded
# cb38dfc with MONAI 1.5 (voxel) give them.
SPHERES = {
  ('surfel', (1, 1, 1)): (2.000, 0.7886, 0.800, 0.648, None, None),
  ('voxel', (1, 1, 1)): (2.106, 0.6434, None, None, 0.966, 0.981),
  ('surfel', (1, 1, 3)): (3.162, 0.7818, None, None, None, None),
  ('voxel', (1, 1, 3)): (3.667, 0.6434, None, None, None, None),
}


def sphere(centre, radius):
  return ((GRID - np.array(centre)) ** 2).sum(-1) <= radius**2


def cube(size=12, start=3, side=5, rank=3):
  out = np.zeros((size,) * rank, bool)
  out[(slice(start, start + side),) * rank] = True
  return out


def some(shape, seed, share=0.3):
  """A mask of irregular pieces, some of which end at the edge of the image."""
  noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.0)
  return noise > np.quantile(noise, 1 - share)


@pytest.mark.parametrize(('kind', 'spacing'), SPHERES)
def test_spheres_of_the_reference(kind, spacing):
  d = surface.distances(sphere((11.5, 11.5, 11.5), 8), sphere((11.5, 11.5, 12.5), 7), spacing, kind)
  got = surface.hausdorff(d), surface.nsd(d, 1), *surface.directed(d), surface.masd(d), surface.assd(d)
  for value, wanted in zip(got, SPHERES[kind, spacing], strict=True):
    assert wanted is None or value == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize(('kind', 'wanted'), [('surfel', 0.9935), ('voxel', 0.9949)])
def test_hd95_hides_a_stray_voxel(kind, wanted):
  """Of a cube and the same with one voxel far away: HD95 is 0, the whole Hausdorff distance is not."""
  stray = cube()
  stray[0, 0, 0] = True
  d = surface.distances(cube(), stray, (1, 1, 2), kind)
  assert surface.hausdorff(d) == 0
  assert surface.hausdorff(d, 100) > 5
  if kind == 'surfel':  # the reference is of spacing 1
    d = surface.distances(cube(), stray, (1, 1, 1), kind)
  assert surface.nsd(d, 1) == pytest.approx(wanted, abs=5e-4)


@pytest.mark.parametrize('rank', [2, 3])
@pytest.mark.parametrize('seed', [0, 1])
def test_voxels_by_brute_force(rank, seed):
  """Distances between all pairs of border voxels, where a border voxel has a face neighbour outside."""
  spacing, shape = (1.5, 0.7, 2.0)[:rank], (9, 8, 7)[:rank]
  masks = [some(shape, seed), some(shape, seed + 10)]
  points = []
  for mask in masks:
    padded = np.pad(mask, 1)
    faces = [np.roll(padded, s, a) for a in range(rank) for s in (1, -1)]
    inner = np.logical_and.reduce(faces)[(slice(1, -1),) * rank]
    points.append(np.argwhere(mask & ~inner) * np.array(spacing))
  table = cdist(*points)
  there, back = table.min(1), table.min(0)
  d = surface.distances(*masks, spacing, 'voxel')
  assert sorted(d.truth) == pytest.approx(sorted(there)) and sorted(d.predicted) == pytest.approx(sorted(back))
  assert surface.hausdorff(d) == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
  assert surface.nsd(d, 1.5) == pytest.approx(np.concatenate([there <= 1.5, back <= 1.5]).mean())
  assert surface.assd(d) == pytest.approx(np.concatenate([there, back]).mean())
  assert surface.masd(d) == pytest.approx((there.mean() + back.mean()) / 2)


@pytest.mark.parametrize('rank', [2, 3])
def test_surfels_by_brute_force(rank):
  """A surfel is where not all neighbours of a corner are alike; distances between all pairs of them."""
  spacing, shape = (1.5, 0.7, 2.0)[:rank], (7, 6, 5)[:rank]
  masks = [some(shape, 3), some(shape, 4)]
  points = []
  for mask in masks:
    padded = np.pad(mask, 1)
    corners = itertools.product(*(range(n - 1) for n in padded.shape))
    near = lambda c, padded=padded: padded[tuple(slice(i, i + 2) for i in c)]
    points.append(np.array([c for c in corners if near(c).any() and not near(c).all()]) * np.array(spacing))
  table = cdist(*points)
  d = surface.distances(*masks, spacing, 'surfel')
  assert sorted(d.truth) == pytest.approx(sorted(table.min(1)))
  assert sorted(d.predicted) == pytest.approx(sorted(table.min(0)))


def triangle(*points):
  a, b, c = np.array(points, float)
  return np.linalg.norm(np.cross(b - a, c - a)) / 2


def test_areas_of_surfels():
  """By geometry: the octahedron around one voxel, the flat faces, edges and corners of a box, an L of three voxels."""
  spacing = (1.0, 2.0, 3.0)
  area = lambda mask: surface.distances(mask, mask, spacing).truth_area.sum()
  one = np.ones((1, 1, 1), bool)
  half = np.diag(np.array(spacing) / 2)
  assert area(one) == pytest.approx(8 * triangle(*half))
  # a box of n voxels an axis: faces of (n - 1) x (m - 1), bevelled edges, eight corners
  n = np.array([4, 5, 6])
  faces = 2 * sum(np.prod(np.delete((n - 1) * spacing, a)) for a in range(3))
  bevel = lambda a: np.hypot(*(np.delete(spacing, a) / 2))
  edges = 4 * sum((n[a] - 1) * spacing[a] * bevel(a) for a in range(3))
  assert area(np.ones(n, bool)) == pytest.approx(faces + edges + 8 * triangle(*half))
  flat = np.ones((4, 5), bool)
  contour = surface.distances(flat, flat, (1.0, 2.0)).truth_area.sum()
  assert contour == pytest.approx(2 * (3 * 1.0 + 4 * 2.0) + 4 * np.hypot(0.5, 1.0))


@pytest.mark.parametrize('kind', surface.KINDS)
def test_what_does_not_change(kind):
  a, b, spacing = some((8, 9, 7), 5), some((8, 9, 7), 6), (1.0, 0.5, 3.0)
  numbers = lambda d: [surface.hausdorff(d), surface.nsd(d, 1.0), surface.assd(d), surface.masd(d)]
  base = surface.distances(a, b, spacing, kind)
  same = lambda d: numbers(d) == pytest.approx(numbers(base))
  assert same(surface.distances(b, a, spacing, kind)), 'symmetric'
  for flipped in ([0], [1, 2], [0, 1, 2]):
    assert same(surface.distances(np.flip(a, flipped), np.flip(b, flipped), spacing, kind)), 'joint flips'
  for axes in itertools.permutations(range(3)):
    turned = [spacing[i] for i in axes]
    assert same(surface.distances(a.transpose(axes), b.transpose(axes), turned, kind)), 'joint turns'
  assert same(surface.distances(np.pad(a, ((3, 1), (0, 2), (5, 0))), np.pad(b, ((3, 1), (0, 2), (5, 0))), spacing, kind))
  wide = surface.distances(a, b, [4 * s for s in spacing], kind)
  assert surface.hausdorff(wide) == pytest.approx(4 * surface.hausdorff(base))
  assert surface.nsd(wide, 4.0) == pytest.approx(surface.nsd(base, 1.0))
  shares = [surface.nsd(base, t) for t in (0, 0.5, 1, 2, 4, np.inf)]
  assert shares == sorted(shares) and shares[-1] == 1
  own = surface.distances(a, a, spacing, kind)
  assert numbers(own) == [0, 1, 0, 0]


def test_a_volume_of_one_slice_is_all_border():
  """Voxels that an erosion takes away: in 2D the outline, in a volume of one slice every voxel. They are no equals."""
  plane = cube(rank=2)
  small = cube(side=3, rank=2)
  flat = surface.distances(plane, small, (1, 1), 'voxel')
  deep = surface.distances(plane[None], small[None], (1, 1, 1), 'voxel')
  assert len(flat.truth) == 16 and len(deep.truth) == plane.sum() == 25
  assert surface.hausdorff(flat, 100) == surface.hausdorff(deep, 100) == pytest.approx(np.hypot(2, 2))


def test_empty_masks():
  nothing = np.zeros((12, 12, 12), bool)
  d = surface.distances(cube(), nothing, (1, 1, 2))
  assert surface.hausdorff(d) == np.inf and surface.nsd(d, 5) == 0
  both = surface.distances(nothing, nothing, (1, 1, 2), 'voxel')
  assert np.isnan(surface.hausdorff(both)) and np.isnan(surface.nsd(both, 1)) and np.isnan(surface.assd(both))
  assert surface.diagonal((240, 240, 155), (1, 1, 1)) == pytest.approx(373.13, abs=5e-3)


@pytest.mark.parametrize(('shape', 'spacing', 'kind', 'words'), [
  ((4, 4, 5), (1, 1, 1), 'surfel', '4x4x4 and a prediction of 4x4x5; expected the same grid'),
  ((4, 4, 4), (1, 1), 'surfel', 'expected 3 numbers of mm above 0'),
  ((4, 4, 4), (1, 0, 1), 'surfel', 'spacing 1, 0, 1'),
  ((4, 4, 4), (1, 1, 1), 'surfels', "surfels"),
])
def test_bad_input(shape, spacing, kind, words):
  with pytest.raises(UserError, match=words):
    surface.distances(np.zeros((4, 4, 4), bool), np.zeros(shape, bool), spacing, kind)
