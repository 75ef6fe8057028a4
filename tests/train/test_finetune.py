"""Fine-tuning: the recipe of a family, what a run keeps and trains on, its control from scratch, and what is refused."""

import dataclasses
import json
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxmed import config as config_lib
from jaxmed import files
from jaxmed.augment.nnunet import NNUNET
from jaxmed.cli import main
from jaxmed.data.corpus.open import open_source
from jaxmed.errors import Stopped, UserError
from jaxmed.models import registry
from jaxmed.models.layers.adapters import is_adapter
from jaxmed.train import finetune, loop
from jaxmed.train.build import assemble, data_spec, resolve, rundir, weights
from jaxmed.train.build.adapting import TRAINING_ONLY
from jaxmed.train.build.towers import digest_of
from jaxmed.train.finetune import Request
from jaxmed.train.logs import read_rows
from tests.common import host, record_indices, same, saved_state, saved_steps
from tests.masks import tiles_with_masks

PLAIN = {name: (0.0,) for name in NNUNET}  # compiles sooner
FEW = {'augment': PLAIN, 'batch_size': 8, 'steps': 6, 'log_every': 1, 'checkpoint_every': 3, 'eval_every': 3, 'loader': {'threads': 1}}
LINEAR = FEW | {'objective': {'decoder': 'linear'}}


@pytest.fixture(scope='module')
def masks(tiles, tmp_path_factory):
  """48 tiles with masks of three classes: 24 train, of which 6 have none, 8 val, 16 test."""
  return tiles_with_masks(tiles, tmp_path_factory.mktemp('masks'))


@pytest.fixture(scope='module')
def both(trained, masks, tmp_path_factory):
  """A control of a segmentation: its folder and what it found."""
  out = tmp_path_factory.mktemp('control') / 'both'
  return out, finetune.control(Request(str(trained), str(masks), 'segment', 'mask', LINEAR), out, quiet=True)


def test_a_recipe_is_that_of_the_family(trained, masks):
  asked = Request(str(trained), str(masks), 'segment', 'mask', FEW)
  tuned, fresh = (finetune.recipe(dataclasses.replace(asked, scratch=s)) for s in (False, True))
  assert tuned['init'] == str(trained) and 'init' not in fresh
  assert (tuned['model'], tuned['encoder']['embed_dim'], tuned['image_size']) == ('channel_vit_micro/8', 32, (16, 16))
  assert (tuned['learning_rate'], fresh['learning_rate']) == (1e-4, 3e-4)  # Primus
  assert (tuned['optimizer']['layer_decay'], fresh['optimizer']['layer_decay']) == (0.75, 1.0)
  assert {k: tuned['optimizer'][k] for k in ('name', 'b2', 'clip', 'annealing')} == {
      'name': 'adamw', 'b2': 0.98, 'clip': 1.0, 'annealing': 'poly'}
  assert finetune.recipe(dataclasses.replace(asked, user={}))['augment']['rotation_probability'] == (0.2,)
  assert tuned['checkpoint'] == {'best': 'dice', 'best_mode': 'max'}
  same = lambda user: {k: v for k, v in user.items() if k not in ('init', 'learning_rate', 'optimizer')}
  assert same(tuned) == same(fresh)
  classify = finetune.recipe(Request(str(trained), str(masks), 'classify', 'half', FEW | {'optimizer': {'ema': 0.9}}))
  assert classify['learning_rate'] == pytest.approx(5e-4 * (8 / 256) ** 0.5, rel=1e-3)  # MAE
  assert classify['optimizer']['ema'] == 0.9 and classify['optimizer']['annealing'] == 'cosine'


@pytest.mark.parametrize('name, options', [
    ('vit_base/16', {}), ('vit_large/14', {'layer_scale': 1e-5}), ('channel_vit_micro/8', {'depth': 3}),
    ('resnet50', {}), ('convnextv2_tiny', {}), ('resenc_micro', {'strides': ('1x1', '1x2', 2, 2)})])
def test_a_model_has_a_name_that_makes_it(name, options):
  model = registry.create_model(name, (56, 56) if '14' in name else (64, 64), 3, **options)
  words = registry.named(model)
  assert words['model'] == name
  assert registry.create_model(words['model'], model.image_size, 3, **words['encoder']) == model


def test_depths_decide_decay_and_drop_path():
  sizes = {name: registry.create_model(f'vit_{name}/16', 64) for name in ('micro', 'base', 'large', 'huge')}
  assert {n: finetune.layer_decay(m) for n, m in sizes.items()} == {'micro': 0.75, 'base': 0.65, 'large': 0.75, 'huge': 0.75}
  assert {n: finetune.drop_path(m) for n, m in sizes.items()} == {'micro': 0.1, 'base': 0.1, 'large': 0.2, 'huge': 0.3}


def dice(a, b):
  """Of two masks; nothing of two empty ones."""
  return 2 * (a & b).sum() / (a.sum() + b.sum()) if (a | b).any() else np.nan


