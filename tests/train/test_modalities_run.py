"""A run of images, signals and a table of which records lack some, through the real loop; its towers afterwards."""

import numpy as np
import pytest

from jaxmed.config import merge
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError
from jaxmed.train.build import rundir
from jaxmed.train.logs import read_rows
from tests.common import start
from tests.conftest import TINY

SMALL = merge(TINY, {'model': 'vit_micro/4', 'steps': 8, 'log_every': 1, 'checkpoint_every': 8, 'eval_every': 8, 'batch_size': 8,
                     'learning_rate': 1e-2, 'optimizer': {'warmup_steps': 1}, 'encoder': {'depth': 1}}) | {
    'objective': {'out_dim': 16}, 'loader': {'threads': 1, 'table': 'age,ph'},
    'towers': {'signal': {'model': 'channel_vit_micro/5', 'options': {'embed_dim': 32, 'depth': 1, 'num_heads': 2}},
               'table': {'model': 'table_mlp', 'options': {'embed_dim': 16, 'hidden': (16,)}}}}


@pytest.fixture(scope='module')
def patients(tmp_path_factory):
  """Records whose brightness is that of the image, the height of the signal and the age; a third lacks each."""
  root = tmp_path_factory.mktemp('modal')
  (root / 'in').mkdir()
  rng = np.random.default_rng(0)
  lines = ['path,subject,split,signal,age,ph']
  for i in range(32):
    k = rng.random()
    image = np.clip(rng.normal(60 + 120 * k, 5, (16, 16, 1)), 0, 255)
    np.savez(root / 'in' / f'{i:02d}.npz', image=np.uint8(image), channels=['x'])
    np.save(root / 'in' / f's{i:02d}.npy', np.float32(rng.normal(k, 0.1, (23, 2))))
    lines.append(f'{i:02d}.npz,{i},{"val" if i > 23 else "train"},{f"s{i:02d}.npy" if i % 3 else ""},'
                 f'{40 + 40 * k if (i + 1) % 3 else ""},{7 + k / 2 if (i + 1) % 3 else ""}')
  (root / 't.csv').write_text('\n'.join(lines))
  prepare([root / 'in'], root / 'c', table=root / 't.csv', progress=False)
  return root / 'c'


def test_a_run_of_three_modalities(patients, tmp_path):
  out = start(patients, tmp_path / 'run', SMALL, method='symile')
  rows = read_rows(tmp_path / 'run' / 'metrics.jsonl')
  found = [row['loss'] for row in rows if 'loss' in row]
  assert len(found) == 8 and np.isfinite(found).all() and np.mean(found[-2:]) < found[0] and np.isfinite(out['val_loss'])
  assert {'from_image', 'from_signal', 'from_table'} <= {key.rpartition('/')[2] for row in rows for key in row}
  config, spec = rundir.load_config(tmp_path / 'run')
  assert [c['name'] for c in spec.table] == ['age', 'ph'] and spec.signal == (23, 2)
  trainer, _, _, state = rundir.load_state(tmp_path / 'run')
  assert set(trainer.objective.products(state.variables())) == {'image', 'signal', 'table'}
  assert trainer.objective.towers['signal'].encoder.image_size == (20,)
  vectors = rundir.load(tmp_path / 'run').embed(np.zeros((1, 16, 16, 1), np.uint8))
  assert np.isfinite(vectors['mean']).all()
  with pytest.raises(UserError, match='tower signal is a model of signals: jaxmed.load gives encoders of images, here image'):
    rundir.load(tmp_path / 'run', tower='signal')
