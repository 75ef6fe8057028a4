"""Configs: types, unknown keys, overrides, files, and the copy that is saved beside a run."""

import json
import pathlib

import pytest

from jaxmed import config as c
from jaxmed.augment import channels, views
from jaxmed.data.feed import pipeline, sampling
from jaxmed.errors import UserError
from jaxmed.train import optimizer
from jaxmed.train.build import assemble, data_spec, resolve
from jaxmed.train.monitor import spikes, watch


def fails(words, f, *args):
  with pytest.raises(UserError) as e:
    f(*args)
  text = str(e.value)
  assert '\n' not in text
  for word in words:
    assert word in text, text


def set_to(words):
  config = c.base()
  c.update(config, c.parse_overrides(words))
  return config


@pytest.mark.parametrize('word, key, value', [
    ('batch_size=64', 'batch_size', 64),
    ('batch_size=64.0', 'batch_size', 64),
    ('learning_rate=1', 'learning_rate', 1.0),
    ('learning_rate=1e-4', 'learning_rate', 1e-4),
    ('data=corpus', 'data', 'corpus'),
    ('data=2024', 'data', '2024'),
    ('image_size=48', 'image_size', (48,)),
    ('image_size=48,32', 'image_size', (48, 32)),
    ('image_size=(4, 48, 32)', 'image_size', (4, 48, 32)),
    ('image_size=[48]', 'image_size', (48,)),
    ('augment.flip=', 'augment.flip', ()),
    ('optimizer.clip=3', 'optimizer.clip', 3.0),
    ('mesh.fsdp=8', 'mesh.fsdp', 8),
    ('data=a=b', 'data', 'a=b'),
    ('loggers=wandb', 'loggers', ('wandb',)),
    ('loggers=wandb, mlflow', 'loggers', ('wandb', 'mlflow')),
    ("loggers=('wandb', 'mlflow')", 'loggers', ('wandb', 'mlflow')),
    ('loggers=', 'loggers', ()),
])
def test_override(word, key, value):
  got = c.flat(set_to([word]))[key]
  assert got == value
  assert type(got) is type(value)


@pytest.mark.parametrize('word, expected', [
    ('batch_size=many', ['batch_size', 'whole number', "'many'", 'default is 0']),
    ('batch_size=2.5', ['batch_size', 'whole number', '2.5']),
    ('batch_size=True', ['batch_size', 'whole number', 'True']),
    ('learning_rate=fast', ['learning_rate', 'number', "'fast'"]),
    ('learning_rate=nan', ['learning_rate', 'number', 'nan']),
    ('learning_rate=1e999', ['learning_rate', 'number', 'inf']),
    ('optimizer.b2=None', ['optimizer.b2', 'number', 'None']),
    ('augment.channel_sampling=True', ['augment.channel_sampling', 'text', 'True']),
    ('batchsize=64', ["'batchsize'", "'batch_size'"]),
    ('optimizer.weightdecay=0', ["'optimizer.weightdecay'", "'optimizer.weight_decay'"]),
    ('optimiser.clip=1', ["'optimiser", 'optimizer.']),
    ('optimizer=1', ['optimizer is a section', 'optimizer.']),
    ('batch_size.x=1', ['batch_size', 'whole number']),
    ('loggers=wandbb', ['loggers', "'wandbb'", "'wandb'"]),
])
def test_refused(word, expected):
  fails(expected, set_to, [word])


@pytest.mark.parametrize('word', ['batch_size', '=4', '', 'a b'])
def test_not_an_override(word):
  fails(['key=value', repr(word)], c.parse_overrides, [word])


def test_a_key_and_its_section_contradict():
  fails(['optimizer'], c.parse_overrides, ['optimizer=1', 'optimizer.clip=2'])


def test_later_words_win_and_others_stay():
  config = set_to(['optimizer.clip=1', 'optimizer.b2=0.9', 'optimizer.clip=2'])
  assert (config.optimizer.clip, config.optimizer.b2, config.optimizer.b1) == (2.0, 0.9, 0.9)


def test_merge_is_deep():
  assert c.merge({'a': {'x': 1, 'y': 2}, 'b': 3}, {'a': {'y': 4}}) == {'a': {'x': 1, 'y': 4}, 'b': 3}


