"""Methods of volumes that were stopped end with the state of a run that was not, bit for bit."""

import pytest

from jaxmed.errors import Stopped
from jaxmed.train import loop
from tests.common import record_indices, same, saved_state, start
from tests.conftest import TINY

pytestmark = pytest.mark.usefixtures('no_figures')

BASE = TINY | {'steps': 4, 'checkpoint_every': 4, 'eval_every': 4, 'objective': {}, 'evaluators': 'loss',
               'encoder': {'embed_dim': 16, 'depth': 1, 'num_heads': 2}}
CONVOLUTIONS = {'model': 'convnextv2_micro', 'encoder': {'depths': (1, 1), 'dims': (8, 16)}}
WINDOW = {'loader': {'threads': 1, 'window': 4, 'window_group': 'subject'}}
HEAD = {'hidden_dim': 16, 'out_dim': 8}
METHODS = {
    'voco': {'objective': HEAD, 'augment': {'tiles': (2,), 'views': 6}},
    'gemini': {},
    'alice': {'objective': HEAD},
    'swin_unetr_ssl': {},
    'models_genesis': {},
    'volume_fusion': {},
    'spark': CONVOLUTIONS | {'objective': {'mask_size': 8}},
    'joint_clustering': WINDOW,
    'uni4eye': WINDOW | {'objective': {'patch_slices': 2}},
}


@pytest.mark.parametrize('method', METHODS)
def test_2_and_2_equal_4(corpus, tmp_path, monkeypatch, method):
  user = BASE | METHODS[method] | {'method': method}
  start(corpus, tmp_path / 'whole', user)
  with monkeypatch.context() as m:
    record_indices(m, stop_at=2)
    with pytest.raises(Stopped, match='SIGTERM'):
      start(corpus, tmp_path / 'parts', user)
  loop.resume(tmp_path / 'parts', quiet=True)
  same(saved_state(tmp_path / 'whole'), saved_state(tmp_path / 'parts'))
