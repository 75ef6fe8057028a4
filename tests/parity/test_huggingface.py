"""Stock classes of transformers, of random weights and without a download: their features, both directions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.utils import logging

from jaxmed import encoder
from jaxmed.interop import folders, huggingface, text, two_towers, vit_mae
from jaxmed.interop.two_towers import Towers
from jaxmed.models.decoders.mae import Decoder
from jaxmed.models.text.registry import create_text
from tests.parity.common import assert_same, build, image, tokens

logging.set_verbosity_error()
logging.disable_progress_bar()
INFO = {'channels': [{'name': n, 'mean': 100.0 + i, 'std': 50.0 - i} for i, n in enumerate('RGB')],
        'normalize': 'corpus', 'feature': 'cls', 'method': 'clip'}
GREY = INFO | {'channels': INFO['channels'][:2]}
SMALL = dict(embed_dim=32, num_heads=2, depth=2)
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
VISION = SIZES | dict(image_size=16, patch_size=8)


def torch_images(x):
  return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def stock(path):
  """AutoModel of a folder, with which of its weights the folder has not."""
  model, told = transformers.AutoModel.from_pretrained(path, output_loading_info=True)
  assert not [name for name in told['unexpected_keys'] if not name.startswith('decoder.')] and not told['mismatched_keys']
  return model.eval(), told['missing_keys']


def randomised(model):
  """Every tensor of a stock model at a scale at which a swapped one shows."""
  generator = torch.Generator().manual_seed(0)
  for name, tensor in model.named_parameters():
    noise = torch.randn(tensor.shape, generator=generator) * (0.3 if tensor.ndim > 1 else 0.2)
    tensor.data = noise + (1.0 if tensor.ndim == 1 and ('norm' in name.lower() or 'lambda' in name)
                           and 'bias' not in name else 0.0)
  return model.eval()


EXPORTS = {
  'vit': ('hf_vit', 3, dict(pos='sincos', norm_epsilon=1e-5), 'ViTModel'),
  'vit without biases': ('hf_vit', 2, dict(no_embed_class=True, qkv_bias=False, mlp='gelu_tanh'), 'ViTModel'),
  'dinov2': ('hf', 3, dict(layer_scale=0.1), 'Dinov2Model'),
  'registers': ('hf_dinov2', 3, dict(num_registers=3, no_embed_class=True), 'Dinov2WithRegistersModel'),
  'SwiGLU': ('hf', 1, dict(num_registers=2, mlp='swiglu', mlp_ratio=88 / 32), 'Dinov2WithRegistersModel'),
}


@pytest.mark.parametrize('name', EXPORTS)
def test_stock_classes_give_our_features(name, tmp_path):
  fmt, channels, options, kind = EXPORTS[name]
  model, params = build('vit_micro/8', 16, channels, **SMALL | options)
  difference, _ = folders.export_encoder(tmp_path, fmt, model, params, INFO | {'channels': INFO['channels'][:channels]})
  theirs, missing = stock(tmp_path)
  assert type(theirs).__name__ == kind and missing <= {'pooler.dense.weight', 'pooler.dense.bias'}
  x = image((2, 16, 16, channels))
  with torch.no_grad():
    assert_same(tokens(model, params, x), theirs(torch_images(x)).last_hidden_state.numpy())
  assert difference < 1e-5
  again, same, info = folders.read_encoder(tmp_path)
  assert info['channels'] == INFO['channels'][:channels]
  assert_same(tokens(again, same, x), tokens(model, params, x))


def test_masked_autoencoders_with_their_decoder(tmp_path):
  model, params = build('vit_micro/8', 16, 3, pos='sincos', **SMALL)
  decoder = Decoder((2, 2), 192, embed_dim=32, depth=2, num_heads=2)
  noise = np.array([[0.4, 0.1, 0.3, 0.2], [0.2, 0.4, 0.1, 0.3]], np.float32)
  restore = jnp.asarray(noise.argsort(axis=1).argsort(axis=1))
  shown = jnp.asarray(noise.argsort(axis=1)[:, :2])
  weights = decoder.init(jax.random.key(0), jnp.zeros((2, 32)), jnp.zeros((2, 2, 32)), jnp.ones((2, 2), bool), restore,
                         jnp.zeros((2, 1), int), None)['params']
  weights = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape),
                         jax.tree.map(jnp.asarray, two_towers.state_dict.host(weights)))
  more = vit_mae.to_decoder(model, decoder, weights, 0.5, True)
  folders.export_encoder(tmp_path, 'hf_vit_mae', model, params, INFO, more)
  theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path).eval()
  x = image((2, 16, 16, 3))
  with torch.no_grad():
    want = theirs(torch_images(x), noise=torch.tensor(noise))
    alone = stock(tmp_path)[0](torch_images(x), noise=torch.tensor(noise)).last_hidden_state.numpy()
  run = lambda method, *a: model.apply({'params': params}, *a, method=method)
  latent = run('encode', run('embed_patches', jnp.asarray(x)).take(shown))
  assert_same(np.concatenate([latent.cls[:, None], latent.patches], axis=1), alone)
  have = decoder.apply({'params': weights}, latent.cls, latent.patches, jnp.ones((2, 2), bool), restore,
                       jnp.zeros((2, 1), int), None)
  assert_same(np.asarray(have), want.logits.numpy())
  assert want.mask.numpy().tolist() == np.asarray(restore >= 2).tolist()


def pair(siglip, **words):
  options = dict(class_token=False, map_head=True) if siglip else dict(pre_norm=True, norm_epsilon=1e-5)
  model, params = build('vit_micro/8', 16, 3, **SMALL | options)
  tower = create_text('text_siglip_micro' if siglip else 'text_micro', 7, vocab_size=300, **SMALL | words)
  tower = tower.clone(out_dim=32 if siglip else 24, out_bias=siglip)
  drawn = tower.init(jax.random.key(0), jnp.ones((1, 7), int))['params']
  rng = np.random.default_rng(5)
  drawn = jax.tree.map(lambda a: a + 0.2 * rng.normal(size=a.shape).astype(np.float32), two_towers.state_dict.host(drawn))
  projection = None if siglip else 0.3 * rng.normal(size=(32, 24)).astype(np.float32)
  return Towers(model, params, tower, drawn, projection, 2.5, -9.0 if siglip else None, 'mean' if siglip else 'cls', -1 if siglip else 299)


IDS = np.array([[5, 9, 299, 0, 0, 0, 0], [7, 0, 3, 11, 12, 13, 299]])  # 299 ends a text


@pytest.mark.parametrize('kind', ['CLIP', 'SigLIP'])
def test_towers_and_their_logits(kind, tmp_path):
  towers = pair(kind == 'SigLIP', mlp='gelu_tanh')
  difference, _ = folders.export_towers(tmp_path, 'hf', towers, INFO)
  theirs, missing = stock(tmp_path)
  assert type(theirs).__name__.lower() == f'{kind.lower()}model' and not missing and difference < 1e-5
  x = image((3, 16, 16, 3))
  with torch.no_grad():
    out = theirs(pixel_values=torch_images(x), input_ids=torch.tensor(IDS))
    vectors = theirs.get_image_features(torch_images(x)).pooler_output, theirs.get_text_features(torch.tensor(IDS)).pooler_output
  ours = two_towers.vectors(towers, jnp.asarray(x), jnp.asarray(IDS))
  for have, want in zip(ours, vectors):
    assert_same(have, want.numpy())
  u, v = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in ours)
  np.testing.assert_allclose(np.exp(2.5) * u @ v.T + (towers.bias or 0), out.logits_per_image.numpy(), atol=2e-4)
  again = folders.read_towers(tmp_path)
  for have, want in zip(two_towers.vectors(again, jnp.asarray(x), jnp.asarray(IDS)), ours):
    assert_same(have, want)
  words, _ = text.read_text(tmp_path)
  assert (words.causal, words.pool, words.mlp) == (towers.text.causal, towers.text.pool, 'gelu_tanh')


FOREIGN = {
  'vit': lambda t: t.ViTModel(t.ViTConfig(**VISION, qkv_bias=False)),
  'dinov2': lambda t: t.Dinov2Model(t.Dinov2Config(**VISION, mlp_ratio=2)),
  'registers': lambda t: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(
    **VISION, mlp_ratio=3, num_register_tokens=2, use_swiglu_ffn=True)),
  'mae': lambda t: t.ViTMAEForPreTraining(t.ViTMAEConfig(
    **VISION, mask_ratio=0.0, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)),
  'CLIP': lambda t: t.CLIPModel(t.CLIPConfig(text_config=SIZES | dict(vocab_size=50, max_position_embeddings=7, eos_token_id=49),
                                             vision_config=VISION, projection_dim=12)),
  'SigLIP': lambda t: t.SiglipModel(t.SiglipConfig(text_config=SIZES | dict(vocab_size=50, max_position_embeddings=7),
                                                   vision_config=VISION)),
}


@pytest.mark.parametrize('name', FOREIGN)
def test_folders_of_stock_classes_are_read(name, tmp_path):
  theirs = randomised(FOREIGN[name](transformers))
  theirs.save_pretrained(tmp_path, max_shard_size='40KB' if name == 'CLIP' else '1GB')
  assert (tmp_path / 'model.safetensors.index.json').exists() == (name == 'CLIP')
  mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
  transformers.ViTImageProcessor(size={'height': 16, 'width': 16}, image_mean=mean, image_std=std).save_pretrained(tmp_path)
  ours = encoder.from_file(tmp_path)
  stored = np.random.default_rng(2).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
  x = transformers.AutoImageProcessor.from_pretrained(tmp_path)(list(stored), return_tensors='pt')['pixel_values']
  with torch.no_grad():
    if name == 'mae':
      want = theirs.vit(x, noise=torch.arange(4.0).repeat(2, 1)).last_hidden_state
    else:
      want = theirs(x).last_hidden_state if name not in ('CLIP', 'SigLIP') else theirs.vision_model(x)
  have = ours.embed(stored)
  if name in ('CLIP', 'SigLIP'):
    assert_same(have['cls' if name == 'CLIP' else 'mean'], want.pooler_output.numpy())
    ids = np.array([[3, 49, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 49]])
    tower, params = text.read_text(tmp_path)
    with torch.no_grad():
      words = theirs.get_text_features(torch.tensor(ids)).pooler_output
    assert_same(np.asarray(tower.apply({'params': params}, ids).pool), words.numpy())
  else:
    assert_same(have['cls'], want[:, 0].numpy())
    assert_same(have['patches'].reshape(2, 4, -1), want[:, -4:].numpy())


def test_the_stock_processor_makes_our_input(tmp_path):
  model, params = build('vit_micro/8', 16, 3, **SMALL)
  folders.export_encoder(tmp_path, 'hf', model, params, INFO)
  stored = np.random.default_rng(2).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
  processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
  have = processor(list(stored), return_tensors='pt')['pixel_values'].numpy().transpose(0, 2, 3, 1)
  want = np.stack([(stored[..., i] - c['mean']) / c['std'] for i, c in enumerate(INFO['channels'])], axis=-1)
  np.testing.assert_allclose(have, want, atol=1e-5)
  ours = encoder.from_file(tmp_path).embed(stored)
  with torch.no_grad():
    assert_same(ours['cls'], stock(tmp_path)[0](torch.tensor(have.transpose(0, 3, 1, 2))).last_hidden_state[:, 0].numpy())


def test_positions_at_other_sizes(tmp_path):
  model, params = build('vit_micro/8', 16, 3, pos_interpolation='plain', **SMALL)
  _, notes = folders.export_encoder(tmp_path, 'hf', model, params, INFO)
  assert notes == []
  x = image((2, 24, 24, 3))
  with torch.no_grad():
    want = stock(tmp_path)[0](torch_images(x), interpolate_pos_encoding=True).last_hidden_state.numpy()
  assert_same(tokens(model, params, x), want)
  assert json.loads((tmp_path / 'config.json').read_text())['jaxmed']['info'] == INFO
  assert huggingface.is_folder(tmp_path)
