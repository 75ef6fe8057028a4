"""Methods of several modalities: losses from the towers' vectors in float64, what is missing, who is trained, bad input."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.models.signals.registry import create_signal, create_table
from jaxmed.models.text.registry import create_text
from jaxmed.objectives import METHODS, default_options, modalities
from jaxmed.objectives.networks import Clock
from jaxmed.train.build import assemble, resolve, towers
from tests.objectives import siamese_fakes as fakes
from tests.objectives.test_paired import clip_reference
from tests.objectives.test_symile import reference as symile_reference
from tests.test_recipes import SPECS

COLUMNS = [{'name': n, 'mean': 0.0, 'std': 2.0} for n in ('age', 'ph')]
OPTIONS = {'symile': dict(out_dim=6), 'more': dict(out_dim=6, hidden_dim=7, feature='mean'),
           'fusion': dict(num_classes=3, kind='early', dim=6, hidden=8), 'gtp4o': dict(num_classes=3, dim=8, depth=1, hidden=8)}


def start(name, **options):
  """(objective, variables, batch) of five records: the second has no signal, the third no text, the fourth no table."""
  beside = {'text': create_text('text_micro', 6, **fakes.TINY), 'signal': create_signal('channel_vit_micro/5', 10, 2, **fakes.TINY),
            'table': create_table('table_mlp', COLUMNS, embed_dim=5, hidden=(6,))}
  encoder = create_model('vit_micro/4', (8, 8), 2, **fakes.TINY)
  objective = METHODS[name](encoder, towers=FrozenDict(beside), **OPTIONS[name] | options)
  rng = np.random.default_rng(0)
  text = rng.integers(1, 257, (5, 6))
  signal, table = rng.normal(size=(5, 10, 2)), rng.normal(size=(5, 2))
  steps, text[2], table[3], table[0, 1] = np.ones((5, 10), bool), 0, np.nan, np.nan
  steps[1] = False
  data = {'image': rng.normal(size=(5, 8, 8, 2)), 'channels': np.tile(np.arange(2, dtype=np.int32), (5, 1)),
          'text': text.astype(np.int32), 'signal': signal, 'signal_mask': steps, 'table': table,
          'label': np.array([0, 1, 2, -1, 1], np.int32), 'index': np.arange(5, dtype=np.int32)}
  data = {k: jnp.asarray(v, jnp.float32 if v.dtype == np.float64 else v.dtype) for k, v in data.items()}
  shapes = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0), data))
  draw = lambda path, x: jnp.asarray(float(path[-1].key in ('scale', 'var')) + 0.3 * np.abs(rng.normal(size=x.shape)), x.dtype)
  return objective, jax.tree_util.tree_map_with_path(draw, shapes), data


@functools.partial(jax.jit, static_argnums=(0, 4))
def step(objective, variables, data, count=0, train=True):
  def cost(params):
    value, (metrics, _) = objective.loss(variables | {'params': params}, data, jax.random.key(3), count, train)
    features, there, _ = objective.encoded(params, data, None, train)
    return value, (metrics, objective.vectors(features), there)

  return jax.value_and_grad(cost, has_aux=True)(variables['params'])


def trained(grads):
  return {path[0].key for path, x in jax.tree_util.tree_leaves_with_path(grads) if np.any(x)}


THERE = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]], bool)
f64 = lambda x: np.asarray(x, np.float64)


@pytest.mark.parametrize('normalize', ['unit', 'layer_norm'])
def test_symile_with_what_is_missing(normalize, monkeypatch):
  objective, variables, data = start('symile', normalize=normalize)
  (loss, (metrics, vectors, there)), grads = step(objective, variables, data)
  np.testing.assert_array_equal(there, THERE)
  params, out = variables['params'], []
  for m, name in enumerate(objective.modalities):
    head = jax.tree.map(f64, params['heads'][name])
    x = np.where(THERE[:, m, None], f64(vectors[m]), head['missing']) @ head['project']['kernel'] + head['project']['bias']
    x = fakes.unit(x) if normalize == 'unit' else (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    out.append(x if normalize == 'unit' else x * head['norm']['scale'] + head['norm']['bias'])
  monkeypatch.setattr('tests.objectives.test_symile.KEY', jax.random.split(jax.random.key(3))[1])
  want = symile_reference(out, float(params['similarity']['scale']), np.ones(5, bool), 'shuffled')
  assert float(loss) == pytest.approx(want, rel=5e-5)
  assert trained(grads) == {'encoder', 'text', 'signal', 'table', 'heads', 'similarity'}
  missing = grads['heads']
  assert not np.any(missing['image']['missing']) and all(np.any(missing[n]['missing']) for n in ('text', 'signal', 'table'))
  assert {'from_image', 'from_table', 'logit_scale'} <= set(metrics)
  padded = data | {'index': data['index'].at[4].set(-1), 'image': data['image'].at[4].add(3.0)}
  again = padded | {'image': data['image']}
  assert float(step(objective, variables, padded)[0][0]) == pytest.approx(float(step(objective, variables, again)[0][0]), rel=1e-5)


def test_more_has_no_term_without_the_report():
  objective, variables, data = start('more')
  (loss, (_, vectors, _)), grads = step(objective, variables, data, 0, False)
  z = {}
  for name, x in zip(objective.modalities, vectors):
    p, x = jax.tree.map(f64, variables['params']['projectors'][name]), f64(x)
    for i in (0, 1):
      x = x @ p[f'dense{i}']['kernel']
      x = (x - p[f'norm{i}']['mean']) / np.sqrt(p[f'norm{i}']['var'] + 1e-5) * p[f'norm{i}']['scale'] + p[f'norm{i}']['bias']
      x = np.maximum(x, 0) if i == 0 else x
    z[name] = x
  s, want = -np.log(0.02), 0.0
  for m, name in enumerate(objective.modalities):
    if name != 'text':
      want += clip_reference(z[name], z['text'], s, None, THERE[:, m] & THERE[:, 1], 0.5)
  assert float(loss) == pytest.approx(want, rel=1e-4)
  assert trained(grads) == {'encoder', 'text', 'signal', 'table', 'projectors'}
  alone = data | {'text': data['text'].at[1:].set(0)}  # one pair: nothing to tell it from
  (loss, _), grads = step(objective, variables, alone, 0, False)
  assert abs(float(loss)) < 1e-5 and not any(np.abs(x).max() > 1e-5 for x in jax.tree.leaves(grads['signal']))


@pytest.mark.parametrize('name', ['fusion', 'gtp4o'])
def test_fusion_learns_of_labelled_records(name):
  objective, variables, data = start(name)
  (loss, (metrics, *_)), grads = step(objective, variables, data)
  logits = f64(jax.jit(objective.predict)(variables, data))
  assert logits.shape == (5, 3) and trained(grads) == {'encoder', 'text', 'signal', 'table', 'head'}
  entropy = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(5), np.maximum(data['label'], 0)]
  known = np.asarray(data['label']) >= 0
  assert float(loss) == pytest.approx(entropy[known].mean(), rel=1e-4)
  assert float(metrics['accuracy']) == pytest.approx((logits.argmax(1) == np.asarray(data['label']))[known].mean())
  if name == 'gtp4o':
    assert np.any(grads['head']['completion']['prompts'])


def test_staged_training_takes_modalities_one_by_one_first():
  objective, variables, data = start('fusion', staged=0.5, kind='late')
  objective = dataclasses.replace(objective, clock=Clock(10))
  (first, (_, vectors, there)), early = step(objective, variables, data, 4)
  (joint, (metrics, *_)), late = step(objective, variables, data, 5)
  assert trained(early) == {'encoder', 'text', 'signal', 'table', 'alone'}
  assert trained(late) == {'encoder', 'text', 'signal', 'table', 'head'}
  terms = []
  for m, name in enumerate(objective.modalities):
    p = jax.tree.map(f64, variables['params']['alone'][name])
    logits, use = f64(vectors[m]) @ p['kernel'] + p['bias'], np.asarray(there[:, m] & (data['label'] >= 0))
    terms.append((np.log(np.exp(logits).sum(1)) - logits[np.arange(5), np.maximum(data['label'], 0)])[use].mean())
  assert float(first) == pytest.approx(np.mean(terms), rel=1e-4) and float(joint) == pytest.approx(float(metrics['cross_entropy']))


def test_leads_are_sampled_in_training_alone():
  objective, variables, data = start('symile', lead_sampling='hcs')
  vector = jax.jit(lambda key, train: objective.vectors(objective.encoded(variables['params'], data, key, train)[0])[2],
                   static_argnums=1)
  draws = [np.asarray(vector(jax.random.key(k), True)) for k in range(6)]
  assert len({x.tobytes() for x in draws}) > 1
  np.testing.assert_array_equal(vector(jax.random.key(0), False), vector(jax.random.key(1), False))


def spec_of(**changes):
  return dataclasses.replace(SPECS['demo'], signal=(40, 2), table=tuple(COLUMNS), **changes)


def test_a_run_has_the_modalities_whose_towers_it_names():
  user = {'method': 'symile', 'model': 'vit_micro/8', 'image_size': 16, 'loader': {'table': 'age,ph'},
          'towers': {'signal': {'model': 'resnet_micro'}, 'table': {'model': 'table_micro'}}}
  config = resolve.resolve(user, spec_of())
  objective = assemble.build(config, spec_of()).objective
  assert objective.modalities == ('image', 'signal', 'table') and objective.towers['table'].columns == ('age', 'ph')
  shapes = assemble.batch_shapes(config, spec_of())
  assert shapes['table'].shape[1:] == (2,) and shapes['signal'].shape[1:] == (40, 2) and 'text' not in shapes
  plain = resolve.resolve({k: v for k, v in user.items() if k not in ('towers', 'loader')}, SPECS['demo'])
  assert assemble.build(plain, SPECS['demo']).objective.modalities == ('image', 'text')
  assert towers.fields_of(METHODS['symile'], plain.towers) == ('image', 'text')


@pytest.mark.parametrize('towers, loader, words', [
    ({'table': {'model': 'table_mlp'}}, {}, 'takes a table: name columns of numbers, loader.table='),
    ({'signal': {'model': 'vit_micro/25', 'init': 'RUN'}}, {}, 'a tower of signals begins fresh'),
    ({'signal': {'options': {'normalize': 'lead'}}}, {}, 'towers.signal.model=channel_vit_micro/25'),
    ({'sginal': {'model': 'vit_micro/25'}}, {}, "'sginal'.*signal")])
def test_bad_configs(towers, loader, words):
  user = {'method': 'symile', 'model': 'vit_micro/8', 'image_size': 16, 'towers': towers, 'loader': loader}
  with pytest.raises(UserError, match=words):
    resolve.resolve(user, dataclasses.replace(spec_of(), table=()))


def test_bad_options():
  encoder = fakes.encoder('vit')
  signal = FrozenDict(signal=create_signal('resnet_micro', 64, 2))
  for name, options, words in (
      ('symile', dict(normalize='units'), 'objective.normalize'), ('symile', dict(out_dim=0), 'must be positive'),
      ('symile', dict(lead_sampling='hcs', towers=signal), 'needs a tower with tokens of leads'),
      ('more', dict(temperature=0.0), 'must be positive'), ('fusion', dict(kind='middle'), 'objective.kind'),
      ('fusion', dict(dim=9, kind='graph'), 'num_heads 4 does not divide'), ('fusion', dict(staged=1.0), 'must lie in'),
      ('gtp4o', dict(kind='late'), 'gtp4o is a graph'), ('gtp4o', dict(prompts=0), 'must be positive')):
    assert set(options) - {'towers'} <= set(default_options(name))
    with pytest.raises(UserError, match=words):
      METHODS[name](encoder, **options)
  assert modalities.NAMES == METHODS['symile'].FIELDS
