"""Folders of transformers and open_clip without torch: what is in them, what comes back, what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmed
from jaxmed import cli
from jaxmed.errors import UserError
from jaxmed.interop import export_file, folders, huggingface, text, two_towers
from jaxmed.interop.huggingface import canonical, from_tensors, to_tensors, vision_config
from jaxmed.interop.safetensors_io import read_tensors, write_tensors
from jaxmed.interop.two_towers import Towers
from jaxmed.models import create_model
from jaxmed.models.text.registry import create_text
from tests.interop.test_roundtrip import build, same

SMALL = dict(embed_dim=16, num_heads=2, depth=2)
INFO = {'channels': [{'name': n, 'mean': 10.0, 'std': 51.0} for n in 'abc'], 'normalize': 'corpus', 'feature': 'cls',
        'method': 'mae'}
KINDS = {
  'vit': dict(pos='sincos'),
  'vit_mae': dict(no_embed_class=True, mlp='quick_gelu'),
  'dinov2': dict(layer_scale=0.1, mlp='swiglu', mlp_ratio=3.0),
  'dinov2_with_registers': dict(num_registers=2),
  'clip': dict(pre_norm=True, norm_epsilon=1e-5, qkv_bias=False),
  'siglip': dict(class_token=False, map_head=True, mlp='gelu_tanh'),
}


def small(channels=3, **options):
  return build('vit_micro/8', 16, SMALL | options, channels)


@pytest.mark.parametrize('kind', KINDS)
def test_names_there_and_back(kind):
  model, params = small(**KINDS[kind])
  model, params = canonical(model, params, kind)
  tensors = to_tensors(model, params, kind)
  again, found = from_tensors(tensors, vision_config(model, kind), kind)
  same(found, params)
  wanted = model.clone(pos_interpolation=again.pos_interpolation, layer_scale=again.layer_scale)
  assert again == wanted and bool(again.layer_scale) == bool(model.layer_scale)
  prefixed = {huggingface.PREFIXES[kind] + name: x for name, x in tensors.items()} | {'pooler.dense.bias': np.zeros(3)}
  same(from_tensors(prefixed, vision_config(model, kind), kind)[1], params)
  block = {'vit': 'encoder.layer.1.attention.attention.query.weight', 'clip': 'encoder.layers.1.self_attn.q_proj.weight'}
  if kind in block:
    kernel = params['transformer']['blocks']['attn']['qkv']['kernel'][1][:, 0].reshape(16, 16)
    np.testing.assert_array_equal(tensors[block[kind]], kernel.T)


def test_a_bias_of_patches_goes_into_the_positions():
  model, params = small(pre_norm=True)
  other, folded = canonical(model, params, 'clip')
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
  run = jax.jit(lambda m, p: m.apply({'params': p}, x).cls, static_argnums=0)
  assert not folded['patch_embed']['bias'].any() and params['patch_embed']['bias'].any()
  np.testing.assert_allclose(run(model, params), run(other, folded), atol=1e-6)
  bare = jax.tree.map(np.copy, folded)
  bare['norm_pre']['scale'] *= 2
  assert np.abs(run(other, folded) - run(other, bare)).max() > 1e-3  # the norm is there


REFUSED = {
  'registers': ('hf_vit', dict(num_registers=1), 'ViTModel has encoder.num_registers=0, not 1'),
  'scale': ('hf_vit', dict(layer_scale=0.1), 'ViTModel has encoder.layer_scale=0, not 0.1'),
  'no class': ('hf_dinov2', dict(class_token=False), 'Dinov2Model has encoder.class_token=True'),
  'rope': ('hf', dict(pos='rope'), 'ViTModel has learned or fixed positions, not encoder.pos=rope'),
  'ratio': ('hf_dinov2', dict(mlp='swiglu', mlp_ratio=8 / 3), 'Dinov2Model has encoder.mlp_ratio of a whole number'),
  'pre_norm': ('hf', dict(pre_norm=True), 'ViTModel has encoder.pre_norm=False, not True'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_a_class_that_cannot_hold_a_model(name, tmp_path):
  fmt, options, words = REFUSED[name]
  with pytest.raises(UserError, match=words):
    folders.export_encoder(tmp_path, fmt, *small(**options), INFO)
  assert not list(tmp_path.iterdir())


def test_other_shapes_and_families(tmp_path):
  for model, words in ((create_model('vit_micro/8', (16, 24), 3), 'square images'),
                       (create_model('channel_vit_micro/8', 16, 3), 'no place for a channel_vit'),
                       (create_model('vit_micro/8', (16, 16, 16), 3), 'square images')):
    with pytest.raises(UserError, match=words):
      folders.export_encoder(tmp_path, 'hf', model, {}, INFO)
  (tmp_path / 'there').write_text('x')
  with pytest.raises(UserError, match='exists and is not empty'):
    folders.export_encoder(tmp_path, 'hf', *small(), INFO)


def test_a_file_becomes_a_folder_and_a_file_again(tmp_path, capsys):
  model, params = small(channels=4, num_registers=2)
  info = INFO | {'channels': [{'name': n, 'mean': 1.0, 'std': 2.0} for n in 'abcd'], 'normalize': 'image'}
  file, folder = tmp_path / 'a.safetensors', tmp_path / 'folder'
  export_file(file, 'jaxmed', model, params, info)
  assert cli.main(['export', str(file), '--format', 'hf', '--out', str(folder)]) == 0
  said = capsys.readouterr().out
  assert 'normalize=image standardises each image' in said and 'takes images of 1 or 3 channels, not 4' in said
  assert sorted(p.name for p in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors',
                                                      'preprocessor_config.json']
  config = json.loads((folder / 'config.json').read_text())
  assert (config['num_channels'], config['num_register_tokens'], config['model_type']) == (4, 2, 'dinov2_with_registers')
  assert not json.loads((folder / 'preprocessor_config.json').read_text())['do_normalize']
  card = (folder / 'README.md').read_text()
  assert "AutoModel.from_pretrained('folder')" in card and 'standardises each image' in card
  loaded = jaxmed.load(folder)
  assert loaded.normalize == 'image' and loaded.vocabulary == ('a', 'b', 'c', 'd')
  images = np.random.default_rng(1).normal(size=(2, 16, 16, 4)).astype(np.float32)
  want = jaxmed.load(file).embed(images)
  np.testing.assert_allclose(loaded.embed(images)['cls'], want['cls'], atol=1e-5)
  assert cli.main(['import', str(folder), '--out', str(tmp_path / 'b.safetensors')]) == 0
  np.testing.assert_allclose(jaxmed.load(tmp_path / 'b.safetensors').embed(images)['cls'], want['cls'], atol=1e-5)
  with pytest.raises(UserError, match='leave --num-heads out'):
    jaxmed.interop.import_file(folder, None, tmp_path / 'c.safetensors', num_heads=2)


def test_foreign_configs(tmp_path):
  model, params = canonical(*small(), 'vit')
  write_tensors(tmp_path / 'model.safetensors', to_tensors(model, params, 'vit'), {'format': 'pt'})
  config = vision_config(model, 'vit')

  def say(**changes):
    (tmp_path / 'config.json').write_text(json.dumps(config | changes))

  say()
  loaded = jaxmed.load(tmp_path)
  assert loaded.normalize == 'none' and loaded.vocabulary == ('R', 'G', 'B')  # nothing says how to normalise
  beside = {'image_mean': [0.5] * 3, 'image_std': [0.25] * 3}
  (tmp_path / 'preprocessor_config.json').write_text(json.dumps(beside))
  assert jaxmed.load(tmp_path).channels[1] == {'name': 'G', 'mean': 127.5, 'std': 63.75}
  for changes, words in (({'hidden_act': 'relu'}, "unknown hidden_act 'relu'"), ({'model_type': 'swin'}, "'swin'"),
                         ({'num_attention_heads': 3}, 'num_heads 3 does not divide'),
                         ({'image_size': 24}, 'pos_embed')):
    say(**changes)
    with pytest.raises(UserError, match=words):
      jaxmed.load(tmp_path)
  say(model_type='bert')
  with pytest.raises(UserError):
    folders.read_towers(tmp_path)


def pair(siglip, **changes):
  options = dict(class_token=False, map_head=True) if siglip else dict(pre_norm=True)
  words = create_text('text_siglip_micro' if siglip else 'text_micro', 6, vocab_size=300, **SMALL)
  words = words.clone(out_dim=16, out_bias=siglip)
  shapes = jax.eval_shape(words.init, jax.random.key(0), jnp.zeros((1, 6), jnp.int32))['params']
  rng = np.random.default_rng(2)
  drawn = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), two_towers.state_dict.nn.meta.unbox(shapes))
  projection = None if siglip else rng.normal(size=(16, 16)).astype(np.float32)
  made = Towers(*small(**options), words, drawn, projection, 2.0, -10.0 if siglip else None,
                'mean' if siglip else 'cls', -1 if siglip else 299)
  return dataclasses.replace(made, **changes)


@pytest.mark.parametrize('siglip', [False, True], ids=['CLIP', 'SigLIP'])
def test_towers_there_and_back(siglip, tmp_path):
  towers = pair(siglip)
  tensors, config, kept = two_towers.to_huggingface(towers)
  again = two_towers.from_huggingface(tensors, config)
  same(again.params, kept.params)
  same(again.text_params, towers.text_params)
  assert again.text == towers.text and (again.scale, again.bias, again.end) == (2.0, towers.bias, towers.end)
  assert tensors['logit_scale'].shape == ((1,) if siglip else ())
  write_tensors(tmp_path / 'model.safetensors', tensors, {'format': 'pt'})
  (tmp_path / 'config.json').write_text(json.dumps(config))
  model, params = text.read_text(tmp_path)
  assert model == towers.text
  same(params, towers.text_params)
  assert read_tensors(tmp_path)[0]['logit_scale'].shape == tensors['logit_scale'].shape
  assert folders.read_encoder(tmp_path)[0].map_head == siglip


def test_towers_of_open_clip():
  towers = pair(False, end=77)
  tensors, config, kept = two_towers.to_open_clip(towers)
  assert config['text_cfg']['pool_type'] == 'eos' and config['text_cfg']['eos_id'] == 77
  np.testing.assert_array_equal(tensors['visual.proj'], towers.projection)
  again = two_towers.from_open_clip(tensors, config)
  same(again.text_params, towers.text_params)
  same(again.params, kept.params)
  assert again.end == 77


@pytest.mark.parametrize('siglip, changes, words, write', [
  (False, {'feature': 'mean'}, 'CLIPModel has objective.feature=cls, not mean', two_towers.to_huggingface),
  (False, {'end': -1}, 'takes the state of the id that ends a text', two_towers.to_huggingface),
  (False, {'text': create_text('text_micro', 6, causal=False)}, 'CLIPModel has towers.text.options.causal=True',
   two_towers.to_huggingface),
  (True, {'projection': np.zeros((16, 16))}, 'SiglipModel has objective.project=False', two_towers.to_huggingface),
  (True, {'text': create_text('text_siglip_micro', 6, pool='mean')}, 'SiglipModel has towers.text.options.pool=last',
   two_towers.to_huggingface),
  (True, {}, 'by its name in timm', two_towers.to_open_clip),
  (False, {'text': create_text('text_micro', 6, pool='mean')}, 'pool eot and last, not mean', two_towers.to_open_clip),
  (False, {'text': create_text('text_micro', 6, mlp='quick_gelu')}, 'quick_gelu in both towers or in none',
   two_towers.to_open_clip),
])
def test_towers_that_no_class_holds(siglip, changes, words, write):
  with pytest.raises(UserError, match=words):
    write(pair(siglip, **changes))
