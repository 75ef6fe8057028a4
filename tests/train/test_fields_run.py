"""Methods that want masks, or windows of records, through the real loop; corpora and runs that do not suit them."""

import dataclasses
import itertools
import json
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmed import objectives
from jaxmed.config import merge
from jaxmed.data.corpus.open import open_source
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError
from jaxmed.models.layers.transformer import Dense as Layer
from jaxmed.objectives.base import Method
from jaxmed.objectives.networks import inputs
from jaxmed.parallel.mesh import make_mesh
from jaxmed.train.build import assemble, data_spec, resolve, rundir
from jaxmed.train.logs import read_rows
from jaxmed.train.probe import Probe
from tests.common import record_indices, start
from tests.conftest import TINY

SMALL = merge(TINY, {'model': 'vit_micro/4', 'steps': 12, 'log_every': 1, 'checkpoint_every': 12, 'eval_every': 12, 'batch_size': 8,
                     'learning_rate': 1e-2, 'optimizer': {'warmup_steps': 1},
                     'encoder': {'depth': 1}, 'augment': {'scale': (0.5, 1.0)}}) | {'objective': {}}


class Toy(Method):
  """An encoder and a linear layer."""

  LEARNING_RATE: ClassVar = (1e-2, 8)

  def init(self, rng, batch):
    frame = inputs(batch)
    if self.WINDOWS:
      frame = {k: v[:, 0] for k, v in frame.items()}
    head = self.head.init(rng, jnp.zeros((1, self.encoder.embed_dim)))['params']
    return {'params': {'encoder': self.encoder.init(rng, **frame)['params'], 'head': head}, 'target': {}, 'extra': {}}

  def encoder_params(self, variables):
    return variables['params']['encoder']


@dataclasses.dataclass(frozen=True)
class Pixels(Toy):
  """Each pixel's label by a linear layer on its patch."""

  encoder: Any
  FIELDS: ClassVar = ('image', 'mask')

  @property
  def head(self):
    return Layer((4 * 4 * 2,), ('embed', None))

  def loss(self, variables, batch, rng, step, train=True):
    params = variables['params']
    features = self.encoder.apply({'params': params['encoder']}, **inputs(batch))
    logits = self.head.apply({'params': params['head']}, features.patches)
    side = batch['image'].shape[1] // 4
    logits = logits.reshape(-1, side, side, 4, 4, 2).swapaxes(2, 3).reshape(-1, 4 * side, 4 * side, 2)
    known = batch['mask'] >= 0
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch['mask'], 0))
    loss = (entropy * known).sum() / jnp.maximum(known.sum(), 1)
    return loss, ({'known': known.mean()}, {})


@dataclasses.dataclass(frozen=True)
class Order(Toy):
  """The place of each frame in its window, from how it differs from the mean of all frames."""

  encoder: Any
  WINDOWS: ClassVar = True
  DEFAULTS: ClassVar = {'loader': {'window': 3}}

  @property
  def head(self):
    return Layer((3,), ('embed', None))

  def loss(self, variables, batch, rng, step, train=True):
    params, there = variables['params'], batch['index'] >= 0  # [B, K]
    frames = {k: v.reshape(-1, *v.shape[2:]) for k, v in inputs(batch).items()}
    features = self.encoder.apply({'params': params['encoder']}, **frames).pooled('mean')
    features = features.reshape(*there.shape, -1)
    logits = self.head.apply({'params': params['head']}, features - features.mean(axis=1, keepdims=True))
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.broadcast_to(jnp.arange(3), there.shape))
    return (entropy * there).sum() / there.sum(), ({'there': there.mean()}, {})


@pytest.fixture(autouse=True)
def toys(monkeypatch):
  monkeypatch.setitem(objectives.METHODS, 'pixels', Pixels)
  monkeypatch.setitem(objectives.METHODS, 'order', Order)


@pytest.fixture(scope='module')
def frames(tmp_path_factory):
  """Twelve cases of four frames, which become brighter; the bright half of each is its mask. Files are shuffled."""
  root = tmp_path_factory.mktemp('frames')
  (root / 'in').mkdir()
  rng = np.random.default_rng(0)
  lines = ['path,subject,split,mask,case,seconds,phase']
  for name, k in enumerate(rng.permutation(48)):
    case, t = divmod(int(k), 4)
    image = rng.normal(60 + 30 * t, 5, (16, 16, 1))
    mask = np.zeros((16, 16, 1), np.uint8)
    mask[rng.integers(0, 8) :, rng.integers(0, 8) :] = 1
    np.savez(root / 'in' / f'{name:02d}.npz', image=np.uint8(image + 70 * mask), channels=['x'])
    np.savez(root / 'in' / f'm{name:02d}.npz', image=mask, channels=['x'])
    lines.append(f'{name:02d}.npz,{case},{"val" if case > 9 else "train"},m{name:02d}.npz,c{case},{t / 2},{"ab"[t > 1]}')
  (root / 't.csv').write_text('\n'.join(lines))
  prepare([root / 'in'], root / 'c', table=root / 't.csv', progress=False)
  return root / 'c'


def losses(run):
  return [row['loss'] for row in read_rows(run / 'metrics.jsonl') if 'loss' in row]


