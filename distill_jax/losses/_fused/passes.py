"""Passes over logits that come some classes at a time: statistics of each token, and gradients.

Where the logits come from is the caller's: `Read` computes them, or cuts them out of an array.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.losses._fused import heads, token_values
from distill_jax.losses._fused.heads import Plan, Products, Rows, Shared
from distill_jax.losses._fused.token_values import DIVERGENCES, Statistics, at, normalized, put

Read = Callable[[Shared, Any, int], Products]
"""`(the heads' part of some classes, the first of them, how many) -> their products`."""


class _Sum(NamedTuple):
  """A sum of exponentials, exp(peak) * total, of the classes seen so far; [T] each."""

  peak: jax.Array
  total: jax.Array

  def log(self) -> jax.Array:
    return jnp.log(jnp.where(self.total == 0, 1, self.total)) + self.peak


class Saved(NamedTuple):
  """For the gradients, [T] each: log sums of both sides, and the divergence's derivative by the student's."""

  student: Any
  teacher: Any
  slope: Any


def statistics(plan: Plan, rows: Rows, shared: Shared, read: Read) -> tuple[Statistics, Saved]:
  """Of all classes; 0 where an index is no class."""
  sums, found = _first_pass(plan, rows, shared, read)
  log_sum, teacher = (sums[side].log() if side in sums else None for side in ("student", "teacher"))
  if plan.divergence not in DIVERGENCES:
    slope = None
  elif plan.divergence in ("kl", "reverse_kl"):
    found["divergence"], slope = _from_sums(plan, sums)
  else:
    found["divergence"], slope = _second_pass(plan, rows, shared, read, log_sum, teacher)
  label_log_sum = sums["plain"].log() if "plain" in sums else None
  return Statistics(**found, log_sum=log_sum, label_log_sum=label_log_sum), Saved(
    log_sum, teacher, slope
  )


def gradients(
  plan: Plan,
  rows: Rows,
  shared: Shared,
  read: Read,
  known: tuple[Statistics, Saved],
  cotangent: Statistics,
  d_head: tuple[jax.Array, ...],
  write: Callable[[jax.Array, jax.Array, Any], jax.Array],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Of the hidden states, [T, H] in float32 or wider, and the head's, which `write(d_head, part, start)` takes up."""
  hidden = rows.student
  names = heads.axes((rows, shared))
  zeros = jnp.zeros(hidden.shape, rows.weights.dtype)
  carry, cotangent = heads.vary(((zeros, d_head), cotangent), names)

  def body(carry, start, size):
    d_hidden, d_head = carry
    part = heads.columns(shared, start, size)
    raw = read(part, start, size)
    plain, pull = jax.vjp(lambda raw: heads.logits(raw, part.student, part.class_mask), raw.student)
    first = _first_class(plan, shared) + start
    (dz,) = pull(_logit_gradient(plan, rows, part, known, cotangent, plain, raw, first))
    own = heads.hidden_gradient(dz, hidden, part.student)
    parts = heads.head_gradient(dz, hidden, part.student)
    return d_hidden + own, tuple(
      write(old, new, start) for old, new in zip(d_head, parts, strict=True)
    )

  return heads.in_parts(shared.student.kernel.shape[-1], plan.classes, body, carry)


def _logit_gradient(plan, rows, part, known, cotangent, plain, raw, first) -> jax.Array:
  """The gradient by the chunk's logits [T, C], before bias and cap are undone."""
  found, saved = known
  z = token_values.tempered(plan, plain, part)
  dz = jnp.zeros_like(z)
  if saved.student is not None:
    q = jnp.exp(normalized(z, saved.student))
    dz = cotangent.log_sum[:, None] * q
  if plan.divergence in DIVERGENCES:
    log_p = normalized(_taught(plan, raw, part), saved.teacher)

    def divergence(z):
      return DIVERGENCES[plan.divergence](log_p, normalized(z, saved.student), part.mix)

    (direct,) = jax.vjp(divergence, z)[1](cotangent.divergence)
    dz = dz + direct + (cotangent.divergence * saved.slope)[:, None] * q
  if (
    rows.kept is not None
  ):  # with a bucket, log_sum does not count the kept classes; draws may repeat
    dz = put(dz, rows.kept - first, cotangent.kept, add=plan.divergence != "bucket")
  dz = dz if plan.one_temperature else dz / part.temperature
  if rows.labels is not None:
    chosen = token_values.is_label(rows.labels - first, z.shape[-1])
    dz = dz + jnp.where(chosen, cotangent.label[:, None], 0)
  if found.label_log_sum is not None:
    dz = dz + cotangent.label_log_sum[:, None] * jnp.exp(normalized(plain, found.label_log_sum))
  return dz


