"""Damage and death of checkpoints, swept: nothing wrong is ever restored, and something right always is.

`run.py` runs the sweeps whole. `LD_PRELOAD=failing_calls.so python checkpoints.py FOLDER kill|EIO|ENOSPC NUMBER...`
lets file-system calls fail: the process is killed instead, or the call fails once, or it and all that follow do.
"""

import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

from states import assert_identical, flip, make_state, save_steps

from distill_jax.storage.checkpoint import Checkpoints

SAVED = [(1, 1), (2, 2), (2, 9)]
"""Step and seed: what is there, what is saved next, and what replaces it (as after a resumption elsewhere)."""


def sweep_flips(folder, count, seed):
  """Bits flipped at random places of all files of the newer of two checkpoints.

  Returns:
    How many flips were noticed; of the others all bits that were restored were right.
  """
  folder, draw = Path(folder) / "run", random.Random(seed)
  save_steps(folder, 1, 2)
  files = [file for file in (folder / "2").rglob("*") if file.is_file() and file.stat().st_size]
  sizes = [file.stat().st_size for file in files]
  states = {step: make_state(step, seed=step) for step in (1, 2)}
  reader, noticed = Checkpoints(folder, read_only=True), 0
  for _ in range(count):
    file = draw.choice(files) if draw.random() < 0.5 else draw.choices(files, sizes)[0]
    at = draw.randrange(file.stat().st_size), draw.randrange(8)
    flip(file, *at)
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always", RuntimeWarning)
      state = reader.restore(states[1])
    step = int(state.step)
    assert_identical(state, states[step])
    told = any("is damaged and is skipped" in str(warning.message) for warning in caught)
    assert told == (step == 1), (file, at)
    noticed += told
    flip(file, *at)
  assert_identical(reader.restore(states[1]), states[2])
  return noticed


def build(folder):
  """The library that makes calls fail; None where there is no C compiler."""
  compiler = shutil.which("cc")
  if compiler is None or sys.platform != "linux":
    return None
  library = Path(folder) / "failing_calls.so"
  source = Path(__file__).with_name("failing_calls.c")
  subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
  return library


def sweep_calls(folder, fault, count=None, seed=0):
  """`count` file-system calls of some saves fail in turn, chosen at random, or all of them.

  Returns:
    How many failed, and how many there are.
  """
  quickly = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": quickly,
    "LD_PRELOAD": str(build(folder)),
  }

  def run(*numbers, expected=0):
    command = [sys.executable, __file__, str(folder), fault, *map(str, numbers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    text = f"{fault} at calls {numbers}: ended with {done.returncode}\n{done.stdout}{done.stderr}"
    assert done.returncode == expected, text

  run(0)  # none fails
  complete, calls = read_progress(folder)
  assert complete == 2
  numbers = random.Random(seed).sample(range(1, calls + 1), count or calls)
  if fault == "kill":
    for number in numbers:
      run(number, expected=-signal.SIGKILL)
    run()  # what the last one left
  else:
    run(*numbers)
  return len(numbers), calls


def read_progress(folder):
  """How many saves were complete, and how many calls were made."""
  return tuple(map(int, (Path(folder) / "progress").read_text().split()))


def each_call(folder, fault, *numbers):
  """In a process of its own: checks what the one before left, and lets a call fail, again and again."""
  folder, library = Path(folder), ctypes.CDLL(None)
  whole, run, progress = folder / "whole", folder / "run", folder / "progress"
  if not whole.exists():
    save_steps(whole, 1)
  if run.exists():
    check(run, read_progress(folder)[0])
  for number in map(int, numbers):
    signal.alarm(120)
    shutil.copytree(whole, run)
    progress.write_text("0 0")
    save(library, run, progress, fault, number)
    check(run, read_progress(folder)[0])
    print(f"{fault} at call {number}: {progress.read_text()}", flush=True)


def save(library, run, progress, fault, number):
  """Saves twice, and writes down how many saves were complete and how many calls there were."""
  error = 0 if fault == "kill" else getattr(errno, fault)
  complete = 0
  library.failing_arm(str(run).encode(), number or -1, error, fault == "ENOSPC" and number > 0)
  try:
    with Checkpoints(run, keep=1) as checkpoints:
      for step, seed in SAVED[1:]:
        checkpoints.save(make_state(step, seed=seed))
        checkpoints.wait()
        complete += 1
        progress.write_text(f"{complete} 0")
  except (RuntimeError, OSError) as raised:
    print(f"{fault} at call {number}: {raised}")
  progress.write_text(f"{complete} {library.failing_disarm()}")


def check(run, complete):
  """What was complete is there, or what was being written; and the run goes on."""
  possible = SAVED[complete : complete + 2]
  for read_only in (True, False):
    with Checkpoints(run, keep=1, read_only=read_only) as checkpoints:
      state = checkpoints.restore(make_state())
      found = [
        (step, seed) for step, seed in possible if is_same(state, make_state(step, seed=seed))
      ]
      assert found, f"restored step {int(state.step)}, expected one of {possible}"
  try:
    go_on(run)
  except (
    RuntimeError
  ):  # threads of the save that failed in this very process are still in each other's way
    go_on(run)
  assert [path.name for path in run.iterdir()] == ["3"]
  shutil.rmtree(run)


def go_on(run):
  with Checkpoints(run, keep=1) as checkpoints:
    checkpoints.save(make_state(3, seed=3))
    assert_identical(checkpoints.restore(make_state()), make_state(3, seed=3))


def is_same(a, b):
  try:
    assert_identical(a, b)
  except AssertionError:
    return False
  return True


if __name__ == "__main__":
  warnings.simplefilter("ignore")
  each_call(*sys.argv[1:])
  sys.stdout.flush()
  os._exit(0)  # of hundreds of failed saves some thread of Orbax's may still wait
