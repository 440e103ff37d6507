"""SIGTERM stops one process after a step; test_hosts.py and test_command.py have several."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from distill_jax.distributed.interruption import Interrupted, Interruption, saying_why


@pytest.fixture
def handler():
  """Handles SIGTERM outside of training; yields a list with an item for each signal."""
  signals = []
  old = signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
  yield signals
  signal.signal(signal.SIGTERM, old)


def terminate():
  os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_is_reported_at_the_next_step(handler):
  with pytest.raises(Interrupted) as raised, Interruption() as interruption:
    assert not interruption.at()
    terminate()
    assert interruption.at() and interruption.at()
    raise Interrupted(SimpleNamespace(step=np.int32(3)))
  assert raised.value.code == 143 and "step 3" in str(raised.value)
  assert handler == []
  terminate()
  assert handler == [1]


def test_sigterm_after_the_last_step_raises(handler):
  with pytest.raises(Interrupted) as raised, Interruption():
    terminate()
  assert raised.value.code == 143 and raised.value.state is None
  with pytest.raises(KeyError), Interruption():
    terminate()
    raise KeyError
  with Interruption() as again:
    assert not again.at()


@pytest.fixture
def console():
  """Handles Ctrl-C as an interactive Python does; a process in the background ignores it."""
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, old)


def interrupt():
  os.kill(os.getpid(), signal.SIGINT)


def test_first_ctrl_c_waits_for_the_step_and_the_second_does_not(console, capfd):
  state = SimpleNamespace(step=np.int32(3))
  with pytest.raises(Interrupted) as raised, Interruption() as interruption:
    interrupt()
    assert interruption.at()
    with pytest.raises(KeyboardInterrupt):
      interrupt()
    interruption.answer(state, saved=True)
  assert raised.value.code == 130 and "step 3" in str(raised.value)
  assert capfd.readouterr().err.count("Ctrl-C") == 2
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_without_a_folder_leaves_the_result(console, capfd):
  with Interruption() as interruption:
    interrupt()
    interruption.answer(SimpleNamespace(step=np.int32(3)), saved=False)
    assert not interruption.at()


def test_handler_of_the_caller_for_ctrl_c_stays():
  signals = []
  old = signal.signal(signal.SIGINT, lambda *_: signals.append(1))
  try:
    with Interruption() as interruption:
      interrupt()
      assert (interruption.at(), signals) == (False, [1])
  finally:
    signal.signal(signal.SIGINT, old)


@pytest.mark.parametrize("send, code", [(terminate, 143), (interrupt, 130)])
def test_signal_outside_of_training_says_why(console, send, code):
  with pytest.raises(Interrupted) as raised, saying_why():
    send()
  assert raised.value.code == code


@pytest.mark.parametrize("send, code", [(terminate, 143), (interrupt, 130)])
def test_signal_in_a_callback_of_the_garbage_collector_is_not_lost(console, send, code):
  def callback(*_):
    gc.callbacks.remove(callback)
    send()

  with pytest.raises(Interrupted) as raised, saying_why():
    gc.callbacks.append(callback)
    gc.collect()  # Python ignores what is raised in there.
    time.sleep(20)
    pytest.fail("the signal was lost")
  assert raised.value.code == code


def test_other_thread_leaves_the_handler(handler):
  def train():
    with Interruption() as interruption:
      ready.set()
      sent.wait()
      results.append(interruption.at())

  ready = threading.Event()
  sent = threading.Event()
  results = []
  thread = threading.Thread(target=train)
  thread.start()
  ready.wait()
  terminate()
  sent.set()
  thread.join()
  assert (results, handler) == ([False], [1])


SCRIPT = """
import itertools
from distill_jax.distributed.interruption import Interrupted, Interruption
with Interruption() as interruption:
  for step in itertools.count():
    print(step, flush=True)
    if interruption.at():
      raise Interrupted
"""


def test_uncaught_interruption_exits_with_143():
  with subprocess.Popen(
    [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as child:
    child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate()
  assert (child.returncode, errors) == (143, b"")
