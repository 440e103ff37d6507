"""Sweeps of corrupt checkpoints and killed saves: a valid state is always restored, and no other.

`run.py` runs all of each sweep. `LD_PRELOAD=failing_calls.so python checkpoints.py FOLDER
kill|EIO|ENOSPC NUMBER...` lets file-system calls fail: the process is killed instead, or the call
fails once, or it and all that follow do.
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

from states import assert_identical, detects_flip, make_state, save_steps

from distill_jax.storage.checkpoint import Checkpoints

SAVED = [(1, 1), (2, 2), (2, 9)]
"""Steps and seeds: stored at first, saved next, its replacement (as after resuming elsewhere)."""


def sweep_flips(folder, count, seed):
  """Flips bits at random positions of all files of the newer of two checkpoints.

  Returns:
    Number of flips that were detected; after the others, all restored bits were correct.
  """
  folder = Path(folder) / "run"
  generator = random.Random(seed)
  save_steps(folder, 1, 2)
  files = [file for file in (folder / "2").rglob("*") if file.is_file() and file.stat().st_size]
  sizes = [file.stat().st_size for file in files]
  states = {step: make_state(step, seed=step) for step in (1, 2)}
  reader = Checkpoints(folder, read_only=True)
  detected = 0
  for _ in range(count):
    file = generator.choice(files)
    if generator.random() < 0.5:
      file = generator.choices(files, sizes)[0]
    position = generator.randrange(file.stat().st_size), generator.randrange(8)
    detected += detects_flip(reader, folder / "2", states, file, position)
  assert_identical(reader.restore(states[1]), states[2])
  return detected


def build(folder):
  """Returns the library that makes calls fail; None without a C compiler."""
  compiler = shutil.which("cc")
  if compiler is None or sys.platform != "linux":
    return None
  library = Path(folder) / "failing_calls.so"
  source = Path(__file__).with_name("failing_calls.c")
  subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
  return library


def sweep_calls(folder, fault, count=None, seed=0):
  """Lets `count` random file-system calls of some saves fail in turn, or all of them.

  Returns:
    Number of calls that failed, and number of calls.
  """
  flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": flags,
    "LD_PRELOAD": str(build(folder)),
  }

  def run(*numbers, killed=False):
    command = [sys.executable, __file__, str(folder), fault, *map(str, numbers)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    text = (
      f"{fault} at calls {numbers}: ended with {child.returncode}\n{child.stdout}{child.stderr}"
    )
    # Runs differ by a few calls: a number past a run's last one kills nobody.
    last = read_progress(folder)[1] if numbers else 0
    survives = not killed or 0 < last < numbers[0]
    assert child.returncode == (0 if survives else -signal.SIGKILL), text

  # No call fails.
  run(0)
  complete, calls = read_progress(folder)
  assert complete == 2
  numbers = random.Random(seed).sample(range(1, calls + 1), count or calls)
  if fault == "kill":
    for number in numbers:
      run(number, killed=True)
    # Check what the last one left.
    run()
  else:
    run(*numbers)
  return len(numbers), calls


def read_progress(folder):
  """Returns the number of complete saves, and of calls."""
  return tuple(map(int, (Path(folder) / "progress").read_text().split()))


def each_call(folder, fault, *numbers):
  """Checks in a child process what the one before left, and lets each of the calls fail."""
  folder = Path(folder)
  library = ctypes.CDLL(None)
  template = folder / "template"
  run = folder / "run"
  progress = folder / "progress"
  if not template.exists():
    save_steps(template, 1)
  if run.exists():
    check(run, read_progress(folder)[0])
  for number in map(int, numbers):
    signal.alarm(120)
    shutil.copytree(template, run)
    progress.write_text("0 0")
    save(library, run, progress, fault, number)
    check(run, read_progress(folder)[0])
    print(f"{fault} at call {number}: {progress.read_text()}", flush=True)


def save(library, run, progress, fault, number):
  """Saves twice, and records the number of complete saves and of calls."""
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
  """Checks that the last complete state or the one in progress is restored, and the run resumes."""
  possible = SAVED[complete : complete + 2]
  for read_only in (True, False):
    with Checkpoints(run, keep=1, read_only=read_only) as checkpoints:
      state = checkpoints.restore(make_state())
      equal = [pair for pair in possible if is_identical(state, make_state(*pair))]
      assert equal, f"restored step {int(state.step)}, expected one of {possible}"
  try:
    resume(run)
  except RuntimeError:
    # Threads of the save that failed in this process still block each other.
    resume(run)
  assert [path.name for path in run.iterdir()] == ["3"]
  shutil.rmtree(run)


def resume(run):
  with Checkpoints(run, keep=1) as checkpoints:
    checkpoints.save(make_state(3, seed=3))
    assert_identical(checkpoints.restore(make_state()), make_state(3, seed=3))


def is_identical(a, b):
  try:
    assert_identical(a, b)
  except AssertionError:
    return False
  return True


if __name__ == "__main__":
  warnings.simplefilter("ignore")
  each_call(*sys.argv[1:])
  sys.stdout.flush()
  # A thread of Orbax may still wait after hundreds of failed saves.
  os._exit(0)
