"""Images that keep their aspect: what fills an array, and views that are drawn in that part alone."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.augment import intensity
from jaxmed.augment.geometry import filled, random_box
from jaxmed.augment.views import ViewMaker
from jaxmed.config import merge
from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed import fields
from jaxmed.data.feed.pipeline import train_batches
from jaxmed.data.prepare.prepare import prepare
from jaxmed.data.resize import nearest, resize
from jaxmed.train.build import data_spec, resolve

GRIDS = [(20, 32), (32, 20), (24, 24), (9, 12), (16, 40), (33, 11), (20, 32), (12, 12)]


@pytest.mark.parametrize('grid, size, spacing, want', [
    ((256, 160), (96, 96), None, (96, 60)),
    ((160, 256), (96, 120), None, (75, 120)),
    ((50, 60), (96, 96), None, (50, 60)),  # nothing is enlarged
    ((100, 400), (96, 96), (4.0, 1.0), (96, 96)),  # a square of 400 mm
    ((30, 400), (96, 96), (8.0, 1.0), (30, 96)),  # stored more coarsely than the array has room for
    ((100, 100, 200), (50, 50, 50), (1.0, 1.0, 1.0), (25, 25, 50)),
    ((20, 512, 512), (20, 96, 96), (5.0, 0.7, 0.7), (20, 96, 96)),  # thick slices stay
    ((40, 512, 512), (20, 96, 96), (5.0, 0.7, 0.7), (20, 36, 36)),
    ((64, 320, 240), (16, 96, 96), None, (16, 96, 72)),  # frames by themselves
    ((1, 3000), (96, 96), None, (1, 96)),
])
def test_grids(grid, size, spacing, want):
  assert fields.aspect_grid(grid, size, spacing) == want


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """Images of many grids with masks and a box around label 1."""
  root, rng = tmp_path_factory.mktemp('uneven'), np.random.default_rng(0)
  (root / 'in').mkdir()
  lines = ['path,split,mask,boxes']
  for i, grid in enumerate(GRIDS):
    mask = np.zeros(grid, np.uint8)
    mask[2:grid[0] // 2, 3:grid[1] // 2] = 1
    np.savez(root / 'in' / f'{i}.npz', image=rng.integers(50, 250, (*grid, 2), np.uint8), channels=['x', 'y'])
    np.savez(root / 'in' / f'm{i}.npz', image=mask[..., None], channels=['x'])
    box = json.dumps([[2, 3, grid[0] // 2, grid[1] // 2]])
    lines.append(f'{i}.npz,train,m{i}.npz,"{box}"')
  (root / 't.csv').write_text('\n'.join(lines), encoding='utf-8')
  prepare([root / 'in'], root / 'c', table=root / 't.csv', progress=False)
  return open_source(root / 'c')


def batch_of(source, size=(16, 16)):
  wanted = fields.of_source(source, size, ('image', 'mask', 'boxes'), boxes=1, extent=True)
  return next(train_batches(source, batch_size=8, size=size, vocabulary=('x', 'y'), seed=0, fit='aspect', fields=wanted))


def test_what_an_array_holds(source):
  batch = batch_of(source)
  for k, i in enumerate(batch['index']):
    record, own = source[i], tuple(batch['extent'][k])
    grid = record['image'].shape[:2]
    assert own == fields.aspect_grid(grid, (16, 16), record['spacing'])
    assert abs(own[0] / own[1] - grid[0] / grid[1]) < 0.6 / min(own) * max(grid) / min(grid)
    image, mask = batch['image'][k], batch['mask'][k]
    np.testing.assert_array_equal(image[:own[0], :own[1]], resize(record['image'], own))
    np.testing.assert_array_equal(mask[:own[0], :own[1]], nearest(record['mask'], own))
    assert not image[own[0]:].any() and not image[:, own[1]:].any()
    assert (mask[own[0]:] == -1).all() and (mask[:, own[1]:] == -1).all()
    scale = np.array(own) / grid
    want = [2 * scale[0], 3 * scale[1], grid[0] // 2 * scale[0], grid[1] // 2 * scale[1]]
    np.testing.assert_allclose(batch['boxes'][k, 0], want, rtol=1e-6)
  assert len({tuple(e) for e in batch['extent']}) > 4


@pytest.mark.parametrize('options', [{}, {'views': 2, 'local_views': 2, 'local_size': (4, 4)}, {'scale': (1.0, 1.0)}])
def test_views_show_nothing_of_what_lies_beyond(source, options):
  """By values there that no view may show; the plain view and its mask too."""
  batch = batch_of(source)
  beyond = ~np.asarray(filled(jnp.asarray(batch['extent']), (16, 16)))
  image = np.where(beyond[..., None], np.float32(1e6), batch['image'].astype(np.float32))
  view = ViewMaker((8, 8), (100.0, 100.0), (50.0, 50.0), contrast=0.2, **options)
  for made in (view(jax.random.key(0), batch | {'image': image}), view.plain(batch | {'image': image})):
    groups = [made[g] for g in ('global', 'local') if g in made] or [made]
    for group in groups:
      assert np.abs(group['image']).max() < 8 and np.asarray(group['image']).std() > 0.1
      assert 'extent' not in group and (np.asarray(group['mask']) >= 0).all()
      box = np.asarray(group['view_box']).reshape(8, -1, 4)
      assert (box[..., :2] >= 0).all() and (box[..., 2:] <= batch['extent'][:, None]).all()


@pytest.mark.parametrize('mode', ['image', 'percentile'])
def test_statistics_are_of_the_image(mode):
  """As of each image alone."""
  x = jnp.asarray(np.random.default_rng(0).gamma(2.0, size=(3, 9, 7, 2)), jnp.float32)
  extent = jnp.asarray([[9, 7], [5, 3], [1, 4]])
  inside, channels = filled(extent, (9, 7)), jnp.zeros((3, 2), jnp.int32)
  out = intensity.normalize(jnp.where(inside[..., None], x, 1e6), channels, jnp.zeros(1), jnp.ones(1), mode, inside)
  for k, (h, w) in enumerate(np.asarray(extent)):
    alone = intensity.normalize(x[k:k + 1, :h, :w], channels[:1], jnp.zeros(1), jnp.ones(1), mode)
    np.testing.assert_allclose(out[k, :h, :w], alone[0], rtol=2e-5, atol=2e-5)


def torchvision_box(rng, height, width, scale, ratio):
  """(height, width) of RandomResizedCrop.get_params, torchvision/transforms/transforms.py."""
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(*np.log(ratio)))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return h, w
  if width / height < min(ratio):
    return round(width / min(ratio)), width
  if width / height > max(ratio):
    return height, round(height * max(ratio))
  return height, width


@pytest.mark.parametrize('scale', [(0.08, 1.0), (0.32, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize('grid', [(160, 256), (256, 160)])
def test_laws_of_area_and_aspect_are_torchvisions(scale, grid):
  """Quantiles of both to 0.01, on images of 256 x 160 in the corner of larger arrays."""
  ratio, rng, count = (3 / 4, 4 / 3), np.random.default_rng(0), 20_000
  want = np.array([torchvision_box(rng, *grid, scale, ratio) for _ in range(count)], float)
  draw = jax.jit(jax.vmap(lambda key, own: random_box(key, own, scale, ratio)))
  start, length = map(np.asarray, draw(jax.random.split(jax.random.key(1), count), jnp.tile(jnp.asarray(grid), (count, 1))))
  assert (start >= 0).all() and (start + length <= grid).all()
  at = np.linspace(0.05, 0.95, 19)
  area = lambda x: x.prod(axis=1) / np.prod(grid)
  np.testing.assert_allclose(np.quantile(area(length), at), np.quantile(area(want), at), atol=0.01)
  np.testing.assert_allclose(np.quantile(length[:, 1] / length[:, 0], at), np.quantile(want[:, 1] / want[:, 0], at), atol=0.02)


def test_the_largest_box_at_the_bound():
  """Where nothing fits: 256 x 160 gives 213 x 160, as torchvision."""
  for grid, want in (((160, 256), (160, 213)), ((256, 160), (213, 160)), ((160, 180), (160, 180))):
    start, length = random_box(jax.random.key(0), grid, (1.0, 1.0), (3 / 4, 4 / 3), tries=1)
    assert tuple(map(int, length)) == want
    assert tuple(map(int, start)) == tuple((n - m) // 2 for n, m in zip(grid, want))


def test_a_run_keeps_the_aspect_where_records_differ_in_it(source):
  spec = data_spec.describe(source, '')
  assert spec.uneven
  user = {'model': 'vit_micro/8', 'image_size': (8,), 'batch_size': 4, 'steps': 2}
  assert resolve.resolve(user, spec).loader.fit == 'aspect'
  assert resolve.resolve(merge(user, {'loader': {'fit': 'resize'}}), spec).loader.fit == 'resize'
  long = data_spec.describe(source.select(), '')
  even = dataclasses.replace(long, uneven=False, size=(40, 20))
  loader = resolve.resolve(user, even).loader
  assert (loader.fit, loader.load_size) == ('resize', (24, 12))
  assert resolve.resolve(merge(user, {'loader': {'load_size': (12, 12)}}), even).loader.fit == 'aspect'
  square = dataclasses.replace(long, uneven=False, size=(40, 40))
  loader = resolve.resolve(user, square).loader
  assert (loader.fit, loader.load_size) == ('resize', (12, 12))
