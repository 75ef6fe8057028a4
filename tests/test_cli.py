"""The command: the road from a folder to features, and every mistake as one line and exit code 2."""

import ctypes
import errno
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import jaxmed
from jaxmed import cli, owner
from jaxmed.cli import common, streams, train
from jaxmed.data.corpus.open import open_source
from jaxmed.errors import Unavailable
from jaxmed.interop import weight_formats
from jaxmed.models import registry
from jaxmed.train.build import resolve
from tests.common import same, saved_state, saved_steps, words
from tests.conftest import TINY

TINY_WORDS = words(TINY | {'steps': 2, 'eval_every': 2})


def tree(folder):
  """All files below a folder and their sizes."""
  return sorted((str(p.relative_to(folder)), p.stat().st_size if p.is_file() else 0) for p in folder.rglob('*'))


@pytest.fixture
def run(trained, tmp_path):
  """A trained run of its own."""
  return shutil.copytree(trained, tmp_path / 'trained')


@pytest.fixture(scope='session')
def vit(corpus, tmp_path_factory):
  """A run of a plain ViT."""
  out = tmp_path_factory.mktemp('vit') / 'run'
  assert cli.main(['train', '--data', str(corpus), '--out', str(out), *TINY_WORDS, 'model=vit_micro/8']) == 0
  return out


@pytest.fixture
def ok(capfd):
  """Runs the command, which must succeed: (what it printed on stdout, on stderr)."""
  def run(*argv):
    capfd.readouterr()
    code = cli.main([str(a) for a in argv])
    out, err = capfd.readouterr()
    assert code == 0, err
    return out, err
  return run


@pytest.fixture
def fails(capfd, tmp_path):
  """Runs the command, which must end with 2, one line that has `expected` in it, and nothing left behind."""
  def run(argv, *expected):
    before = tree(tmp_path)
    capfd.readouterr()
    code = cli.main([str(a) for a in argv])
    out, err = capfd.readouterr()
    assert code == 2, err
    assert out == ''
    # On a busy machine work that takes more than two seconds is told before.
    err = re.sub(r'^jaxmed: .* \.\.\. \d+ s\n', '', err, flags=re.MULTILINE)
    assert err.count('\n') == 1, err
    assert err.startswith('jaxmed: ')
    for word in expected:
      assert str(word) in err, err
    assert tree(tmp_path) == before
  return run


# ---- the road ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, fmt', [('trained', 'channelvit'), ('vit', 'timm')])
def test_the_road(name, fmt, request, corpus, ok, tmp_path):
  """train -> evaluate -> export -> load -> embed -> import; features are the same at every station."""
  run = shutil.copytree(request.getfixturevalue(name), tmp_path / 'run')
  out, _ = ok('evaluate', run, '--data', corpus, '--label', 'tissue', '--out', tmp_path / 'e.json', '--json')
  result = json.loads(out)
  assert result == json.loads((tmp_path / 'e.json').read_text()) == json.loads((run / 'evaluation.json').read_text())
  assert {r['features'] for r in result['rows']} == {'trained', 'untrained', 'pixels (PCA)'}
  assert result['classes'] == ['colon', 'retina']
  page = (run / 'report.html').read_text()
  assert all(text in page for text in ('untrained', 'tissue', 'data:image/png;base64,'))

  ok('embed', run, '--data', corpus, '--out', tmp_path / 'run.npz')
  out, _ = ok('export', run, '--format', fmt, '--out', tmp_path / 'encoder.safetensors', '--json')
  assert json.loads(out)['difference'] < 1e-5
  card = (tmp_path / 'encoder.md').read_text()
  assert 'encoder.safetensors' in card
  assert 'tissue' in card or 'knn' in card
  shutil.rmtree(run)
  ok('embed', tmp_path / 'encoder.safetensors', '--data', corpus, '--out', tmp_path / 'file.npz')
  ok('import', tmp_path / 'encoder.safetensors', '--format', fmt, '--out', tmp_path / 'again.safetensors')
  ok('embed', tmp_path / 'again.safetensors', '--data', corpus, '--out', tmp_path / 'again.npz')
  a, b, c = (np.load(tmp_path / f'{n}.npz') for n in ('run', 'file', 'again'))
  assert a['features'].dtype == np.float32
  assert a['features'].shape == (96, 32)
  assert a['id'].tolist() == b['id'].tolist() == open_source(corpus).table['id'].to_pylist()
  np.testing.assert_allclose(a['features'], b['features'], atol=1e-5, rtol=1e-5)
  np.testing.assert_array_equal(b['features'], c['features'])


