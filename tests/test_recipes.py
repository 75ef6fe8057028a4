"""Recipes: what each variant resolves to is the text in tests/golden; `python -m tests.test_recipes --write` writes it."""

import ast
import dataclasses
import difflib
import json
import pathlib
import sys

import pytest

from jaxmed import config as config_lib
from jaxmed import objectives
from jaxmed.contracts import FIELDS
from jaxmed.train.build import assemble, data_spec, resolve

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / 'tests' / 'golden'
RECIPES = sorted(p for p in (ROOT / 'experiments').rglob('*.py') if p.parent.name not in ('studies', 'transfer'))
CASES = [(path, variant) for path in RECIPES for variant in config_lib.variants(str(path)) or ('',)]
PUBLISHED = [path for path in RECIPES if 'published' in config_lib.variants(str(path))]
NAMES = {path: '.'.join(path.relative_to(ROOT / 'experiments').with_suffix('').parts) for path in RECIPES}
NAMED = [f'{NAMES[path]}.{variant}' if variant else NAMES[path] for path, variant in CASES]


def channels(names, mean, std):
  return tuple({'name': n, 'mean': m, 'std': s} for n, m, s in zip(names, mean, std, strict=True))


HOLDS = dict(holds=FIELDS, signal=(5000, 12), table=tuple({'name': n, 'mean': 0.0, 'std': 1.0} for n in ('age', 'ph')),
              mask_values=(0, 1, 2), mask_names=('background', '1', '2'), number=(50.0, 10.0))
SPECS = {
    'imagenet': data_spec.DataSpec(channels('RGB', (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)), 3, False, 'uint8', 1_281_167,
                               (256, 256), tuple(f'class{i}' for i in range(1000)), **HOLDS),
    'demo': data_spec.DataSpec(channels(('T1', 'GM', 'WM', *'RGB', 'phase', 'DNA'), (155, 116, 84, 189, 96, 76, 68, 33),
                                    (70, 93, 96, 52, 48, 50, 25, 19)), 3, True, 'uint8', 5650, (48, 48),
                           ('front', 'back'), mixed=True, **HOLDS),
}


def values(path, variant):
  return config_lib.load_file(f'{path}:{variant}' if variant else str(path))


def specs(given):
  """ImageNet and the demo corpus, of as many records as a batch at least."""
  return [dataclasses.replace(spec, rows=max(spec.rows, given.get('batch_size', 0))) for spec in SPECS.values()]


def resolved(path, variant):
  """Every resolved value by its key: for ImageNet, and what differs for the demo corpus."""
  given = values(path, variant)
  first, second = (config_lib.flat(resolve.resolve(given, spec)) for spec in specs(given))
  return {'imagenet': first, 'demo': {k: v for k, v in second.items() if v != first[k]}}


def text_of(path, variant):
  """The same as text that does not depend on the last bits of a float."""
  def plain(value):
    if isinstance(value, dict):
      return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
      return [plain(v) for v in value]
    return float(f'{value:.10g}') if isinstance(value, float) else value

  whole = plain(resolved(path, variant))
  lines = lambda part: ',\n'.join(f'    {json.dumps(k)}: {json.dumps(v)}' for k, v in sorted(part.items()))
  return '{\n' + ',\n'.join(f'  "{name}": {{\n{lines(part)}\n  }}' for name, part in whole.items()) + '\n}\n'


@pytest.mark.parametrize('path, variant', CASES, ids=NAMED)
def test_resolves_to_its_golden_text(path, variant):
  file = GOLDEN / f'{NAMES[path]}.{variant}.json' if variant else GOLDEN / f'{NAMES[path]}.json'
  want = file.read_text() if file.exists() else ''
  got = text_of(path, variant)
  diff = ''.join(difflib.unified_diff(want.splitlines(True), got.splitlines(True), file.name, 'now', n=0))
  assert got == want, f'write it again if this is meant: python -m tests.test_recipes --write\n{diff}'


@pytest.mark.parametrize('path, variant', CASES, ids=NAMED)
def test_keeps_what_it_sets_and_builds(path, variant):
  given = values(path, variant)
  for spec in specs(given):
    config = resolve.resolve(given, spec)
    got = config_lib.flat(config)
    for key, value in config_lib.flat(config_lib.from_dict(config_lib.merge(given))).items():
      if key not in ('image_size', 'loader.load_size', 'augment.local_size', 'augment.gram_size', 'augment.flip',
                     'augment.tiles', 'epochs'):  # filled up
        assert got[key] == value, key
    assert assemble.build(config, spec).objective.encoder.in_channels == len(spec.channels)
  assert not {'data', 'init'} & set(given)
  assert config_lib.from_dict(given).get('epochs', 0) > 0 or 'steps' in given


def test_golden_texts_belong_to_recipes():
  assert sorted(p.stem for p in GOLDEN.glob('*.json')) == sorted(NAMED)


@pytest.mark.parametrize('model', ['vit_micro/16', 'channel_vit_micro/16', 'bag_micro/16', 'resnet_micro', 'convnextv2_micro',
                                   'caformer_micro', 'pvt_v2_micro', 'swin_micro', 'swin_unetr_micro', 'dformer_micro',
                                   'swtr_unet_micro'])
def test_every_method_builds_on_every_family(model):
  """With its own defaults: what a family lacks is left out, what it has otherwise is set."""
  for method in objectives.METHODS:
    user = {'method': method, 'model': model, 'image_size': 64, 'loader': {'label': 'label'}}
    trainer = assemble.build(resolve.resolve(user, SPECS['demo']), SPECS['demo'])
    assert type(trainer.objective) is objectives.METHODS[method]


def test_every_method_has_a_recipe():
  by_variant = {name: {values(p, name)['method'] for p in PUBLISHED} for name in ('published', 'laptop')}
  for name, methods in by_variant.items():
    assert methods == set(objectives.METHODS), name


@pytest.mark.parametrize('path', PUBLISHED, ids=NAMES.get)
def test_says_what_it_is(path):
  doc = ' '.join(ast.get_docstring(ast.parse(path.read_text())).split())
  name = path.relative_to(ROOT).as_posix()
  for words in ('arXiv', f'jaxmed train {name} --data', 'iffers', 'Published', 'Not run here at full size'):
    assert words in doc, words
  assert f'{name}:laptop' in doc or 'tools/channel_claims.py' in doc
  variants = config_lib.variants(str(path))
  assert variants[0] == 'published'
  for variant in variants:
    assert f'`{variant}`' in doc or f':{variant}' in doc or variant == 'published', variant


@pytest.mark.parametrize('path', RECIPES, ids=NAMES.get)
def test_is_data(path):
  imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
  assert [node.module for node in imports] == ['ml_collections']


@pytest.mark.parametrize('path', PUBLISHED, ids=NAMES.get)
def test_laptop_is_small_and_gentle(path):
  config = resolve.resolve(values(path, 'laptop'), SPECS['demo'])
  assert config.steps * config.batch_size <= 30_000
  assert config.image_size == (48, 48)
  assert config.augment.blur <= 0.5
  assert not any(config.augment.solarize)


if __name__ == '__main__':
  assert sys.argv[1:] == ['--write'], 'usage: python -m tests.test_recipes --write'
  GOLDEN.mkdir(exist_ok=True)
  for old in GOLDEN.glob('*.json'):
    old.unlink()
  for (one, which), stem in zip(CASES, NAMED, strict=True):
    (GOLDEN / f'{stem}.json').write_text(text_of(one, which))