def test_round_trip_through_json():
  config = set_to(['image_size=48,32', 'augment.scale=0.5,1.0'])
  back = c.from_dict(json.loads(json.dumps(c.to_dict(config))))
  assert back.to_dict() == config.to_dict()
  assert back.image_size == (48, 32)
  assert isinstance(back.augment.scale, tuple)
  assert isinstance(back.augment.flip, tuple)


def test_flat_has_every_key_once():
  flat = c.flat(c.base())
  assert flat['optimizer.accumulate'] == 1
  assert flat['mesh.data'] == 0
  assert 'optimizer' not in flat
  assert {'method', 'model', 'steps', 'epochs', 'batch_size', 'image_size', 'learning_rate', 'seed', 'checkpoint_every',
          'eval_every'} <= set(flat)  # words that scripts rely on


def test_choices_are_those_of_the_code():
  """The table names what each room accepts."""
  code = {
      'on_collapse': watch.ACTIONS, 'on_spike': spikes.ACTIONS, 'loader.fit': ('auto', *pipeline.FITS),
      'optimizer.annealing': optimizer.ANNEALING, 'optimizer.clip_scope': optimizer.CLIP_SCOPES,
      'optimizer.moments': optimizer.MOMENTS, 'loader.schedule': sampling.SCHEDULES,
      'loader.subjects': sampling.SUBJECTS, 'augment.channel_sampling': channels.CHANNEL_SAMPLING,
      'augment.channel_views': views.CHANNEL_VIEWS, 'augment.teacher_channels': views.TEACHER_CHANNELS}
  for key, values in code.items():
    assert sorted(c.CHOICES[key]) == sorted(values), key
  flat = c.flat(c.base())
  names = lambda value: value if isinstance(value, tuple) else (value,)
  assert all(set(names(flat[key])) <= set(choices) for key, choices in c.CHOICES.items())


def test_every_key_is_explained():
  text = c.about()
  assert max(map(len, text.split('\n'))) <= 100
  words = ' '.join(text.split())
  for section, keys in c.SECTIONS.items():
    assert not section or f' {section}.* ' in words
    for name, key in keys.items():
      assert f' {name}={c.default_of(key)} {c.kind(key)}: {key.meaning}' in words, name
      assert key.meaning and not key.meaning.endswith('.'), name
  named = [name for section in c.SECTIONS.values() for name, key in section.items() if key.default != {}]
  assert len(c.flat(c.base())) == len(named)


@pytest.mark.parametrize('default, expected', [
    ((), '()'), ((3 / 4, 4 / 3), '0.75,1.333'), ('', "''"), ('mae', 'mae'), (0, '0'), (False, 'False')])
def test_a_default_as_it_is_written(default, expected):
  assert c.shown(default) == expected


@pytest.mark.parametrize('text, expected', [
    (None, ['does not exist']),
    ('def get_config(:', ['SyntaxError']),
    ('x = 1', ['get_config']),
    ('def get_config():\n  return 1 / 0', ['ZeroDivisionError']),
    ('def get_config():\n  return 5', ['get_config', 'ConfigDict']),
    ('import no_such_module', ['ModuleNotFoundError', 'no_such_module']),
])
def test_bad_file(tmp_path, text, expected):
  path = tmp_path / 'recipe.py'
  if text is not None:
    path.write_text(text)
  fails(['recipe.py', *expected], c.load_file, str(path))


def test_file_of_another_kind(tmp_path):
  (tmp_path / 'recipe.txt').write_text('steps: 3')
  fails(['recipe.txt', 'Python file'], c.load_file, str(tmp_path / 'recipe.txt'))


@pytest.mark.parametrize('value', ["{'steps': 3, 'encoder': {'depth': 2}}",
                                   "ConfigDict({'steps': 3, 'encoder': {'depth': 2}})"])
def test_file(tmp_path, value):
  path = tmp_path / 'recipe.py'
  path.write_text(f'from ml_collections import ConfigDict\ndef get_config():\n  return {value}\n')
  assert c.load_file(str(path)) == {'steps': 3, 'encoder': {'depth': 2}}


VARIANTS = '''
VARIANTS = ('published', 'laptop')
def get_config(variant='published'):
  return {'steps': 3 if variant == 'laptop' else 3000}
'''