def test_embed_equals_the_encoder(trained, corpus, ok, tmp_path):
  """The rows of the file are those of `jaxmed.load(RUN).embed` of the same records, resized."""
  from jaxmed.data.resize import resize
  ok('embed', trained, '--data', corpus, '--split', 'test', '--feature', 'cls', '--out', tmp_path / 'f.npz')
  source = open_source(corpus).select(split='test')
  images = np.stack([resize(source[i]['image'], (16, 16)) for i in range(len(source))])
  got = np.load(tmp_path / 'f.npz')
  assert got['id'].tolist() == source.table['id'].to_pylist()
  np.testing.assert_allclose(got['features'], jaxmed.load(trained).embed(images)['cls'], atol=1e-5)
  assert jaxmed.load(trained).vocabulary == ('R', 'G', 'B')  # a second call: `load` is a function still


def test_embed_of_a_folder(trained, corpus, tiles, ok, tmp_path):
  ok('embed', trained, '--data', tiles, '--out', tmp_path / 'a.npz')
  ok('embed', trained, '--data', corpus, '--out', tmp_path / 'b.npz')
  a, b = (np.load(tmp_path / f'{n}.npz') for n in 'ab')
  rows = [b['id'].tolist().index(i) for i in a['id']]
  assert sorted(rows) == list(range(96))
  np.testing.assert_allclose(a['features'], b['features'][rows], atol=1e-5)


def test_a_plain_folder_needs_nothing_else(tiles, ok, tmp_path, monkeypatch):
  """Method, model, sizes, length and rate are chosen and said; the defaults are made small here to save time."""
  monkeypatch.setitem(registry.SIZES, 'micro', dict(embed_dim=16, depth=1, num_heads=2))
  monkeypatch.setattr(resolve, 'CPU_IMAGES', 150)
  folder = tmp_path / 'images'
  (folder / 'more').mkdir(parents=True)
  for i, path in enumerate(sorted(tiles.glob('*.png'))[:40]):
    shutil.copy(path, folder / ('more' if i % 2 else '') / path.name)
  out, err = ok('train', '--data', folder, '--out', tmp_path / 'run', '--json')
  summary = json.loads(out)
  assert out.count('\n') == 1
  assert summary['run'] == str(tmp_path / 'run')
  assert np.isfinite(summary['loss'])
  assert all(word in err for word in ('method simclr, model vit_micro/8 at 24x24, channels R, G, B', 'epochs)',
                                      'learning rate', 'cpu device(s)', f'step {summary["steps"]}/'))
  for name in ('config.json', 'data.json', 'metrics.jsonl', 'report.html', 'corpus/manifest.parquet',
               'figures/views.png', 'figures/loss.png', 'figures/patch_pca.png'):
    assert (tmp_path / 'run' / name).stat().st_size > 100, name
  assert any((tmp_path / 'run' / 'events').iterdir())
  assert saved_steps(tmp_path / 'run')[-1] == summary['steps']


def test_a_recipe_with_overrides(corpus, ok, tmp_path):
  recipe = tmp_path / 'recipe.py'
  recipe.write_text(f'def get_config():\n  return {TINY | {"eval_every": 3}!r}\n')
  ok('train', recipe, '--data', corpus, '--out', tmp_path / 'run', 'eval_every=20', 'checkpoint.keep=1', '--json')
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert (config['eval_every'], config['checkpoint']['keep'], config['batch_size']) == (20, 1, 8)
  assert config['data'] == str(corpus)


@pytest.mark.parametrize('model', ['channel_vit_micro/8', 'vit_micro/8'])
def test_mixed_channels(mixed_corpus, model, ok, tmp_path):
  ok('train', '--data', mixed_corpus, '--out', tmp_path / 'run', *TINY_WORDS, 'augment.channel_sampling=hcs',
     f'model={model}')
  ok('embed', tmp_path / 'run', '--data', mixed_corpus, '--out', tmp_path / 'f.npz')
  features = np.load(tmp_path / 'f.npz')['features']
  assert features.shape == (96, 32)
  assert np.isfinite(features).all()
  result = json.loads(ok('evaluate', tmp_path / 'run', '--data', mixed_corpus, '--label', 'tissue', '--json')[0])
  assert {r['features'] for r in result['rows']} == {'trained', 'untrained', 'pixels (PCA)'}


