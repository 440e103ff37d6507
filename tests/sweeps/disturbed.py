"""Training that is killed, asked to stop, or loses one of its processes: it ends with the bits that it would have had.

`run.py` runs the sweeps whole.
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import numpy as np
from spawning import finish, said, spawn

SCRIPT = Path(__file__).with_name("train.py")


class Runs:
  """Runs that are disturbed again and again, each compared at its end with one that was left alone."""

  def __init__(self, folder, processes, steps):
    self.folder, self.processes, self.steps, self.number = Path(folder), processes, steps, 0
    began = time.monotonic()
    finish(self.start(), seconds=600)
    self.seconds = time.monotonic() - began
    self.expected = outcome(self.run)
    self.number = 1

  @property
  def run(self):
    return self.folder / str(self.number)

  def start(self):
    return spawn(self.processes, SCRIPT, self.run, self.steps)

  def complete(self):
    """The run goes on to its end; the next one is a fresh one."""
    if not (self.run / "out.npz").exists():
      finish(self.start(), seconds=600)
    found = outcome(self.run)
    assert found == self.expected, f"run {self.run} ended with other bits, or told another story"
    self.number += 1

  def latest(self):
    """The step of the newest checkpoint."""
    steps = [path.name for path in (self.run / "checkpoints").glob("*") if path.name.isdecimal()]
    return max(map(int, steps), default=0)

  def reaches(self, step, processes):
    """Waits until a run that was started has checkpoints of its own up to a step.

    Returns:
      Whether at least a third of it is still to come: a clock would let a fast machine end it before the signal.
    """
    before = self.latest()
    while self.latest() < max(step, before + 1) and all(
      process.poll() is None for process in processes
    ):
      time.sleep(0.01)
    return self.latest() < self.steps * 2 // 3


def outcome(run):
  """The last parameters bit for bit, and what a run says of its evaluations."""
  with np.load(run / "out.npz") as file:
    arrays = {name: (x.dtype.str, x.shape, x.tobytes()) for name, x in file.items()}
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  return arrays, [line for line in lines if line["phase"] == "validation"]


def sweep_kills(folder, count, seed):
  """One process, killed at random moments: while it starts, trains, evaluates, saves, or ends.

  Returns:
    How many runs they were.
  """
  runs, draw, killed = Runs(folder, 1, steps=2000), random.Random(seed), 0
  while killed < count:
    (process,) = runs.start()
    try:
      process.wait(timeout=draw.uniform(0, runs.seconds))
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
  """Two processes, one of which gets SIGTERM: both stop after one step, which is the newest checkpoint.

  Returns:
    The longest time until both had ended, in seconds.
  """
  return max(disturb(runs, draw, signal.SIGTERM) for runs, draw in disturbed(folder, count, seed))


def sweep_losses(folder, count, seed):
  """Two processes, one of which is killed: the other one ends.

  Returns:
    The longest time until it had, in seconds.
  """
  return max(disturb(runs, draw, signal.SIGKILL) for runs, draw in disturbed(folder, count, seed))


def disturbed(folder, count, seed):
  """`count` times the runs as they are, and at last their ends."""
  runs, draw = Runs(folder, 2, steps=1500), random.Random(seed)
  for _ in range(count):
    yield runs, draw
  runs.complete()


def disturb(runs, draw, number):
  """Starts a run and disturbs it while it trains. Returns: the seconds from the signal to the end of both."""
  processes = runs.start()
  while not runs.reaches(draw.randrange(runs.steps // 2), processes):
    finish(processes)
    runs.complete()
    processes = runs.start()
  time.sleep(draw.uniform(0, 0.1))  # not always right after a checkpoint
  processes[draw.randrange(2)].send_signal(number)
  began = time.monotonic()
  if number == signal.SIGTERM:
    outputs = finish(processes, expected=143, seconds=60)
    steps = {int(step) for step in said("stopped after ", outputs)}
    assert steps == {runs.latest()}, f"stopped after {steps}, saved {runs.latest()}"
  else:
    try:
      for process in processes:
        process.communicate(timeout=60)
    finally:
      for process in processes:
        process.kill()
    assert all(process.returncode for process in processes)
  return time.monotonic() - began
