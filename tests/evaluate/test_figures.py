"""Figures: they exist whole, show what they claim (checked on drawn pixels), refuse what they cannot."""

import io

import numpy as np
import pytest
from PIL import Image

from jaxmed.errors import UserError
from jaxmed.evaluate.report import figures


def drawn(path):
  return np.asarray(Image.open(path).convert('RGB')).astype(int)


def share(picture, colour, tolerance=3):
  """Fraction of pixels of about this colour."""
  return (np.abs(picture - np.array(colour)).max(axis=-1) <= tolerance).mean()


def test_loss_curves_draw_each_number_in_its_colour(tmp_path):
  rows = [
    dict(
      step=s, loss=1 / (s + 1), learning_rate=1e-3, images_per_second=10.0, grad_norm=1.0, note='x', ok=True
    )
    for s in range(100)
  ]
  rows[50] = dict(step=50, loss=float('nan'))
  rows.append({'step': 99, 'probe/knn': 0.5, 'skipped': 0})
  rows.append(dict(loss=3.0))  # no step: not drawn, no failure
  assert figures._numeric(rows) == ['loss', 'learning_rate', 'images_per_second', 'grad_norm', 'probe/knn']
  assert 'skipped' in figures._numeric([dict(step=1, skipped=2)])
  figures.loss_curves(rows, tmp_path / 'new' / 'loss.png')
  picture = drawn(tmp_path / 'new' / 'loss.png')
  for colour in ('#0072B2', '#009E73', '#CC79A7'):
    assert share(picture, [int(colour[i:i + 2], 16) for i in (1, 3, 5)]) > 1e-4
  assert [p.name for p in (tmp_path / 'new').iterdir()] == ['loss.png']
  with pytest.raises(UserError, match='no row has a step'):
    figures.loss_curves([dict(step=1), dict(loss=1.0)], tmp_path / 'none.png')
  assert not (tmp_path / 'none.png').exists()


def test_the_smooth_line_is_a_running_median():
  value = np.ones(100)
  value[50] = 1000
  np.testing.assert_array_equal(figures._smooth(value), np.ones(100))
  ramp = np.arange(100.)
  np.testing.assert_array_equal(figures._smooth(ramp)[5:-5], ramp[5:-5])


@pytest.mark.parametrize(('names', 'colour'), [
    (('R', 'G', 'B'), True), (('fundus:R', 'fundus:G', 'fundus:B'), True), (('red', 'green', 'blue'), True),
    (('T1', 'GM', 'WM'), False), (('B', 'G', 'R'), False), (('R', 'G'), False), (('DAPI',), False)])
def test_which_channels_are_a_colour_image(names, colour):
  assert figures.is_colour(names) == colour


def test_colour_is_colour_and_other_channels_are_grey(tmp_path):
  images = np.zeros((2, 40, 40, 3))
  images[..., 0] = 200  # red
  figures.image_grid(images, ['R', 'G', 'B'], tmp_path / 'rgb.png', 'Red')
  assert share(drawn(tmp_path / 'rgb.png'), (255, 0, 0)) > 0.5
  images[:, :20] = 0
  figures.image_grid(images, ['T1', 'GM', 'WM'], tmp_path / 'grey.png', 'Grey')
  grey = drawn(tmp_path / 'grey.png')
  assert (grey.max(axis=-1) - grey.min(axis=-1) < 12).mean() > 0.99
  black = share(grey, (0, 0, 0))  # half of T1 and all of GM and WM
  assert 0.45 < black < 5 / 6


def test_shown_values_and_limits():
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, 5, 6, 2)) * [1, 1000] + [0, 5000]
  images[0, 0, 0, 0] = np.nan
  limits = figures._limits(images, ['a', 'b'])
  np.testing.assert_allclose(limits[1], np.percentile(images[..., 1], [0.5, 99.5]))
  np.testing.assert_allclose(limits[0], np.nanpercentile(images[..., 0], [0.5, 99.5]))
  shown = figures._shown(images, ['a', 'b'], limits)
  assert shown.shape == (2, 2, 5, 6, 3) and shown.min() == 0 and shown.max() == 1
  np.testing.assert_array_equal(shown[0, 0, 0, 0], figures._MISSING)
  want = (images[1, 2, 3, 1] - limits[1, 0]) / (limits[1, 1] - limits[1, 0])
  np.testing.assert_allclose(shown[1, 1, 2, 3], np.clip(want, 0, 1))
  flat = np.full((1, 2, 2, 1), 7.0)
  assert np.isfinite(figures._shown(flat, ['a'], figures._limits(flat, ['a']))).all()
  rare = np.zeros((1, 100, 100, 1))
  rare[0, 0, 0] = 9
  assert tuple(figures._limits(rare, ['a'])[0]) == (0, 9)


def test_a_volume_is_shown_by_its_middle_slice():
  volume = np.zeros((2, 5, 4, 6, 1))
  volume[:, 2] = np.arange(24).reshape(4, 6, 1)
  np.testing.assert_array_equal(
    figures._sliced('images', volume, ['CT'])[1, ..., 0], np.arange(24).reshape(4, 6)
  )


