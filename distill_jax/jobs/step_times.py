"""Measures how long a train step of each variant takes, as a ratio to one of them."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from distill_jax.jobs import data
from distill_jax.jobs.plan import Job, Network, one_per_variant, train_data
from distill_jax.train import make_init, make_train_step

REPEATS = 15
"""Turns of each side."""
SECONDS = 0.2
"""What a turn takes at least."""

Run = Callable[[], float]
"""Returns seconds per step of some steps."""


def step_times(job: Job) -> dict[tuple[str, str], float]:
  """Returns {(role, variant): step time over the reference's} of the baseline and of each variant.

  Ratios are of medians over alternating turns. Both sides are timed on one batch, on one device, in
  this process, so that other load slows both. One variant's program at a time is in memory with the
  reference's. Teachers are untrained: the values of their weights do not change the time. Without a
  reference in the config the result is empty.
  """
  name, ratios = job.config.reference, {}
  if not name:
    return {}
  networks = [*one_per_variant(job, "baseline"), *one_per_variant(job, "student")]
  reference = _steps(job, next(network for network in networks if network.variant == name))
  for network in networks:
    value = 1.0 if network.variant == name else ratio(_steps(job, network), reference)
    ratios[network.role, network.variant] = value
    print(
      f"step time of {network.variant or network.role}: {value:.2f} times that of {name}",
      flush=True,
    )
  return ratios


def ratio(run: Run, reference: Run) -> float:
  """Returns the median seconds of `run` over those of `reference`, by turns; the side that goes
  first alternates.
  """
  sides = run, reference
  times: tuple[list[float], list[float]] = [], []
  for turn in range(REPEATS):
    for side in (0, 1) if turn % 2 else (1, 0):
      times[side].append(sides[side]())
  return statistics.median(times[0]) / statistics.median(times[1])


def _steps(job: Job, network: Network) -> Run:
  """Returns a function that times some steps of a network on one batch, compiled and warm."""
  config, training, teacher, key = job.config, network.training, network.teacher, jax.random.key(0)
  batches = data.training_batches(config, train_data(job, network.role), training.batch_size)
  batch = jax.device_put(next(batches))
  parts = network.train_model, teacher, network.objective(None), training.optimizer()
  on_policy = network.recipe.on_policy
  step = make_train_step(*parts, config.step_options(training, on_policy))
  state = make_init(*parts, on_policy=on_policy)(key, batch)
  teacher_variables: Any = ()
  if teacher is not None and teacher.ema_update is None:
    teacher_variables = teacher.variables or teacher.init(key, batch)
  compiled = jax.jit(step, donate_argnums=0).lower(state, teacher_variables, batch).compile()

  def seconds(steps: int) -> float:
    nonlocal state
    start = time.perf_counter()
    for _ in range(steps):
      state, _ = compiled(state, teacher_variables, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / steps

  seconds(1)
  steps = max(1, round(SECONDS / seconds(1)))
  return lambda: seconds(steps)