def test_both_arms_are_runs_and_are_compared(both, masks):
  out, found = both
  assert found['records'] == 16 and found['subjects'] == 8
  assert found == json.loads((out / 'comparison.json').read_text())
  a, b = (found['arms'][arm]['dice'] for arm in finetune.ARMS)
  assert min(a['value'], b['value']) >= 0 and found['difference']['dice']['value'] == pytest.approx(a['value'] - b['value'])
  low, high = (found['difference']['dice'][k] for k in ('low', 'high'))
  assert low <= found['difference']['dice']['value'] <= high
  assert found['masks'] and {'nsd', 'hd95'} < found['difference'].keys() and 'hd95' in finetune.table(found)
  test, run = open_source(masks).select('test'), rundir.load_segmenter(out / 'pretrained', 'best')
  cases = [[dice(run.predict(r['image']) == v, r['mask'] == v) for v in (1, 2)] for r in map(test.record, range(16))]
  assert a['value'] == pytest.approx(np.mean(np.nanmean(cases, axis=0)))  # on the stored grid of 24 x 24
  config, spec = rundir.load_config(out / 'pretrained')
  assert spec.rows == 18 and spec.mask_values == (0, 1, 2)  # of 24, 6 have no mask
  assert tuple(config.objective['values']) == (0, 1, 2)
  assert not json.loads((out / 'scratch' / 'config.json').read_text())['init']
  rows = [r for r in read_rows(out / 'pretrained' / 'metrics.jsonl') if 'dice' in r]
  assert [r['step'] for r in rows] == [3, 6] and all(0 <= r['dice'] <= 1 and 'dice/2' in r for r in rows)
  assert saved_steps(out / 'pretrained')
  assert 'dice' in finetune.table(found) and '[' in finetune.table(found)


def test_it_begins_with_the_weights_of_the_run(both, trained):
  """At the small rates of a few steps the encoder is near that of the run, and far from that of the other arm."""
  params = {name: rundir.load(path).params for name, path in
            (('given', trained), ('tuned', both[0] / 'pretrained'), ('fresh', both[0] / 'scratch'))}
  apart = lambda a, b: max(float(np.abs(x - y).max()) for x, y in zip(
      jax.tree.leaves(params[a]['transformer']), jax.tree.leaves(params[b]['transformer']), strict=True))
  assert 0 < apart('given', 'tuned') < 0.01 < apart('given', 'fresh')


def test_a_tuned_run_is_embedded_and_goes_on(both, masks, tmp_path, capsys):
  shutil.copytree(both[0] / 'pretrained', tmp_path / 'run')
  images = np.stack([open_source(masks)[i]['image'] for i in range(2)])[:, :16, :16]
  assert rundir.load(tmp_path / 'run', 'best').embed(images)['mean'].shape == (2, 32)
  assert main(['finetune', '--resume', str(tmp_path / 'run'), '--json']) == 0  # it is at its end
  assert json.loads(capsys.readouterr().out.splitlines()[-1])['steps'] == 6


def test_a_frozen_encoder_keeps_its_bits(trained, masks, tmp_path):
  """Regression of a number with 12 of the records: the head moves, the encoder does not."""
  asked = Request(str(trained), str(masks), 'regress', 'bright', FEW, freeze=True, fraction=0.5)
  user = finetune.recipe(asked)
  assert user['loader']['records'] == 12 and user['encoder']['drop_path'] == 0.0
  loop.train(user, tmp_path / 'run', quiet=True)
  given, tuned = rundir.load(trained), rundir.load(tmp_path / 'run')
  assert digest_of(given.params) == digest_of(tuned.params)
  assert np.abs(saved_state(tmp_path / 'run').params['head']['kernel']).sum() > 0
  _, spec = rundir.load_config(tmp_path / 'run')
  source = open_source(masks).select('train')
  numbers = [float(v) for v in source.table['bright'].to_pylist()]
  assert spec.rows == 12 and spec.classes == () and min(numbers) < spec.number[0] < max(numbers)
  rows = [r for r in read_rows(tmp_path / 'run' / 'metrics.jsonl') if 'val_mae' in r]
  assert [r['step'] for r in rows] == [3, 6] and all(r['val_mae'] > 1 and r['val_r2'] < 1 for r in rows)


LORA = {'optimizer': {'ema': 0.5, 'layer_decay': 0.5}, 'adapter': {'name': 'lora', 'rank': 2}}


