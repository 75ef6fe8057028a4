"""One owner at a time: threads, processes, dead owners, owners elsewhere."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from jaxmed import owner
from jaxmed.errors import UserError


def other(folder, **changes):
  """Writes the file of an owner that is another process."""
  folder.mkdir(exist_ok=True)
  me = owner._me() | {'token': 'another', 'process': os.getpid(), 'started': owner._started(os.getpid())} | changes
  (folder / owner.NAME).write_text(json.dumps(me), encoding='utf-8')
  return me


def test_an_owner_is_told_and_leaves_nothing(tmp_path):
  place = tmp_path / 'run'
  with owner.of_folder(place) as mine:
    mine.check()
    known = json.loads((place / owner.NAME).read_text(encoding='utf-8'))
    assert known['process'] == os.getpid() and known['token'] == mine.token
    with owner.of_folder(place) as again:  # the same process, within
      assert again is mine
    assert mine.lock.exists()
    with pytest.raises(UserError, match=rf'run is being written by process {os.getpid()} on .* since 20.*another --out'):
      owner.acquire(mine.lock, place)
  assert not place.exists()
  with owner.of_folder(place):
    (place / 'config.json').touch()
  assert [p.name for p in place.iterdir()] == ['config.json']


def test_a_file_has_its_owner_beside_it(tmp_path):
  with owner.of_file(tmp_path / 'a.npz'), owner.of_file(tmp_path / 'b.npz'):
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UserError, match=r'a\.npz is being written by process'), owner.of_file(tmp_path / 'a.npz'):
      pass
  assert not list(tmp_path.iterdir())
  with owner.of_file(tmp_path / 'missing' / 'a.npz'):  # the writer says it
    assert not list(tmp_path.iterdir())


def test_a_dead_owner_is_taken_over_with_a_note(tmp_path, capsys):
  gone = subprocess.Popen([sys.executable, '-c', ''])
  gone.wait()
  for changes in ({'process': gone.pid, 'started': '1'}, {'started': '17'}):  # ended; its number is another's now
    other(tmp_path / 'run', **changes)
    with owner.of_folder(tmp_path / 'run') as mine:
      mine.check()
    assert f'belonged to process {changes.get("process", os.getpid())} on' in capsys.readouterr().err
    assert not (tmp_path / 'run' / owner.NAME).exists()


def test_a_damaged_file_is_no_owner_for_ever(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(owner, 'DEAD', 0.2)
  (tmp_path / owner.NAME).write_text('{"tok', encoding='utf-8')
  with owner.of_folder(tmp_path) as mine:
    mine.check()
  assert 'belonged to another process, which is gone: taken over' in capsys.readouterr().err


def test_an_owner_elsewhere_lives_by_its_signs(tmp_path, monkeypatch, capsys):
  """Touched, it is alive; untouched for DEAD seconds it is gone."""
  monkeypatch.setattr(owner, 'DEAD', 0.6)
  lock = tmp_path / owner.NAME
  other(tmp_path, machine='elsewhere', host='node7', process=12)
  real, asked = owner._touched, []
  monkeypatch.setattr(owner, '_touched', lambda path: real(path) + (1 if len(asked) > 2 else 0) + (asked.append(1) or 0))
  with pytest.raises(UserError, match='written by process 12 on node7'):
    owner.acquire(lock, tmp_path)
  monkeypatch.setattr(owner, '_touched', real)
  with owner.of_folder(tmp_path) as mine:
    mine.check()
  assert 'belonged to process 12 on node7 since' in capsys.readouterr().err


def test_signs_of_life(tmp_path, monkeypatch):
  monkeypatch.setattr(owner, 'BEAT', 0.05)
  with owner.of_folder(tmp_path) as mine:
    before = owner._touched(mine.lock)
    end = time.monotonic() + 10
    while owner._touched(mine.lock) == before and time.monotonic() < end:
      time.sleep(0.02)
    assert owner._touched(mine.lock) > before


def test_who_lost_the_place_writes_no_more(tmp_path):
  with owner.of_folder(tmp_path) as mine:
    other(tmp_path, host='node8', process=5)
    with pytest.raises(UserError, match='was taken over by process 5 on node8'):
      mine.check()
  assert (tmp_path / owner.NAME).exists()  # the other's


def test_without_hard_links(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(95, 'not supported')
  monkeypatch.setattr(owner.os, 'link', refuse)
  with owner.of_folder(tmp_path) as mine:
    mine.check()
    with pytest.raises(UserError, match='is being written'):
      owner.acquire(mine.lock, tmp_path)


def _begin(place, go, out):
  """Takes the place at the same moment as others, and holds it until all have tried."""
  go.wait()
  try:
    with owner.of_folder(place):
      out.put('owner')
      time.sleep(1.0)
  except UserError as e:
    out.put(str(e))


@pytest.mark.parametrize('before', ['free', 'dead'])
def test_of_many_at_once_one_is_the_owner(tmp_path, before):
  """Real processes, on a free place and on that of a dead owner."""
  place, context = tmp_path / 'run', multiprocessing.get_context('spawn')
  if before == 'dead':
    other(place, started='1')
  go, out = context.Event(), context.Queue()
  workers = [context.Process(target=_begin, args=(place, go, out)) for _ in range(4)]
  for w in workers:
    w.start()
  go.set()
  said = [out.get(timeout=30) for _ in workers]
  for w in workers:
    w.join()
  assert said.count('owner') == 1 and all('is being written by process' in s for s in said if s != 'owner'), said
