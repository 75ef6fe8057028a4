"""Channels by name: aliases, what else is known of them, names that nobody knows; from the file to the encoder."""

import json

import numpy as np
import pytest

import jaxmed
from jaxmed import cli, interop
from jaxmed.data.corpus import vocabulary
from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed.pipeline import eval_batches
from jaxmed.errors import UserError
from tests.common import start
from tests.conftest import TINY

ABOUT = {'red': {'aliases': ['R', 'gray'], 'stain': 'eosin'}, 'green': {'aliases': ['G']}, 'blue': {'aliases': ['B']}}
pytestmark = pytest.mark.usefixtures('no_figures')
HASHED = TINY['encoder'] | {'channel_embedding': 'hashed', 'hash_rows': 64, 'hash_width': 8}


@pytest.fixture(scope='module')
def about(tmp_path_factory):
  path = tmp_path_factory.mktemp('vocabulary') / 'channels.json'
  path.write_text(json.dumps(ABOUT))
  return path


@pytest.fixture(scope='module')
def run(mixed_corpus, about, tmp_path_factory):
  """A run with hashed embeddings and diverse sampling, in which gray is another word for red."""
  out = tmp_path_factory.mktemp('runs') / 'run'
  start(mixed_corpus, out, TINY | {'steps': 3, 'encoder': HASHED, 'loader': {'threads': 1, 'vocabulary': str(about)},
                                   'augment': {'channel_sampling': 'diverse', 'channel_temperature': 0.5}})
  return out


def test_read(about):
  known = vocabulary.read(about)
  assert known.name('gray') == known.name('red') == 'red' and known.name('other') == 'other'
  assert known.aliases('red') == ['R', 'gray'] and known.features['red'] == 'red|stain=eosin'
  assert known.unknown(['G', 'x']) == ['x']


def test_names_share_an_id(mixed_corpus):
  ids = {'R': 1, 'gray': 1, 'G': 0, 'B': 2}
  for batch in eval_batches(open_source(mixed_corpus), batch_size=8, size=(8, 8), vocabulary=ids):
    for row, mask in zip(batch['channels'], batch['channel_mask'], strict=True):
      assert row[mask].tolist() in ([1, 0, 2], [1], [])


def test_a_run_knows_channels_by_any_name(run, mixed_corpus):
  encoder = jaxmed.load(run)
  assert encoder.vocabulary == ('red', 'green', 'blue')
  assert encoder.model.channel_names == ('red|stain=eosin', 'green', 'blue')
  stats = open_source(mixed_corpus).stats
  counts = [stats[c]['count'] for c in ('R', 'gray')]
  assert encoder.channels[0]['mean'] == pytest.approx(
      np.average([stats[c]['mean'] for c in ('R', 'gray')], weights=counts), rel=1e-6)
  image = np.random.default_rng(0).integers(0, 255, (1, 16, 16, 1), np.uint8)
  want = encoder.embed(image, channels=['red'])['mean']
  np.testing.assert_array_equal(encoder.embed(image, channels=['gray'])['mean'], want)
  with pytest.raises(UserError, match='the channels red, green, blue'):
    encoder.embed(np.repeat(image, 2, axis=-1), channels=['R', 'gray'])


def test_a_name_that_training_never_saw(run, tiles, tmp_path, capsys):
  """An error that names the nearest; with --unseen allow a vector by its hash."""
  words = ['embed', str(run), '--data', str(tiles), '--out', str(tmp_path / 'a.npz'), '--channels', 'R,far red,B']
  assert cli.main(words) == 2
  assert "unknown channel" in capsys.readouterr().err
  assert cli.main([*words, '--unseen', 'allow']) == 0
  assert 'was not trained on far red' in capsys.readouterr().err
  assert np.isfinite(np.load(tmp_path / 'a.npz')['features']).all()
  encoder = jaxmed.load(run)
  wide = encoder.extended({'far red': {'mean': 0.0, 'std': 1.0}, 'R': {'mean': 9.0, 'std': 9.0}})
  assert wide.vocabulary == ('red', 'green', 'blue', 'far red')
  image = np.random.default_rng(0).normal(size=(1, 16, 16, 2))
  np.testing.assert_allclose(wide.embed(image, ['G', 'B'])['mean'], encoder.embed(image, ['G', 'B'])['mean'], atol=1e-6)
  assert np.abs(wide.embed(image, ['G', 'far red'])['mean'] - wide.embed(image, ['G', 'B'])['mean']).max() > 1e-4


@pytest.mark.parametrize('layout', ['channelvit', 'jaxmed'])
def test_hashed_embeddings_travel(run, layout, tmp_path):
  """The official class has a table: the vectors themselves are written, under the names of the channels."""
  encoder = jaxmed.load(run)
  model, info = encoder.model.clone(pos='learned', image_size=(16, 16)), {'channels': list(encoder.channels)}
  import jax
  params = dict(encoder.params) | {'pos_embed': jax.numpy.zeros((5, 32))}
  interop.export_file(tmp_path / 'a.safetensors', layout, model, params, info)
  other = jaxmed.load(tmp_path / 'a.safetensors')
  assert other.model.channel_embedding == ('table' if layout == 'channelvit' else 'hashed')
  np.testing.assert_allclose(other.model.apply({'params': other.params}, method='channel_vectors'),
                             model.apply({'params': params}, method='channel_vectors'), atol=1e-6)
  assert other.ids == encoder.ids


def test_bad_input(mixed_corpus, about, tmp_path):
  path = tmp_path / 'v.json'
  for content, words in (({'a': {'aliases': ['x']}, 'b': {'aliases': ['x']}}, "'x' stands for 'a' and for 'b'"),
                         ([1], 'must be JSON of the form'), ({'a': 3}, "'a' has 3")):
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
      vocabulary.read(path)
  path.write_text(json.dumps({'red': {'aliases': ['R', 'G']}}))
  base = TINY | {'loader': {'threads': 1, 'vocabulary': str(path)}}
  with pytest.raises(UserError, match="channels R and G, which are both 'red'"):
    start(mixed_corpus, tmp_path / 'run', base)
  path.write_text(json.dumps({'R': {}, 'G': {}, 'B': {}, 'grey': {}}))
  with pytest.raises(UserError, match=r"the channel 'gray', which .*v.json does not name \(near it: grey"):
    start(mixed_corpus, tmp_path / 'run', TINY | {'loader': {'vocabulary': str(path), 'unknown': 'error'}})
  with pytest.raises(UserError, match='diverse looks at channel embeddings, of which vit_micro/8 has none'):
    start(mixed_corpus, tmp_path / 'run', TINY | {'model': 'vit_micro/8', 'augment': {'channel_sampling': 'diverse'}})
