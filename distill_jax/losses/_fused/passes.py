"""Passes over logits that are read some classes at a time: statistics of each token, and gradients.

The caller's `Read` function computes the logits' products, or slices them out of an array.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.losses._fused import heads, log_sums, token_values
from distill_jax.losses._fused.heads import Plan, Products, Rows, Shared
from distill_jax.losses._fused.log_sums import ExpSum
from distill_jax.losses._fused.token_values import DIVERGENCES, Statistics, normalized

Read = Callable[[Shared, Any, int], Products]
"""`(the heads' columns of some classes, the first of these classes, their number) -> products`."""


class Residuals(NamedTuple):
  """Values for the gradients, [T] each; None where no term needs one.

  Attributes:
    student: log sum exp of the student.
    teacher: log sum exp of the teacher.
    slope: derivative of the divergence by `student`.
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
  z: jax.Array  # logits / temperature


def statistics(plan: Plan, rows: Rows, shared: Shared, read: Read) -> tuple[Statistics, Residuals]:
  """Returns the statistics over all classes, 0 where an index is no class, and the residuals."""
  sums, values = _first_pass(plan, rows, shared, read)
  log_sum = sums["student"].log() if "student" in sums else None
  teacher = sums["teacher"].log() if "teacher" in sums else None
  label_log_sum = sums["label"].log() if "label" in sums else None
  slope = None
  if plan.divergence in ("kl", "reverse_kl"):
    values["divergence"], slope = log_sums.kl(plan, sums)
  elif plan.divergence in DIVERGENCES:
    values["divergence"], slope = _second_pass(plan, rows, shared, read, log_sum, teacher)
  all_statistics = Statistics(**values, log_sum=log_sum, label_log_sum=label_log_sum)
  return all_statistics, Residuals(log_sum, teacher, slope)


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
  z = token_values.over_temperature(plan, logits, part)
  return _Chunk(part, _class_offset(plan, shared) + start, raw, logits, z)


def _logit_gradient(plan: Plan, rows: Rows, chunk: _Chunk, results, cotangent) -> jax.Array:
  """Returns the gradient by the chunk's logits [T, C], before bias and cap are undone."""
  all_statistics, residuals = results
  dz = jnp.zeros_like(chunk.z)
  if residuals.student is not None:
    q = jnp.exp(normalized(chunk.z, residuals.student))
    dz = cotangent.log_sum[:, None] * q
    if plan.divergence in DIVERGENCES:
      dz = dz + _divergence_gradient(plan, chunk, residuals, cotangent.divergence)
      dz = dz + (cotangent.divergence * residuals.slope)[:, None] * q
  if rows.indices is not None:
    # With a bucket, log_sum leaves the targets' classes out. Random samples may repeat: add.
    add = plan.divergence != "bucket"
    dz = token_values.put(dz, rows.indices - chunk.first, cotangent.at_indices, add=add)
  dz = dz if plan.unit_temperature else dz / chunk.part.temperature
  if rows.labels is not None:
    is_label = token_values.one_hot(rows.labels - chunk.first, dz.shape[-1])
    dz = dz + jnp.where(is_label, cotangent.at_label[:, None], 0)
  if all_statistics.label_log_sum is not None:
    probabilities = jnp.exp(normalized(chunk.logits, all_statistics.label_log_sum))
    dz = dz + cotangent.label_log_sum[:, None] * probabilities
  return dz


def _divergence_gradient(
  plan: Plan, chunk: _Chunk, residuals: Residuals, cotangent: jax.Array
) -> jax.Array:
  """Returns the gradient of a dense divergence by z with the student's log sum fixed."""
  assert plan.divergence is not None
  f = DIVERGENCES[plan.divergence]
  log_p = normalized(_teacher_logits(plan, chunk.raw, chunk.part), residuals.teacher)

  def divergence(z):
    return f(log_p, normalized(z, residuals.student), chunk.part.mix)

  return jax.vjp(divergence, chunk.z)[1](cotangent)[0]


