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


def test_a_second_ctrl_c_interrupts_at_once():
  flag = signals.StopFlag()
  flag.set(signal.SIGTERM)
  with pytest.raises(KeyboardInterrupt):
    flag.set(signal.SIGINT)