def test_a_dense_method_learns(frames, tmp_path):
  out = start(frames, tmp_path / 'run', SMALL, method='pixels')
  found = losses(tmp_path / 'run')
  assert np.mean(found[-3:]) < 0.6 * np.mean(found[:2])
  assert out['val_loss'] < 0.6
  config, spec = rundir.load_config(tmp_path / 'run')
  assert spec.holds == ('mask',)
  assert assemble.batch_shapes(config, spec)['mask'].shape == (8, 16, 16)


def test_a_method_of_windows_learns_their_order(frames, tmp_path, monkeypatch):
  seen = record_indices(monkeypatch)
  user = merge(SMALL, {'loader': {'window_group': 'case', 'window_order': 'seconds', 'window_stride': 1}})
  out = start(frames, tmp_path / 'run', user, method='order')
  assert np.mean(losses(tmp_path / 'run')[-3:]) < 0.8 < np.mean(losses(tmp_path / 'run')[:2])
  assert out['val_loss'] < 0.8  # log 3 = 1.1 where the order is by chance
  config, spec = rundir.load_config(tmp_path / 'run')
  assert assemble.batch_shapes(config, spec)['image'].shape == (8, 3, 16, 16, 1)
  source = open_source(frames).select('train')
  case, time = source.table['case'].to_pylist(), source.table['seconds'].to_pylist()
  for rows in itertools.chain.from_iterable(seen.values()):
    assert len({case[i] for i in rows}) == 1 and np.diff([time[i] for i in rows]).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(('method', 'options'), [
  ('phases', {'layers': 2, 'width': 8, 'dropout': 0.0, 'frames_at_once': 3}),
  ('anticipate', {'tokens': 2, 'stride': 1.0, 'dim': 16, 'depth': 1, 'num_heads': 2, 'hidden_dim': 16, 'dropout': 0.0})])
def test_phases_of_videos_are_learned(frames, tmp_path, method, options):
  """With an encoder that stays: windows of five have room behind videos of four frames, so that these end there."""
  loader = {'label': 'phase', 'window': 5, 'window_group': 'case', 'window_order': 'seconds'}
  user = merge(SMALL, {'steps': 30, 'checkpoint_every': 30, 'eval_every': 30, 'loader': loader, 'objective': options})
  out = start(frames, tmp_path / 'run', user, method=method)
  found = [row['accuracy'] for row in read_rows(tmp_path / 'run' / 'metrics.jsonl') if 'accuracy' in row]
  bar = 0.95 if method == 'phases' else 0.78  # a convolution counts frames from the border, single frames overlap
  assert np.mean(found[:2]) < 0.75 and np.mean(found[-5:]) > bar
  assert out['val_loss'] < (0.3 if method == 'phases' else 0.6)
  seen = read_rows(tmp_path / 'run' / 'metrics.jsonl')[-1]
  trainer, config, spec, state = rundir.load_state(tmp_path / 'run')
  videos = Probe(trainer, config, spec, open_source(frames), make_mesh({'data': 0}), lambda: None).videos(state)
  assert [y.tolist() for y, _ in videos] == [[0, 0, 1, 1]] * 2  # two held-out cases, in their order
  assert seen['val_accuracy'] == pytest.approx(np.mean([y == p for y, p in videos])) and seen['val_edit'] > 0.3


def test_what_does_not_suit_is_one_line(frames, corpus, tmp_path):
  for place, changes, match in (
      (corpus, {'method': 'pixels'}, "method pixels trains on the field 'mask', which no record of the corpus has"),
      (frames, {'method': 'mae', 'loader': {'window': 3}}, 'loader.window=3 makes samples of several records, but method mae'),
      (frames, {'method': 'order', 'loader': {'window_group': 'cas'}}, "'cas': did you mean 'case'"),
      (frames, {'method': 'order', 'augment': {'local_views': 2}}, 'loader.window=3 goes with global views alone'),
      (frames, {'method': 'order', 'loader': {'window': -1}}, 'loader.window must be at least 0')):
    with pytest.raises(UserError, match=match) as e:
      start(place, tmp_path / 'no', SMALL, **changes)
    assert '\n' not in str(e.value) and not (tmp_path / 'no').exists()
  without = dataclasses.replace(data_spec.describe(open_source(frames).select('train'), ''), holds=())
  with pytest.raises(UserError, match='no record of the corpus has'):
    resolve.resolve(SMALL | {'method': 'pixels'}, without)


def test_runs_of_earlier_versions_are_read(trained, tmp_path):
  """Their config.json has no key of fields and windows, their data.json does not say what records hold."""
  values, data = (json.loads((trained / name).read_text()) for name in ('config.json', 'data.json'))
  for key in ('text_length', 'signal_length', 'window', 'window_group', 'window_order', 'window_stride'):
    del values['loader'][key]
  for key in ('holds', 'signal', 'boxes'):
    del data[key]
  (tmp_path / 'config.json').write_text(json.dumps(values))
  (tmp_path / 'data.json').write_text(json.dumps(data))
  config, spec = rundir.load_config(tmp_path)
  assert (config, spec) == rundir.load_config(trained)
  shapes = assemble.batch_shapes(config, spec)
  assert {k: (v.shape, v.dtype.name) for k, v in shapes.items()} == {
      'image': ((8, 24, 24, 3), 'uint8'), 'channels': ((8, 3), 'int32'), 'label': ((8,), 'int32'), 'index': ((8,), 'int32')}