def test_resume_of_a_finished_run(run, ok):
  before = saved_state(run)
  out, _ = ok('train', '--resume', run)
  assert '20 steps' in out
  same(saved_state(run), before)


def test_a_checkpoint_by_its_step(trained, corpus, ok, tmp_path):
  for which in ('15', 'latest', '20'):
    ok('embed', trained, '--checkpoint', which, '--data', corpus, '--out', tmp_path / f'{which}.npz')
  old, latest, new = (np.load(tmp_path / f'{n}.npz')['features'] for n in ('15', 'latest', '20'))
  np.testing.assert_array_equal(latest, new)
  assert np.abs(old - new).max() > 1e-4


# ---- what it prints ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('verb', cli.VERBS)
def test_help_has_an_example(verb, capsys):
  with pytest.raises(SystemExit) as e:
    cli.main([verb, '--help'])
  assert e.value.code == 0
  out = capsys.readouterr().out
  assert f'example:\n  jaxmed {verb}' in out
  assert '--json' in out


@pytest.mark.parametrize('argv', [['list'], ['doctor'], ['report', '{run}'], ['demo-data', '{tmp}/samples']])
def test_json_is_one_object(argv, run, ok, tmp_path):
  out, _ = ok(*(a.format(run=run, tmp=tmp_path) for a in argv), '--json')
  assert out.count('\n') == 1
  assert isinstance(json.loads(out), dict)
  text, _ = ok(*(a.format(run=run, tmp=f'{tmp_path}/text') for a in argv))
  assert text.strip()
  assert not text.startswith('{')


def test_list_names_what_can_be_chosen(ok):
  got = json.loads(ok('list', '--json')[0])
  assert set(got['methods']) >= {'mae', 'supervised'}
  assert {'vit_tiny', 'vit_giant', 'channel_vit_small'} <= set(got['models'])
  assert {'timm', 'channelvit'} <= set(got['formats'])
  assert {'classify', 'retrieve'} <= set(got['protocols']) and set(got['evaluators']) >= {'health', 'loss', 'knn', 'ridge'}
  assert all(got['methods'].values())
  assert all(all(got[kind].values()) for kind in ('formats', 'protocols', 'evaluators'))


