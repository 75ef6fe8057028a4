"""Towers of texts that are frozen or adapted: what rests stays to the bit, products are plain, sections are checked."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.config import merge
from jaxmed.errors import UserError
from jaxmed.models.layers.adapters import is_adapter
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.train.build import adapting, assemble, resolve, rundir
from tests.test_recipes import SPECS
from tests.train.test_step import STEP

SIZES = {'embed_dim': 16, 'depth': 2, 'num_heads': 2}
USER = {'method': 'clip', 'model': 'channel_vit_micro/8', 'image_size': 16, 'batch_size': 4, 'steps': 4, 'encoder': SIZES,
        'learning_rate': 1e-2, 'objective': {'out_dim': 8}, 'optimizer': {'warmup_steps': 0}, 'loader': {'text_length': 7},
        'towers': {'text': {'options': SIZES}}}
LORA = {'init': 'RUN', 'init_map': 'params/text->text', 'towers': {'text': {'adapter': {'name': 'lora', 'rank': 2}}}}


def flat(tree):
  return {k: np.asarray(v) for k, v in flax.traverse_util.flatten_dict(tree, sep='/').items()}


def stepped(user):
  """(trainer, config, parameters before, parameters after) of one step on random records."""
  config = resolve.resolve(merge(USER, user), SPECS['demo'])
  trainer, mesh = assemble.build(config, SPECS['demo']), mesh_lib.make_mesh(config.mesh)
  shapes, rng = assemble.batch_shapes(config, SPECS['demo'], mesh), np.random.default_rng(0)
  state = trainer.initialize(trainer.abstract(shapes, mesh), shapes)
  most = {'image': 256, 'channels': 8, 'text': 257, 'channel_mask': 2}
  batch = {k: rng.integers(int(k == 'channel_mask'), most.get(k, 1) or 1, s.shape).astype(s.dtype) if k in most
           else np.arange(4, dtype=s.dtype) if k == 'index' else np.full(s.shape, 16 if k == 'extent' else -1, s.dtype)
           for k, s in shapes.items()}
  before = jax.tree.map(np.asarray, state.params)
  after, metrics = STEP(trainer, state, mesh_lib.put_batch(batch, mesh))
  assert np.isfinite(metrics['loss'])
  return trainer, config, before, jax.tree.map(np.asarray, after.params)


def moved(before, after):
  before, after = flat(before), flat(after)
  return {k for k in before if not np.array_equal(before[k], after[k])}


def test_a_frozen_tower():
  """freeze=text leaves the tower to the bit, its projection too; the image's side is trained."""
  _, _, before, after = stepped({'freeze': 'text'})
  names = moved(before, after)
  assert not [k for k in names if k.startswith('text/')]
  assert {'projection/kernel', 'encoder/transformer/blocks/mlp/fc1/kernel'} <= names


def test_a_locked_image_tower_and_adapters_of_texts():
  """LiT with LoRA: the encoder and the blocks of texts stay to the bit, adapters and heads alone are trained."""
  trainer, config, before, after = stepped(merge(LORA, {'freeze': 'encoder', 'towers': {'text': {
      'model': 'bert_micro', 'options': {'pool': 'attention'}}}}))
  names = moved(before, after)
  assert {k for k in names if not is_adapter(tuple(k.split('/')))} == {
      'text/head/kernel', 'text/pool/query', 'projection/kernel', 'similarity/scale'}
  assert {f'text/transformer/blocks/attn/adapter_{p}/up/kernel' for p in 'qv'} <= names
  said = adapting.told(config, trainer.optimizer, after)
  count = sum(x.size for k, x in flat(after).items() if not k.startswith('text/') or k in names or 'adapter' in k)
  assert said.startswith(f'adapter lora of text (rank 2, alpha 4, targets q,v, dropout 0): {count:,} of ')
  network, ids = trainer.objective.model_of('text'), jnp.asarray([[5, 9, 3, 0, 0, 0, 0]])
  plain, weights = rundir.product(network, after['text'])
  assert plain.adapter is None and not [k for k in flat(weights) if 'adapter' in k]
  np.testing.assert_allclose(plain.apply({'params': weights}, ids).mean,
                             network.apply({'params': after['text']}, ids).mean, atol=1e-5)


@pytest.mark.parametrize('values, words', [
    (merge(LORA, {'towers': {'text': {'adapter': {'name': 'vpt'}}}}), "towers.text.adapter.name 'vpt': choose one of lora"),
    (merge(LORA, {'towers': {'text': {'adapter': {'rnk': 1}}}}), "did you mean 'rank'"),
    (merge(LORA, {'towers': {'text': {'adapter': {'targets': 'q,o'}}}}), "towers.text.adapter.targets 'o'"),
    (merge(LORA, {'towers': {'text': {'adapter': {'dropout': 1.0}}}}), 'between 0 and 1, not 1.0'),
    (merge(LORA, {'towers': {'text': {'adapter': {'rank': 'two'}}}}), "adapter.rank takes a number of at least 0, not 'two'"),
    (merge(LORA, {'init': '', 'init_map': ''}), 'trains beside a frozen tower: give its weights, init=RUN init_map=params/text'),
    (merge(LORA, {'optimizer': {'scaling': 'mup'}}), 'take optimizer.scaling=standard'),
    ({'towers': {'image': {'adapter': {'name': 'lora'}}}}, "unknown key towers.image 'adapter'"),
])
def test_wrong_sections_are_told(values, words):
  with pytest.raises(UserError, match=words):
    resolve.resolve(merge(USER, values), SPECS['demo'])
