"""What `doctor --data` measures, and what it makes of it."""

import collections
import json
import time

import pytest

from jaxmed import cli
from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed import rates


@pytest.mark.parametrize('fit', ['resize', 'crop'])
def test_all_stages_are_measured(corpus, fit):
  source = open_source(corpus).select('train')
  out = rates.measure(source, size=(16, 16), batch_size=8, fit=fit, seconds=0.02, cores=2)
  assert out['records'] == 64
  assert out['stored'] == [24, 24]
  assert not out['bricks']
  assert 24 * 24 * 3 / 4 < out['record_bytes'] < 24 * 24 * 3 + 500
  stages = {'disk', 'read', 'decode', 'fit', 'batch'} - ({'decode'} if fit == 'crop' else set())
  assert set(out['rates']) == stages
  assert all(set(found) == ({1} if name == 'disk' else {1, 2}) for name, found in out['rates'].items())
  assert all(rate > 0 for found in out['rates'].values() for rate in found.values())
  assert out['images_per_second'] == max(out['rates']['batch'].values())
  assert out['transfer_images'] > 0
  assert out['threads'] in (1, 2)
  text = rates.text(out)
  assert 'bound: ' in text and 'advice: ' in text
  json.dumps(out)


def test_each_row_once_an_epoch():
  seen = collections.Counter()

  def work(i):
    seen[i] += 1
    return 10

  count, size = rates._rate(work, 50, 3, 0.05)
  seen[0] -= 1  # the call before
  assert size == pytest.approx(10 * count)
  assert max(seen.values()) - min(seen[i] for i in range(50)) <= 1
  assert sum(seen.values()) - 3 <= round(count * 0.05) <= sum(seen.values())


def test_a_call_that_takes_longer_than_the_measurement_counts():
  count, size = rates._rate(lambda i: time.sleep(0.05) or 10, 4, 2, 0.001)
  assert 0 < count < 25 and size == pytest.approx(10 * count)


def judged(**changes):
  found = {'disk': {1: 900.0}, 'read': {1: 1000.0, 2: 2000.0}, 'decode': {1: 500.0, 2: 1000.0},
           'fit': {1: 400.0, 2: 800.0}, 'batch': {1: 400.0, 2: 800.0}} | changes.pop('rates', {})
  out = {'rates': found, 'cores': 2, 'size': [32, 32], 'stored': [32, 32], 'fit': 'resize',
         'milliseconds': rates._costs(found), 'transfer_images': 1e6} | changes
  return rates._judged(out, changes.get('threads', 2))


def test_costs_are_what_a_stage_adds():
  found = rates._costs({'read': {1: 1000.0}, 'decode': {1: 500.0}, 'fit': {1: 400.0}})
  assert found == pytest.approx({'read': 1.0, 'decode': 1.0, 'fit': 0.5})
  assert rates._costs({'read': {1: 1000.0}, 'fit': {1: 2000.0}})['fit'] == 0


def test_judgement():
  good = judged()
  assert (good['bound'], good['threads'], good['images_per_second']) == ('read', 2, 800.0)
  assert good['advice'] == ['nothing to mend: 2 thread(s) read 800 images/s']
  assert judged(rates={'fit': {1: 100.0, 2: 200.0}})['bound'] == 'fit'
  slow = judged(transfer_images=300.0)
  assert slow['bound'] == 'transfer'
  assert 'way to the device' in slow['advice'][0]
  disk = judged(rates={'disk': {1: 50.0}})
  assert disk['bound'] == 'disk'
  assert 'local SSD' in disk['advice'][0]
  assert 'loader.threads=2 reads 800 images/s, 1 thread(s) 400' in judged(threads=1)['advice'][0]
  flat = judged(rates={'batch': {1: 400.0, 2: 410.0}})
  assert flat['threads'] == 1
  assert any('several processes' in line for line in flat['advice'])
  large = judged(stored=[128, 64])
  assert any('128x64 are shrunk to 32x32' in line and '8.0 times smaller' in line for line in large['advice'])
  assert not any('shrunk' in line for line in judged(stored=[128, 64], fit='crop')['advice'])


def test_the_command(corpus, capsys):
  assert cli.main(['doctor', '--data', str(corpus), '--size', '16', '--batch', '8', '--seconds', '0.02', '--json']) == 0
  out = json.loads(capsys.readouterr().out)
  assert out['records'] == 64
  assert out['size'] == [24, 24]  # what the run that is meant would fit records to
  for words, said in ((['--data', str(corpus / 'none')], 'does not exist'), (['--data', str(corpus), '--seconds', '0'], '--seconds'),
                      (['--data', str(corpus), '--size', '16', '16', '16'], 'axes')):
    assert cli.main(['doctor', *words]) == 2
    assert said in capsys.readouterr().err