def test_reconstructions_share_the_levels_of_the_original(tmp_path):
  original = np.zeros((2, 16, 16, 1))
  original[:, 8:] = 100
  masked = np.where(np.arange(16)[None, None, :, None] < 8, np.nan, original)
  figures.reconstructions(original, masked, original + 1000, ['CT'], tmp_path / 'r.png')
  picture = drawn(tmp_path / 'r.png')
  assert share(picture, np.round(figures._MISSING * 255)) > 0.1  # half of a third of the tiles
  assert 0.1 < share(picture, (0, 0, 0)) < 0.4  # the prediction, far too bright, shows white all over
  volume = np.zeros((2, 4, 16, 16, 3))
  figures.reconstructions(volume, volume, volume, ['a', 'b', 'c'], tmp_path / 'v.png')
  assert (tmp_path / 'v.png').stat().st_size > 1000
  with pytest.raises(UserError, match='differ'):
    figures.reconstructions(original, masked[:1], original, ['CT'], tmp_path / 'x.png')


def test_three_components_equal_an_svd():
  rng = np.random.default_rng(0)
  patches = rng.normal(size=(3, 4, 5, 7)) * np.arange(1, 8)
  flat = patches.reshape(-1, 7) - patches.reshape(-1, 7).mean(axis=0)
  part = flat @ np.linalg.svd(flat, full_matrices=False)[2][:3].T
  got = figures._three_components(patches).reshape(-1, 3)
  assert got.min() == 0 and got.max() == 1
  for i in range(3):  # equal but for sign, shift, scale and the clipped ends
    inner = (got[:, i] > 0) & (got[:, i] < 1)
    assert abs(np.corrcoef(got[inner, i], part[inner, i])[0, 1]) > 1 - 1e-9
  assert figures._three_components(patches[..., :2]).shape == (3, 4, 5, 3)
  assert np.isfinite(figures._three_components(np.ones((1, 2, 2, 4)))).all()


@pytest.mark.parametrize('shape', [((5, 12, 12, 2), (5, 3, 3, 8)), ((2, 6, 12, 12, 1), (2, 3, 3, 3, 8)),
                                   ((3, 13, 10, 1), (3, 3, 2, 4))])
def test_patch_pca_puts_colours_beside_images(tmp_path, shape):
  rng = np.random.default_rng(0)
  figures.patch_pca(rng.random(shape[0]), rng.normal(size=shape[1]), tmp_path / 'p.png')
  picture = drawn(tmp_path / 'p.png')
  coloured = (picture.max(axis=-1) - picture.min(axis=-1) > 30).mean()
  assert 0.15 < coloured < 0.6


def test_the_same_figure_is_the_same_file(tmp_path):
  images = np.random.default_rng(0).random((2, 8, 8, 2))
  for name in 'ab':
    figures.image_grid(images, ['x', 'y'], tmp_path / f'{name}.png', 'Twice')
  assert (tmp_path / 'a.png').read_bytes() == (tmp_path / 'b.png').read_bytes()
  assert Image.open(io.BytesIO((tmp_path / 'a.png').read_bytes())).format == 'PNG'


@pytest.mark.parametrize(('shape', 'names', 'words'), [
    ((2, 4, 4), ['x'], 'expected \\[N, H, W, C\\]'), ((0, 4, 4, 1), ['x'], 'N > 0'),
    ((2, 4, 4, 3), ['x', 'y'], '3 channels and 2 names')])
def test_what_cannot_be_shown(tmp_path, shape, names, words):
  with pytest.raises(UserError, match=words):
    figures.image_grid(np.zeros(shape), names, tmp_path / 'x.png')
  with pytest.raises(UserError, match='expected \\[N, \\*grid, D\\]'):
    figures.patch_pca(np.zeros((2, 4, 4, 1)), np.zeros((2, 4, 8)), tmp_path / 'x.png')
  with pytest.raises(UserError, match='NaN'):
    figures.patch_pca(np.zeros((1, 4, 4, 1)), np.full((1, 2, 2, 8), np.nan), tmp_path / 'x.png')


def test_no_window_and_no_global_state(tmp_path):
  import subprocess
  import sys
  code = (
    'import sys; from jaxmed.evaluate import metrics, page, pixels, probes, tables\n'
    'from jaxmed.evaluate.protocols import channels, classify; from jaxmed.evaluate.report import figures\n'
    "print([m for m in ('matplotlib', 'sklearn', 'torch', 'tensorflow') if m in sys.modules])\n"
    f"import numpy as np; figures.image_grid(np.zeros((1, 4, 4, 1)), ['x'], {str(tmp_path / 'x.png')!r})\n"
    "print('matplotlib.pyplot' in sys.modules)"
  )
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
  assert out.split('\n')[:2] == ['[]', 'False']


def test_relevance_is_shown_where_it_is(tmp_path):
  """The one patch that counts is the orange one; names carry the channels' shares."""
  from matplotlib import image as reading
  maps = np.zeros((1, 2, 2, 2))
  maps[0, 1, 0, 1] = 2.0
  figures.looked_at(np.zeros((1, 32, 32, 2)), maps, np.array([[0.0, 1.0]]), ['DNA', 'ER'], tmp_path / 'r.png')
  picture = reading.imread(tmp_path / 'r.png')[..., :3]
  orange = (picture[..., 0] > 0.6) & (picture[..., 2] < 0.1)
  assert orange.any()
  down, across = np.nonzero(orange)
  black = np.nonzero((picture.max(axis=-1) < 0.01) & (np.indices(picture.shape[:2])[1] > picture.shape[1] // 2))
  assert across.min() > picture.shape[1] // 2 and down.max() < black[0].max()  # the second channel, its upper half
