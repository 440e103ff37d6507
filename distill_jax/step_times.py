"""How long a train step of one variant takes, as a ratio to another's."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from distill_jax import examples
from distill_jax.jobs import Job, Network, different, trained_on
from distill_jax.train import make_init, make_train_step

REPEATS, SECONDS = 15, 0.2  # turns of each side, and how long one takes at least

Run = Callable[[], float]
"""Seconds per step of some steps."""


def step_times(job: Job) -> dict[str, float]:
  """Step time of each variant over the reference's: ratios of medians over turns taken one after the other.

  Both sides are timed on one batch, on one device, in this process: what else the machine does slows both. One
  variant's program at a time is kept beside the reference's. Teachers are untrained: their weights take no less time.
  Nothing where the config names no reference.
  """
  students = {network.variant: network for network in different(job, "student")}
  if not job.config.reference:
    return {}
  reference = _steps(job, students[job.config.reference])
  ratios = {}
  for name, network in students.items():
    ratios[name] = 1.0 if name == job.config.reference else ratio(_steps(job, network), reference)
    print(f"step time of {name}: {ratios[name]:.2f} times that of {job.config.reference}", flush=True)
  return ratios


def ratio(run: Run, reference: Run, repeats: int = REPEATS) -> float:
  """Median seconds of `run` over those of `reference`, by turns; the side that goes first alternates."""
  sides = run, reference
  times: tuple[list[float], list[float]] = [], []
  for turn in range(repeats):
    for side in (0, 1) if turn % 2 else (1, 0):
      times[side].append(sides[side]())
  return statistics.median(times[0]) / statistics.median(times[1])


def _steps(job: Job, network: Network) -> Run:
  """Some steps of a network on one batch, compiled and warm."""
  config, training, teacher, key = job.config, network.training, network.teacher, jax.random.key(0)
  batch = jax.device_put(
    next(examples.training_batches(config, trained_on(job, "student"), training.batch_size))
  )
  parts = network.learner, teacher, network.objective(None), training.optimizer()
  options: dict[str, Any] = {"augment": config.augment(), "mix": config.mix()}
  step = make_train_step(*parts, microbatches=training.microbatches, **options)
  state = make_init(*parts)(key, batch)
  taught_by: Any = ()
  if teacher is not None and teacher.follow is None:
    taught_by = teacher.variables or teacher.init(key, batch)
  compiled = jax.jit(step, donate_argnums=0).lower(state, taught_by, batch).compile()

  def seconds(steps: int) -> float:
    nonlocal state
    start = time.perf_counter()
    for _ in range(steps):
      state, _ = compiled(state, taught_by, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / steps

  seconds(1)
  steps = max(1, round(SECONDS / seconds(1)))
  return lambda: seconds(steps)
