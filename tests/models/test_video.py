"""ResNets of videos: torchvision's sizes, channels between the parts of R(2+1)D, what looks along time."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.models.encoders.video import between_channels
from tests.models.common import normal
from tests.models.test_conv import _draw, features

FC = 512 * 400 + 400  # torchvision's counts have the classifier of Kinetics-400


@pytest.mark.parametrize('name, count, patch', [
    ('r3d_18', 33_371_472, (8, 16, 16)), ('mc3_18', 11_695_440, (1, 16, 16)), ('r2plus1d_18', 31_505_325, (8, 16, 16))])
def test_parameters_are_torchvisions(name, count, patch):
  model = create_model(name, (16, 112, 112))
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 112, 112, 3)))['params'])
  trained = {k: v for k, v in flax.traverse_util.flatten_dict(shapes).items() if k[-1] not in ('mean', 'var')}
  assert sum(s.size for s in trained.values()) + FC == count
  assert model.patch_size == patch


def test_channels_between():
  pairs = [(64, 64), (64, 128), (128, 256), (256, 512), (128, 128), (256, 256), (512, 512)]
  assert [between_channels(*pair) for pair in pairs] == [144, 230, 460, 921, 288, 576, 1152]


@pytest.mark.parametrize('time', ['all', 'first', 'separate'])
def test_what_looks_along_time(time):
  """A change in the first of 16 frames reaches four: of the stem's kernel and two of stage 1 four of 16; of those with a
  stride of two and one kernel more of stage 2 four of eight, or as many as before where it does not look along time."""
  model = create_model('r3d_micro', (16, 8, 8), 2, time=time, depths=(1, 1), dims=(8, 8), stem_width=4)
  params, image = _draw(model), np.array(normal((1, 16, 8, 8, 2)))
  other = image.copy()
  other[:, 0] += 1
  first, second = (features(model, params, x)[0] for x in (image, other))
  steps = {'all': 2, 'first': 1, 'separate': 2}[time]
  assert first.grid == (16 // steps, 2, 2)
  changed = np.abs(np.asarray(first.patches - second.patches)).reshape(16 // steps, -1).max(axis=1) > 1e-6
  np.testing.assert_array_equal(changed, np.arange(16 // steps) < 4)


def test_hidden_patches_are_not_seen():
  model = create_model('r3d_micro', (4, 16, 16), 1, depths=(1, 1), dims=(8, 8), stem_width=4)
  params, image = _draw(model), np.array(normal((1, 4, 16, 16, 1)))
  hidden = np.arange(32).reshape(1, 32) % 3 == 0
  where = np.kron(hidden.reshape(2, 4, 4), np.ones((2, 4, 4)))[None, ..., None] > 0
  first, second = (features(model, params, x, hidden=hidden)[0].patches for x in (image, np.where(where, 5.0, image)))
  np.testing.assert_array_equal(first, second)
  assert not np.asarray(first)[hidden].any()


def test_images_have_three_axes():
  with pytest.raises(UserError, match='three axes.*resnet18'):
    create_model('r3d_18', (112, 112))
  with pytest.raises(UserError, match="did you mean 'separate'"):
    create_model('r3d_18', (16, 112, 112), time='seperate')
