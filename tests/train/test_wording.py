"""Runs with a vocabulary of their own texts: kept whole, the size of the tower, and the same after a stop."""

import json

import pytest

from jaxmed.data.feed import tokenizers
from jaxmed.errors import Stopped, UserError
from jaxmed.train import loop
from jaxmed.train.build import rundir, wording
from tests.common import record_indices, same, saved_state, start

pytestmark = pytest.mark.usefixtures('no_figures')

USER = {'method': 'clip', 'model': 'channel_vit_micro/16', 'image_size': 32, 'batch_size': 4, 'steps': 4, 'log_every': 1,
        'learning_rate': 1e-3, 'checkpoint_every': 4, 'eval_every': 4, 'evaluators': 'loss',
        'encoder': {'embed_dim': 16, 'depth': 1, 'num_heads': 2}, 'objective': {'out_dim': 8},
        'towers': {'text': {'options': {'embed_dim': 16, 'depth': 1, 'num_heads': 2}}},
        'loader': {'threads': 1, 'tokenizer': 'wordpiece:200', 'text_length': 40, 'text_draw': 'sentence'}}


def test_a_run_keeps_its_vocabulary(demo_corpus, tmp_path, monkeypatch):
  start(demo_corpus, tmp_path / 'whole', USER)
  with monkeypatch.context() as m:
    record_indices(m, stop_at=2)
    with pytest.raises(Stopped, match='SIGTERM'):
      start(demo_corpus, tmp_path / 'parts', USER)
  loop.resume(tmp_path / 'parts', quiet=True)
  same(saved_state(tmp_path / 'whole'), saved_state(tmp_path / 'parts'))
  config, spec = rundir.load_config(tmp_path / 'whole')
  texts = wording.of(spec.texts)
  assert config.towers.text.options.vocab_size == texts.tokenizer.vocab_size <= 200
  kept = tokenizers.load(tmp_path / 'whole')
  assert kept == texts.tokenizer and json.loads((tmp_path / 'whole' / 'tokenizer.json').read_text())['model']['type'] == 'WordPiece'
  table = saved_state(tmp_path / 'whole').params['text']['token_embed']
  assert table.shape == (kept.vocab_size, 16)
  tower = {'text': {'options': {'vocab_size': 50}}}
  with pytest.raises(UserError, match='vocab_size=50 is fewer than the .* ids of loader.tokenizer'):
    start(demo_corpus, tmp_path / 'small', USER, towers=tower)


def test_captions_need_no_column_of_texts(corpus, tmp_path):
  file = tmp_path / 'c.json'
  file.write_text(json.dumps({'column': 'tissue', 'templates': ['a slide of {}.', 'stained: {}']}))
  start(corpus, tmp_path / 'run', USER, steps=1, model='vit_micro/8', image_size=16,
        loader={'captions': str(file), 'tokenizer': 'bpe:90'})
  _, spec = rundir.load_config(tmp_path / 'run')
  assert spec.texts['columns'] == ['tissue'] and set(wording.of(spec.texts).captions) == set(spec.texts['captions'])
