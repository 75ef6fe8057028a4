"""Methods on a bag of channels and on single channels: what is missing changes nothing, and what is there is learned."""

import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.augment.channels import single_channel
from jaxmed.augment.views import ViewMaker
from jaxmed.interop.weight_formats import export_file
from jaxmed.train.build import assemble, data_spec, resolve, weights

RNG = np.random.default_rng(7)
MASK = np.array([[True, True, True], [True, False, True], [False, True, False], [True, True, False]] * 2)
CHANNELS = tuple({'name': n, 'mean': 0.0, 'std': 1.0} for n in 'abcd')
SPEC = data_spec.DataSpec(CHANNELS, 3, True, 'float32', 64, (8, 8), ('x', 'y'), mixed=True)


def make(method, model='bag_micro/4', **augment):
  user = {'method': method, 'model': model, 'image_size': 8, 'batch_size': 8, 'steps': 4, 'augment': augment,
          'encoder': {'embed_dim': 16, 'depth': 1, 'num_heads': 2, 'drop_path': 0.0}, 'loader': {'label': 'label'}}
  if method in ('dino', 'ibot'):
    user['objective'] = {'out_dim': 32, 'hidden_dim': 16, 'bottleneck_dim': 8}
  return assemble.build(resolve.resolve(user, SPEC), SPEC)


def records():
  return {'image': jnp.asarray(RNG.normal(size=(8, 8, 8, 3)), jnp.float32), 'channel_mask': jnp.asarray(MASK),
          'channels': jnp.asarray(RNG.permuted(np.tile(np.arange(4), (8, 1)), axis=1)[:, :3]),
          'label': jnp.asarray([0, 1] * 4)}


@pytest.mark.parametrize('method', ['mae', 'dino', 'ibot', 'simclr', 'data2vec', 'supervised'])
def test_missing_channels_change_nothing(method):
  trainer, batch, key = make(method), records(), jax.random.key(0)

  @jax.jit
  def gradients(image):
    views = trainer.view(key, batch | {'image': image})
    variables = nn.unbox(trainer.objective.init(key, views))

    def loss(params):
      return trainer.objective.loss(variables | {'params': params}, views, key, jnp.asarray(1))[0]

    value, grads = jax.value_and_grad(loss)(variables['params'])
    return value, grads['encoder']

  whole = gradients(batch['image'])
  holes = gradients(jnp.where(MASK[:, None, None], batch['image'], jnp.nan))
  jax.tree.map(np.testing.assert_array_equal, whole, holes)
  assert np.isfinite(whole[0]) and all(np.isfinite(g).all() for g in jax.tree.leaves(whole))
  assert np.abs(whole[1]['patch_embed']['kernel']).max() > 0


def test_one_channel_of_each():
  draws = np.asarray(jax.vmap(lambda key: single_channel(key, jnp.asarray(MASK)))(jax.random.split(jax.random.key(0), 600)))
  assert (draws.sum(axis=2) == 1).all() and not draws[:, ~MASK].any()
  np.testing.assert_allclose(draws[:, :4].mean(axis=0), MASK[:4] / MASK[:4].sum(axis=1, keepdims=True), atol=0.08)
  assert len(np.unique(draws[:, 0].argmax(axis=1) * 3 + draws[:, 4].argmax(axis=1))) == 9  # each sample its own


def test_views_of_one_channel_have_one_slot():
  """All views of a sample show the same channel, by its name; otherwise masks say which."""
  batch = records()
  batch['image'] = batch['channels'][:, None, None].astype(jnp.float32) + jnp.zeros((8, 8, 8, 1))  # its own id
  view = ViewMaker((8, 8), (0.0,) * 4, (1.0,) * 4, scale=(1.0, 1.0), views=2, local_views=1, local_size=(4, 4),
                   channel_sampling='single', channel_views='shared', teacher_channels='same')
  seen = set()
  for seed in range(4):
    out = jax.jit(view)(jax.random.key(seed), batch)
    names = np.asarray(out['global']['channels'])
    assert names.shape == (8, 2, 1) and (names[:, 0] == names[:, 1]).all() and 'channel_mask' not in out['global']
    np.testing.assert_array_equal(names[:, :1], out['local']['channels'])
    for b in range(8):
      assert names[b, 0, 0] in np.asarray(batch['channels'])[b][MASK[b]]
      np.testing.assert_allclose(out['global']['image'][b], float(names[b, 0, 0]), atol=1e-5)
    seen.add(tuple(names[:, 0, 0]))
  assert len(seen) > 1
  for options in ({'channel_views': 'each'}, {'teacher_channels': 'all'}):
    out = dataclasses.replace(view, **options)(jax.random.key(0), batch)['global']
    assert out['image'].shape[-1] == 3 and (np.asarray(out['channel_mask']).sum(axis=2) == 1).all()


def test_packed_rows_are_the_same():
  trainer = make('supervised')
  encoder, batch = trainer.objective.encoder, records()
  params = nn.unbox(jax.jit(encoder.init)(jax.random.key(0), batch['image']))['params']
  run = lambda model: jax.jit(lambda x: model.apply({'params': params}, x, batch['channels'], batch['channel_mask']))
  want, got = run(encoder)(batch['image']), run(encoder.clone(packing=0.75))(batch['image'])
  np.testing.assert_allclose(got.cls, want.cls, atol=2e-5)
  np.testing.assert_allclose(got.mean, want.mean, atol=2e-5)


@pytest.mark.parametrize('model', ['channel_vit_micro/4', 'bag_micro/4'])
def test_a_channel_vit_starts_from_single_channels(tmp_path, model):
  """IC-ViT: the bag's weights, and embeddings of channels as they were drawn; of one channel the features are the same."""
  first, second, batch = make('dino'), make('supervised', model), records()
  bag = nn.unbox(jax.jit(first.objective.encoder.init)(jax.random.key(1), batch['image']))['params']
  file = tmp_path / 'bag.safetensors'
  export_file(file, 'jaxmed', first.objective.encoder.clone(mask_token=False), bag,
              {'channels': [dict(c) for c in CHANNELS[:2]], 'feature': 'cls', 'method': 'dino'})
  config = resolve.resolve({'method': 'supervised', 'model': model, 'image_size': 8, 'batch_size': 8, 'steps': 4,
                          'init': str(file), 'loader': {'label': 'label'},
                          'encoder': {'embed_dim': 16, 'depth': 1, 'num_heads': 2}}, SPEC)
  own = nn.unbox(jax.jit(second.objective.init)(jax.random.key(2), batch))
  given = weights.given_weights(config, types.SimpleNamespace(**own), SPEC.vocabulary)['params']['encoder']
  fresh = own['params']['encoder']
  assert ('channel_embed' in given) == (model == 'channel_vit_micro/4')
  for name, value in given.items():
    want = fresh if name == 'channel_embed' else bag
    jax.tree.map(np.testing.assert_array_equal, value, want[name])
  one = batch['image'][..., :1]
  given = given | ({'channel_embed': jnp.zeros((4, 16))} if 'channel_embed' in given else {})
  got = second.objective.encoder.apply({'params': given}, one, jnp.ones((8, 1), int)).cls
  np.testing.assert_allclose(got, first.objective.encoder.apply({'params': bag}, one).cls, atol=2e-5)