def test_list_one_kind_or_one_name(ok, fails, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert set(json.loads(ok('list', 'recipes', '--json')[0])) == {'recipes'}
  text = ok('list', 'recipes')[0]
  assert 'experiments/mae.py' in text and '[:published :laptop]' in text
  mae = json.loads(ok('list', 'methods', 'mae', '--json')[0])
  assert mae['options']['mask_ratio'] == {'default': 0.75, 'meaning': "share of a sample's tokens that is hidden",
                                          'choices': []}
  assert 'mask_ratio=0.75' in ok('list', 'methods', 'mae')[0]
  small = json.loads(ok('list', 'models', 'vit_small/16', '--json')[0])['options']
  assert small['embed_dim']['default'] == 384 and 'rope' in small['pos']['choices']
  assert json.loads(ok('list', 'models', 'resnet', '--json')[0])['options']
  assert 'VARIANTS' not in ok('list', 'recipes', 'experiments/mae.py')[0]
  fails(['list', 'method'], "'method'", "'methods'")
  fails(['list', 'methods', 'mea'], "'mea'", "'mae'")
  fails(['list', 'models', 'vit_smal'], "'vit_smal'", "'vit_small'")
  fails(['list', 'formats', 'timm'], 'leave', 'timm')


def test_as_a_process():
  """`python -m jaxmed`: nothing on stdout but the JSON; help does not wait for JAX."""
  go = lambda *argv: subprocess.run([sys.executable, *argv], capture_output=True, text=True)
  bad = go('-m', 'jaxmed', 'trian')
  assert (bad.returncode, bad.stdout) == (2, '')
  assert bad.stderr == "jaxmed: unknown command 'trian': did you mean 'train'?\n"
  code = ('import sys\nfrom jaxmed.cli import main\n'
          'try:\n  main(sys.argv[1:])\nfinally:\n  print([m for m in ("jax", "numpy", "matplotlib") if m in sys.modules])')
  for argv in (['--help'], *([verb, '--help'] for verb in ('train', 'prepare', 'launch', 'list'))):
    assert go('-c', code, *argv).stdout.endswith('[]\n'), argv


def test_a_reader_that_goes_away():
  code = 'import sys\nfrom jaxmed.cli import main\nsys.exit(main(["list"]))'
  process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  process.stdout.close()
  assert process.wait() == 0
  assert b'Traceback' not in process.stderr.read()


def test_a_reader_that_goes_away_ends_no_work(monkeypatch):
  """The rest of what is printed goes nowhere, and the command goes on."""
  reading, writing = os.pipe()
  with open(writing, 'w') as stream:
    monkeypatch.setattr(sys, 'stdout', stream)
    with streams.kept():
      os.close(reading)
      for _ in range(3):
        print('x' * 100_000, flush=True)
    assert sys.stdout is stream


def test_output_that_is_closed(monkeypatch):
  monkeypatch.setattr(sys, 'stdout', None)
  monkeypatch.setattr(sys, 'stderr', None)
  assert cli.main(['list', 'methods']) == 0
  assert cli.main(['lst']) == 2


def test_a_closed_descriptor_is_no_place_for_a_file(tmp_path):
  """A process whose standard output is closed opens files as any other: none takes the number of its output."""
  code = ('import sys\nfrom jaxmed.cli import streams\n'
          'with streams.kept():\n  f = open(sys.argv[1], "w")\n  assert f.fileno() > 2\n  print("x", flush=True)')
  argv = [sys.executable, '-c', code, str(tmp_path / 'f')]
  assert subprocess.run(['sh', '-c', 'exec "$@" >&- 2>&-', 'sh', *argv]).returncode == 0
  assert (tmp_path / 'f').read_text() == ''


def test_names_of_any_bytes_are_printed(monkeypatch):
  latin = io.TextIOWrapper(io.BytesIO(), encoding='latin-1')
  monkeypatch.setattr(sys, 'stdout', latin)
  with streams.kept():
    print('a\udcff \xe4 \u03b1', end='', flush=True)
  assert latin.buffer.getvalue() == b'a\\xff \xe4 \\u03b1'


@pytest.mark.parametrize('words, name', [
    ("prepare '' --out x", 'FOLDER'), ("prepare . '' --out x", 'FOLDER'), ("prepare . --out x --table=", '--table'),
    ("prepare . --out ''", '--out'), ("train --data ''", '--data'), ("train ''", 'CONFIG key=value'),
    ("train --resume ''", '--resume'), ("embed '' --data x --out y", 'RUN|FILE'), ("curate ''", 'CORPUS'),
    ("evaluate . --data '' --label y", '--data'), ("import '' --out x", 'FILE'), ("import x --out ''", '--out')])
def test_an_empty_argument(words, name, fails, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  fails(shlex.split(words), f'jaxmed: {name} is empty: expected a value')


# ---- mistakes ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('argv, expected', [
    (['trian'], ["'trian'", "'train'"]),
    ([], ['VERB']),
    (['train', '--outt', 'x'], ['--outt', 'train --help']),
    (['train'], ['--out RUN']),
    (['train', '--out', '{tmp}/x'], ['--data']),
    (['train', '--data', '{tmp}/none', '--out', '{tmp}/x'], ['{tmp}/none does not exist']),
    (['train', '--data', '{tmp}/empty', '--out', '{tmp}/x'], ['{tmp}/empty']),
    (['train', '{tmp}/none.py', '--data', '{corpus}', '--out', '{tmp}/x'], ['none.py does not exist']),
    (['train', '--data', '{corpus}', '--out', '{tmp}/x', 'batchsize=4'], ["'batchsize'", "'batch_size'"]),
    (['train', '--data', '{corpus}', '--out', '{tmp}/x', 'batch_size=four'], ['batch_size', 'whole number']),
    (['train', '--data', '{corpus}', '--out', '{tmp}/x', 'method=mea'], ["method 'mea'", "'mae'"]),
    (['train', '--data', '{corpus}', '--out', '{tmp}/x', 'model=vitt_tiny/8'], ["model 'vitt_tiny'", "'vit_tiny'"]),
    (['train', '--data', '{corpus}', '--out', '{tmp}/x', 'batch_size=100'], ['batch_size 100', '64 training records']),
    (['train', '--data', '{corpus}', '--out', '{tmp}/x', 'batch_size=10', 'optimizer.accumulate=4'],
     ['batch_size 10', 'nearest is 8']),
    (['train', '--data', '{corpus}', '--out', '{tmp}/x', 'mesh.fsdp=8'], ['mesh', 'fsdp=8', '1 devices']),
    (['train', '--data', '{corpus}', '--out', '{tmp}/x', 'method=supervised'], ['loader.label']),
    (['train', '--data', '{corpus}', '--out', '{tmp}/x', 'method=supervised', 'loader.label=tisue'],
     ["'tisue'", "'tissue'"]),
    (['train', '--data', '{corpus}', '--out', '{tmp}/x', 'loader.label=tisue'], ["'tisue'", "'tissue'"]),
    (['train', '--data', '{corpus}', '--out', '{tmp}/x', 'loader.split=trian'], ["'trian'", "'train'"]),
    (['train', '--data', '{corpus}', '--out', '{tmp}/x', 'augment.views=2', 'method=mae'], ['method mae takes one view', 'views=2']),
    (['train', '--data', '{corpus}', '--out', '{tmp}/x', 'method=mae', 'objective.mask_ratio=0.99', 'image_size=16'],
     ['objective.mask_ratio 0.99', 'hides all']),
    (['train', '--data', '{corpus}', '--out', '{tmp}/x', 'encoder.num_heads=5'], ['num_heads 5', 'embed_dim 128']),
    (['train', '--data', '{corpus}', '--out', '{tmp}/full'], ['{tmp}/full exists', '--resume {tmp}/full']),
    (['train', '--data', '{corpus}', '--out', '{tmp}/full/file/run'], ['{tmp}/full/file/run']),
    (['train', '--data', '{corpus}', '--out', '{tmp}/x', 'init={tmp}/none'], ['{tmp}/none does not exist']),
    (['train', '--data', '{corpus}', '--out', '{tmp}/x', 'init={run}', *TINY_WORDS, 'encoder.embed_dim=16'],
     ['init={run}', 'another model']),
    (['train', '--resume', '{tmp}/empty'], ['{tmp}/empty is not a run']),
    (['train', '--resume', '{tmp}/none'], ['{tmp}/none is not a run']),
    (['train', '--resume', '{run}', '--out', '{tmp}/x'], ['leave --out']),
    (['train', '--resume', '{run}', 'seed=1'], ['seed cannot change']),
    (['train', '--resume', '{run}', 'sed=1'], ["'sed'", "'seed'"]),
    (['train', '--resume', '{run}', '--data', '{tmp}/none'], ['{tmp}/none does not exist']),
    (['evaluate', '{tmp}/none', '--data', '{corpus}', '--label', 'tissue'], ['{tmp}/none does not exist']),
    (['evaluate', '{tmp}/empty', '--data', '{corpus}', '--label', 'tissue'], ['{tmp}/empty is not a run']),
    (['evaluate', '{run}', '--data', '{tmp}/empty', '--label', 'tissue'], ['{tmp}/empty is no corpus']),
    (['evaluate', '{run}', '--data', '{corpus}', '--label', 'tisue'], ["'tisue'", "'tissue'"]),
    (['evaluate', '{run}', '--data', '{corpus}', '--label', 'tissue', '--feature', 'clss'], ['--feature', 'clss']),
    (['evaluate', '{run}', '--data', '{corpus}', '--label', 'tissue', '--checkpoint', '3'],
     ["no checkpoint '3'", '[15, 20]']),
    (['evaluate', '{run}', '--data', '{grey}', '--label', 'tissue'], ["'L'", 'B, G, R']),
    (['evaluate', '{run}', '--data', '{corpus}', '--label', 'tissue', '--batch-size', '0'], ['--batch-size']),
    (['evaluate', '{run}', '--data', '{corpus}', '--label', 'tissue', '--out', '{tmp}/full/file/e.json'],
     ['{tmp}/full/file/e.json']),
    (['embed', '{tmp}/full/file', '--data', '{corpus}', '--out', '{tmp}/f.npz'], ['{tmp}/full/file']),
    (['embed', '{run}', '--data', '{tmp}/none', '--out', '{tmp}/f.npz'], ['{tmp}/none does not exist']),
    (['embed', '{run}', '--data', '{tmp}/empty', '--out', '{tmp}/f.npz'], ['{tmp}/empty']),
    (['embed', '{run}', '--data', '{grey}', '--out', '{tmp}/f.npz'], ["'L'", 'B, G, R']),
    (['embed', '{vit}', '--data', '{grey}', '--out', '{tmp}/f.npz'], ["'L'", 'B, G, R']),
    (['embed', '{vit}', '--data', '{red}', '--out', '{tmp}/f.npz'], ['R, G, B', '1 channels']),
    (['evaluate', '{vit}', '--data', '{red}', '--label', 'tissue'], ['R, G, B', '1 channels']),
    (['embed', '{run}', '--data', '{corpus}', '--split', 'tets', '--out', '{tmp}/f.npz'], ["'tets'", "'test'"]),
    (['embed', '{run}', '--data', '{corpus}', '--batch-size', '-1', '--out', '{tmp}/f.npz'], ['--batch-size']),
    (['embed', '{run}', '--data', '{corpus}', '--out', '{tmp}/full/file/f.npz'], ['{tmp}/full/file/f.npz']),
    (['embed', '{run}', '--data', '{corpus}', '--out', '{tmp}/empty'], ['{tmp}/empty']),
    (['export', '{run}', '--format', 'timmm', '--out', '{tmp}/e.safetensors'], ["'timmm'", "'timm'"]),
    (['export', '{run}', '--format', 'timm', '--out', '{tmp}/e.safetensors'], ['timm', 'channelvit']),
    (['export', '{vit}', '--format', 'channelvit', '--out', '{tmp}/e.safetensors'], ['channelvit', 'timm']),
    (['export', '{run}', '--format', 'channelvit', '--out', '{tmp}/full/file/e.safetensors'],
     ['{tmp}/full/file/e.safetensors']),
    (['export', '{run}', '--format', 'channelvit'], ['--out', 'export --help']),
    (['import', '{tmp}/none', '--format', 'timm', '--out', '{tmp}/e.safetensors'], ['{tmp}/none', 'not exist']),
    (['import', '{tmp}/full/file', '--format', 'timm', '--out', '{tmp}/e.safetensors'], ['{tmp}/full/file']),
    (['import', '{tmp}/full/file', '--format', 'tim', '--out', '{tmp}/e.safetensors'], ["'tim'", "'timm'"]),
    (['report', '{tmp}/none'], ['{tmp}/none']),
    (['report', '{tmp}/empty'], ['{tmp}/empty']),
    (['prepare', '{tmp}/empty', '--out', '{tmp}/x'], ['{tmp}/empty']),
    (['prepare', '{tmp}/full', '--out', '{tmp}/x', '--splits', 'a,b'], ['--splits a,b']),
    (['demo-data', '{tmp}/full/file/x'], ['{tmp}/full/file/x']),
], ids=lambda v: ' '.join(v[:1] + v[-1:]).replace('{tmp}/', '').replace('/', ':') if isinstance(v, list) else '')
def test_mistake(argv, expected, corpus, mixed_corpus, grey_corpus, red_corpus, trained, vit, fails, tmp_path):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'file').write_text('text')
  before = tree(trained), tree(vit)
  fill = lambda w: w.format(tmp=tmp_path, corpus=corpus, mixed=mixed_corpus, grey=grey_corpus, red=red_corpus,
                            run=trained, vit=vit)
  fails([fill(w) for w in argv], *(fill(w) for w in expected))
  assert (tree(trained), tree(vit)) == before