def test_variants_of_a_file(tmp_path):
  path = tmp_path / 'recipe.py'
  path.write_text(VARIANTS)
  assert c.variants(str(path)) == ('published', 'laptop')
  assert c.load_file(str(path)) == {'steps': 3000}
  assert c.load_file(f'{path}:laptop') == {'steps': 3}
  assert c.load_file(f'{path}:published') == {'steps': 3000}
  fails(['variant', 'recipe.py', "'lptop'", "'laptop'"], c.load_file, f'{path}:lptop')
  fails(["''", 'laptop, published'], c.load_file, f'{path}:')
  fails(['other.py', 'does not exist'], c.load_file, f'{tmp_path}/other.py:laptop')


def test_a_recipe_by_its_name(tmp_path, monkeypatch):
  """Outside of the repository too; a file of that name in the working directory wins."""
  monkeypatch.chdir(tmp_path)
  assert c.load_file('experiments/mae.py:laptop')['method'] == 'mae'
  assert 'experiments/channel_vit/all_channels.py' in c.recipes()
  fails(['experiments/mea.py does not exist', 'experiments/mae.py'], c.load_file, 'experiments/mea.py')
  fails(['nothing.py does not exist', 'jaxmed list recipes'], c.load_file, 'nothing.py')
  (tmp_path / 'experiments').mkdir()
  (tmp_path / 'experiments' / 'mae.py').write_text('def get_config():\n  return {"steps": 7}')
  assert c.load_file('experiments/mae.py') == {'steps': 7}
  assert c.recipes()['experiments/mae.py'] == pathlib.Path('experiments/mae.py')


def test_a_file_without_variants(tmp_path):
  path = tmp_path / 'recipe.py'
  path.write_text('def get_config():\n  return {}')
  assert c.variants(str(path)) == ()
  fails(['recipe.py has no variants', "':laptop'"], c.load_file, f'{path}:laptop')


def test_a_file_with_a_colon_in_its_name(tmp_path):
  path = tmp_path / 'a:b.py'
  path.write_text('def get_config():\n  return {"steps": 7}')
  assert c.load_file(str(path)) == {'steps': 7}


def spec(**changes):
  fields = dict(channels=({'name': 'a', 'mean': 1.0, 'std': 2.0}, {'name': 'b', 'mean': 1.0, 'std': 2.0}), slots=2,
                masked=False, dtype='uint8', rows=1000, size=(64, 48), classes=('no', 'yes'))
  return data_spec.DataSpec(**fields | changes)


def test_what_is_chosen_from_the_data():
  config = resolve.resolve({'method': 'mae', 'epochs': 4.0, 'batch_size': 128}, spec())
  assert config.image_size == (64, 48)
  assert config.steps == 32  # ceil(4 * 1000 / 128)
  assert config.epochs == pytest.approx(32 * 128 / 1000)
  assert config.learning_rate == pytest.approx(3 * 2.4e-3 * (128 / 4096) ** 0.5)  # three times narrower than ViT-S
  assert config.optimizer.warmup_steps == 3
  assert config.optimizer.b2 == 0.95  # the method's
  assert config.encoder.pos == 'sincos'
  assert config.model == 'channel_vit_micro/8'
  assert resolve.resolve({'optimizer': {'b2': 0.5}}, spec()).optimizer.b2 == 0.5  # the user's wins


@pytest.mark.parametrize('user, more, model', [
    ({}, {}, 'vit_micro/8'), ({}, {'mixed': True}, 'channel_vit_micro/8'), ({'method': 'simclr'}, {}, 'channel_vit_micro/8'),
    ({'encoder': {'depth': 2}}, {}, 'channel_vit_micro/8'), ({}, {'channels': ({'name': 'a', 'mean': 1.0, 'std': 2.0},), 'slots': 1}, 'channel_vit_micro/8'),
    ({'augment': {'channel_sampling': 'hcs'}}, {}, 'channel_vit_micro/8'), ({'model': 'vit_micro/8'}, {}, 'vit_micro/8'),
    ({}, {'size': (300, 300)}, 'vit_micro/16'), ({}, {'size': (16, 32, 32)}, 'vit_micro/8')])
def test_the_encoder_follows_from_data_and_words(user, more, model):
  assert resolve.resolve(user, spec(**more)).model == model


def test_a_run_without_a_named_method_has_milder_views():
  own, named = (resolve.resolve(user, spec()) for user in ({}, {'method': 'simclr'}))
  assert own.method == named.method == 'simclr'
  assert (own.augment.scale, named.augment.scale) == ((0.2, 1.0), (0.08, 1.0))
  assert resolve.resolve({'augment': {'scale': (0.5, 1.0)}}, spec()).augment.scale == (0.5, 1.0)  # the user's wins


