"""Sweeps of training that is killed, stopped, or loses a process: it ends with the same bits.

`run.py` runs all of each sweep.
"""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import numpy as np
from spawning import finish, lines_after, spawn

from distill_jax.storage import sealed_json

SCRIPT = Path(__file__).with_name("train.py")


class Runs:
  """Runs that are disturbed repeatedly, each compared at its end with an undisturbed one."""

  def __init__(self, folder, processes, steps):
    self.folder = Path(folder)
    self.processes = processes
    self.steps = steps
    self.number = 0
    start = time.monotonic()
    finish(self.start(), seconds=600)
    self.seconds = time.monotonic() - start
    self.expected = outcome(self.run)
    self.number = 1

  @property
  def run(self):
    return self.folder / str(self.number)

  def start(self):
    return spawn(self.processes, SCRIPT, self.run, self.steps)

  def complete(self):
    """Resumes the run to its end; the next one is a fresh one."""
    if not (self.run / "out.npz").exists():
      finish(self.start(), seconds=600)
    result = outcome(self.run)
    assert result == self.expected, f"run {self.run} ended with other bits or metrics"
    self.number += 1

  def latest(self):
    """Returns the step of the newest checkpoint."""
    steps = [path.name for path in (self.run / "checkpoints").glob("*") if path.name.isdecimal()]
    return max(map(int, steps), default=0)

  def reaches(self, step, processes):
    """Waits until a run that was started has saved checkpoints up to a step.

    Returns:
      Whether at least a third of it remains: by a clock, a fast machine would end before the
        signal.
    """
    before = self.latest()
    while self.latest() < max(step, before + 1) and all(
      process.poll() is None for process in processes
    ):
      time.sleep(0.01)
    return self.latest() < self.steps * 2 // 3


def outcome(run):
  """Returns the last parameters bit for bit, and the metrics of the evaluations."""
  with np.load(run / "out.npz") as file:
    arrays = {name: (x.dtype.str, x.shape, x.tobytes()) for name, x in file.items()}
  lines = sealed_json.read_lines(run / "metrics.jsonl")
  return arrays, [line for line in lines if line["phase"] == "validation"]


def sweep_kills(folder, count, seed):
  """Kills one process at random moments: while it starts, trains, evaluates, saves, or ends.

  Returns:
    Number of runs.
  """
  runs = Runs(folder, 1, steps=2000)
  generator = random.Random(seed)
  killed = 0
  while killed < count:
    (process,) = runs.start()
    try:
      process.wait(timeout=generator.uniform(0, runs.seconds))
    except subprocess.TimeoutExpired:
      process.kill()
      killed += 1
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)
    if process.returncode == 0:
      runs.complete()
  runs.complete()
  return runs.number - 1


def sweep_sigterms(folder, count, seed):
  """Sends SIGTERM to one of two processes: both stop after one step, the newest checkpoint.

  Returns:
    Seconds until both had ended, at most.
  """
  return max(disturb(*each, signal.SIGTERM) for each in disturbed(folder, count, seed))


def sweep_losses(folder, count, seed):
  """Kills one of two processes: the other one ends.

  Returns:
    Seconds until it had ended, at most.
  """
  return max(disturb(*each, signal.SIGKILL) for each in disturbed(folder, count, seed))


def disturbed(folder, count, seed):
  """Yields the runs and a random generator `count` times, then completes the last run."""
  runs = Runs(folder, 2, steps=1500)
  generator = random.Random(seed)
  for _ in range(count):
    yield runs, generator
  runs.complete()


def disturb(runs, generator, number):
  """Sends a signal to a run while it trains, and returns the seconds until both have ended."""
  processes = runs.start()
  while not runs.reaches(generator.randrange(runs.steps // 2), processes):
    finish(processes)
    runs.complete()
    processes = runs.start()
  # Not always right after a checkpoint.
  time.sleep(generator.uniform(0, 0.1))
  processes[generator.randrange(2)].send_signal(number)
  start = time.monotonic()
  if number == signal.SIGTERM:
    outputs = finish(processes, expected=143, seconds=60)
    steps = {int(step) for step in lines_after("stopped after ", outputs)}
    assert steps == {runs.latest()}, f"stopped after {steps}, saved {runs.latest()}"
  else:
    try:
      for process in processes:
        process.communicate(timeout=60)
    finally:
      for process in processes:
        process.kill()
    assert all(process.returncode for process in processes)
  return time.monotonic() - start