def single(tiles, tmp_path_factory, name):
  place = tmp_path_factory.mktemp(name)
  shutil.copy(tiles / 'table.csv', place / 'table.csv')
  for path in tiles.glob('*.png'):
    with Image.open(path) as image:
      image.convert('L').save(place / path.name)
  out = tmp_path_factory.mktemp('corpora') / name
  assert cli.main(['prepare', str(place), '--out', str(out), '--table', str(place / 'table.csv'),
                   '--channels', name]) == 0
  return out


@pytest.fixture(scope='session')
def grey_corpus(tiles, tmp_path_factory):
  """The tiles as single grey channels of another name than those of the runs."""
  return single(tiles, tmp_path_factory, 'L')


@pytest.fixture(scope='session')
def red_corpus(tiles, tmp_path_factory):
  """The same under a name that the runs know."""
  return single(tiles, tmp_path_factory, 'R')


def test_a_channel_vit_takes_any_of_its_channels(trained, red_corpus, ok, tmp_path):
  ok('embed', trained, '--data', red_corpus, '--out', tmp_path / 'f.npz')
  source = open_source(red_corpus)
  image = np.asarray(Image.fromarray(source[5]['image'][..., 0]).resize((16, 16), Image.Resampling.BILINEAR))
  features = np.load(tmp_path / 'f.npz')['features']
  near = jaxmed.load(trained).embed(image[None, ..., None], ['R'])['mean']
  assert np.abs(features[5] - near).max() < 0.3 * np.abs(features - near).max()


