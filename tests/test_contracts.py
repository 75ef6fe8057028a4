"""Encoders, methods and batches are what the contracts say; by shapes alone, nothing is computed."""

import dataclasses
import functools
import inspect
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from jaxmed import contracts
from jaxmed.augment.views import ViewMaker
from jaxmed.data.feed import fields
from jaxmed.encoder import Encoder
from jaxmed.errors import UserError
from jaxmed.evaluate.attention import attention_maps
from jaxmed.evaluate.protocols import PROTOCOLS
from jaxmed.evaluate.protocols.channels import ByChannels
from jaxmed.models import create_model, registry
from jaxmed.models.layers.defaults import EncoderDefaults
from jaxmed.models.layers.tokens import Features
from jaxmed.models.text.registry import create_text
from jaxmed.objectives import METHODS, feature_of, filled, networks
from jaxmed.train.evaluators import EVALUATORS

TINY = dict(embed_dim=16, depth=1, num_heads=2)
MODELS = {'vit': ('vit_micro/4', 8, TINY), 'channel_vit': ('channel_vit_micro/4', 8, TINY),
          'bag': ('bag_micro/4', 8, TINY), 'resnet': ('resnet_micro', 16, dict(depths=(1, 1), dims=(8, 16), stem_width=8)),
          'convnextv2': ('convnextv2_micro', 16, dict(depths=(1, 1), dims=(8, 16))), 'caformer': ('caformer_micro', 16, dict(depths=(1, 1), dims=(32, 64))),
          'pvt_v2': ('pvt_v2_micro', 16, dict(depths=(1, 1), dims=(8, 16), num_heads=(1, 2), reductions=(2, 1),
                                              mlp_ratios=(2, 2))),
          'unet': ('resenc_micro', 16, dict(depths=(1, 1), dims=(8, 16), stem_width=8)),
          'video_resnet': ('r3d_micro', (8, 16, 16), dict(depths=(1, 1), dims=(8, 16), stem_width=8)),
          'swin': ('swin_micro', 16, dict(depths=(1, 1), dims=(8, 16), num_heads=(1, 2))),
          'swin_unetr': ('swin_unetr_micro', 16, dict(depths=(1, 1), dims=(8, 16), num_heads=(1, 2))),
          'dformer': ('dformer_micro', 16, dict(depths=(1, 1), dims=(8, 16), num_heads=(1, 2))),
          'swtr_unet': ('swtr_unet_micro', 16, dict(depths=(1, 1), dims=(8, 16), stem_width=8, transformer_depth=1))}
METHODS_OF = dict(one_pass=('one_pass',), embed_patches=('embed_patches', 'encode'), project=('project',),
                  channel_vectors=('channel_vectors',), penalty=('penalty',), concatenated=('concatenated',))
SPEC = jax.ShapeDtypeStruct


def model_of(family, **options):
  name, size, fields = MODELS[family]
  return create_model(name, size, 3, **(fields | options))


def image_of(model, batch=2, channels=3, size=None):
  return jnp.zeros((batch, *(size or model.image_size), channels))


@functools.cache
def initial(model):
  """Shapes of the variables."""
  return jax.eval_shape(lambda: model.init(jax.random.key(0), image_of(model)))


def applied(model, *args, **kwargs):
  """Shapes of what the module gives."""
  return jax.eval_shape(lambda v: model.apply(v, *args, **kwargs), initial(model))


def test_every_family_is_tested():
  assert set(MODELS) == set(registry.FAMILIES)


@pytest.mark.parametrize('family', MODELS)
def test_an_encoder_has_what_the_contract_names(family):
  model = model_of(family)
  assert isinstance(model, contracts.Encoder) and isinstance(model, EncoderDefaults)
  assert 'supports' not in registry.describe(model)  # a constant of the class, no option
  features = applied(model, image_of(model))
  assert isinstance(features, Features) and features.patches.shape[2] == model.embed_dim
  assert (features.cls is not None) == model.class_token
  assert model.num_prefix_tokens == int(model.class_token) + model.num_registers
  if model.per_channel:
    assert features.grid[0] == 3


