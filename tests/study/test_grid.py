"""What a study file declares: axes, settings, names of cells; bad files are one line before anything is opened."""

import pytest

from jaxmed.errors import UserError
from jaxmed.study import grid, rules
from jaxmed.study.grid import Study

BASE = {'method': 'mae', 'model': 'vit_micro/8', 'batch_size': 8, 'steps': 20, 'learning_rate': 1e-3}


def read(tmp_path, axes, **fields):
  """The study of a file that is written from plain values."""
  path = tmp_path / 'study.py'
  path.write_text(f'def get_study():\n  return {dict(base=BASE, axes=axes) | fields!r}\n')
  return grid.read(str(path))


def made(axes, **fields):
  return grid.cells(Study(**(dict(base=BASE, axes=axes) | fields)))


def test_the_last_axis_changes_fastest():
  cells = made({'encoder.depth': [1, 2], 'seed': [0, 7]})
  assert [c.name for c in cells] == ['depth=1_seed=0', 'depth=1_seed=7', 'depth=2_seed=0', 'depth=2_seed=7']
  assert cells[2].config == BASE | {'encoder': {'depth': 2}, 'seed': 0}
  assert cells[3].axes == {'encoder.depth': 2, 'seed': 7}
  assert [c.group for c in cells] == ['depth=1', 'depth=1', 'depth=2', 'depth=2']
  assert made({'seed': [0]})[0].group == 'all'


def test_settings_have_labels():
  width = {'w32': {'encoder.embed_dim': 32, 'encoder.num_heads': 2}, 'w64': {'encoder': {'embed_dim': 64}, 'seed': 3}}
  cells = made({'width': width})
  assert [c.name for c in cells] == ['width=w32', 'width=w64']
  assert cells[0].config['encoder'] == {'embed_dim': 32, 'num_heads': 2} and cells[1].config['seed'] == 3


def test_special_axes():
  assert made({'samples': [10, 'all']})[0].config['loader'] == {'records': 10, 'records_seed': 0}
  assert made({'samples': [10, 'all']})[1].config['loader'] == {'records': 0}
  seeded = made({'samples': [10], 'seed': [4, 5]})
  assert [c.config['loader']['records_seed'] for c in seeded] == [4, 5]
  own = made({'samples': [10], 'seed': [4]}, base=BASE | {'loader': {'records_seed': 9}})
  assert own[0].config['loader']['records_seed'] == 9
  parts = [c.config.get('loader', {}) for c in made({'sources': ['CT,MR', 'CT=2,*=1', 'all']})]
  assert parts == [{'sources': 'CT,MR'}, {'balance': 'source', 'weights': 'CT=2,*=1'}, {}]
  assert made({'epochs': [2.0]})[0].config['steps'] == 'auto'  # the base's steps would win


def test_channels():
  names = ('R', 'G', 'B')
  assert grid.hidden(3, names) == grid.hidden('all', names) == ''
  assert grid.hidden(1, names) == 'G,B=1' and grid.hidden('B, R', names) == 'G=1'
  for bad, said in ((0, 'from 1 to 3'), (4, 'R, G, B'), (True, 'expected'), ('Q', "'Q'")):
    with pytest.raises(UserError, match=said):
      grid.hidden(bad, names)


def test_names_are_names_of_files():
  name = made({'model': ['vit_micro/8'], 'image_size': [(16, 32)], 'loader.weights': ['a=1,b=2']})[0].name
  assert name == 'model=vit_micro-8_image_size=16-32_weights=a=1-b=2'
  both = made({'encoder.depth': [1], 'objective.depth': [2]})[0].name
  assert both == 'encoder.depth=1_objective.depth=2'


def test_a_dict_a_study_and_variants(tmp_path):
  assert read(tmp_path, {'seed': [0]}).judges == ('loss',)
  path = tmp_path / 'v.py'
  path.write_text("from jaxmed.study.grid import Study\nVARIANTS = ('a', 'b')\n\ndef get_study(variant='a'):\n"
                  f"  return Study({BASE!r}, {{'seed': [0]}}, shared={{'encoder.depth': 1 if variant == 'a' else 2}})\n")
  assert grid.read(f'{path}:b', {'batch_size': 4}).base == BASE | {'encoder': {'depth': 2}, 'batch_size': 4}
  with pytest.raises(UserError, match="unknown variant .* 'c'"):
    grid.read(f'{path}:c')


