"""First values of weights against the laws of the official codes; each figure from the law, not from a run."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxmed.models.layers.initial import initializer, normal
from jaxmed.models.registry import create_model
from jaxmed.objectives import METHODS


def first(name, channels=3, **options):
  """{path: first values} of a model of 16 x 16 pixels."""
  model = create_model(name, 16, channels, **options)
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, channels)))
  return flax.traverse_util.flatten_dict(nn.unbox(variables['params']), sep='/')


@pytest.mark.parametrize('law, cut', [('trunc_normal', None), ('trunc_normal_tf', 2.0), ('beit', 1.0)])
def test_normal_laws(law, cut):
  """PyTorch's trunc_normal_ cuts 0.02 at 2, which is nowhere; timm's _tf_ and SimMIM's at so many deviations."""
  std = 0.02 if cut is None else 0.02 * scipy.stats.truncnorm(-cut, cut).std()
  for init in (initializer(law), normal(law)):
    x = np.asarray(init(jax.random.key(1), (400, 500), jnp.float32))
    assert x.std() == pytest.approx(std, rel=0.01)
    assert np.abs(x).max() > 0.08 if cut is None else 0.0198 * cut < np.abs(x).max() <= 0.02 * cut * (1 + 1e-6)


@pytest.mark.parametrize('name, options, kernel, bias', [
    ('vit_micro/8', {}, 0.02, 0.0),
    ('vit_micro/8', {'patch_init': 'torch'}, (3 * 64) ** -0.5 / 3**0.5, (3 * 64) ** -0.5 / 3**0.5),
    ('vit_micro/8', {'patch_init': 'torch_bias', 'kernel_init': 'xavier_uniform'}, (2 / (192 + 128)) ** 0.5,
     192**-0.5 / 3**0.5),
    ('channel_vit_micro/8', {}, 64**-0.5 / 3**0.5, 64**-0.5 / 3**0.5),
    ('channel_vit_micro/8', {'patch_init': ''}, 0.02, 0.0),
])
def test_patch_embedding(name, options, kernel, bias):
  """PyTorch's convolution is uniform in +-1 / sqrt(fan_in), whose deviation is that by sqrt(3); biases too."""
  found = first(name, **options)
  assert found['patch_embed/kernel'].std() == pytest.approx(kernel, rel=0.03)
  assert found['patch_embed/bias'].std() == pytest.approx(bias, rel=0.15)


def test_tokens():
  found = first('vit_micro/8', num_registers=4, mask_token=True, token_std=1e-6, mask_std=0.0)
  assert found['cls_token'].std() == pytest.approx(1e-6, rel=0.2)
  assert found['register_tokens'].std() == pytest.approx(1e-6, rel=0.1)
  assert not found['mask_token'].any()
  assert found['pos_embed'].std() == pytest.approx(0.02, rel=0.1)


def test_ends_of_branches_shrink_with_depth():
  """SimMIM's models/vision_transformer.py: trunc_normal_(std=0.02) at one deviation, over sqrt(2 * layer)."""
  found = first('vit_micro/8', depth=3, kernel_init='beit', layer_scale=0.1)
  std, blocks = 0.02 * scipy.stats.truncnorm(-1, 1).std(), 'transformer/blocks'
  for path, shares in (('attn/qkv', (1, 1, 1)), ('mlp/fc1', (1, 1, 1)), ('attn/proj', (2, 4, 6)), ('mlp/fc2', (2, 4, 6))):
    kernel = found[f'{blocks}/{path}/kernel']
    np.testing.assert_allclose(kernel.reshape(3, -1).std(axis=1), [std / s**0.5 for s in shares], rtol=0.02)
  assert (found[f'{blocks}/ls1'] == 0.1).all()
  assert np.abs(found['cls_token']).max() <= 0.02 and np.abs(found['pos_embed']).max() <= 0.02


# What each method's official code sets, beside trunc_normal_(std=0.02): kernels, patches, class token, mask token.
OFFICIAL = {
    'dino': ('trunc_normal', 'torch', 0.02, None),  # dino:vision_transformer.py
    'ibot': ('trunc_normal', 'torch', 0.02, 0.0),  # ibot:models/vision_transformer.py, masked_embed
    'dinov2': ('trunc_normal', 'torch', 1e-6, 0.0),  # dinov2:dinov2/models/vision_transformer.py:init_weights
    'dinov3': ('trunc_normal', 'torch', 0.02, 0.0),  # dinov3:dinov3/models/vision_transformer.py:init_weights
    'mae': ('xavier_uniform', 'torch_bias', 0.02, None),  # mae:models_mae.py:initialize_weights
    'mocov3': ('xavier_qkv', '', 1e-6, None),  # moco-v3:vits.py
    'simmim': ('beit', '', 0.02, 0.02),  # SimMIM:models/simmim.py
    'ijepa': ('trunc_normal', '', 0.02, None),  # ijepa:src/models/vision_transformer.py:_init_weights
}


@pytest.mark.parametrize('name', OFFICIAL)
def test_methods_begin_as_published(name):
  kernels, patches, cls, mask = OFFICIAL[name]
  wants = {'kernel_init': 'trunc_normal', 'patch_init': '', 'token_std': 0.02, 'mask_std': 0.02}
  wants |= METHODS[name].DEFAULTS['encoder']
  assert (wants['kernel_init'], wants['patch_init'], wants['token_std']) == (kernels, patches, cls)
  assert mask is None or (wants['mask_std'] == mask and wants['mask_token'])


def test_epsilon_of_norms_reaches_every_norm():
  """With a great epsilon each norm gives little, its bias alone."""
  model = create_model('vit_micro/8', 16, 3, depth=2, norm_epsilon=1e12)
  x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), x)['params'])
  assert np.abs(model.apply({'params': params}, x).patches).max() < 1e-5
  block = model.clone(norm_epsilon=1e-6).apply({'params': params}, x, levels=(1, 2)).levels
  still = model.apply({'params': params}, x, levels=(1, 2)).levels
  assert np.abs(still[0].patches - still[1].patches).max() < 1e-5 < np.abs(block[0].patches - block[1].patches).max()
