"""A run of images and texts: both towers as encoders, and every task that compares them, from the command."""

import csv
import json
import shutil

import numpy as np
import pytest

import jaxmed
from jaxmed import cli
from jaxmed.config import merge
from jaxmed.data.corpus.open import open_source
from jaxmed.errors import UserError
from jaxmed.train import loop
from tests.conftest import TINY

pytestmark = pytest.mark.usefixtures('no_figures')


@pytest.fixture(scope='module')
def run(tiles, tmp_path_factory):
  """(run, corpus) of two steps on the tiles, of which some have no text."""
  from jaxmed.data.prepare.prepare import prepare
  place = tmp_path_factory.mktemp('pairs')
  with open(tiles / 'table.csv', encoding='utf-8') as f:
    rows = list(csv.DictReader(f))
  for i, row in enumerate(rows):
    row['text'] = f'{row["tissue"]} number {i}' if i % 9 else ''
  shutil.copytree(tiles, place / 'raw')
  with open(place / 'raw/table.csv', 'w', newline='', encoding='utf-8') as f:
    table = csv.DictWriter(f, rows[0])
    table.writeheader()
    table.writerows(rows)
  prepare([place / 'raw'], place / 'corpus', table=place / 'raw/table.csv', progress=False)
  small = {k: v for k, v in TINY.items() if k not in ('method', 'objective', 'optimizer', 'augment')}
  loop.train(merge(small, {'method': 'clip', 'data': str(place / 'corpus'), 'steps': 2, 'log_every': 1, 'eval_every': 2,
                           'checkpoint_every': 2, 'batch_size': 8, 'objective': {'out_dim': 8},
                           'loader': {'text_length': 24}, 'encoder': {'depth': 1},
                           'towers': {'text': {'model': 'text_micro', 'options': {'depth': 1, 'embed_dim': 16}}}}),
             place / 'run', quiet=True)
  return place / 'run', place / 'corpus'


def test_both_towers_are_encoders(run):
  encoder = jaxmed.load(run[0])
  words = jaxmed.load(run[0], tower='text')
  pair, source = encoder.pair, open_source(run[1]).select('test')
  texts = [t or '' for t in source.table['text'].to_pylist()]
  assert '' in texts
  found = words.embed_source(source)['mean']
  assert found.shape == (len(source), 8)
  ids = np.array([([c + 1 for c in t.encode()] + [0] * 24)[:24] for t in texts])
  want = np.asarray(pair.objective.text.apply({'params': pair.params['text']}, ids).mean)
  assert np.allclose(found, want, atol=1e-5)
  assert np.allclose(words.embed(texts[:3])['mean'], want[:3], atol=1e-5)
  cls = encoder.embed_source(source)['cls']
  projected = cls @ np.asarray(pair.params['projection']['kernel'])
  image = projected / np.linalg.norm(projected, axis=1, keepdims=True)
  assert np.allclose(pair.images(cls), image, atol=1e-5)
  assert pair.scale == pytest.approx(np.exp(float(pair.params['similarity']['scale'])), rel=1e-6) and 13 < pair.scale < 16
  both = jaxmed.load(run[0], tower='image+text')
  shown = both.embed_subsets(source, [('image',), ('text',), ('image', 'text')])
  real = np.array([bool(t) for t in texts])
  assert np.allclose(shown[2][:, :8], image, atol=1e-5) and not shown[0][:, 8:].any() and not shown[1][:, :8].any()
  assert np.allclose(np.linalg.norm(shown[2][:, 8:], axis=1), real, atol=1e-5)
  assert np.array_equal(both.embed_source(source)['mean'], shown[2])
  fresh = encoder.untrained(3)
  assert not np.allclose(fresh.pair.texts(texts), pair.texts(texts), atol=1e-3)
  with pytest.raises(UserError, match='has no patches of images'):
    words.embed_source(source, dense=True)


def test_from_the_command(run, tmp_path, capsys):
  place, corpus = map(str, run)
  asked = [['--task', 'zero_shot,retrieve_text', '--label', 'tissue'],
           ['--task', 'classify', '--label', 'tissue', '--tower', 'text'],
           ['--task', 'classify', '--label', 'tissue', '--tower', 'image+text', '--channels', 'all']]
  (tmp_path / 'words.json').write_text(json.dumps({'templates': ['{}', 'a {} tile'], 'classes': {}}), encoding='utf-8')
  asked[0] += ['--prompts', str(tmp_path / 'words.json'), '--option', 'zero_shot.pool=mean,max']
  found = []
  for i, words in enumerate(asked):
    out = tmp_path / f'{i}.json'
    assert cli.main(['evaluate', place, '--data', corpus, *words, '--out', str(out)]) == 0
    found.append(json.loads(out.read_text(encoding='utf-8')))
  capsys.readouterr()
  both = found[0]['protocols']
  assert [r['features'] for r in both['zero_shot']['rows']] == ['trained'] * 2 + ['untrained'] * 2
  assert both['zero_shot']['prompts'] == {t: [t, f'a {t} tile'] for t in ('colon', 'retina')}
  assert both['retrieve_text']['texts'] == both['retrieve_text']['splits']['test']  # each text says its own number
  assert {p.name for p in tmp_path.glob('0.*.png')} == {'0.zero_shot.named_images.png', '0.retrieve_text.best_texts.png'}
  page = (run[0] / 'report.html').read_text(encoding='utf-8')
  assert 'named images' in page and 'best texts' in page and 'top-5 accuracy' in page
  assert found[1]['rows'][0]['metrics']['accuracy']['value'] > 0.9  # a text says its tissue
  grid = found[2][place]
  assert grid['channels'] == ['image', 'text'] and len(grid['methods']['logistic']['subsets']) == 3
  assert any('lack some of the channels' in n for n in grid['notes'])
  assert cli.main(['export', place, '--tower', 'text', '--format', 'timm', '--out', str(tmp_path / 'x')]) == 2
  assert 'the tower text is of texts: export writes encoders of images' in capsys.readouterr().err
  for words, message in ((['--task', 'classify', '--prompts', 'pcam', '--label', 'tissue'], '--prompts is of --task zero_shot'),
                         (['--task', 'zero_shot', '--label', 'tissue', '--tower', 'text'], 'compares both towers'),
                         (['--task', 'retrieve_text', '--channels', 'all'], 'does not judge one vector a record')):
    assert cli.main(['evaluate', place, '--data', corpus, *words]) == 2
    assert message in capsys.readouterr().err
