import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxmed.errors import UserError
from jaxmed.models import create_model, list_models, registry


def test_names_and_sizes():
  assert {'vit_tiny', 'vit_giant', 'channel_vit_small', 'channel_vit_base'} <= set(list_models())
  model = create_model('channel_vit_small/16', in_channels=8)
  assert (model.embed_dim, model.depth, model.num_heads, model.image_size) == (384, 12, 6, (224, 224))
  assert create_model('vit_base/2x16x16', (16, 96, 96)).patch_size == (2, 16, 16)
  assert create_model('vit_base/8', (16, 96, 96)).patch_size == (8, 8, 8)


@pytest.mark.parametrize(
  'name,millions',
  [
    ('vit_tiny/16', 5.524),
    ('vit_small/16', 21.666),
    ('vit_base/16', 85.799),
    ('vit_large/16', 303.302),
    ('vit_giant2/14', 1136.480),
  ],
)
def test_parameter_counts(name, millions):
  """timm's vit_{tiny,small,base,large}_patch16_224 without classifier, and DINOv2's ViT-g at 518."""
  model = create_model(name, 518 if 'giant' in name else 224)
  shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *model.image_size, 3))))
  assert sum(a.size for a in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=1e-3)


@pytest.mark.parametrize('name', ['vit_tiny/8', 'channel_vit_micro/2x8x8', 'vit_giant2/14'])
def test_description_and_back(name):
  size = (8, 32, 32) if '2x' in name else 56
  model = create_model(name, size, 5, pos='rope', drop_path=0.2)
  assert registry.rebuild(registry.describe(model)) == model


@pytest.mark.parametrize(
  'args,words',
  [
    (('vit_tny/16',), "did you mean 'vit_tiny'"),
    (('vit_tiny',), 'vit_tiny/16'),
    (('vit_tiny/0',), 'needs a patch size'),
    (('vit_tiny/axb',), 'needs a patch size'),
    (('vit_tiny/16', 100), 'nearest is 96x96'),
    (('vit_tiny/16', (8, 96, 96)), 'nearest is 16x96x96'),
    (('vit_tiny/16x16', (96, 96, 96)), 'does not divide'),
  ],
)
def test_names_that_do_not_exist(args, words):
  with pytest.raises(UserError, match=words) as e:
    create_model(*args)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  'options,words',
  [
    (dict(dept=3), "did you mean 'depth'"),
    (dict(pos='learnt'), "did you mean 'learned'"),
    (dict(mlp='swiglue'), 'swiglu'),
    (dict(dtype='float16'), 'float'),
    (dict(remat='some'), 'remat'),
    (dict(num_heads=5), 'num_heads 5 does not divide embed_dim 192'),
  ],
)
def test_options_that_do_not_exist(options, words):
  with pytest.raises(UserError, match=words):
    create_model('vit_tiny/16', **options)


def test_unknown_family():
  with pytest.raises(UserError, match="did you mean 'vit'"):
    registry.rebuild({'family': 'vitt'})