@pytest.mark.parametrize('user, factor', [
    ({'model': 'vit_micro/8'}, 3), ({'model': 'channel_vit_tiny/8'}, 2), ({'model': 'vit_small/8'}, 1), ({'model': 'vit_base/8'}, 1),
    ({'model': 'vit_micro/8', 'encoder': {'embed_dim': 64, 'num_heads': 2}}, 6), ({'model': 'resnet_micro'}, 3), ({'model': 'resnet18'}, 1),
    ({'model': 'vit_base/8', 'optimizer': {'scaling': 'mup'}}, 3)])
def test_narrow_transformers_have_a_higher_rate(user, factor):
  config = resolve.resolve({'method': 'mae', 'batch_size': 64, 'image_size': 32} | user, spec())
  assert config.learning_rate == pytest.approx(factor * 2.4e-3 * (64 / 4096) ** 0.5)


@pytest.mark.parametrize('user, images', [
    ({'method': 'mae', 'model': 'vit_micro/8'}, 20_000),  # 64 tokens: 40,000 images, but at most
    ({'method': 'simclr', 'model': 'vit_micro/4'}, 2_600_000 // 512),  # 256 tokens of each of two views
    ({'method': 'simclr', 'model': 'channel_vit_micro/4'}, 2_600_000 // 1024),  # of each of two channels
    ({'method': 'simclr', 'model': 'resnet_micro'}, 20_000),  # counted as patches of 8
    ({'method': 'simclr', 'model': 'channel_vit_micro/4', 'image_size': 128}, 1000)])  # at least
def test_a_cpu_sees_as_many_images_as_its_tokens_allow(user, images):
  config = resolve.resolve({'batch_size': 50, 'image_size': 64} | user, spec(size=(128, 128)))
  assert config.steps == -(-images // 50)


def test_warmup_in_epochs():
  warmup = lambda **optimizer: resolve.resolve(
      {'steps': 100, 'batch_size': 10, 'optimizer': optimizer}, spec()).optimizer.warmup_steps
  assert warmup(warmup_epochs=0.25) == 25  # of 1000 records
  assert warmup(warmup_epochs=0.25, warmup_steps=7) == 7
  assert warmup() == 10


@pytest.mark.parametrize('normalize, kept', [('corpus', True), ('full', True), ('image', False), ('percentile:1:99', False)])
def test_wanted_colours_need_stored_ones(normalize, kept):
  rgb = tuple({'name': n, 'mean': 1.0, 'std': 2.0} for n in 'RGB')
  data = spec(channels=rgb, slots=3)
  config = resolve.resolve({'method': 'dino', 'image_size': 32, 'model': 'vit_micro/8', 'loader': {'normalize': normalize}},
                         data)
  assert (config.augment.color != (), config.augment.grayscale != (0.0,)) == (kept, kept)
  assert config.augment.contrast == 0.4
  assemble.build(config, data)


@pytest.mark.parametrize('user, expected', [
    ({'method': 'maee'}, ["'maee'", "'mae'"]),
    ({'model': 'vit_tinny/8'}, ["'vit_tinny'", "'vit_tiny'"]),
    ({'model': 'vit_tiny'}, ['patch size', 'vit_tiny/16']),
    ({'model': 'vit_tiny/7'}, ['image_size', 'nearest is 63x49']),
    ({'encoder': {'dept': 3}}, ["'encoder.dept'", "'encoder.depth'"]),
    ({'method': 'mae', 'objective': {'mask_ration': 0.5}}, ["'objective.mask_ration'", "'objective.mask_ratio'"]),
    ({'method': 'mae', 'objective': {'mask_ratio': 1.5}}, ['objective.mask_ratio', '1.5']),
    ({'batch_size': 2000}, ['batch_size 2000', '1000']),
    ({'batch_size': -8}, ['batch_size']),
    ({'steps': -1}, ['steps']),
    ({'epochs': -1.0}, ['epochs']),
    ({'learning_rate': -1.0}, ['learning_rate']),
    ({'log_every': -5}, ['log_every']),
    ({'image_size': (16, 16, 16)}, ['image_size', '3 axes']),
    ({'image_size': -16}, ['image_size']),
    ({'mesh': {'data': 3}}, ['mesh', 'data=3', '1 devices']),
    ({'optimizer': {'accumulate': 3}, 'batch_size': 64}, ['batch_size 64', 'nearest is 63']),
    ({'optimizer': {'accumulate': 0}}, ['optimizer.accumulate']),
    ({'optimizer': {'warmup_epochs': -1.0}}, ['optimizer.warmup_epochs', '-1']),
    ({'optimizer': {'clip_scope': 'modul'}}, ["'modul'", "'module'"]),
    ({'optimizer': {'layer_decay': 0.0}}, ['optimizer.layer_decay']),
    ({'optimizer': {'ema': 1.5}}, ['optimizer.ema']),
    ({'optimizer': {'b1': 1.0}}, ['optimizer.b1']),
    ({'augment': {'scale': (0.5,)}}, ['augment.scale']),
    ({'augment': {'scale': ('a', 'b')}}, ['augment.scale']),
    ({'augment': {'flip': (0.5, 0.5, 0.5)}}, ['augment.flip', '2 axes']),
    ({'augment': {'channel_sampling': 'hsc'}}, ["'hsc'", "'hcs'"]),
    ({'loader': {'normalize': 'corpsu'}}, ["'corpsu'", "'corpus'"]),
    ({'loader': {'load_size': (8, 8, 8)}}, ['loader.load_size']),
    ({'loader': {'load_size': 40}}, None),
    ({'loader': {'fit': 'pad'}}, ["'pad'", 'crop']),
    ({'loader': {'threads': 0}}, ['loader.threads']),
    ({'method': 'supervised'}, ['supervised', 'loader.label']),
    ({'checkpoint': {'keep': 0}}, ['checkpoint.keep']),
    ({'checkpoint': {'best_mode': 'minn'}}, ["'minn'", "'min'"]),
    ({'init_parts': 'al'}, ["'al'", "'all'"]),
    ({'on_leak': 'halt'}, ['on_leak', 'ignore, stop, warn']),
])
def test_resolve_refuses(user, expected):
  begin = lambda: assemble.build(resolve.resolve(user, spec()), spec())
  if expected is None:
    begin()
  else:
    fails(expected, begin)


@pytest.mark.parametrize('user, expected', [
  ({'method': 'mea'}, "unknown method 'mea': did you mean 'mae'"), ({'method': 'mae', 'objective': {'mask_rati': 0.5}}, 'objective.mask_ratio'),
  ({'model': 'vit_micro/8', 'encoder': {'dept': 2}}, 'encoder.depth'), ({'steps': -1}, 'steps must be at least 0'),
  ({'on_spike': 'skp'}, 'skip')])
def test_what_the_values_alone_say_is_checked_before_data(user, expected):
  """None of these needs a corpus, and options of an encoder that is still to be chosen wait for it."""
  with pytest.raises(UserError) as told:
    resolve.check(user)
  assert expected in str(told.value)
  resolve.check({'encoder': {'depth': 2}, 'loader': {'load_size': 32}})


@pytest.mark.parametrize('key', ['steps', 'epochs', 'batch_size', 'learning_rate', 'checkpoint_every', 'eval_every'])
def test_zero_is_no_word_for_chosen(key):
  """A run with steps=0 once trained as many as it liked."""
  auto = resolve.resolve({key: 'auto'}, spec())
  assert c.flat(auto) == c.flat(resolve.resolve({}, spec())) and auto[key] > 0
  for zero in (0, 0.0):
    with pytest.raises(UserError, match=f'^{key}={zero}: expected a number above 0, or auto$'):
      resolve.resolve({key: zero}, spec())


def test_auto_of_sizes_and_warm_up():
  user = {'image_size': 'auto', 'loader': {'load_size': 'auto'}, 'optimizer': {'warmup_steps': 'auto', 'warmup_epochs': 'auto'}}
  assert c.flat(resolve.resolve(user, spec())) == c.flat(resolve.resolve({}, spec()))
  none = resolve.resolve({'steps': 100, 'optimizer': {'warmup_steps': 0}}, spec())
  assert none.optimizer.warmup_steps == 0  # a number is taken
  assert resolve.resolve({'steps': 100, 'optimizer': {'warmup_epochs': 0}}, spec()).optimizer.warmup_steps == 0
  with pytest.raises(UserError, match=r'optimizer.warmup_steps=-3: expected a number of at least 0, or auto'):
    resolve.resolve({'optimizer': {'warmup_steps': -3}}, spec())
  with pytest.raises(UserError, match="batch_size takes a whole number, not 'many'"):
    resolve.resolve({'batch_size': 'many'}, spec())
