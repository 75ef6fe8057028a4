"""What a run says while it starts, and how long it says that took."""

import json
import shutil
import time

import pytest

from jaxmed.evaluate.page import write_report
from jaxmed.train import loop
from jaxmed.train.monitor import times
from tests.conftest import TINY


@pytest.fixture
def soon(monkeypatch):
  monkeypatch.setattr(times, 'FIRST', 0.1)
  monkeypatch.setattr(times, 'EVERY', 0.3)


def test_long_work_is_told_and_told_again(soon, capsys):
  with times.telling('waiting'):
    time.sleep(0.6)
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) in (2, 3)
  assert all(line.startswith('jaxmed: waiting ... ') and line.endswith(' s') for line in lines)


def test_short_or_quiet_work_is_not_told(soon, capsys):
  with times.telling('waiting'):
    pass
  with times.telling('waiting', quiet=True):
    time.sleep(0.3)
  assert capsys.readouterr().err == ''


def test_the_bar_stays_whole(soon, monkeypatch):
  import io
  import sys

  from tqdm import tqdm
  monkeypatch.setattr(sys, 'stderr', err := io.StringIO())
  with tqdm(total=2, file=err) as bar, times.telling('waiting'):
    bar.update()
    time.sleep(0.25)
  assert '\njaxmed: waiting ... 0 s\n' in err.getvalue().replace('\r', '\n')


def test_stages_add_up_and_failures_count(capsys):
  found = times.Times(quiet=True)
  for _ in range(2):
    with pytest.raises(ValueError), found.stage('work'):
      time.sleep(0.05)
      raise ValueError
  assert found.seconds['work'] >= 0.1
  assert found.line().startswith('seconds: work 0.')


def test_a_run_says_what_its_start_took(corpus, tmp_path, capsys):
  place = tmp_path / 'run'
  loop.train(TINY | {'data': str(corpus), 'steps': 2}, place)
  found = json.loads((place / 'times.json').read_text())
  wanted = ('opening the corpus', 'building the model', 'tracing the step', 'compiling the step', 'the first batch',
            'the first evaluation', 'evaluations', 'checkpoints', 'figures and report')
  assert set(wanted) <= set(found)
  assert all(seconds >= 0 for seconds in found.values())
  assert 'jaxmed: seconds: opening the corpus ' in capsys.readouterr().err


def test_the_report_shows_times(trained, tmp_path):
  place = tmp_path / 'run'
  shutil.copytree(trained, place)
  (place / 'times.json').write_text('{"compiling the step": 12.25}')
  page = write_report(place).read_text(encoding='utf-8')
  assert 'compiling the step' in page
  assert '12.25' in page