def _first_pass(plan: Plan, rows: Rows, shared: Shared, read: Read) -> tuple[dict, dict]:
  """Returns sums of exponentials, and single logits, over all classes."""

  def body(carry, start, size):
    return _collect(plan, rows, shared, read, carry, start, size)

  carry = heads.vary(_empty_carry(plan, rows), heads.axes((rows, shared)))
  sums, values = heads.scan_parts(shared.student.kernel.shape[-1], plan.classes, body, carry)
  if plan.axis_name is None:
    return sums, values
  return log_sums.over_devices(sums, plan), jax.lax.psum(values, plan.axis_name)


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
    new["at_indices"] = values["at_indices"] + token_values.at(chunk.z, rows.indices - chunk.first)
  if "at_label" in values:
    is_label = token_values.one_hot(rows.labels - chunk.first, chunk.logits.shape[-1])
    new["at_label"] = values["at_label"] + jnp.where(is_label, chunk.logits, 0).sum(-1)
  return new


def _add_to_sums(plan: Plan, rows: Rows, chunk: _Chunk, sums: dict) -> dict:
  new: dict[str, Any] = {}
  z = {"student": chunk.z}
  if "label" in sums:
    new["label"] = sums["label"].add(chunk.logits)
  if "student" in sums:
    others = chunk.z
    if plan.divergence == "bucket":
      others = token_values.put(chunk.z, rows.indices - chunk.first, -jnp.inf)
    new["student"] = sums["student"].add(others)
  if "teacher" in sums:
    z["teacher"] = _teacher_logits(plan, chunk.raw, chunk.part)
    new["teacher"] = sums["teacher"].add(z["teacher"])
  if "cross" in sums:
    a, b = log_sums.kl_sides(plan)
    peaks = new[a].peak, new[b].peak
    cross, infinite = log_sums.cross_sum(z[a], z[b], *peaks)
    new["cross"] = log_sums.move_cross(sums["cross"], sums[a], sums[b], *peaks) + cross
    new["infinite"] = jnp.maximum(sums["infinite"], infinite)
  return new


def _second_pass(
  plan: Plan, rows: Rows, shared: Shared, read: Read, log_sum, teacher_log_sum
) -> tuple[jax.Array, jax.Array]:
  """Returns a divergence to a mixture, and its derivative by the student's log sum."""
  assert plan.divergence is not None
  f = DIVERGENCES[plan.divergence]

  def body(carry, start, size):
    chunk = _read_chunk(plan, shared, read, start, size)
    log_p = normalized(_teacher_logits(plan, chunk.raw, chunk.part), teacher_log_sum)

    def divergence(log_sum):
      return f(log_p, normalized(chunk.z, log_sum), shared.mix)

    value, pull = jax.vjp(divergence, log_sum)
    return carry[0] + value, carry[1] + pull(jnp.ones_like(value))[0]

  axes = heads.axes((rows, shared))
  log_sum, zeros = heads.vary((log_sum, jnp.zeros_like(log_sum)), axes)
  num_classes = shared.student.kernel.shape[-1]
  totals = heads.scan_parts(num_classes, plan.classes, body, (zeros, zeros))
  return totals if plan.axis_name is None else jax.lax.psum(totals, plan.axis_name)


def _teacher_logits(plan: Plan, raw: Products, part: Shared) -> jax.Array:
  """Returns the teacher's logits over the temperature."""
  z = heads.logits(raw.teacher, part.teacher, part.class_mask)
  return token_values.over_temperature(plan, z, part)


def _class_offset(plan: Plan, shared: Shared) -> Any:
  """Returns the index of this device's first class in the full vocabulary."""
  if plan.axis_name is None:
    return 0
  return jax.lax.axis_index(plan.axis_name) * shared.student.kernel.shape[-1]
