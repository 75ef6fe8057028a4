"""open_clip's classes, of random weights and without a download: both directions."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import open_clip
import pytest
import torch

from jaxmed.errors import UserError
from jaxmed.interop import folders, text, two_towers
from tests.parity.common import assert_same, build, image
from tests.parity.test_huggingface import IDS, INFO, SMALL, pair, randomised, torch_images


def ours_and_theirs(towers, model, x, ids):
  with torch.no_grad():
    want = model.encode_image(torch_images(x)).numpy(), model.encode_text(torch.tensor(ids)).numpy()
  for have, theirs in zip(two_towers.vectors(towers, jnp.asarray(x), jnp.asarray(ids)), want):
    assert_same(have, theirs)


def test_towers_of_clip(tmp_path):
  towers = pair(False, mlp='quick_gelu')
  towers = dataclasses.replace(towers, image=towers.image.clone(mlp='quick_gelu'))
  difference, notes = folders.export_towers(tmp_path, 'open_clip', towers, INFO)
  model, preprocess = open_clip.create_model_from_pretrained(f'local-dir:{tmp_path}')
  assert difference < 1e-5 and not notes and float(model.logit_scale) == 2.5 and model.logit_bias is None
  strict = model.load_state_dict({k: torch.tensor(v) for k, v in folders.read_tensors(tmp_path)[0].items()}, strict=True)
  assert not strict.missing_keys
  ours_and_theirs(towers, model, image((2, 16, 16, 3)), IDS)
  mean, std = (np.array([c[k] for c in INFO['channels']]) / 255 for k in ('mean', 'std'))
  np.testing.assert_allclose(preprocess.transforms[-1].mean, mean)
  np.testing.assert_allclose(preprocess.transforms[-1].std, std)
  again, _, info = folders.read_encoder(tmp_path)
  assert again.pre_norm and info['channels'] == INFO['channels']


def test_towers_of_siglip_without_its_head(tmp_path):
  towers = pair(True)
  model, params = build('vit_micro/8', 16, 3, layer_scale=0.2, **SMALL)
  rng = np.random.default_rng(3)
  towers = dataclasses.replace(towers, image=model, params=params, projection=rng.normal(size=(32, 32)).astype(np.float32))
  folders.export_towers(tmp_path, 'open_clip', towers, INFO | {'normalize': 'image'})
  theirs = open_clip.create_model(f'local-dir:{tmp_path}').eval()
  assert float(theirs.logit_bias) == -9.0
  ours_and_theirs(towers, theirs, image((2, 16, 16, 3)), IDS)
  same = folders.read_towers(tmp_path)
  assert (same.feature, same.bias, same.text.pool, same.text.causal) == ('mean', -9.0, 'last', False)


CONFIGS = {
  'CLIP': {'embed_dim': 24, 'quick_gelu': True,
           'vision_cfg': {'image_size': 16, 'layers': 2, 'width': 64, 'head_width': 32, 'patch_size': 8, 'ls_init_value': 0.1},
           'text_cfg': {'context_length': 7, 'vocab_size': 300, 'width': 32, 'heads': 2, 'layers': 2}},
  'CustomTextCLIP': {'embed_dim': 24, 'custom_text': True, 'init_logit_bias': -10.0,
                     'vision_cfg': {'image_size': 16, 'layers': 2, 'width': 64, 'patch_size': 8, 'no_ln_pre': True,
                                    'pool_type': 'avg', 'act_kwargs': {'approximate': 'tanh'}},
                     'text_cfg': {'context_length': 7, 'vocab_size': 300, 'width': 32, 'heads': 2, 'layers': 2,
                                  'no_causal_mask': True, 'proj_bias': True, 'pool_type': 'last', 'norm_kwargs': {'eps': 1e-6}}},
}


@pytest.mark.parametrize('name', CONFIGS)
def test_their_weights_are_read(name, tmp_path):
  config = json.loads(json.dumps(CONFIGS[name]))
  kind = getattr(open_clip.model, name)
  theirs = randomised(kind(**{k: v for k, v in config.items() if k != 'custom_text'}))
  tensors = {k: v.numpy() for k, v in theirs.state_dict().items()}
  towers = two_towers.from_open_clip(tensors, config)
  ours_and_theirs(towers, theirs, image((2, 16, 16, 3)), IDS)
  path = tmp_path / 'open_clip_pytorch_model.bin'
  torch.save(theirs.state_dict(), path)
  with pytest.raises(UserError, match='does not say its heads and activation'):
    text.read_text(path)
  words, params = text.read_text(path, like=towers.text)
  assert words == towers.text
  np.testing.assert_array_equal(params['token_embed'], towers.text_params['token_embed'])


def test_a_map_head_goes_by_its_name_in_timm():
  sizes = dict(embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0, class_token=False, map_head=True)
  model = build('vit_micro/16', 32, 3, **sizes | {'depth': 1, 'embed_dim': 96, 'num_heads': 3})[0].clone(**sizes, image_size=(224, 224))
  assert two_towers._timm_name(model) == 'vit_base_patch16_siglip_224'
  with pytest.raises(UserError, match='timm'):
    two_towers._timm_name(model.clone(depth=11))


def test_the_map_head_of_timm():
  import timm
  model, params = build('vit_micro/8', 16, 3, class_token=False, map_head=True, **SMALL)
  tensors = two_towers.to_timm(model, params)
  theirs = timm.models.vision_transformer.VisionTransformer(
    img_size=16, patch_size=8, num_classes=0, global_pool='map', class_token=False, embed_dim=32, depth=2, num_heads=2).eval()
  theirs.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()})
  x = image((2, 16, 16, 3))
  with torch.no_grad():
    want = theirs(torch_images(x)).numpy()
  assert_same(np.asarray(model.apply({'params': params}, jnp.asarray(x)).mean), want)
  again, same = two_towers.from_timm(tensors, 2)
  assert again.map_head and again.class_token is False
  np.testing.assert_array_equal(same['attn_pool']['kv']['kernel'], params['attn_pool']['kv']['kernel'])
