"""Packed rows in runs: one program for every set of channels, and no gradient for channels that are not shown."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed import fields, pipeline, sampling
from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.objectives.masked.mae import MAE
from jaxmed.train import pictures
from jaxmed.train.build import data_spec
from jaxmed.train.logs import read_rows
from jaxmed.train.step import Trainer
from tests.common import record_indices, start
from tests.conftest import TINY
from tests.objectives.devices import batch_of

SIZES = dict(embed_dim=16, depth=1, num_heads=2)


def test_a_run_compiles_its_step_once(mixed_corpus, tmp_path, monkeypatch):
  """Whatever channels and sizes its batches have; and its losses are those of a run on padded rows."""
  monkeypatch.setattr(pictures, 'views', lambda run, state: None)
  monkeypatch.setattr(pictures, 'end', lambda run, state: None)
  seen = record_indices(monkeypatch)
  short = dict(steps=4, checkpoint_every=4, eval_every=4, batch_size=16, loader={'threads': 1},
               augment={'sample_sizes': (8, 16)})
  compiled, own = [], Trainer.compile  # what it returns takes one shape alone: nothing can be compiled behind it
  monkeypatch.setattr(Trainer, 'compile', lambda self, *args: compiled.append(self) or own(self, *args))
  start(mixed_corpus, tmp_path / 'packed', TINY, **short, encoder=TINY['encoder'] | {'packing': 0.75})
  assert len(compiled) == 1 and compiled[0].objective.encoder.packing == 0.75
  channels = open_source(mixed_corpus).select('train').table['channels'].to_pylist()
  sets = {tuple(len(channels[i]) for i in rows) for rows in seen.values()}
  assert len(seen) == len(sets) == 4  # no batch has the channels of another
  start(mixed_corpus, tmp_path / 'padded', TINY, **short)
  losses = [[row['loss'] for row in read_rows(tmp_path / name / 'metrics.jsonl') if 'loss' in row]
            for name in ('packed', 'padded')]
  assert len(losses[0]) == 4
  np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize('packing', [0.0, 1.0])
def test_channels_that_are_not_shown_get_no_gradient(packing):
  """Exactly none, neither their pixels nor their embeddings."""
  objective = MAE(create_model('channel_vit_micro/4', 16, 3, packing=packing, **SIZES), decoder_dim=16,
                  decoder_depth=1, decoder_heads=2)
  batch = batch_of(np.random.default_rng(0), MAE, 16)
  batch['channels'] = np.tile(np.array([2, 0], np.int32), (8, 1))
  batch['channel_mask'] = np.tile(np.array([[True, False]]), (8, 1)) | (np.arange(8) < 4)[:, None]
  batch['channel_mask'][:, 1] &= False
  batch['image'] = np.nan_to_num(batch['image'])
  variables = nn.unbox(objective.init(jax.random.key(0), batch))

  def loss(params, image):
    return objective.loss(variables | {'params': params}, batch | {'image': image}, jax.random.key(1), 0)[0]

  grads, pixels = jax.jit(jax.grad(loss, (0, 1)))(variables['params'], jnp.asarray(batch['image']))
  table = np.abs(grads['encoder']['channel_embed']).sum(axis=1)
  assert (table[[0, 1]] == 0).all() and table[2] > 0
  size = np.abs(pixels).sum(axis=(1, 2))
  assert (size[:, 1] == 0).all() and (size[:, 0] > 0).all()


def test_more_channels_than_a_batch_has_room_for(mixed_corpus):
  source = open_source(mixed_corpus).select('train')
  spec = data_spec.describe(source, '')
  data_spec.check_same(spec, source)
  with pytest.raises(UserError, match='has a record of 3 channels, but the run began with at most 2'):
    data_spec.check_same(dataclasses.replace(spec, slots=2), source)
  narrow = fields.of(('image',), size=(16, 16), slots=2, dtype='uint8')
  elements = pipeline._Elements(source, (16, 16), narrow, spec.ids, 'resize', np.zeros(len(source), np.int32), len(source))
  assert elements._padded(np.ones((4, 4, 1), np.uint8), 0)[0, 0].tolist() == [1, 0]
  with pytest.raises(UserError, match='record 0 has 3 channels, more than the 2 that its manifest tells of'):
    elements._padded(np.ones((4, 4, 3), np.uint8), 0)


def test_batches_of_nearly_the_same_number_of_channels(mixed_corpus):
  source = open_source(mixed_corpus).select('train')
  channels = np.array([len(c) for c in source.table['channels'].to_pylist()])
  sampler = sampling.make(source, sampling.Mixture(balance='n_channels'), 0)
  assert sampler.names == ('1', '3')
  totals = channels[[sampler(i) for i in range(160)]].reshape(20, 8).sum(axis=1)
  assert np.ptp(totals) <= 4 and totals.mean() == pytest.approx(8 * channels.mean(), abs=0.5)
  assert set(range(len(source))) == {sampler(i) for i in range(2 * len(source))}
