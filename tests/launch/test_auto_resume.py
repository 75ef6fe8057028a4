"""`jaxmed train --auto-resume`: one command that starts a run, goes on with it, and leaves an ended one as it is."""

import shutil

import pytest

from jaxmed import cli
from jaxmed.errors import UserError
from jaxmed.train.build import rundir
from jaxmed.train.logs import read_rows
from tests.common import same, saved_state, words
from tests.conftest import TINY

pytestmark = pytest.mark.usefixtures('no_figures')


def command(corpus, run, *more):
  return ['train', *words(TINY), *more, '--data', corpus, '--out', run, '--auto-resume']


def test_start_stop_go_on_and_once_more(server, corpus, trained, tmp_path):
  run = tmp_path / 'run'
  argv = command(corpus, run)
  fork = server.start(argv, tmp_path)
  fork.wait_for('step 7/20')
  fork.signal(15)
  assert fork.wait() == 75
  # What may change when a run goes on may change here too; other words are what they were.
  code, _, err = server.run(command(corpus, run, 'checkpoint_every=4'), tmp_path)
  assert code == 0, err
  same(saved_state(trained), saved_state(run))
  rows = lambda r: [(x['step'], x['loss']) for x in read_rows(r / 'metrics.jsonl') if 'loss' in x]
  assert rows(run) == rows(trained)
  assert server.run(argv, tmp_path)[0] == 0
  assert rows(run) == rows(trained)


def test_words_that_contradict_the_run(corpus, trained, tmp_path, capfd):
  run = shutil.copytree(trained, tmp_path / 'run')
  for word, key in (('learning_rate=0.01', 'learning_rate'), ('encoder.depth=3', 'encoder.depth'), ('seed=1', 'seed')):
    assert cli.main([str(a) for a in command(corpus, run, word)]) == 2
    assert f'{key} cannot change when a run goes on' in capfd.readouterr().err
  same(saved_state(trained), saved_state(run))


def test_what_it_needs(corpus, tmp_path, capfd):
  assert cli.main(['train', '--auto-resume', '--data', str(corpus)]) == 2
  assert 'give --out RUN' in capfd.readouterr().err
  assert cli.main(['train', '--auto-resume', '--resume', str(tmp_path / 'run')]) == 2
  assert 'leave --out, --auto-resume' in capfd.readouterr().err
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'notes.txt').touch()
  assert cli.main([str(a) for a in command(corpus, tmp_path / 'other')]) == 2
  assert 'exists and is not empty' in capfd.readouterr().err


def test_what_a_killed_start_left_is_no_run(tmp_path):
  """config.json is written last: without it there is nothing to go on with, and nothing to lose."""
  for name in ('data.json', '.config.json.x1.part'):
    (tmp_path / name).touch()
  rundir.check_new(tmp_path)
  (tmp_path / 'config.json').touch()
  with pytest.raises(UserError, match='exists and is not empty'):
    rundir.check_new(tmp_path)


def test_a_folder_that_was_prepared_is_not_prepared_again(tiles, tmp_path):
  run = tmp_path / 'run'
  argv = [str(a) for a in command(tiles, run, 'steps=2', 'eval_every=2', 'checkpoint_every=1')]
  assert cli.main(argv) == 0
  made = (run / 'corpus' / 'manifest.parquet').stat().st_mtime_ns
  assert cli.main(argv) == 0
  assert (run / 'corpus' / 'manifest.parquet').stat().st_mtime_ns == made
