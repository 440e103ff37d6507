"""Passes over logits that are read some classes at a time: statistics of each token, and gradients.

The caller's `Read` function computes the logits' products, or slices them out of an array.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.losses import _softmax
from distill_jax.losses._fused import heads, log_sums, token_values
from distill_jax.losses._fused.heads import Plan, Products, Rows, Shared
from distill_jax.losses._fused.log_sums import ExpSum, LogSum
from distill_jax.losses._fused.token_values import DIVERGENCES, Statistics

Read = Callable[[Shared, Any, int], Products]
"""`(the heads' columns of some classes, the first of these classes, their number) -> products`."""


class Residuals(NamedTuple):
  """Values for the gradients; None where no term needs one.

  Attributes:
    student: `LogSum` of the student.
    teacher: `LogSum` of the teacher.
    slope: derivative of the divergence by the student's log_total, [T].
  """

  student: Any
  teacher: Any
  slope: Any


class _Chunk(NamedTuple):
  """Some classes: their heads, their first class in the full vocabulary, products and logits."""

  part: Shared
  first: Any
  raw: Products
  logits: jax.Array


def statistics(plan: Plan, rows: Rows, shared: Shared, read: Read) -> tuple[Statistics, Residuals]:
  """Returns the statistics over all classes, 0 where an index is no class, and the residuals."""
  sums, values = _first_pass(plan, rows, shared, read)
  names = [name for name in ("student", "teacher", "label") if name in sums]
  logs = {name: sums[name].log() for name in names}
  slope = None
  if plan.divergence in ("kl", "reverse_kl"):
    values["divergence"], slope = log_sums.kl(plan, sums)
  elif plan.divergence in DIVERGENCES:
    values["divergence"], slope = _second_pass(
      plan, rows, shared, read, logs["student"], logs["teacher"]
    )
  log_sum = logs.get("student")
  all_statistics = Statistics(**values, log_sum=log_sum, label_log_sum=logs.get("label"))
  return all_statistics, Residuals(log_sum, logs.get("teacher"), slope)


def gradients(
  plan: Plan,
  rows: Rows,
  shared: Shared,
  read: Read,
  results: tuple[Statistics, Residuals],
  cotangent: Statistics,
  d_head: tuple[jax.Array, ...],
  write: Callable[[jax.Array, jax.Array, Any], jax.Array],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Returns the gradients of the hidden states, [T, H] in float32 or wider, and of the head.

  `write(d_head, part, start)` writes the head's gradient of some classes into that of all.
  """
  hidden = rows.student
  zeros = jnp.zeros(hidden.shape, rows.weights.dtype)
  carry, cotangent = heads.vary(((zeros, d_head), cotangent), heads.axes((rows, shared)))

  def body(carry, start, size):
    d_hidden, d_head = carry
    part = heads.columns(shared, start, size)
    raw = read(part, start, size)
    logits, pull = jax.vjp(lambda x: heads.logits(x, part.student, part.class_mask), raw.student)
    chunk = _chunk(plan, shared, part, start, raw, logits)
    (dz,) = pull(_logit_gradient(plan, rows, chunk, results, cotangent))
    d_hidden = d_hidden + heads.hidden_gradient(dz, hidden, chunk.part.student)
    parts = heads.head_gradient(dz, hidden, chunk.part.student)
    pairs = zip(d_head, parts, strict=True)
    return d_hidden, tuple(write(old, new, start) for old, new in pairs)

  return heads.scan_parts(shared.student.kernel.shape[-1], plan.classes, body, carry)


def _read_chunk(plan: Plan, shared: Shared, read: Read, start: Any, size: int) -> _Chunk:
  """Returns the chunk of `size` classes from `start` on."""
  part = heads.columns(shared, start, size)
  raw = read(part, start, size)
  logits = heads.logits(raw.student, part.student, part.class_mask)
  return _chunk(plan, shared, part, start, raw, logits)