def _first_pass(plan: Plan, rows: Rows, shared: Shared, read: Read) -> tuple[dict, dict]:
  """Sums of exponentials, and single logits, of all classes."""

  def body(seen, start, size):
    return _collect(plan, rows, shared, read, seen, start, size)

  empty = heads.vary(_nothing_seen(plan, rows), heads.axes((rows, shared)))
  sums, found = heads.in_parts(shared.student.kernel.shape[-1], plan.classes, body, empty)
  if plan.axis_name is not None:
    sums, found = _join(sums, plan), jax.lax.psum(found, plan.axis_name)
  return sums, found


def _nothing_seen(plan: Plan, rows: Rows) -> tuple[dict, dict]:
  tokens, dtype = rows.student.shape[0], rows.weights.dtype
  empty, zeros = (
    _Sum(jnp.full(tokens, -jnp.inf, dtype), jnp.zeros(tokens, dtype)),
    jnp.zeros(tokens, dtype),
  )
  sums: dict[str, Any] = {"student": empty} if token_values.collects_log_sum(plan) else {}
  if plan.divergence in DIVERGENCES:
    sums["teacher"] = empty
  if plan.divergence in ("kl", "reverse_kl"):
    sums |= {"cross": zeros, "infinite": zeros}
  if token_values.collects_label_log_sum(plan, rows):
    sums["plain"] = empty
  found = {} if rows.kept is None else {"kept": jnp.zeros(rows.kept.shape, dtype)}
  return sums, found | ({} if rows.labels is None else {"label": zeros})


def _collect(plan: Plan, rows: Rows, shared: Shared, read: Read, seen, start, size: int):
  """The first pass over one chunk."""
  sums, found = seen
  new: dict[str, Any] = {}
  part, first = heads.columns(shared, start, size), _first_class(plan, shared) + start
  raw = read(part, start, size)
  plain = heads.logits(raw.student, part.student, part.class_mask)
  z = token_values.tempered(plan, plain, part)
  if "kept" in found:
    found = {**found, "kept": found["kept"] + at(z, rows.kept - first)}
  if "label" in found:
    chosen = token_values.is_label(rows.labels - first, size)
    found = {**found, "label": found["label"] + jnp.where(chosen, plain, 0).sum(-1)}
  if "plain" in sums:
    new["plain"] = _grown(sums["plain"], plain)
  if "student" in sums:
    seen = put(z, rows.kept - first, -jnp.inf) if plan.divergence == "bucket" else z
    new["student"] = _grown(sums["student"], seen)
  if "teacher" in sums:
    t = _taught(plan, raw, part)
    new["teacher"] = _grown(sums["teacher"], t)
  if "cross" in sums:
    a, b = _leading(plan)
    new["cross"] = _moved(sums["cross"], sums[a], sums[b], new[a].peak, new[b].peak)
    cross, infinite = _crossed(*((t, z) if a == "teacher" else (z, t)), new[a].peak, new[b].peak)
    new |= {"cross": new["cross"] + cross, "infinite": jnp.maximum(sums["infinite"], infinite)}
  return new, found


def _join(sums: dict, plan: Plan) -> dict:
  """The sums of all devices along the axis."""

  def joined(own: _Sum) -> _Sum:
    peak = jax.lax.pmax(own.peak, plan.axis_name)
    return _Sum(peak, jax.lax.psum(own.total * jnp.exp(own.peak - _finite(peak)), plan.axis_name))

  new: dict[str, Any] = {name: joined(own) for name, own in sums.items() if isinstance(own, _Sum)}
  if "cross" in sums:
    a, b = _leading(plan)
    cross = _moved(sums["cross"], sums[a], sums[b], new[a].peak, new[b].peak)
    new["cross"] = jax.lax.psum(cross, plan.axis_name)
    new["infinite"] = jax.lax.pmax(sums["infinite"], plan.axis_name)
  return new


