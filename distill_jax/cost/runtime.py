"""Measures what a model costs to run on the default device: size, FLOPs, latency, throughput."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from distill_jax.models.adapters.outputs import primary_outputs
from distill_jax.train.generation import sample_text
from distill_jax.types import Batch, Model, Variables

FEWEST_REPEATS = 3
MOST_SECONDS = 60.0


class _Call(NamedTuple):
  """A compiled call that is timed, and the number of its rows."""

  run: Callable[[], object]
  rows: int


def measure_cost(
  model: Model,
  variables: Variables,
  batch: Batch,
  *,
  repeats: int = 20,
  batch_sizes: Sequence[int] = (),
) -> dict[str, float]:
  """Returns size, FLOPs, latency and throughput of a model, see `measure_costs`."""
  networks = [(model, variables)]
  return measure_costs(networks, batch, repeats=repeats, batch_sizes=batch_sizes)[0]


def measure_costs(
  networks: Sequence[tuple[Model, Variables]],
  batch: Batch,
  *,
  repeats: int = 20,
  batch_sizes: Sequence[int] = (),
) -> list[dict[str, float]]:
  """Returns size, FLOPs, latency and throughput of each network in evaluation mode.

  The compiled programs compute the primary outputs (`primary_outputs`: the logits), so features
  that only distillation reads cost nothing. The timed runs of all networks take turns, so that
  other load of the machine slows all of them alike.

  Args:
    networks: models, of which only `apply` and `sample` are used, and their weights.
    batch: real or zero inputs, arrays [rows, ...]; the first row is the one example.
    repeats: number of timed runs of each program, after one that is not timed. When all of them
      have taken `MOST_SECONDS`, those of a round are the last ones, from `FEWEST_REPEATS` on.
    batch_sizes: numbers of rows to time in addition, filled with the batch's rows in turn.

  Returns:
    'parameters': number of trained values; 'bytes': of params and state in memory; 'flops': of one
    example by XLA's count, which takes the body of a loop (`lax.scan`) once and a Pallas call as
    nothing, NaN if it is unknown; 'latency_ms': median for one example; 'throughput': examples/s at
    the batch's size; 'throughput_128', ...: at each of the `batch_sizes`; 'generation_128', ...:
    sequences/s that `Model.sample` generates there, of models that have it. Each time has a spread,
    the upper quartile of its runs divided by the lower one: 'latency_ms_spread',
    'throughput_spread', ...

  Raises:
    ValueError: `repeats` or a batch size is less than 1.
  """
  if repeats < 1:
    raise ValueError(f"repeats: expected at least 1, got {repeats}")
  if any(size < 1 for size in batch_sizes):
    raise ValueError(f"batch_sizes: expected at least 1 each, got {list(batch_sizes)}")
  costs, calls = [], []
  for model, variables in networks:
    sizes, timed = _prepare(model, variables, batch, batch_sizes)
    costs.append(sizes)
    calls.append(timed)
  times = _time_by_turns([call.run for timed in calls for call in timed.values()], repeats)
  rows = iter(times)
  for sizes, timed in zip(costs, calls):
    for name, call in timed.items():
      low, median, high = np.percentile(next(rows), (25, 50, 75))
      sizes[name] = float(1e3 * median if name == "latency_ms" else call.rows / median)
      sizes[f"{name}_spread"] = float(high / low)
  return costs


def _prepare(
  model: Model, variables: Variables, batch: Batch, batch_sizes: Sequence[int]
) -> tuple[dict[str, float], dict[str, _Call]]:
  """Returns what is not timed, and {name: call to time}, on inputs that are on the device."""

  @jax.jit
  def predict(params, state, batch):
    outputs, _ = model.apply(params, state, batch, train=False, key=None)
    return primary_outputs(outputs)

  many = {name: np.asarray(values) for name, values in batch.items()}
  rows = len(next(iter(many.values())))
  one = {name: values[:1] for name, values in many.items()}
  analysis = predict.lower(*variables, one).compile().cost_analysis() or {}
  sizes = {
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables.params)),
    "bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables)),
    "flops": float(analysis.get("flops", np.nan)),
  }
  wanted = {"latency_ms": 1, "throughput": rows}
  wanted |= {f"throughput_{size}": size for size in batch_sizes}
  calls = {}
  for name, size in wanted.items():
    taken = {key: values[np.arange(size) % rows] for key, values in many.items()}
    calls[name] = _Call(functools.partial(predict, *variables, jax.device_put(taken)), size)
  if model.sample is None:
    return sizes, calls
  generate = jax.jit(functools.partial(sample_text, "model", model))
  for size in batch_sizes:
    taken = {key: values[np.arange(size) % rows] for key, values in many.items()}
    run = functools.partial(generate, variables, jax.device_put(taken))
    calls[f"generation_{size}"] = _Call(run, size)
  return sizes, calls


def _time_by_turns(calls: Sequence[Callable[[], object]], repeats: int) -> np.ndarray:
  """Returns seconds [calls, rounds]; each round runs all calls once."""
  for call in calls:
    jax.block_until_ready(call())
  rounds: list[list[float]] = []
  began = time.perf_counter()
  while len(rounds) < repeats:
    if len(rounds) >= FEWEST_REPEATS and time.perf_counter() - began > MOST_SECONDS:
      break
    rounds.append([_seconds(call) for call in calls])
  return np.array(rounds).T


def _seconds(call: Callable[[], object]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start
