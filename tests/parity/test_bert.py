"""BERT beside transformers' BertModel of a tiny config: tokens, sums of layers and gradients of the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.text import registry as text
from tests.parity.common import assert_same

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers', reason="pip install 'jaxmed[parity]'")

DIM, DEPTH, HEADS, LENGTH = 32, 4, 4, 9
LINEAR = {'attn.proj': 'attention.output.dense', 'mlp.fc1': 'intermediate.dense', 'mlp.fc2': 'output.dense'}


def ours(model):
  """A BertModel's weights as ours."""
  state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
  norm = lambda name: {'scale': state[f'{name}.weight'], 'bias': state[f'{name}.bias']}
  blocks = []
  for i in range(DEPTH):
    layer = f'encoder.layer.{i}'
    qkv = lambda kind, layer=layer: [state[f'{layer}.attention.self.{n}.{kind}'] for n in ('query', 'key', 'value')]
    dense = {name: {'kernel': state[f'{layer}.{there}.weight'].T, 'bias': state[f'{layer}.{there}.bias']}
             for name, there in LINEAR.items()}
    fused = {'kernel': np.stack([w.T.reshape(DIM, HEADS, -1) for w in qkv('weight')], axis=1),
             'bias': np.stack([b.reshape(HEADS, -1) for b in qkv('bias')])}
    blocks.append({'attn': {'qkv': fused, 'proj': dense['attn.proj']}, 'norm1': norm(f'{layer}.attention.output.LayerNorm'),
                   'mlp': {'fc1': dense['mlp.fc1'], 'fc2': dense['mlp.fc2']}, 'norm2': norm(f'{layer}.output.LayerNorm')})
  table = lambda name: state[f'embeddings.{name}_embeddings.weight']
  return {'token_embed': table('word'), 'pos_embed': table('position'), 'type_embed': table('token_type'),
          'embed_norm': norm('embeddings.LayerNorm'), 'transformer': {'blocks': jax.tree.map(lambda *x: np.stack(x), *blocks)}}


def test_bert():
  torch.manual_seed(0)
  config = transformers.BertConfig(vocab_size=50, hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
                                   intermediate_size=4 * DIM, max_position_embeddings=LENGTH, initializer_range=0.3,
                                   hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
  model = transformers.BertModel(config, add_pooling_layer=False).eval()
  with torch.no_grad():
    for name, p in model.named_parameters():
      if name.endswith('bias') or 'LayerNorm' in name:
        p.add_(0.2 * torch.randn_like(p))
  rng = np.random.default_rng(0)
  ids = rng.integers(1, 50, (4, LENGTH)) * (np.arange(LENGTH) < np.array([9, 5, 7, 2])[:, None])
  types, real = rng.integers(0, 2, ids.shape), ids != 0
  out = model(torch.as_tensor(ids), torch.as_tensor(real.astype(int)), torch.as_tensor(types), output_hidden_states=True)
  sums = torch.stack(out.hidden_states[-3:]).sum(dim=0)
  weight = rng.normal(size=sums.shape) * real[..., None]
  (sums * torch.as_tensor(weight, dtype=torch.float32)).sum().backward()
  network = text.create_text('bert_base', LENGTH, vocab_size=50, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, layers=3)
  params = jax.tree.map(jnp.asarray, ours(model))

  def loss(params):
    tokens = network.apply({'params': params}, ids, types=types).patches
    return (tokens * weight).sum(), tokens

  (_, tokens), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  assert_same(np.asarray(tokens)[real], sums.detach().numpy()[real])
  last = network.clone(layers=1).apply({'params': params}, ids, types=types)
  assert_same(np.asarray(last.patches)[real], out.last_hidden_state.detach().numpy()[real])
  want = model.embeddings.word_embeddings.weight.grad.numpy()
  np.testing.assert_allclose(np.asarray(grads['token_embed'])[1:], want[1:], atol=1e-4 * np.abs(want).max())
  query = model.encoder.layer[0].attention.self.query.weight.grad.numpy().T.reshape(DIM, HEADS, -1)
  np.testing.assert_allclose(np.asarray(grads['transformer']['blocks']['attn']['qkv']['kernel'])[0, :, 0], query,
                             atol=1e-4 * np.abs(query).max())
