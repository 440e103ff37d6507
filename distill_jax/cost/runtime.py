"""Measures what a model costs to run on the default device: size, FLOPs, latency, throughput."""

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from distill_jax.models.adapters.outputs import primary_outputs
from distill_jax.types import Batch, Model, Variables


def measure_cost(
  model: Model,
  variables: Variables,
  batch: Batch,
  *,
  repeats: int = 20,
  batch_sizes: Sequence[int] = (),
) -> dict[str, float]:
  """Returns size, FLOPs, latency and throughput of a model in evaluation mode.

  The compiled program computes the primary outputs (`primary_outputs`: the logits), so features
  that only distillation reads cost nothing.

  Args:
    model: only its `apply` is used.
    variables: its weights.
    batch: real or zero inputs, arrays [rows, ...]; the first row is the one example.
    repeats: number of timed runs, after one that is not timed.
    batch_sizes: numbers of rows to time in addition, filled with the batch's rows in turn.

  Returns:
    'parameters': number of trained values; 'bytes': of params and state in memory; 'flops': of one
    example by XLA's count, which takes the body of a loop (`lax.scan`) once and a Pallas call as
    nothing, NaN if it is unknown; 'latency_ms': median for one example; 'throughput': examples/s at
    the batch's size; 'throughput_128', ...: at each of the `batch_sizes`.

  Raises:
    ValueError: `repeats` or a batch size is less than 1.
  """
  if repeats < 1:
    raise ValueError(f"repeats: expected at least 1, got {repeats}")
  if any(size < 1 for size in batch_sizes):
    raise ValueError(f"batch_sizes: expected at least 1 each, got {list(batch_sizes)}")

  @jax.jit
  def predict(params, state, batch):
    outputs, _ = model.apply(params, state, batch, train=False, key=None)
    return primary_outputs(outputs)

  many = {name: np.asarray(values) for name, values in batch.items()}
  one = {name: values[:1] for name, values in many.items()}
  rows = len(next(iter(many.values())))
  analysis = predict.lower(*variables, one).compile().cost_analysis() or {}
  costs = {
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables.params)),
    "bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables)),
    "flops": float(analysis.get("flops", np.nan)),
    "latency_ms": 1e3 * _median_seconds(predict, variables, one, repeats),
    "throughput": rows / _median_seconds(predict, variables, many, repeats),
  }
  for size in batch_sizes:
    resized = {name: values[np.arange(size) % rows] for name, values in many.items()}
    costs[f"throughput_{size}"] = size / _median_seconds(predict, variables, resized, repeats)
  return costs


def _median_seconds(predict: Callable, variables: Variables, batch: Batch, repeats: int) -> float:
  """Returns the median time of one call, on inputs that are already on the device."""
  batch = jax.device_put(batch)
  jax.block_until_ready(predict(*variables, batch))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(predict(*variables, batch))
    times.append(time.perf_counter() - start)
  return float(np.median(times))