def test_a_mistake_after_preparing_leaves_the_place_free(tiles, tmp_path, capfd):
  """What was prepared for a run that never began is removed, so that the corrected command works."""
  assert cli.main(['train', '--data', str(tiles), '--out', str(tmp_path / 'run'), 'method=mea']) == 2
  err = capfd.readouterr().err
  assert err.splitlines()[-1] == "jaxmed: unknown method 'mea': did you mean 'mae'?"
  assert not (tmp_path / 'run').exists()


def test_what_is_left_out_of_a_folder_is_told(tiles, tmp_path, capfd):
  folder = tmp_path / 'in'
  folder.mkdir()
  for i, path in enumerate(sorted(tiles.glob('*.png'))[:4]):
    shutil.copy(path, folder)
    (folder / f'{i}.doc').write_bytes(path.read_bytes())
  with train._corpus(str(folder), tmp_path / 'run'):
    assert f'jaxmed: left out files of {folder}: 4 of kinds that no reader takes (.doc 4)' in capfd.readouterr().err
  common.left_out({'ignored': 0, 'empty': 0, 'rejected': 0, 'others': {}}, 'x')
  assert capfd.readouterr().err == ''


def test_a_corpus_in_the_way(tiles, corpus, fails, tmp_path):
  shutil.copytree(corpus, tmp_path / 'run' / 'corpus')
  fails(['train', '--data', tiles, '--out', tmp_path / 'run'], tmp_path / 'run' / 'corpus', '--data')