def _chunk(plan, shared, part: Shared, start: Any, raw: Products, logits: jax.Array) -> _Chunk:
  return _Chunk(part, _class_offset(plan, shared) + start, raw, logits)


def _logit_gradient(plan: Plan, rows: Rows, chunk: _Chunk, results, cotangent) -> jax.Array:
  """Returns the gradient by the chunk's logits [T, C], before bias and cap are undone."""
  all_statistics, residuals = results
  t = token_values.temperature(plan, chunk.part)
  dz = jnp.zeros_like(chunk.logits)
  if residuals.student is not None:
    log_q = residuals.student.normalize(chunk.logits, t)
    dz = cotangent.log_sum.log_total[:, None] * jnp.exp(log_q)
    if plan.divergence in DIVERGENCES:
      dz = dz + _divergence_gradient(plan, chunk, log_q, residuals, cotangent.divergence)
      dz = dz + (cotangent.divergence * residuals.slope)[:, None] * jnp.exp(log_q)
  dz = dz / t
  if rows.indices is not None:
    # With a bucket, log_sum leaves the targets' classes out. Random samples may repeat: add.
    add = plan.divergence != "bucket"
    dz = token_values.put(dz, rows.indices - chunk.first, cotangent.at_indices, add=add)
  if rows.labels is not None:
    is_label = _softmax.is_class(rows.labels - chunk.first, dz.shape[-1])
    dz = dz + jnp.where(is_label, cotangent.at_label[:, None], 0)
  if all_statistics.label_log_sum is not None:
    log_q = all_statistics.label_log_sum.normalize(chunk.logits, 1.0)
    dz = dz + cotangent.label_log_sum.log_total[:, None] * jnp.exp(log_q)
  return dz


def _divergence_gradient(
  plan: Plan, chunk: _Chunk, log_q: jax.Array, residuals: Residuals, cotangent: jax.Array
) -> jax.Array:
  """Returns the gradient of a dense divergence by log_q, with the student's log sum fixed."""
  assert plan.divergence is not None
  f = DIVERGENCES[plan.divergence]
  log_p = _teacher_log_probs(plan, chunk, residuals.teacher)
  return jax.vjp(lambda log_q: f(log_p, log_q, chunk.part.mix), log_q)[1](cotangent)[0]


def _first_pass(plan: Plan, rows: Rows, shared: Shared, read: Read) -> tuple[dict, dict]:
  """Returns sums of exponentials, and single logits, over all classes."""

  def body(carry, start, size):
    return _collect(plan, rows, shared, read, carry, start, size)

  carry = heads.vary(_empty_carry(plan, rows), heads.axes((rows, shared)))
  sums, values = heads.scan_parts(shared.student.kernel.shape[-1], plan.classes, body, carry)
  if plan.axis_name is None:
    return sums, values
  sums = log_sums.over_devices(sums, plan, token_values.temperature(plan, shared))
  return sums, jax.lax.psum(values, plan.axis_name)


def _empty_carry(plan: Plan, rows: Rows) -> tuple[dict, dict]:
  """Returns sums and single logits of no classes, of those that the plan needs."""
  num_tokens = rows.student.shape[0]
  dtype = rows.weights.dtype
  empty = ExpSum.empty(num_tokens, dtype)
  zeros = jnp.zeros(num_tokens, dtype)
  sums: dict[str, Any] = {}
  if token_values.needs_log_sum(plan):
    sums["student"] = empty
  if plan.divergence in DIVERGENCES:
    sums["teacher"] = empty
  if plan.divergence in ("kl", "reverse_kl"):
    sums |= {"cross": zeros, "infinite": zeros}
  if token_values.needs_label_log_sum(plan, rows):
    sums["label"] = empty
  values = {}
  if rows.indices is not None:
    values["at_indices"] = jnp.zeros(rows.indices.shape, dtype)
  if rows.labels is not None:
    values["at_label"] = zeros
  return sums, values


