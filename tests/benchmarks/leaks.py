"""Counts descriptors, threads and memory over many trainings and checkpoints in one process.

python tests/benchmarks/leaks.py [FITS] [CHECKPOINTS]

Exits with 1 where the second half of them adds more than a few descriptors or threads, or 20 kB for
each checkpoint more than a loop written by hand with JAX and Orbax does. Those keep memory
themselves: TensorStore (0.1.86) never frees the list of metrics for which Orbax asks at each
checkpoint, all in all 22 kB for a small state, and jax keeps a part of each compiled program. What
malloc can return is returned before it is counted: the arenas of many threads, free for the most
part, else grow by half a MB for each fit.
"""

import ctypes
import gc
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp

from distill_jax import data, objectives
from distill_jax.models import from_apply
from distill_jax.train import CheckpointOptions, RunOptions, fit

STEPS = 100
MARGIN_BYTES = 20_000
"""For each checkpoint: caches grow in steps."""
FEW = 4
"""Descriptors and threads that come and go: a checkpoint is written in the background."""


class Usage(NamedTuple):
  """What this process holds."""

  descriptors: int
  threads: int
  memory: int


def usage() -> Usage:
  gc.collect()
  if sys.platform == "linux":
    ctypes.CDLL(None).malloc_trim(0)
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  descriptors = len(os.listdir("/proc/self/fd"))
  return Usage(descriptors, threading.active_count(), pages * os.sysconf("SC_PAGE_SIZE"))


def make_data() -> tuple[np.ndarray, np.ndarray]:
  image = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
  return image, image[:, :3].argmax(1).astype(np.int32)


def train_by_hand(folder: Path, steps: int) -> None:
  """Trains the network of `train` with JAX and Orbax only, with a checkpoint after each step."""
  optimizer = optax.adam(1e-2)

  def loss(params, image, label):
    logits = image @ params["w"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

  @jax.jit
  def step(state, image, label):
    params, opt_state, count = state
    value, gradients = jax.value_and_grad(loss)(params, image, label)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state, count + 1), value

  @jax.jit
  def accuracy(params, image, label):
    return (jnp.argmax(image @ params["w"], -1) == label).mean()

  image, label = make_data()
  params = {"w": jnp.ones((4, 3))}
  state = (params, optimizer.init(params), jnp.zeros((), jnp.int32))
  for index in range(steps):
    state, _ = step(state, image[:8], label[:8])
    leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}
    path = folder / str(index)
    ocp.save_checkpointables_async(path, {"state": leaves}).result()
    shutil.rmtree(folder / str(index - 2), ignore_errors=True)
  accuracy(state[0], image, label).block_until_ready()


def train(folder: Path, steps: int) -> None:
  """Trains a tiny network, with a checkpoint after each step."""
  image, labels = make_data()
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


def measure(title: str, count: int, run: Callable[[int], None]) -> tuple[int, float]:
  """Calls `run` for each index and prints the usage; returns what the second half added: of
  descriptors or threads, and of bytes for each call.
  """
  usages = [usage()]
  for start, stop in ((0, count // 2), (count // 2, count)):
    for index in range(start, stop):
      run(index)
    usages.append(usage())
  before, half, end = usages
  print(f"{title}: {count}")
  for name, value in (("before", before), ("at half", half), ("at the end", end)):
    print(
      f"  {name}: {value.descriptors} descriptors, {value.threads} threads, "
      f"{value.memory / 1e6:.1f} MB",
      flush=True,
    )
  added = max(end.descriptors - half.descriptors, end.threads - half.threads)
  return added, (end.memory - half.memory) / (count - count // 2)


def is_flat(folder: Path, count: int, steps: int) -> bool:
  """Returns whether trainings of `steps` checkpoints leave as little behind as those by hand."""
  title = f"trainings of {steps} checkpoints"
  _, floor = measure(
    f"{title}, by hand", count, lambda i: train_by_hand(folder / f"by_hand_{steps}_{i}", steps)
  )
  added, growth = measure(title, count, lambda i: train(folder / f"fit_{steps}_{i}", steps))
  print(f"  {growth / 1e3:.0f} kB each, by hand {floor / 1e3:.0f} kB", flush=True)
  return added <= FEW and growth <= floor + MARGIN_BYTES * steps


def main(fits: int = 500, checkpoints: int = 20_000) -> int:
  """Returns the exit code."""
  with tempfile.TemporaryDirectory() as name:
    flat = [
      is_flat(Path(name), fits, 2),
      is_flat(Path(name), max(2, checkpoints // STEPS), STEPS),
    ]
  print("flat" if all(flat) else "not flat")
  return int(not all(flat))


if __name__ == "__main__":
  sys.exit(main(*map(int, sys.argv[1:])))