def test_damaged_runs(run, corpus, fails):
  embed = ['embed', run, '--data', corpus, '--out', run.parent / 'f.npz']
  config = (run / 'config.json').read_text()
  (run / 'config.json').write_text(config[:100])
  fails(embed, run / 'config.json', 'JSON')
  (run / 'config.json').write_text('{}')
  fails(embed, run / 'config.json')
  (run / 'config.json').write_text(config)
  data = (run / 'data.json').read_text()
  (run / 'data.json').unlink()
  fails(embed, run / 'data.json')
  (run / 'data.json').write_text('{"rows": 3}')
  fails(embed, run / 'data.json')
  (run / 'data.json').write_text(data)
  (run / 'config.json').write_text(config.replace('"embed_dim": 32', '"embed_dim": 16'))
  fails(embed, run / 'checkpoints' / '20', 'another model')
  (run / 'config.json').write_text(config)
  shutil.rmtree(run / 'checkpoints' / '15')
  for path in (run / 'checkpoints' / '20' / 'state' / 'ocdbt.process_0' / 'd').iterdir():
    path.write_bytes(path.read_bytes()[:20])
  fails(embed, run / 'checkpoints')
  os.rename(run / 'checkpoints' / '20', run / 'checkpoints' / '20.orbax-checkpoint-tmp')
  fails(embed, run, 'no checkpoint')


def test_a_vit_takes_only_its_channels(vit, mixed_corpus, fails, tmp_path):
  """A record with fewer channels must not be padded in silence."""
  fails(['embed', vit, '--data', mixed_corpus, '--out', tmp_path / 'f.npz'], 'gray', 'B, G, R')


def test_nothing_to_replace(run, ok, fails):
  """An export that fails leaves the old file as it was."""
  out = run.parent / 'e.safetensors'
  ok('export', run, '--format', 'channelvit', '--out', out)
  before = out.read_bytes()
  fails(['export', run, '--format', 'timm', '--out', out], 'timm')
  assert out.read_bytes() == before
  assert weight_formats.load_file(out)[2]['channels'][0]['name'] == 'R'


