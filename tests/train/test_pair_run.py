"""A run of images and texts: both towers as encoders, and every task that compares them, from the command."""

import dataclasses
import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmed
from jaxmed import cli
from jaxmed.config import merge
from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed.texts import Texts
from jaxmed.errors import UserError
from jaxmed.evaluate.protocols import channels
from jaxmed.evaluate.protocols.classify import Classify
from jaxmed.train import loop, pictures
from jaxmed.train.build import assemble, resolve, rundir
from tests.conftest import TINY
from tests.test_recipes import SPECS

SMALL = merge({k: v for k, v in TINY.items() if k not in ('method', 'objective')}, {
    'method': 'clip', 'model': 'vit_micro/8', 'steps': 1, 'eval_every': 9, 'checkpoint_every': 1, 'objective': {'out_dim': 8},
    'loader': {'text_length': 140}, 'encoder': {'depth': 1},
    'towers': {'text': {'model': 'text_micro', 'options': {'depth': 1, 'embed_dim': 16, 'num_heads': 2}}}})


@pytest.fixture(scope='module')
def load():
  """tower -> what a run would load, with fresh weights."""
  config = resolve.resolve(SMALL, SPECS['demo'])
  trainer = assemble.build(config, SPECS['demo'])
  count = len(SPECS['demo'].channels)
  batch = {'image': jnp.zeros((1, 16, 16, count)), 'channels': jnp.arange(count)[None], 'text': jnp.ones((1, 140), jnp.int32)}
  variables = nn.unbox(jax.jit(trainer.objective.init)(jax.random.key(0), batch))
  state = types.SimpleNamespace(variables=lambda: variables, average=None, step=jnp.zeros((), int))
  return lambda tower='image': rundir.encoder_of(trainer, config, SPECS['demo'], state, tower)


@pytest.fixture(scope='module')
def few(demo_corpus):
  """Every 40th record of the demo."""
  source = open_source(demo_corpus)
  return source.keep(np.arange(len(source)) % 40 == 0)


def test_both_towers_are_encoders(load, few):
  encoder, words = load(), load('text')
  pair, source = encoder.pair, few.select('test')
  texts = source.table['text'].to_pylist()
  found = words.embed_source(source)['mean']
  assert found.shape == (len(source), 8)
  ids = np.array([([c + 1 for c in t.encode()] + [0] * 140)[:140] for t in texts])
  want = np.asarray(pair.objective.text.apply({'params': pair.params['text']}, ids).mean)
  assert np.allclose(found, want, atol=1e-5)
  assert np.allclose(words.embed(['', *texts[:3]])['mean'][1:], want[:3], atol=1e-5)
  joined = dataclasses.replace(pair, wording=Texts(('subject', 'text')))  # as of a run with loader.text=subject,text
  longer = [f'{s} {t}' for s, t in zip(source.table['subject'].to_pylist(), texts, strict=True)]
  assert np.array_equal(dataclasses.replace(words, encoder=dataclasses.replace(encoder, pair=joined)).embed_source(source)['mean'],
                        words.embed(longer)['mean'])
  cls = encoder.embed_source(source)['cls']
  projected = cls @ np.asarray(pair.params['projection']['kernel'])
  image = projected / np.linalg.norm(projected, axis=1, keepdims=True)
  assert np.allclose(pair.images(cls), image, atol=1e-5)
  assert pair.scale == pytest.approx(np.exp(float(pair.params['similarity']['scale'])), rel=1e-6) and 13 < pair.scale < 16
  both = load('image+text')
  shown = both.embed_subsets(source, [('image',), ('text',), ('image', 'text')])
  assert np.allclose(shown[2][:, :8], image, atol=1e-5) and not shown[0][:, 8:].any() and not shown[1][:, :8].any()
  assert np.allclose(shown[1][:, 8:], want / np.linalg.norm(want, axis=1, keepdims=True), atol=1e-5)
  assert np.array_equal(both.embed_source(source)['mean'], shown[2])
  assert not np.allclose(encoder.untrained(3).pair.texts(texts), pair.texts(texts), atol=1e-3)
  for other in (words, both):
    with pytest.raises(UserError, match='patches'):
      other.embed_source(source, dense=True)


def test_by_tower_and_by_subsets_of_modalities(load, few):
  words, both = load('text'), load('image+text')
  found = jaxmed.evaluate(words, few, label='region', seed=1)
  assert {r['features'] for r in found['rows']} == {'trained', 'untrained', 'pixels (PCA)'}
  assert found['rows'][1]['metrics']['accuracy']['value'] > 2 * found['chance']['accuracy']  # a text says its region
  grid = channels.ByChannels(Classify(probes=('knn',))).run(both, few, 'region', draws=20)
  value = {tuple(s['channels']): s['metrics']['accuracy']['value'] for s in grid['methods']['knn']['subsets']}
  assert set(value) == {('image',), ('text',), ('image', 'text')} and value['image', 'text'] > value['image',]
  for task in ('zero_shot', 'retrieve_text'):
    with pytest.raises(UserError, match='compares both towers: leave --tower out'):
      jaxmed.evaluate(words, few, task, label='region')


def test_from_the_command(demo_corpus, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(pictures, 'views', lambda run, state: None)
  monkeypatch.setattr(pictures, 'end', lambda run, state: None)
  loop.train(SMALL | {'data': str(demo_corpus)}, tmp_path / 'run', quiet=True)
  place, corpus = str(tmp_path / 'run'), str(demo_corpus)
  (tmp_path / 'words.json').write_text(json.dumps({'templates': ['{}', 'a {} patch']}), encoding='utf-8')
  ask = ['evaluate', place, '--data', corpus, '--where', 'subject=brain-test-02-2,brain-test-02-4,brain-test-02-5']
  out = tmp_path / 'all.json'
  assert cli.main([*ask, '--task', 'zero_shot,retrieve_text', '--label', 'region', '--prompts', str(tmp_path / 'words.json'),
                   '--option', 'zero_shot.pool=mean,max', '--out', str(out)]) == 0
  found = json.loads(out.read_text(encoding='utf-8'))['protocols']
  assert [r['features'] for r in found['zero_shot']['rows']] == ['trained'] * 2 + ['untrained'] * 2
  assert found['zero_shot']['prompts']['central-inferior-medial'][1] == 'a central-inferior-medial patch'
  assert found['retrieve_text']['texts'] <= found['retrieve_text']['splits']['test']
  assert {p.name for p in tmp_path.glob('*.png')} == {'all.zero_shot.named_images.png', 'all.retrieve_text.best_texts.png'}
  page = (tmp_path / 'run/report.html').read_text(encoding='utf-8')
  assert 'named images' in page and 'best texts' in page and 'top-5 accuracy' in page
  capsys.readouterr()
  for words, message in (
      ([*ask, '--task', 'classify', '--prompts', 'pcam', '--label', 'region'], '--prompts is of --task zero_shot'),
      ([*ask, '--task', 'retrieve_text', '--channels', 'all'], 'does not judge one vector a record'),
      (['export', place, '--tower', 'text', '--format', 'timm', '--out', str(tmp_path / 'x')],
       'the tower text is of texts: export writes encoders of images')):
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err