@pytest.mark.parametrize('adapted', [False, True], ids=['segment', 'finetune with lora'])
def test_a_stopped_run_ends_with_the_same_bits(both, trained, masks, tmp_path, monkeypatch, adapted):
  """Weights, average, moments and the best checkpoint, which is one that was looked at; what is frozen stays, too."""
  whole, parts = both[0] / 'scratch', tmp_path / 'parts'
  if adapted:
    whole = tmp_path / 'whole'
    loop.train(finetune.recipe(Request(str(trained), str(masks), 'segment', 'mask', LINEAR | LORA)), whole, quiet=True)
  shutil.copytree(whole, parts)
  shutil.rmtree(parts / 'checkpoints' / '6')  # killed after step 3, then stopped after 5
  with monkeypatch.context() as m:
    record_indices(m, stop_at=5)
    with pytest.raises(Stopped, match='SIGTERM'):
      loop.resume(parts, quiet=True)
  assert saved_steps(parts)[-1] == 5
  loop.resume(parts, quiet=True)
  same(saved_state(whole), saved_state(parts))
  best, state = [host(rundir.load_state(run, 'best')[3]) for run in (whole, parts)], saved_state(parts)
  same(*best)
  dices = {r['step']: r['dice'] for r in read_rows(parts / 'metrics.jsonl') if 'dice' in r}
  assert int(best[1].step) == max(dices, key=dices.get) and dices.keys() == {3, 6} and int(state.step) == 6
  metrics = files.read_json(parts / 'checkpoints' / '5' / 'metrics' / 'metrics')
  assert 'loss' in metrics and 'dice' not in metrics  # which is one of step 3
  if adapted:
    kept = lambda tree: {k: v for k, v in flatten_dict(tree).items() if not is_adapter(k) and k[0] not in TRAINING_ONLY}
    given = digest_of(kept(host(rundir.load(trained).params)))
    assert given == digest_of(kept(state.params['encoder'])) == digest_of(kept(state.average['encoder']))


def test_a_recipe_takes_the_encoder_of_init(trained, masks):
  """Which has fixed positions; what the recipe or the user says wins, and another model stays another."""
  recipe = config_lib.load_file('experiments/finetune_regress.py:laptop')
  user = config_lib.merge(recipe, {'init': str(trained), 'model': 'channel_vit_micro/8', 'image_size': 16,
                                   'batch_size': 8, 'data': str(masks), 'loader': {'label': 'bright'}})
  got = rundir.like_init(user)
  assert got['encoder'].items() > {'drop_path': 0.0, 'pos': 'sincos', 'embed_dim': 32, 'depth': 2, 'num_heads': 2}.items()
  assert rundir.like_init(user | {'encoder': {'pos': 'learned'}})['encoder']['pos'] == 'learned'
  for other in ({'model': 'vit_micro/8'}, {'method': 'mae'}, {'init': ''}, {'init_map': 'encoder->encoder'}):
    assert rundir.like_init(user | other) == user | other
  source = open_source(masks).select('train')
  spec = data_spec.describe(source, 'bright', data_spec.vocabulary_of(got, source), None,
                            data_spec.labels_of(got, source), data_spec.numeric(got))
  config = resolve.resolve(got, spec)
  shapes = jax.eval_shape(assemble.build(config, spec).create, assemble.batch_shapes(config, spec))
  begun = weights.given_weights(config, nn.unbox(shapes), spec.vocabulary)
  given, kept = (flatten_dict(tree) for tree in (rundir.load(trained).params, begun['params']['encoder']))
  assert all(np.array_equal(given[k], kept[k]) for k in given)


@pytest.mark.parametrize('changes, words', [
    ({'task': 'segmnt'}, "unknown --task 'segmnt': did you mean 'segment'"),
    ({'label': 'half'}, '--task segment learns the column mask: give --label mask'),
    ({'task': 'classify'}, '--task classify learns a column of classes: masks are for'),
    ({'fraction': 0.0}, '--fraction 0 must be above 0'),
    ({'freeze': True, 'user': {'adapter': {'name': 'lora'}}}, '--freeze keeps the whole encoder as it is'),
    ({'path': 'nowhere'}, 'nowhere does not exist'),
    ({'task': 'regress', 'label': 'brigt'}, "'brigt': did you mean 'bright'"),
    ({'task': 'regress', 'label': 'half'}, "column 'half' .* expected finite numbers"),
    ({'user': {'objective': {'values': (0, 1)}}}, 'objective.values=0,1, but the masks of the corpus have the values 0, 1, 2'),
    ({'user': {'objective': {'values': (0, 1, 2, 9)}}}, 'objective.values=0,1,2,9, but the masks of the corpus have the'),
    ({'user': {'objective': {'decoder': 'lineer'}}}, "unknown objective.decoder 'lineer': did you mean 'linear'"),
    ({'user': {'image_size': (8, 8, 8)}}, 'image_size .* has 3 axes')])
def test_what_is_refused_in_one_line(trained, masks, tmp_path, changes, words):
  asked = {'path': str(trained), 'data': str(masks), 'task': 'segment', 'label': 'mask', 'user': {}} | changes
  with pytest.raises(UserError, match=words) as e:
    asked = Request(**asked)
    asked = dataclasses.replace(asked, user=FEW | asked.user)
    loop.train(finetune.recipe(asked), tmp_path / 'run', quiet=True)
  assert '\n' not in str(e.value) and not (tmp_path / 'run').exists()


def test_a_corpus_without_masks_is_told(trained, corpus, capsys):
  words = ['finetune', str(trained), '--data', str(corpus), '--task', 'segment', '--label', 'mask', '--out', 'never']
  assert main(words) == 2
  assert 'has no record with a mask' in capsys.readouterr().err
  assert main(['finetune', str(trained), '--data', str(corpus), '--task', 'segment']) == 2
  assert 'finetune needs --out' in capsys.readouterr().err
