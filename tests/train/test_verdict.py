"""What a run says at its end: the same probes on the untrained encoder and on pixels, and the lines that follow."""

import numpy as np
import pytest

from jaxmed.data.corpus.open import open_source
from jaxmed.evaluate import pixels, probes
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.train import evaluators, verdict
from jaxmed.train.build.rundir import load_state
from jaxmed.train.probe import Probe
from jaxmed.train.verdict import Length

GOOD = {'knn': 0.8, 'knn_untrained': 0.6, 'knn_pixels': 0.7, 'knn_over_untrained_low': 0.1,
        'knn_over_untrained_high': 0.3, 'knn_over_pixels_low': 0.02, 'knn_over_pixels_high': 0.2}
HEALTH = {'rankme': 20.0, 'lidar': 30.0}
MAE = Length('mae', 'vit_micro/8', 5.0)


def test_others_are_judged_on_the_same_records_as_the_run(trained, corpus):
  trainer, config, spec, state = load_state(trained)
  config.loader.label = 'tissue'
  probe = Probe(trainer, config, spec, open_source(corpus), mesh_lib.make_mesh({'data': 0}), lambda: None)
  found = evaluators.evaluation('knn,ridge', 10, 20, probe)(state, ('knn', 'ridge'))
  snapshot, (train, val) = probe.at(state), probe.labelled
  own = snapshot.labelled
  plain = snapshot.encoder.untrained(config.seed)
  sources = {'untrained': [plain.embed_source(part)[plain.feature] for part in (train, val)],
             'pixels': pixels.source_features(snapshot.encoder, train, val)}
  for other, (x, y) in sources.items():
    for name, scores in (('knn', probes.knn), ('ridge', probes.ridge)):
      right = scores(x, own.train_y, y, own.classes).argmax(axis=1) == own.val_y
      assert found[f'{name}_{other}'] == pytest.approx(right.mean())
      low, high = (found[f'{name}_over_{other}_{end}'] for end in ('low', 'high'))
      assert low <= found[name] - right.mean() + 1e-9 and found[name] - right.mean() - 1e-9 <= high
  assert verdict.beside(snapshot, ('loss', 'health')) == {}


def test_a_run_that_pays_says_what_it_has():
  assert verdict.lines(GOOD, {}, MAE) == ['accuracy on held-out records: kNN 0.800 (untrained 0.600, pixels 0.700)']


@pytest.mark.parametrize('worse, words', [
    ({'knn_over_untrained_low': -0.01}, 'not beyond its untrained encoder by kNN (+0.200 [-0.010, +0.300]): try'),
    ({'knn_over_untrained_low': np.nan}, 'not beyond its untrained encoder'),
    ({'knn_over_pixels_low': -0.1, 'knn_over_pixels_high': -0.01}, 'below raw pixels by kNN (+0.100 [-0.100, -0.010])')])
def test_a_run_that_does_not_pay_says_so_and_what_to_try(worse, words):
  first, second = verdict.lines(GOOD | worse, {}, MAE)
  assert first.startswith('accuracy') and words in second
  assert all(word in second for word in ('epochs=20 ', 'method=simclr', 'model=resnet_micro'))
  other = verdict.lines(GOOD | worse, {}, Length('simclr', 'resnet_micro', 5.0))[1]
  assert 'method=mocov3' in other and 'model=' not in other


def test_pixels_are_ahead_only_where_they_are_by_the_better_probe():
  below = {'knn_over_pixels_high': -0.01}
  ridge = {k.replace('knn', 'ridge'): v for k, v in GOOD.items()}
  assert len(verdict.lines(GOOD | below, {}, MAE)) == 2
  assert len(verdict.lines(GOOD | below | ridge, {}, MAE)) == 1


def test_without_labels_health_is_compared_with_the_start():
  assert verdict.lines({'loss': 1.0}, HEALTH, MAE) == []
  better, = verdict.lines({'rankme': 40.0, 'lidar': 50.0}, HEALTH, MAE)
  assert better.startswith('effective rank of the features 40.0 (untrained 20.0), LiDAR 50.0 (30.0)')
  assert 'tells images apart no better' in verdict.lines({'rankme': 40.0, 'lidar': 29.0}, HEALTH, MAE)[1]