@pytest.mark.parametrize('axes, fields, said', [
    ({'stepz': [1]}, {}, "unknown axis .*'stepz': did you mean 'steps'"),
    ({'sample': [1]}, {}, "did you mean 'samples'"),
    ({'optimizer.beta1': [1]}, {}, "did you mean 'optimizer.b1'"),
    ({'seed': []}, {}, 'axis seed .* is empty'),
    ({}, {}, 'has no axes'),
    ({'seed': 3}, {}, 'takes a list of values, not 3'),
    ({'model': 'vit_micro/8'}, {}, 'takes a list of values'),
    ({'data': ['a']}, {}, 'axis data'),
    ({'seed': {'a': {}}}, {}, 'axis seed is a key'),
    ({'loss': {'a': {}}}, {}, 'column of the table'),
    ({'size': {'a': 3}}, {}, 'axis size: a is 3'),
    ({'steps': [1], 'budget': [1e9]}, {}, 'axes steps and budget'),
    ({'budget': [1e9]}, {'equal': 'steps'}, "axis budget and equal='steps'"),
    ({'seed': [0]}, {'equal': 'sample'}, "did you mean 'samples'"),
    ({'seed': [0]}, {'judges': []}, 'no judge'),
    ({'seed': [0]}, {'judges': ['clasify']}, "did you mean 'classify'"),
    ({'seed': [0]}, {'judges': [{'label': 'x'}]}, 'has no task'),
    ({'seed': [0]}, {'judges': [{'task': 'classify', 'lable': 'x'}]}, "did you mean 'label'"),
    ({'seed': [0]}, {'judges': [{'task': 'retrieve', 'options': {'galery': 'test'}}]}, 'retrieve.gallery'),
    ({'seed': [0]}, {'judges': [{'task': 'finetune', 'options': {'task': 'clasify'}}]}, "did you mean 'classify'"),
    ({'seed': [0]}, {'judges': [{'task': 'finetune', 'options': {'fraction': 2}}]}, '--fraction 2'),
    ({'seed': [0]}, {'judges': [7]}, 'a judge of the study is 7'),
    ({'seed': [0]}, {'rulez': []}, "did you mean 'rules'"),
    ({'seed': [0]}, {'base': 'experiments/mea.py'}, 'experiments/mae.py'),
])
def test_bad_files(tmp_path, axes, fields, said):
  with pytest.raises(UserError, match=said) as e:
    read(tmp_path, axes, **fields)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('axes, said', [
    ({'seed': [0, 0]}, 'two cells have the name seed=0'),
    ({'loader.weights': ['a b', 'a/b']}, 'two cells have the name'),
    ({'samples': [0]}, 'axis samples has 0'), ({'samples': [1.5]}, 'axis samples has 1.5'),
    ({'samples': [True]}, 'axis samples has True'), ({'sources': [3]}, 'axis sources has 3'),
    ({'budget': [0]}, 'axis budget has 0'), ({'budget': ['1e9']}, "axis budget has '1e9'"),
    ({'setting': {'x' * 300: {}}}, 'short labels'),
])
def test_bad_values(axes, said):
  with pytest.raises(UserError, match=said):
    made(axes)


@pytest.mark.parametrize('text, said', [
    ('x = 1', 'has no get_study'), ('def get_study():\n  return 5', 'must return a Study'),
    ('def get_study():\n  return {"axes": {"seed": [0]}}', 'has no base'),
    ('def get_study():\n  return 1 / 0', 'ZeroDivisionError'), ('def get_study(:', 'SyntaxError')])
def test_files_that_are_no_study(tmp_path, text, said):
  path = tmp_path / 'study.py'
  path.write_text(text)
  with pytest.raises(UserError, match=said):
    grid.read(str(path))


def test_rules_change_nothing_at_the_base():
  base = dict(learning_rate=1e-3, batch_size=64, width=128, params=1000, steps=100, epochs=4.0, given_rate=True)
  cell = base | {'base': base}
  for rule in (rules.sqrt_batch, rules.linear_batch, rules.inverse_width, rules.sqrt_width, rules.power('params', -0.3)):
    assert rule(cell) == {'learning_rate': 1e-3}
  assert rules.least_epochs(4.0)(cell) == {} and rules.least_epochs(5.0)(cell) == {'epochs': 5.0}
  assert rules.warmup(0.1)(cell) == {'optimizer.warmup_steps': 10}
  assert rules.warmup(0.5, most=20)(cell) == {'optimizer.warmup_steps': 20}


def test_rules_of_batch_width_and_size():
  base = dict(learning_rate=1e-3, batch_size=64, width=128, params=1000)
  cell = base | {'batch_size': 256, 'width': 512, 'params': 16_000, 'base': base, 'given_rate': True}
  rate = lambda rule, cell=cell: rule(cell)['learning_rate']
  assert rate(rules.sqrt_batch) == pytest.approx(2e-3) and rate(rules.linear_batch) == pytest.approx(4e-3)
  assert rate(rules.inverse_width) == pytest.approx(2.5e-4) and rate(rules.sqrt_width) == pytest.approx(5e-4)
  assert rate(rules.power('params', -0.25)) == pytest.approx(5e-4)
  chosen = cell | {'given_rate': False, 'learning_rate': 2e-3}  # a rate that is chosen follows the root of the batch
  assert rules.sqrt_batch(chosen) == {} and rate(rules.linear_batch, chosen) == pytest.approx(4e-3)
