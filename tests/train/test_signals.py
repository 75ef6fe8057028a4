"""Signals that ask a run to stop, SLURM's warning among them."""

import signal

import pytest

from jaxmed.errors import Stopped
from jaxmed.train.monitor import signals


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_each_signal_is_heard_and_the_handler_before_comes_back(number):
  before = signal.signal(number, signal.SIG_IGN)
  try:
    with signals.stop_on_signals() as flag:
      flag.check()
      signal.raise_signal(number)
      assert flag
      with pytest.raises(Stopped, match=f'^{number.name}$'):
        flag.check()
    assert signal.getsignal(number) == signal.SIG_IGN
  finally:
    signal.signal(number, before)


def test_ctrl_c_is_told_then_gives_up(monkeypatch, capfd):
  """The second one says what goes on, the third ends with 1 and the truth; more of SIGTERM changes nothing."""
  ended, released = [], []
  monkeypatch.setattr(signals.os, '_exit', ended.append)
  monkeypatch.setattr(signals.owner, 'release_all', lambda: released.append(1))
  flag = signals.StopFlag()
  flag.doing, flag.lost = 'saving', lambda: '; the last whole checkpoint is of step 20'
  for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
    flag.set(number)
  assert flag.name == 'SIGTERM' and not capfd.readouterr().err
  flag.set(signal.SIGINT)
  assert capfd.readouterr().err == 'jaxmed: saving, press Ctrl-C again to give up\n' and not ended
  flag.set(signal.SIGINT)
  assert capfd.readouterr().err == 'jaxmed: given up while saving; the last whole checkpoint is of step 20\n'
  assert (ended, released) == ([1], [1])
