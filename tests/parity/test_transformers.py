"""Masked image modelling beside Hugging Face's transformers: the same weights and masks give the same loss and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.interop import state_dict
from jaxmed.interop.timm import to_timm
from jaxmed.objectives import MAE, SimMIM
from tests.parity.test_trajectory import (
  COUNT,
  DEPTH,
  DIM,
  HEADS,
  PATCH,
  SIZE,
  encoder,
  images,
  in_torch,
  pixels,
  sincos,
  weights,
)

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers', reason="pip install 'jaxmed[parity]'")

DECODER = 24
SHAPE = dict(hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * DIM,
             image_size=SIZE, patch_size=PATCH, layer_norm_eps=1e-6, hidden_dropout_prob=0.0,
             attention_probs_dropout_prob=0.0)
NAMES = {'norm1': 'layernorm_before', 'norm2': 'layernorm_after', 'attn.proj': 'attention.o_proj'}


def blocks(tensors, into):
  """timm's blocks under the names of transformers, `into` a list of layers."""
  out = {}
  for key, value in tensors.items():
    _, layer, name, kind = key.replace('attn.proj', 'attn-proj').replace('attn.qkv', 'attn-qkv').replace(
        'mlp.', 'mlp-').split('.')
    name = name.replace('-', '.')
    if name == 'attn.qkv':
      for part, each in zip('qkv', np.split(value, 3), strict=True):
        out[f'{into}.{layer}.attention.{part}_proj.{kind}'] = each
    else:
      out[f'{into}.{layer}.{NAMES.get(name, name)}.{kind}'] = value
  return out


def vit(model, params):
  """A ViT under the names of transformers."""
  tensors = to_timm(model, params)
  out = {'embeddings.cls_token': tensors['cls_token'], 'embeddings.position_embeddings': tensors['pos_embed'],
         **{f'embeddings.patch_embeddings.projection.{k}': tensors[f'patch_embed.proj.{k}'] for k in ('weight', 'bias')},
         **{f'layernorm.{k}': tensors[f'norm.{k}'] for k in ('weight', 'bias')}}
  return out | blocks({k: v for k, v in tensors.items() if k.startswith('blocks.')}, 'layers')


def decoder(params):
  """Our decoder under the names of transformers, with MAE's fixed positions."""
  positions = np.pad(sincos(SIZE // PATCH, DECODER), ((1, 0), (0, 0)))[None]
  dense = lambda name, p: {f'{name}.weight': p['kernel'].T, f'{name}.bias': p['bias']}
  layers = blocks(state_dict.write_blocks(state_dict.host(params)['transformer']['blocks']), 'decoder_layers')
  return {'mask_token': params['mask_token'][None], 'decoder_pos_embed': positions, **dense('decoder_embed', params['embed']), **layers,
          'decoder_norm.weight': params['norm']['scale'], 'decoder_norm.bias': params['norm']['bias'],
          **dense('decoder_pred', params['predict'])}


def load(net, tensors):
  """The module in float64 with these tensors, no more and no fewer."""
  net.double().load_state_dict({k: in_torch(np.asarray(v, np.float64)) for k, v in tensors.items()})
  return net.eval()


def batch_of(data):
  return {'image': jnp.asarray(data), 'channels': jnp.tile(jnp.arange(3), (COUNT, 1))}


def ours(objective, batch, key):
  """Random weights, the loss and its gradients."""
  boxed = objective.init(jax.random.key(0), batch)
  params = weights(jax.tree.map(lambda x: getattr(x, 'value', x), boxed['params'],
                                is_leaf=lambda x: hasattr(x, 'value')))
  loss = lambda p: objective.loss({'params': p, 'target': {}, 'extra': {}}, batch, key, 0)[0]
  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  return params, float(value), jax.tree.map(np.asarray, grads)


def same(have, want):
  expected = want.grad.numpy()
  assert np.abs(expected).max() > 1e-5
  np.testing.assert_allclose(have.reshape(expected.shape), expected, atol=1e-4 * np.abs(expected).max())


def test_mae():
  objective = MAE(encoder(**MAE.DEFAULTS['encoder']), decoder_dim=DECODER, decoder_depth=DEPTH, decoder_heads=HEADS)
  data, key = images(1, SIZE)[0][:, 0], jax.random.key(5)
  params, value, grads = ours(objective, batch_of(data), key)
  hidden = np.asarray(objective._mask(jax.random.split(key)[0], batch_of(data)).hidden > 0)
  config = transformers.ViTMAEConfig(**SHAPE, norm_pix_loss=True, decoder_hidden_size=DECODER,
                                     decoder_num_hidden_layers=DEPTH, decoder_num_attention_heads=HEADS,
                                     decoder_intermediate_size=4 * DECODER, mask_ratio=0.75)
  tensors = {f'vit.{k}': v for k, v in vit(objective.encoder, params['encoder']).items()}
  tensors |= {f'decoder.{k}': v for k, v in decoder(params['decoder']).items()}
  net = load(transformers.ViTMAEForPreTraining(config), tensors)
  out = net(pixels(data), noise=in_torch(hidden + 1e-3 * np.arange(hidden.shape[1])))
  np.testing.assert_array_equal(out.mask.numpy() > 0, hidden)
  out.loss.backward()
  assert value == pytest.approx(out.loss.item(), rel=1e-5)
  same(grads['encoder']['cls_token'], net.vit.embeddings.cls_token)
  same(grads['encoder']['transformer']['blocks']['mlp']['fc1']['kernel'][0].T, net.vit.layers[0].mlp.fc1.weight)
  same(grads['decoder']['mask_token'], net.decoder.mask_token)
  same(grads['decoder']['predict']['kernel'].T, net.decoder.decoder_pred.weight)


def test_simmim():
  objective = SimMIM(encoder(mask_token=True), mask_size=2 * PATCH)
  data, key = images(1, SIZE)[0][:, 0], jax.random.key(5)
  params, value, grads = ours(objective, batch_of(data), key)
  hidden = np.asarray(objective._mask(jax.random.split(key)[0], batch_of(data)))
  net = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SHAPE, encoder_stride=PATCH))
  tensors = {f'vit.{k}': v for k, v in vit(objective.encoder, params['encoder']).items()}
  tensors['vit.embeddings.mask_token'] = params['encoder']['mask_token'][None]
  kernel = params['head']['kernel'].reshape(DIM, PATCH * PATCH, 3)  # theirs: channels first, for a pixel shuffle
  tensors['decoder.0.weight'] = kernel.transpose(2, 1, 0).reshape(-1, DIM)[..., None, None]
  tensors['decoder.0.bias'] = params['head']['bias'].reshape(PATCH * PATCH, 3).T.reshape(-1)
  net = load(net, tensors)
  out = net(pixels(data), bool_masked_pos=in_torch(hidden))
  out.loss.backward()
  assert value == pytest.approx(out.loss.item(), rel=1e-5)
  same(grads['encoder']['mask_token'], net.vit.embeddings.mask_token)
  same(grads['encoder']['transformer']['blocks']['mlp']['fc1']['kernel'][0].T, net.vit.layers[0].mlp.fc1.weight)