def test_a_defect_is_no_mistake_of_the_user(monkeypatch):
  monkeypatch.setattr(cli.list_, 'run', lambda args: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    cli.main(['list'])


def test_a_process_that_is_gone_has_a_code_of_its_own(monkeypatch, capsys):
  def alone(args):
    raise Unavailable('process 1 does not answer')

  monkeypatch.setattr(cli.list_, 'run', alone)
  assert cli.main(['list']) == 69
  assert capsys.readouterr().err == 'jaxmed: process 1 does not answer\n'


def test_ctrl_c(monkeypatch, capsys):
  def interrupted(args):
    signal.raise_signal(signal.SIGINT)

  monkeypatch.setattr(cli.list_, 'run', interrupted)
  before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
  try:
    assert cli.main(['list']) == 75
  finally:
    signal.signal(signal.SIGINT, before)
  assert capsys.readouterr().err == 'jaxmed: stopped by Ctrl-C; nothing is left half-written\n'


@pytest.fixture
def small_disk(tmp_path):
  """A file system of a few hundred kilobytes and a function that changes its size."""
  libc = ctypes.CDLL(None, use_errno=True)
  place = tmp_path / 'disk'
  place.mkdir()

  def mount(size, flags=0):
    return libc.mount(b'tmpfs', str(place).encode(), b'tmpfs', flags, f'size={size}'.encode())

  if mount('900k') != 0:
    pytest.skip(f'needs to mount a tmpfs: {errno.errorcode[ctypes.get_errno()]}')
  yield place, lambda size: mount(size, 32)  # MS_REMOUNT
  libc.umount2(str(place).encode(), 2)


def test_a_full_disk_while_training(small_disk, server, corpus, trained, tmp_path):
  """One line that says so; with room again the run goes on to the same weights."""
  place, resize = small_disk
  code, out, err = server.run(['train', '--data', corpus, '--out', place / 'run', *words(TINY)], tmp_path)
  assert 'Traceback' not in err, err
  assert (code, out) == (2, '')
  last = err.splitlines()[-1]
  assert last.startswith('jaxmed: ')
  assert 'No space left' in last
  assert str(place) in last
  assert resize('50m') == 0
  assert server.run(['train', '--resume', place / 'run'], tmp_path)[0] == 0
  same(saved_state(place / 'run'), saved_state(trained))


def test_a_full_disk_while_exporting(small_disk, trained, corpus, fails):
  place, _ = small_disk
  (place / 'ballast').write_bytes(bytes(880 << 10))
  fails(['export', trained, '--format', 'channelvit', '--out', place / 'e.safetensors'], place / 'e.safetensors',
        'No space left')
  (place / 'ballast').write_bytes(bytes(900 << 10))
  fails(['embed', trained, '--data', corpus, '--out', place / 'f.npz'], place / 'f.npz', 'No space left')
  assert [p.name for p in pathlib.Path(place).iterdir()] == ['ballast']


def test_a_place_that_cannot_be_written_is_told_before_the_work(trained, corpus, fails, tmp_path, monkeypatch):
  monkeypatch.setattr('jaxmed.encoder.Encoder.embed_source', lambda *a, **k: pytest.fail('computed first'))
  (tmp_path / 'folder').mkdir()
  fails(['evaluate', trained, '--data', corpus, '--label', 'tissue', '--out', tmp_path / 'folder'], 'it is a folder')
  fails(['embed', trained, '--data', corpus, '--out', tmp_path / 'folder'], 'it is a folder')


def test_what_another_process_writes_is_left_alone(trained, corpus, fails, tmp_path):
  """A file, a folder of runs and a selection: each verb tells the second one at once."""
  held = owner._me() | {'token': 'another'}
  selections = shutil.copytree(corpus, tmp_path / 'corpus') / 'selections'
  selections.mkdir()
  (tmp_path / 'compared').mkdir()
  for lock in (tmp_path / '.f.npz.owner.json', tmp_path / '.e.safetensors.owner.json', tmp_path / '.v.json.owner.json',
               tmp_path / 'compared' / '.owner.json', selections / '.lean.parquet.owner.json'):
    lock.write_text(json.dumps(held), encoding='utf-8')
  said = f'is being written by process {os.getpid()} on'
  fails(['embed', trained, '--data', corpus, '--out', tmp_path / 'f.npz'], tmp_path / 'f.npz', said)
  fails(['export', trained, '--format', 'jaxmed', '--out', tmp_path / 'e.safetensors'], said)
  fails(['evaluate', trained, '--data', corpus, '--label', 'tissue', '--out', tmp_path / 'v.json'], said)
  fails(['compare', '--methods', 'mae', '--model', 'vit_micro/8', '--data', corpus, '--label', 'tissue', '--samples', '8',
         '--out', tmp_path / 'compared'], said)
  fails(['curate', tmp_path / 'corpus', '--methods', 'hash', '--out', 'lean'], said)
