"""Counts descriptors, threads and memory over many trainings and checkpoints in one process.

python tests/benchmarks/leaks.py [FITS] [CHECKPOINTS]

Exits with 1 where the second half of the fits, or of the checkpoints, adds more than a few
descriptors or threads, or 100 kB for each of them to the memory in use.
"""

import gc
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optax

from distill_jax import data, objectives
from distill_jax.models import from_apply
from distill_jax.train import CheckpointOptions, RunOptions, fit

MAX_BYTES = 100_000
FEW = 4
"""Descriptors and threads that come and go: a checkpoint is written in the background."""


class Usage(NamedTuple):
  """What this process holds."""

  descriptors: int
  threads: int
  memory: int


def usage() -> Usage:
  gc.collect()
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  descriptors = len(os.listdir("/proc/self/fd"))
  return Usage(descriptors, threading.active_count(), pages * os.sysconf("SC_PAGE_SIZE"))


def train(folder: Path, steps: int) -> None:
  """Trains a tiny network, with a checkpoint after each step."""
  rng = np.random.default_rng(0)
  image = rng.normal(size=(16, 4)).astype(np.float32)
  labels = image[:, :3].argmax(1).astype(np.int32)
  fit(
    from_apply(None, lambda w, image: image @ w["w"], variables={"w": np.ones((4, 3), np.float32)}),
    None,
    objectives.weighted(hard=(1.0, objectives.labels())),
    optax.adam(1e-2),
    data.Source({"id": np.arange(16), "image": image, "label": labels}, classes=3),
    steps=steps,
    batch_size=8,
    checkpoints=CheckpointOptions(folder, every=1),
    run=RunOptions(log_every=100, progress=False),
  )


def measure(title: str, count: int, run) -> bool:
  """Prints the usage before, at half and at the end of `count` runs; returns whether it is flat."""
  before = usage()
  run(0, count // 2)
  half = usage()
  run(count // 2, count)
  end = usage()
  print(f"{title}: {count}")
  for name, value in (("before", before), ("at half", half), ("at the end", end)):
    print(
      f"  {name}: {value.descriptors} descriptors, {value.threads} threads, "
      f"{value.memory / 1e6:.1f} MB",
      flush=True,
    )
  growth = (end.memory - half.memory) / (count - count // 2)
  added = max(end.descriptors - half.descriptors, end.threads - half.threads)
  return added <= FEW and growth <= MAX_BYTES


def main(fits: int = 500, checkpoints: int = 2000) -> int:
  """Returns the exit code."""
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    train(folder / "first", 2)

    def several_fits(start: int, stop: int) -> None:
      for index in range(start, stop):
        train(folder / str(index), 2)

    def one_fit(start: int, stop: int) -> None:
      train(folder / "long", stop)

    flat = [
      measure("fits", fits, several_fits),
      measure("checkpoints in one fit, resumed once", checkpoints, one_fit),
    ]
  print("flat" if all(flat) else "not flat")
  return int(not all(flat))


if __name__ == "__main__":
  sys.exit(main(*map(int, sys.argv[1:])))