def _collect(plan: Plan, rows: Rows, shared: Shared, read: Read, carry, start, size: int):
  """Returns the carry of the first pass after one more chunk."""
  sums, values = carry
  chunk = _read_chunk(plan, shared, read, start, size)
  return _add_to_sums(plan, rows, chunk, sums), _add_to_values(rows, chunk, values)


def _add_to_values(rows: Rows, chunk: _Chunk, values: dict) -> dict:
  new = {}
  if "at_indices" in values:
    at_indices = token_values.at(chunk.logits, rows.indices - chunk.first)
    new["at_indices"] = values["at_indices"] + at_indices
  if "at_label" in values:
    is_label = _softmax.is_class(rows.labels - chunk.first, chunk.logits.shape[-1])
    new["at_label"] = values["at_label"] + jnp.where(is_label, chunk.logits, 0).sum(-1)
  return new


def _add_to_sums(plan: Plan, rows: Rows, chunk: _Chunk, sums: dict) -> dict:
  new: dict[str, Any] = {}
  t = token_values.temperature(plan, chunk.part)
  logits = {"student": chunk.logits}
  if "label" in sums:
    new["label"] = sums["label"].add(chunk.logits, 1.0)
  if "student" in sums:
    others = chunk.logits
    if plan.divergence == "bucket":
      others = token_values.put(chunk.logits, rows.indices - chunk.first, -jnp.inf)
    new["student"] = sums["student"].add(others, t)
  if "teacher" in sums:
    logits["teacher"] = _teacher_logits(chunk)
    new["teacher"] = sums["teacher"].add(logits["teacher"], t)
  if "cross" in sums:
    a, b = log_sums.kl_sides(plan)
    peaks = new[a].peak, new[b].peak
    cross, infinite = log_sums.cross_sum(logits[a], logits[b], *peaks, t)
    new["cross"] = log_sums.move_cross(sums["cross"], sums[a], sums[b], *peaks, t) + cross
    new["infinite"] = jnp.maximum(sums["infinite"], infinite)
  return new


def _second_pass(
  plan: Plan, rows: Rows, shared: Shared, read: Read, student: LogSum, teacher: LogSum
) -> tuple[jax.Array, jax.Array]:
  """Returns a divergence to a mixture, and its derivative by the student's log_total."""
  assert plan.divergence is not None
  f = DIVERGENCES[plan.divergence]
  t = token_values.temperature(plan, shared)

  def body(carry, start, size):
    chunk = _read_chunk(plan, shared, read, start, size)
    log_p = _teacher_log_probs(plan, chunk, teacher)

    def divergence(log_total):
      log_q = LogSum(student.peak, log_total).normalize(chunk.logits, t)
      return f(log_p, log_q, shared.mix)

    value, pull = jax.vjp(divergence, log_total)
    return carry[0] + value, carry[1] + pull(jnp.ones_like(value))[0]

  axes = heads.axes((rows, shared))
  log_total, zeros = heads.vary((student.log_total, jnp.zeros_like(student.log_total)), axes)
  num_classes = shared.student.kernel.shape[-1]
  totals = heads.scan_parts(num_classes, plan.classes, body, (zeros, zeros))
  return totals if plan.axis_name is None else jax.lax.psum(totals, plan.axis_name)


def _teacher_logits(chunk: _Chunk) -> jax.Array:
  return heads.logits(chunk.raw.teacher, chunk.part.teacher, chunk.part.class_mask)


def _teacher_log_probs(plan: Plan, chunk: _Chunk, teacher: LogSum) -> jax.Array:
  """Returns log-probabilities [T, C] of the teacher at the temperature."""
  t = token_values.temperature(plan, chunk.part)
  return teacher.normalize(_teacher_logits(chunk), t)


def _class_offset(plan: Plan, shared: Shared) -> Any:
  """Returns the index of this device's first class in the full vocabulary."""
  if plan.axis_name is None:
    return 0
  return jax.lax.axis_index(plan.axis_name) * shared.student.kernel.shape[-1]
