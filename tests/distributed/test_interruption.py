"""SIGTERM while one process trains; test_command.py has several."""

import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from distill_jax.distributed.interruption import Interrupted, Interruption


@pytest.fixture
def handler():
  """What handles SIGTERM outside of training."""
  came = []
  old = signal.signal(signal.SIGTERM, lambda *_: came.append(1))
  yield came
  signal.signal(signal.SIGTERM, old)


def terminate():
  os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_is_told_at_the_next_step_and_the_old_handler_is_back(handler):
  with pytest.raises(Interrupted) as raised, Interruption() as interruption:
    assert not interruption.at()
    terminate()
    assert interruption.at() and interruption.at()
    raise Interrupted(SimpleNamespace(step=np.int32(3)))
  assert raised.value.code == 143 and "stopped after step 3;" in str(raised.value)
  assert handler == []
  terminate()
  assert handler == [1]


def test_sigterm_after_the_last_step_is_not_lost(handler):
  with pytest.raises(Interrupted) as raised, Interruption():
    terminate()
  assert raised.value.code == 143 and raised.value.state is None
  with pytest.raises(KeyError), Interruption():
    terminate()
    raise KeyError
  with Interruption() as again:
    assert not again.at()


def test_in_another_thread_the_signal_keeps_its_handler(handler):
  def train():
    with Interruption() as interruption:
      ready.set()
      sent.wait()
      told.append(interruption.at())

  ready, sent, told = threading.Event(), threading.Event(), []
  thread = threading.Thread(target=train)
  thread.start()
  ready.wait()
  terminate()
  sent.set()
  thread.join()
  assert (told, handler) == ([False], [1])


SCRIPT = """
import itertools
from distill_jax.distributed.interruption import Interrupted, Interruption
with Interruption() as interruption:
  for step in itertools.count():
    print(step, flush=True)
    if interruption.at():
      raise Interrupted
"""


def test_a_process_that_does_not_catch_it_ends_with_143():
  with subprocess.Popen(
    [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as child:
    child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate()
  assert (child.returncode, errors) == (143, b"")