@pytest.mark.parametrize('family', MODELS)
def test_supports_is_true(family):
  model = model_of(family)
  for name, methods in METHODS_OF.items():
    declared = dataclasses.asdict(model.supports)[name]
    assert all(hasattr(type(model), method) == declared for method in methods), name
  assert ('sizes' in inspect.signature(type(model).__call__).parameters) >= model.supports.sizes
  sizes = jnp.asarray([model.image_size] * 2)
  if model.supports.sizes:
    assert applied(model, image_of(model), sizes=sizes).valid.shape == (2, 4 * (3 if model.per_channel else 1))
  else:
    with pytest.raises((TypeError, ValueError)):
      applied(model, image_of(model), sizes=sizes)


@pytest.mark.parametrize('family', MODELS)
def test_levels(family):
  model = model_of(family)
  assert model.supports.levels == (model.num_levels > 0)
  if model.supports.levels:
    features = applied(model, image_of(model), levels=(model.num_levels,))
    level, = features.levels
    assert level.patches.shape == features.patches.shape and level.grid == features.grid


@pytest.mark.parametrize('family', [f for f in MODELS if registry.FAMILIES[f].supports.one_pass])
def test_one_pass(family):
  model = model_of(family)
  groups = [{'image': image_of(model, 4)}, {'image': image_of(model, 6, size=(4, 4))}]
  wide, narrow = applied(model, groups, 2, method='one_pass')
  channels = 3 if model.per_channel else 1
  assert wide.patches.shape == (4, 4 * channels, 16) and narrow.patches.shape == (6, channels, 16)


@pytest.mark.parametrize('family', [f for f in MODELS if registry.FAMILIES[f].supports.embed_patches])
def test_patches_can_be_left_out(family):
  model = model_of(family)
  some = jnp.zeros((2, 2), jnp.int32)
  tokens = lambda m, image: m.encode(m.embed_patches(image).take(some))
  assert applied(model, image_of(model), method=tokens).patches.shape == (2, 2, 16)


@pytest.mark.parametrize('family', MODELS)
def test_methods_by_channel(family):
  model, supports = model_of(family), model_of(family).supports
  if supports.project:
    assert applied(model, image_of(model), method='project').shape == (2, 3, 4, 16)
  if supports.channel_vectors:
    assert applied(model, method='channel_vectors').shape == (3, 16)
  if supports.concatenated:
    assert applied(model, image_of(model), method='concatenated').cls.shape == (2, 3 * 16)
  if supports.penalty:
    assert model.penalty({}) is None
    pruned = model_of(family, channel_embedding='hashed', hash_prune=0.1)
    shapes = jax.eval_shape(lambda: nn.unbox(pruned.init(jax.random.key(0), image_of(pruned))['params']))
    assert jax.eval_shape(pruned.penalty, shapes).shape == ()


@pytest.mark.parametrize('family', [f for f in MODELS if not registry.FAMILIES[f].supports.attention_maps])
def test_no_attention_maps(family):
  model = model_of(family)
  encoder = Encoder(model, {}, tuple({'name': n, 'mean': 0.0, 'std': 1.0} for n in 'abc'))
  with pytest.raises(UserError, match='attention maps need'):
    attention_maps(encoder, np.zeros((1, *model.image_size, 3)))


def views(wanted=('image',), lead=(2,), **options):
  """Shapes of a view maker's output for a stored batch of 2 (or `lead`) with 3 channels that may be missing, and what is `wanted`."""
  maker = ViewMaker((8, 8), (0.0,) * 3, (1.0,) * 3, **options)
  found = fields.of(wanted, size=(12, 12), slots=3, dtype='uint8', signal=(7, 2), boxes=4, extent=len(wanted) > 1)
  stored = {name: SPEC(shape, dtype) for name, (shape, dtype) in fields.shapes(found, *lead).items()}
  if options.get('channel_sampling') == 'diverse':
    stored['similarity'] = SPEC((3, 3), jnp.float32)
  return stored, jax.eval_shape(lambda batch: maker(jax.random.key(0), batch), stored)


