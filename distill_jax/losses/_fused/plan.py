"""Chooses how many tokens and classes the `linear_*` losses compute at a time."""

import operator

from distill_jax.losses._fused.heads import Plan, Rows, Shared
from distill_jax.losses._fused.token_values import DIVERGENCES

MEMORY = 2**26  # bytes
MIN_TOKENS = 256  # Each chunk of tokens reads and writes an array of the kernel's size.
MIN_CLASSES = 128  # The number of lanes of a TPU.
PART = 2048  # By tokens: arrays of so many classes stay in the processor's cache.


def choose(
  divergence: str | None,
  rows: Rows,
  shared: Shared,
  unit_temperature: bool,
  axis_name: str | None,
  memory: int | None,
) -> Plan:
  """Returns a plan by tokens if enough of them fit into `memory` bytes, else by classes."""
  memory = MEMORY if memory is None else operator.index(memory)
  if memory <= 0:
    raise ValueError(f"memory: expected a number of bytes > 0, got {memory}")
  budget = memory // rows.weights.dtype.itemsize
  num_classes = shared.student.kernel.shape[1]
  tokens = None if axis_name is not None else _tokens_within(budget, divergence, rows, shared)
  if tokens is None:
    classes = _classes_within(budget, divergence, len(rows.student), num_classes)
  else:
    classes = min(PART, num_classes)
  return Plan(divergence, classes, tokens, axis_name, unit_temperature)


def _tokens_within(budget: int, divergence: str | None, rows: Rows, shared: Shared) -> int | None:
  """Returns how many tokens at a time take at most `budget` values; None if too few do."""
  num_tokens = len(rows.student)
  kernel = shared.student.kernel
  num_classes = kernel.shape[1]
  sides = 1 if rows.teacher is None else 2
  reserved = 2 * rows.student.size  # The hidden states' gradient: in chunks, and in order.
  if kernel.dtype != rows.weights.dtype:
    # The kernel's gradient is then not added up in place, and TPUs hold the logits twice.
    sides *= 2
    reserved += kernel.size
  # The last part of the classes is smaller than the others and shares no memory with them.
  per_token = sides * num_classes + _copies(divergence) * min(2 * PART, num_classes)
  most = (budget - reserved) // per_token
  return _even(num_tokens, most) if most >= min(num_tokens, MIN_TOKENS) else None


def _classes_within(budget: int, divergence: str | None, num_tokens: int, num_classes: int) -> int:
  """Returns how many classes of all tokens take at most `budget` values, MIN_CLASSES at least."""
  most = max(budget // (_copies(divergence) * num_tokens), MIN_CLASSES)
  lanes = -(-_even(num_classes, most) // MIN_CLASSES)
  return min(lanes * MIN_CLASSES, num_classes)


def _copies(divergence: str | None) -> int:
  """Returns how many arrays of a chunk's logits XLA holds at once, as compiled for CPUs."""
  if divergence in ("kl", "reverse_kl"):
    return 4
  return 10 if divergence in DIVERGENCES else 2


def _even(total: int, most: int) -> int:
  """Returns the size of the fewest equal parts of at most `most`; the last one may be smaller."""
  return -(-total // -(-total // most))
