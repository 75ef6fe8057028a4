"""The recipes against the official constants that experiments/official.toml holds, read by hand in the official files.

The golden texts pin recipes against themselves alone: a number that was wrong from the beginning stays.
"""

import math
import tomllib

import pytest

from jaxmed import config as config_lib
from tests.test_recipes import NAMES, PUBLISHED, ROOT, SPECS, resolve, values

TABLE = tomllib.loads((ROOT / 'experiments' / 'official.toml').read_text(encoding='utf-8'))
PATHS = {name: path for path, name in NAMES.items()}
# What a variant sets that is no constant of a method, but of a run, a machine or a corpus.
OURS = ('method', 'init', 'eval_every', 'checkpoint_every', 'log_every', 'loader.label', 'encoder.dtype', 'encoder.remat')
# Constants that a table names wherever a run has them, set or not.
ALWAYS = tuple(f'encoder.{name}' for name in (
    'kernel_init', 'patch_init', 'token_std', 'layer_scale', 'drop_path', 'drop_path_law', 'norm_epsilon', 'qkv_bias',
    'class_token', 'num_registers', 'pos', 'zero_init_residual')) + tuple(f'optimizer.{name}' for name in (
        'name', 'b1', 'weight_decay', 'final_weight_decay', 'clip', 'decay_lengths', 'frozen_moments'))


def equal(a, b):
  if isinstance(a, list) or isinstance(b, (list, tuple)):
    return isinstance(a, list) and isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(equal, a, b))
  if isinstance(a, float) or isinstance(b, float):
    number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
    return number(a) and number(b) and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)
  return type(a) is type(b) and a == b


def of(name):
  """(what a variant sets, what it resolves to), by key; epochs as they are set, before they are whole steps."""
  recipe, _, variant = name.partition(':')
  given = config_lib.flat(config_lib.from_dict(config_lib.merge(values(PATHS[recipe], variant))))
  got = config_lib.flat(resolve.resolve(values(PATHS[recipe], variant), SPECS['imagenet']))
  return given, got | ({'epochs': given['epochs']} if 'epochs' in given else {})


@pytest.mark.parametrize('name', TABLE)
def test_a_recipe_has_the_official_constants(name):
  given, got = of(name)
  section = TABLE[name]
  keys = [row[0] for row in section['constants']]
  assert len(keys) == len(set(keys))
  for key, official, where, *ours in section['constants']:
    assert len(ours) in (0, 2) and where.strip(), key
    want = ours[0] if ours else official
    assert equal(want, got[key]), f'{key}: {got[key]!r}, not {want!r} ({where})'
    assert not ours or (not equal(official, want) and len(ours[1]) > 5), f'{key}: why does it differ?'
  wanted = {key for key in given if key not in OURS and not key.startswith('mesh.')} | {k for k in ALWAYS if k in got}
  lacking = wanted - set(keys) - {entry.partition(':')[0] for entry in section.get('not_read', ())}
  assert not lacking, f'official constants of {sorted(lacking)}: add rows to experiments/official.toml'


def test_every_published_variant_has_a_table():
  named = {name.partition(':')[0] for name in TABLE}
  assert named == {NAMES[path] for path in PUBLISHED}
  for recipe in named:
    for variant in config_lib.variants(str(PATHS[recipe])):
      assert variant.startswith('laptop') or f'{recipe}:{variant}' in TABLE, (recipe, variant)
