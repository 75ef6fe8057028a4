"""CLIP and SigLIP: the loss from the towers' vectors in float64, who gets gradients, limits of the scale, bad input."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from flax.core import FrozenDict

from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.models.text.registry import create_text
from jaxmed.objectives import networks
from jaxmed.objectives.paired.clip import CLIP, bounded, likeness
from jaxmed.objectives.paired.siglip import SigLIP
from jaxmed.train.build import assemble, records, resolve, wording
from tests.objectives import siamese_fakes as fakes
from tests.objectives.test_paired import clip_reference, siglip_reference
from tests.test_recipes import SPECS

METHODS = {'clip': CLIP, 'siglip': SigLIP}
WORDS = {CLIP: 'text_micro', SigLIP: 'text_siglip_micro'}
ENCODERS = {'channel_vit': ('channel_vit_micro/4', (8, 8), fakes.TINY),
            'resnet 3D': ('resnet_micro', (8, 16, 16), dict(depths=(1, 1), dims=(8, 16), stem_width=8))}


def start(method, kind):
  """(objective, variables, batch) of five records, one without a text."""
  family, size, options = ENCODERS[kind]
  words = create_text(WORDS[method], 6, **fakes.TINY)
  objective = method(create_model(family, size, 2, **options), towers=FrozenDict({'text': words}), out_dim=8)
  rng = np.random.default_rng(0)
  ids = rng.integers(1, 257, (5, 6)) * (np.arange(6) < rng.integers(2, 7, (5, 1)))
  ids[2] = 0
  there = np.ones((5, 2), bool)
  there[1, 1] = False
  image = np.where(there.reshape(5, *[1] * len(size), 2), rng.normal(size=(5, *size, 2)), np.nan)
  data = {'image': jnp.asarray(image, jnp.float32), 'channels': jnp.broadcast_to(jnp.arange(2), (5, 2)),
          'channel_mask': jnp.asarray(there), 'text': jnp.asarray(ids, jnp.int32)}
  shapes = fakes.nn.unbox(jax.eval_shape(objective.init, jax.random.key(0), data))
  draw = lambda path, x: jnp.asarray(float(path[-1].key in ('scale', 'var')) + 0.3 * rng.normal(size=x.shape), x.dtype)
  return objective, jax.tree_util.tree_map_with_path(draw, shapes), data


@functools.partial(jax.jit, static_argnums=0)
def step(objective, variables, data):
  def loss(params):
    value, (metrics, _) = objective.loss(variables | {'params': params}, data, jax.random.key(0), 0)
    image = objective.encoder.apply({'params': params['encoder']}, **networks.inputs(data), train=True,
                                    mutable=['stats'])[0].pooled(objective.feature)
    return value, (metrics, image, objective.text.apply({'params': params['text']}, data['text']).mean)

  return jax.value_and_grad(loss, has_aux=True)(variables['params'])


@pytest.mark.parametrize('name, kind', [('clip', 'channel_vit'), ('siglip', 'resnet 3D')])
def test_the_loss_and_who_is_trained(name, kind):
  objective, variables, data = start(METHODS[name], kind)
  (loss, (metrics, image, words)), grads = step(objective, variables, data)
  params = variables['params']
  image = np.asarray(image, np.float64) @ np.asarray(params['projection']['kernel'], np.float64)
  similarity = {k: float(x) for k, x in params['similarity'].items()}
  reference = clip_reference if name == 'clip' else siglip_reference
  counts = np.arange(5) != 2
  want = reference(image, np.asarray(words, np.float64), similarity['scale'], similarity.get('bias'), counts, 0.5)
  assert float(loss) == pytest.approx(want, rel=2e-5)
  for part in ('encoder', 'text', 'projection'):
    assert any(np.any(x) for x in jax.tree.leaves(grads[part])), part
  assert all(np.all(x) for x in jax.tree.leaves(grads['similarity']))
  assert np.any(grads['text']['token_embed'][0]) == (name == 'siglip')  # whose texts look at padding
  assert metrics['logit_scale'] == pytest.approx(np.exp(similarity['scale']), rel=1e-6)
  u = fakes.unit(image[counts])
  assert float(metrics['image_likeness']) == pytest.approx(((u @ u.T).sum() - 4) / 12, abs=1e-5)
  other = dict(data, image=data['image'].at[2].set(9.0), text=data['text'])
  if name == 'clip':  # where nothing normalises over the batch, a record without a text is not seen
    assert float(step(objective, variables, other)[0][0]) == pytest.approx(float(loss), rel=1e-5)


def test_a_collapse_is_seen():
  """One text for all images: texts are alike, and nothing is found."""
  objective, variables, data = start(CLIP, 'channel_vit')
  (_, (metrics, *_)), _ = step(objective, variables, data | {'text': jnp.broadcast_to(data['text'][:1], (5, 6))})
  assert float(metrics['text_likeness']) == pytest.approx(1, abs=1e-5)
  assert metrics['image_to_text'] == 0 and metrics['text_to_image'] <= 0.25
  assert float(likeness(jnp.eye(4), jnp.ones(4, bool))) == pytest.approx(0, abs=1e-6)


def test_the_scale_is_bounded():
  top = np.log(100.0)
  for x, g, want in ((1.0, -1.0, -1.0), (top + 0.1, -1.0, 0.0), (top + 0.1, 1.0, 1.0), (-0.1, 1.0, 0.0), (-0.1, -1.0, -1.0)):
    value, slope = jax.value_and_grad(lambda x: g * bounded(x, float(top)))(x)
    assert float(value) == pytest.approx(g * np.clip(x, 0, top), rel=1e-6) and float(slope) == want
  assert float(CLIP(fakes.encoder('vit')).similarity()['scale']) == pytest.approx(2.6593, abs=1e-4)
  siglip = SigLIP(fakes.encoder('vit')).similarity()
  assert float(siglip['scale']) == pytest.approx(np.log(10)) and float(siglip['bias']) == -10


def test_products_and_towers():
  objective, variables, _ = start(SigLIP, 'channel_vit')
  assert set(objective.products(variables)) == {'image', 'text'}
  assert objective.model_of('text').out_dim == 8 and objective.model_of('text').out_bias
  assert 'bias' in variables['params']['text']['head']


class Source:
  """Rows with texts."""

  path = 'corpus'

  def __init__(self, texts):
    self.texts = pa.chunked_array([pa.array(texts, pa.string())])

  def __len__(self):
    return len(self.texts)

  def column(self, name):
    return self.texts


def test_bad_input(capsys):
  encoder = fakes.encoder('vit')
  for options, words in ((dict(out_dim=0), 'objective.out_dim 0 must be positive'), (dict(weight=2.0), 'objective.weight 2.0'),
                         (dict(max_scale=10.0), 'objective.max_scale 10.0 must be 0 or at least 1 / temperature'),
                         (dict(towers=FrozenDict(text=encoder)), 'towers.text must be a model of texts.*not a ViT')):
    with pytest.raises(UserError, match=words):
      CLIP(encoder, **options)
  user = {'method': 'clip', 'model': 'vit_micro/8', 'image_size': 16}
  with pytest.raises(UserError, match="trains on the field 'text', which no record of the corpus has"):
    resolve.resolve(user, dataclasses.replace(SPECS['demo'], holds=()))
  for tower, words in (({'model': 'vit_micro/8'}, "unknown model of texts 'vit_micro/8'"),
                       ({'options': {'vocab_size': 100}}, 'vocab_size=100 is fewer than the 257 ids'),
                       ({'init': 'RUN', 'fixed': True}, 'towers.text.fixed: a tower of texts has a projection that is trained')):
    with pytest.raises(UserError, match=words):
      assemble.build(resolve.resolve(user | {'towers': {'text': tower}}, SPECS['demo']), SPECS['demo'])
  with pytest.raises(UserError, match="corpus has no record with a text: give jaxmed prepare a table with a column 'text'"):
    records.rows(types.SimpleNamespace(path='corpus', table=pa.table({'id': ['a']})), {'method': 'clip'})
  wording.tell({}, Source(['abc', 'abcdef', None]), 6)
  assert not capsys.readouterr().err
  wording.tell({}, Source(['abc', 'äbcdef', None]), 6)
  assert 'cuts 1 of 2 texts, the longest of 7 ids' in capsys.readouterr().err
  with pytest.raises(UserError, match='loader.text_length=2 cuts every text of corpus, of 3 to 7 ids'):
    wording.tell({}, Source(['abc', 'äbcdef', None]), 2)