def _grown(seen: _Sum, z: jax.Array) -> _Sum:
  peak = jnp.maximum(seen.peak, z.max(-1))
  base = _finite(peak)
  return _Sum(peak, seen.total * jnp.exp(seen.peak - base) + jnp.exp(z - base[:, None]).sum(-1))


# KL from a to b of logits seen in chunks: the sum of exp(a - peak_a) ((a - peak_a) - (b - peak_b)), which a new peak
# moves. Relative to the peaks, so that a constant added to all logits costs no digits.


def _leading(plan: Plan) -> tuple[str, str]:
  return ("teacher", "student") if plan.divergence == "kl" else ("student", "teacher")


def _moved(cross, a: _Sum, b: _Sum, peak_a, peak_b) -> jax.Array:
  shift = (_finite(a.peak) - _finite(peak_a)) - (_finite(b.peak) - _finite(peak_b))
  return jnp.exp(a.peak - _finite(peak_a)) * (cross + a.total * shift)


def _crossed(a, b, peak_a, peak_b) -> tuple[jax.Array, jax.Array]:
  """Of one chunk; and 1 where b is impossible and a is not."""
  a, b = a - _finite(peak_a)[:, None], b - _finite(peak_b)[:, None]
  gap = jnp.where((a == -jnp.inf) | (b == -jnp.inf), 0, a - b)
  infinite = (a != -jnp.inf) & (b == -jnp.inf)
  return (jnp.exp(a) * gap).sum(-1), infinite.any(-1).astype(a.dtype)


def _from_sums(plan: Plan, sums: dict) -> tuple[jax.Array, jax.Array]:
  """The divergence, and its derivative by the student's log sum with the logits held."""
  a, b = (sums[side] for side in _leading(plan))
  exists = a.total > 0
  a_total, b_total = (jnp.where(side.total > 0, side.total, 1) for side in (a, b))
  value = sums["cross"] / a_total + jnp.log(b_total) - jnp.log(a_total)
  value = jnp.where(sums["infinite"] > 0, jnp.inf, jnp.where(exists, value, 0))
  return value, exists.astype(value.dtype) if plan.divergence == "kl" else jnp.where(
    exists, -1 - value, 0
  )


def _second_pass(plan, rows, shared, read, log_sum, teacher_log_sum) -> tuple[jax.Array, jax.Array]:
  """A divergence to a mixture, and its derivative by the student's log sum with the logits held."""

  def body(carry, start, size):
    part = heads.columns(shared, start, size)
    raw = read(part, start, size)
    plain = heads.logits(raw.student, part.student, part.class_mask)
    z = token_values.tempered(plan, plain, part)
    log_p = normalized(_taught(plan, raw, part), teacher_log_sum)

    def divergence(log_sum):
      return DIVERGENCES[plan.divergence](log_p, normalized(z, log_sum), shared.mix)

    value, pull = jax.vjp(divergence, log_sum)
    return carry[0] + value, carry[1] + pull(jnp.ones_like(value))[0]

  axes = heads.axes((rows, shared))
  log_sum, zeros = heads.vary((log_sum, jnp.zeros_like(log_sum)), axes)
  found = heads.in_parts(shared.student.kernel.shape[-1], plan.classes, body, (zeros, zeros))
  return found if plan.axis_name is None else jax.lax.psum(found, plan.axis_name)


def _taught(plan: Plan, raw: Products, part: Shared) -> jax.Array:
  """The teacher's logits at the temperature."""
  return token_values.tempered(plan, heads.logits(raw.teacher, part.teacher, part.class_mask), part)


def _first_class(plan: Plan, shared: Shared):
  """The index, in the whole vocabulary, of this device's first class."""
  return (
    0
    if plan.axis_name is None
    else jax.lax.axis_index(plan.axis_name) * shared.student.kernel.shape[-1]
  )


def _finite(peak: jax.Array) -> jax.Array:
  return jnp.where(peak == -jnp.inf, 0, peak)