def test_a_batch_has_the_keys_that_are_listed():
  """Each key of the contract comes from some view maker or its input, and none comes that is not listed."""
  cases = [views(channel_sampling='hcs', sample_sizes=(4, 8)), views(channel_sampling='diverse'),
           views(views=2, local_views=2, local_size=(4, 4), gram_size=(16, 16), channel_sampling='hcs'),
           views(views=2, sample_sizes=(4, 8)), views(views=2, place=3, channel_sampling='hcs'),
           views(contracts.FIELDS), views(contracts.FIELDS, views=2, place=3, sample_sizes=(4, 8))]
  whole = {key for stored, out in cases for key in (*stored, *out)}
  assert whole == set(contracts.Batch.__annotations__)
  groups = {key for _, out in cases for group in ('global', 'local', 'gram') for key in out.get(group, ())}
  assert groups == set(contracts.Views.__annotations__)
  assert not any('extent' in out for _, out in cases)  # views have it no more
  shapes = cases[0][1]
  assert shapes['image'].shape == (2, 8, 8, 3) and shapes['sizes'].shape == (2, 2)
  assert shapes['channel_there'].shape == shapes['channel_mask'].shape == (2, 3)
  many = cases[2][1]
  assert many['global']['teacher_mask'].shape == (2, 2, 3) and many['gram']['image'].shape == (2, 2, 16, 16, 3)
  assert many['local']['image'].shape == (2, 2, 4, 4, 3) and not {'image', 'channels'} & set(many)
  for group, lead in ((cases[5][1], (2,)), (cases[6][1]['global'], (2, 2))):
    assert group['mask'].shape == (*lead, 8, 8) and group['boxes'].shape == (*lead, 4, 4)
    assert group['view_box'].shape == (*lead, 4) and group['view_flip'].shape == (*lead, 2)


@pytest.mark.parametrize('name', METHODS)
def test_a_method_is_an_objective(name):
  method = METHODS[name]
  encoder = model_of('vit', mask_token=True)
  words = {'text': create_text('text_micro', 256)} if 'text' in method.TOWERS else {}
  objective = method(encoder, **filled(method, towers=FrozenDict(words), rows=8, num_classes=3, num_prototypes=4, values=(0, 1), num_heads=2, patch_slices=2))
  assert isinstance(objective, contracts.Objective)
  features = ('cls', 'mean', '')  # '' of a method without features of images
  assert feature_of(objective) in features and method.FEATURE in features
  assert isinstance(objective.frozen(jnp.asarray(0)), Mapping)
  many = method.DEFAULTS.get('augment', {}).get('views', 1) > 1
  _, batch = views(('image', 'text') if words else ('image',), lead=(2, 4) if method.WINDOWS else (2,), **({'views': 2} if many else {}))
  shapes = jax.eval_shape(objective.init, jax.random.key(0), batch)
  assert set(shapes) == set(contracts.Variables.__required_keys__) and set(shapes['target']) <= set(shapes['params'])
  if shapes['target']:
    assert 0 <= float(objective.momentum(jnp.asarray(0))) <= 1
  else:
    with pytest.raises(NotImplementedError, match='momentum'):
      objective.momentum(jnp.asarray(0))
  shown = jax.eval_shape(objective.pictures, shapes, batch, jax.random.key(0)) if name == 'mae' else {}
  assert isinstance(shown, Mapping)


def test_what_measures_and_what_scores():
  assert all(isinstance(make(every=5), contracts.Evaluator) and make(every=5).every == 5 for make in EVALUATORS.values())
  assert contracts.Protocol is contracts.EvaluationProtocol
  for protocol in (*PROTOCOLS.values(), *map(ByChannels, PROTOCOLS.values())):
    assert isinstance(protocol, contracts.EvaluationProtocol) and dataclasses.is_dataclass(protocol)
    asked = set(inspect.signature(contracts.EvaluationProtocol.run).parameters) - {'self', 'options'}
    have = inspect.signature(type(protocol).run).parameters
    assert asked <= set(have) or 'options' in have


def test_a_quiet_encoder_is_the_same_without_what_is_random():
  encoder = model_of('channel_vit', pos='rope', drop_path=0.2, rope_rescale=2.0, channel_embedding='hashed',
                     hash_draw=True)
  quiet = networks.quiet(encoder)
  assert (quiet.drop_path, quiet.rope_rescale, quiet.hash_draw) == (0.0, 0.0, False)
  assert quiet == encoder.clone(drop_path=0.0, rope_rescale=0.0, hash_draw=False)
  assert networks.quiet(model_of('resnet')) == model_of('resnet')
