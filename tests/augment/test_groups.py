"""Groups of views: shapes, which channels student and teacher see, channels by name, crops at other resolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.augment.channels import by_name, mask_by_name
from jaxmed.augment.resample import crop_resize
from jaxmed.augment.views import ViewMaker
from jaxmed.errors import UserError
from jaxmed.objectives.networks import flat, seen_by_teacher, views
from tests.augment.test_color import made as made_by

RNG = np.random.default_rng(0)
resize = jax.jit(crop_resize, static_argnums=3)
KEY = jax.random.key(3)


def batch(size=(16, 16), count=3, channels=3, mask=None):
  out = {'image': RNG.integers(0, 255, (count, *size, channels)).astype(np.uint8),
         'channels': np.tile(np.arange(channels, dtype=np.int32), (count, 1)), 'label': np.arange(count)}
  return out | ({} if mask is None else {'channel_mask': np.asarray(mask)})


def maker(size=(16, 16), channels=3, **options):
  return ViewMaker(size, (0.0,) * channels, (255.0,) * channels, **options)


@pytest.mark.parametrize('size, local', [((16, 16), (8, 8)), ((8, 8, 8), (4, 4, 4))])
def test_shapes(size, local):
  made = jax.jit(maker(size, views=2, local_views=3, local_size=local, gram_size=tuple(2 * n for n in size)))(
      KEY, batch(size))
  assert sorted(made) == ['global', 'gram', 'label', 'local']
  assert made['global']['image'].shape == (3, 2, *size, 3) and made['local']['image'].shape == (3, 3, *local, 3)
  assert made['gram']['image'].shape == (3, 2, *(2 * n for n in size), 3)
  assert made['local']['channels'].shape == (3, 3, 3)
  assert 'channel_mask' not in made['global']
  image = np.asarray(made['global']['image'])
  assert np.abs(image[:, 0] - image[:, 1]).max() > 0.1  # two crops


@pytest.mark.parametrize('size', [(16, 16), (4, 16, 16)])
def test_views_of_their_own_sizes(size):
  """Each is the whole view, resized into the corner; zero beyond. An axis that is shorter than the side keeps its length."""
  options = dict(views=2, scale=(0.3, 0.9), noise=0.1)
  images = batch(size, count=12)
  plain = made_by(maker(size, **options), KEY, images)['global']
  made = made_by(maker(size, **options, sample_sizes=(8, 12, 16)), KEY, images)['global']
  sizes = np.asarray(made['sizes'])
  assert sizes.shape == (12, 2, len(size)) and set(np.unique(sizes)) == {8, 12, 16} | set(size)
  assert len({tuple(views) for views in sizes[:, :, -1].tolist()}) > 3  # views of a sample by themselves
  for view in np.ndindex(12, 2):
    own = tuple(sizes[view])
    assert own[:-2] == size[:-2] and own[-1] == own[-2]
    corner = tuple(slice(n) for n in own)
    whole = resize(plain['image'][view], np.zeros(len(size), int), np.array(size), own)
    np.testing.assert_allclose(made['image'][view][corner], whole, atol=1e-5)
    rest = np.array(made['image'][view])
    rest[corner] = 0
    assert not rest.any()
  one = made_by(maker(size, noise=0.1, sample_sizes=(8,)), KEY, images)
  assert one['image'].shape == (12, *size, 3) and one['sizes'].tolist() == [[*size[:-2], 8, 8]] * 12


def test_flat_keeps_the_views_of_a_sample_together():
  group = made_by(maker(views=2), KEY, batch())['global']
  merged = flat(group)
  image, channels = merged['image'], merged['channels']
  assert image.shape == (6, 16, 16, 3) and channels.shape == (6, 3) and sorted(merged) == ['channels', 'image']
  np.testing.assert_array_equal(image[3], group['image'][1, 1])
  np.testing.assert_array_equal(views(image, 2), group['image'])


def test_the_gram_teacher_sees_the_same_crops_without_changes_of_intensity():
  """A crop that keeps the grid's size is the view without its jitter; another size is a resize of the same box."""
  options = dict(views=2, scale=(0.3, 0.9), flip=(0.0, 0.0))
  images = batch()
  plain = made_by(maker(**options), KEY, images)
  made = made_by(maker(**options, noise=0.3, contrast=0.5, gram_size=(16, 16)), KEY, images)
  np.testing.assert_allclose(made['gram']['image'], plain['global']['image'], atol=1e-6)
  assert np.abs(made['global']['image'] - plain['global']['image']).max() > 0.1


