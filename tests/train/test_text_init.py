"""Towers of texts that begin with weights of transformers or of a run; a run of SigLIP as a folder."""

import json

import jax
import numpy as np
import pytest

from jaxmed import cli
from jaxmed.config import merge
from jaxmed.errors import UserError
from jaxmed.interop import folders, two_towers
from jaxmed.train import loop
from jaxmed.train.build import assemble, resolve, rundir, towers
from tests.common import host, same
from tests.conftest import TINY
from tests.interop.test_folders import INFO, pair
from tests.test_recipes import SPECS

SIGLIP = merge({k: v for k, v in TINY.items() if k not in ('method', 'objective')}, {
    'method': 'siglip', 'model': 'vit_micro/8', 'steps': 1, 'eval_every': 9, 'checkpoint_every': 1, 'learning_rate': 1e-9,
    'encoder': {'depth': 1, 'class_token': False, 'map_head': True},
    'objective': {'out_dim': 32, 'project': False}, 'loader': {'text': 'tissue', 'text_length': 6}})


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """A folder of SiglipModel whose texts have 6 ids at most, of 300."""
  place = tmp_path_factory.mktemp('weights') / 'siglip'
  folders.export_towers(place, 'hf', pair(True), INFO)
  return place


def test_a_tower_begins_with_a_folder_and_goes_on_into_one(weights, corpus, no_figures, tmp_path):
  run = tmp_path / 'run'
  loop.train(merge(SIGLIP, {'data': str(corpus), 'towers': {'text': {'init': str(weights)}}}), run, quiet=True)
  trainer, config, _, state = rundir.load_state(run)
  assert config.towers.text.description.vocab_size == 300 and config.towers.text.description.pool == 'last'
  given = pair(True).text_params
  have = host(state.params['text'])
  for name in ('token_embed', 'pos_embed', 'transformer', 'norm'):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), have[name], given[name])
  assert have['head']['kernel'].shape == (16, 32)  # of another width than 16: fresh
  assert cli.main(['export', str(run), '--format', 'hf', '--out', str(tmp_path / 'out')]) == 0
  made = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert made['architectures'] == ['SiglipModel'] and made['text_config']['projection_size'] == 32
  again = folders.read_towers(tmp_path / 'out')
  assert again.bias == pytest.approx(float(state.params['similarity']['bias']))
  same(again.text_params, have)
  x, ids = np.zeros((1, 16, 16, 3), np.float32), np.ones((1, 6), int)
  image = trainer.objective.encoder.apply({'params': state.params['encoder']}, x).mean
  np.testing.assert_allclose(two_towers.vectors(again, x, ids)[0], image, atol=1e-5)
  same(host(rundir.load_tower(run, towers.TEXTS).params), have)
  with pytest.raises(UserError, match='open_clip makes an encoder'):
    cli.export.run(cli_arguments(run, 'open_clip', tmp_path / 'other'))


def cli_arguments(run, fmt, out):
  import argparse
  return argparse.Namespace(path=str(run), checkpoint='latest', tower='image', format=fmt, out=str(out))


def resolved(user):
  config = resolve.resolve(user, SPECS['demo'])
  towers.opened(config, rundir.load_tower)
  return assemble.build(config, SPECS['demo'])


def test_what_is_refused(weights, tmp_path):
  user = {'method': 'siglip', 'model': 'vit_micro/8', 'image_size': 16, 'loader': {'text_length': 6}}
  for tower, loader, words in (
      ({'init': str(weights), 'fixed': True}, {}, 'freeze=text'),
      ({'init': str(weights), 'options': {'depth': 3}}, {}, 'options are of a model'),
      ({'init': str(weights), 'model': 'text_siglip_micro'}, {}, 'another model than towers.text.model=text_siglip_micro'),
      ({'init': str(weights)}, {'text_length': 7}, 'loader.text_length=7 is longer than the 6 ids'),
      ({'init': str(weights / 'model.safetensors')}, {}, 'does not say its heads and activation'),
      ({'init': str(tmp_path / 'gone')}, {}, 'does not exist')):
    with pytest.raises(UserError, match=words):
      resolved(merge(user, {'towers': {'text': tower}, 'loader': loader}))
  options = {'embed_dim': 16, 'num_heads': 2, 'depth': 2, 'vocab_size': 300}
  built = resolved(merge(user, {'towers': {'text': {
      'init': str(weights / 'model.safetensors'), 'model': 'text_siglip_micro', 'options': options}}}))
  assert built.objective.towers['text'].pool == 'last' and built.objective.towers['text'].vocab_size == 300