@pytest.mark.parametrize('scope', ['each', 'shared'])
@pytest.mark.parametrize('teacher', ['all', 'same'])
def test_which_channels_are_seen(scope, teacher):
  there = [[True, True, True], [True, False, True], [False, True, False]]
  view = maker(views=2, local_views=4, local_size=(8, 8), channel_sampling='hcs', channel_views=scope,
               teacher_channels=teacher)
  different = 0
  for i in range(12):
    made = made_by(view, jax.random.key(i), batch(mask=there))
    shown = np.concatenate([made['global']['channel_mask'], made['local']['channel_mask']], axis=1)  # [B, 6, C]
    assert shown.any(axis=-1).all()
    assert not (shown & ~np.asarray(there)[:, None]).any()
    same = (shown == shown[:, :1]).all()
    assert same or scope == 'each'
    different += not same
    want = np.broadcast_to(np.asarray(there)[:, None], (3, 2, 3)) if teacher == 'all' else shown[:, :2]
    np.testing.assert_array_equal(seen_by_teacher(made['global'])['channel_mask'], want)
  assert (different > 6) == (scope == 'each')


def test_channels_go_to_the_places_of_their_names():
  image = RNG.normal(size=(3, 4, 4, 2)).astype(np.float32)
  ids = np.array([[4, 1], [2, 0], [3, 0]])
  mask = np.array([[True, True], [True, True], [True, False]])
  image[2, ..., 1] = np.nan  # what a missing channel holds must not matter
  have = np.asarray(by_name(image, ids, mask, 5))
  want = np.zeros((3, 4, 4, 5), np.float32)
  want[0, ..., 4], want[0, ..., 1] = image[0, ..., 0], image[0, ..., 1]
  want[1, ..., 2], want[1, ..., 0], want[2, ..., 3] = image[1, ..., 0], image[1, ..., 1], image[2, ..., 0]
  np.testing.assert_array_equal(have, want)
  np.testing.assert_array_equal(mask_by_name(jnp.asarray(ids), jnp.asarray(mask), 5), want.any(axis=(1, 2)))


def test_views_of_an_encoder_with_fixed_channels():
  there = np.array([[True, True], [True, False]])
  view = ViewMaker((8, 8), (0.0,) * 4, (1.0,) * 4, place=4, views=2, channel_sampling='hcs')
  made = made_by(view, KEY, {
      'image': np.ones((2, 8, 8, 2), np.uint8), 'channels': np.array([[3, 1], [2, 0]]), 'channel_mask': there})
  group = made['global']
  assert group['image'].shape == (2, 2, 8, 8, 4)
  np.testing.assert_array_equal(group['channels'], np.broadcast_to(np.arange(4), (2, 2, 4)))
  np.testing.assert_array_equal(group['teacher_mask'][:, 0], [[False, True, False, True], [False, False, True, False]])
  assert not (np.asarray(group['channel_mask']) & ~np.asarray(group['teacher_mask'])).any()
  full = np.asarray(group['image']).max(axis=(2, 3)) > 0.5  # what is there, sampled or not: the teacher looks at it too
  np.testing.assert_array_equal(full, group['teacher_mask'])


def test_one_view_and_held_out():
  view, many, images = maker(views=1, scale=(0.3, 0.5)), maker(views=2), batch()
  assert many.many and not view.many
  held = jax.jit(ViewMaker.held_out, static_argnums=0)
  np.testing.assert_array_equal(held(view, KEY, images)['image'], jax.jit(view.plain)(images)['image'])
  np.testing.assert_array_equal(held(many, KEY, images)['global']['image'], made_by(many, KEY, images)['global']['image'])


def test_a_view_is_a_resize_of_one_box():
  """Each view is a crop of its image: it equals a resize of the box that it carries, flipped as it says."""
  images, flipped = batch((24, 20)), 0
  made = jax.jit(maker(views=2, scale=(0.2, 0.6), local_views=1, local_size=(8, 8)))(KEY, images)
  for name, size in (('global', (16, 16)), ('local', (8, 8))):
    group = jax.tree.map(np.asarray, made[name])
    for place in np.ndindex(group['image'].shape[:2]):
      box = group['view_box'][place].astype(int)
      want = resize(images['image'][place[0]].astype(np.float32) / 255, box[:2], box[2:] - box[:2], size)
      turned = group['view_flip'][place].tolist()
      assert not turned[0]
      flipped += turned[1]
      np.testing.assert_allclose(group['image'][place], want[:, ::-1] if turned[1] else want, atol=1e-5)
  assert 0 < flipped < 9
  assert 'view_flip' not in jax.eval_shape(lambda: maker(flip=(0.0, 0.0))(KEY, images))


@pytest.mark.parametrize('options, word', [
    (dict(views=0), 'augment.views'), (dict(local_scale=(0.5, 0.1)), 'augment.local_scale'),
    (dict(channel_views='both'), 'augment.channel_views'), (dict(teacher_channels='some'), 'teacher_channels')])
def test_bad_options(options, word):
  with pytest.raises(UserError, match=word):
    maker(**options)
