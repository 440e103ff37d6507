"""Statistics of logits that are computed some classes at a time, and never held together.

Forward, one pass over the vocabulary collects logarithms of sums of exponentials and single logits; divergences to a
mixture, which need both normalisers first, take a second. Backward, a last pass computes the same logits again, and
from them the gradients, which go straight to their place: no array of the kernel's size is made but the gradient.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.losses import _heads, _token_values
from distill_jax.losses._heads import Plan, Rows, Shared
from distill_jax.losses._token_values import DIVERGENCES, Statistics, at, known, normalised, put


class _Sum(NamedTuple):
  """A sum of exponentials, exp(peak) * total, of the classes seen so far; [T] each."""

  peak: jax.Array
  total: jax.Array

  def log(self) -> jax.Array:
    return jnp.log(jnp.where(self.total == 0, 1, self.total)) + self.peak


class _Saved(NamedTuple):
  """For the backward pass, [T] each: log sums of both sides, and the divergence's derivative by the student's."""

  student: Any
  teacher: Any
  slope: Any


def by_classes(plan: Plan, rows: Rows, shared: Shared) -> Statistics:
  """Of all classes; differentiable in the student's hidden states, kernel and bias.

  Under `shard_map` all inputs are made to differ along the mapped axes, so that their gradients are summed over the
  axes along which they do not.
  """
  found = _read(plan, *_heads.vary((rows, shared), _heads.axes((rows, shared))))
  classes = shared.student.kernel.shape[-1]
  classes *= 1 if plan.axis_name is None else jax.lax.axis_size(plan.axis_name)
  kept = None if rows.kept is None else known(found.kept, rows.kept, classes)
  label = None if rows.labels is None else known(found.label, rows.labels, classes)
  return found._replace(kept=kept, label=label)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(plan: Plan, rows: Rows, shared: Shared) -> Statistics:
  return _forward(plan, rows, shared)[0]


def _forward(plan: Plan, rows: Rows, shared: Shared) -> tuple[Statistics, tuple]:
  sums, found = _first_pass(plan, rows, shared)
  log_sum, teacher = (sums[side].log() if side in sums else None for side in ("student", "teacher"))
  if plan.divergence not in DIVERGENCES:
    slope = None
  elif plan.divergence in ("kl", "reverse_kl"):
    found["divergence"], slope = _from_sums(plan, sums)
  else:
    found["divergence"], slope = _second_pass(plan, rows, shared, log_sum, teacher)
  label_log_sum = sums["plain"].log() if "plain" in sums else None
  statistics = Statistics(**found, log_sum=log_sum, label_log_sum=label_log_sum)
  return statistics, (rows, shared, statistics, _Saved(log_sum, teacher, slope))


def _backward(plan: Plan, held: tuple, cotangent: Statistics):
  rows, shared, found, saved = held
  hidden, head = rows.student, shared.student
  dtype = jnp.promote_types(hidden.dtype, jnp.float32)
  zeros = jnp.zeros(hidden.shape, dtype), jax.tree.map(jnp.zeros_like, (head.kernel, *_given(head.bias)))
  zeros, cotangent = _heads.vary((zeros, cotangent), _heads.axes((rows, shared)))

  def body(carry, start, size):
    d_hidden, d_head = carry
    part = _heads.columns(shared, start, size)
    raw = _heads.raw_logits(hidden, part.student)
    plain, pull = jax.vjp(lambda raw: _heads.logits(raw, part.student, part.class_mask), raw)
    first = _first_class(plan, shared) + start
    (dz,) = pull(_logit_gradient(plan, rows, part, found, saved, cotangent, plain, first))
    own, parts = (
      _heads.hidden_gradient(dz, hidden, part.student),
      _heads.head_gradient(dz, hidden, part.student),
    )
    new = [
      jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, -1)
      for whole, part in zip(d_head, parts, strict=True)
    ]
    return d_hidden + own, tuple(new)

  d_hidden, (d_kernel, *d_bias) = _heads.in_parts(head.kernel.shape[-1], plan.size, body, zeros)
  d_hidden = d_hidden.astype(hidden.dtype)
  return _heads.cotangents(d_hidden, d_kernel, *d_bias)


_read.defvjp(_forward, _backward)


def _logit_gradient(plan, rows, part, found, saved, cotangent, plain, first) -> jax.Array:
  """The gradient by the chunk's logits [T, C], before bias and cap are undone."""
  z = _token_values.tempered(plan, plain, part)
  dz = jnp.zeros_like(z)
  if saved.student is not None:
    q = jnp.exp(normalised(z, saved.student))
    dz = cotangent.log_sum[:, None] * q
  if plan.divergence in DIVERGENCES:
    log_p = normalised(_token_values.teacher_logits(plan, rows, part), saved.teacher)

    def divergence(z):
      return DIVERGENCES[plan.divergence](log_p, normalised(z, saved.student), part.mix)

    (direct,) = jax.vjp(divergence, z)[1](cotangent.divergence)
    dz = dz + direct + (cotangent.divergence * saved.slope)[:, None] * q
  if rows.kept is not None:  # with a bucket, log_sum does not count the kept classes; draws may repeat
    dz = put(dz, rows.kept - first, cotangent.kept, add=plan.divergence != "bucket")
  dz = dz if plan.one_temperature else dz / part.temperature
  if rows.labels is not None:
    chosen = _token_values.is_label(rows.labels - first, z.shape[-1])
    dz = dz + jnp.where(chosen, cotangent.label[:, None], 0)
  if found.label_log_sum is not None:
    dz = dz + cotangent.label_log_sum[:, None] * jnp.exp(normalised(plain, found.label_log_sum))
  return dz


def _first_pass(plan: Plan, rows: Rows, shared: Shared) -> tuple[dict, dict]:
  """Sums of exponentials, and single logits, of all classes."""
  body, empty = functools.partial(_collect, plan, rows, shared), _nothing_seen(plan, rows)
  empty = _heads.vary(empty, _heads.axes((rows, shared)))
  sums, found = _heads.in_parts(shared.student.kernel.shape[-1], plan.size, body, empty)
  if plan.axis_name is not None:
    sums, found = _join(sums, plan), jax.lax.psum(found, plan.axis_name)
  return sums, found


def _nothing_seen(plan: Plan, rows: Rows) -> tuple[dict, dict]:
  tokens, dtype = rows.student.shape[0], rows.weights.dtype
  empty, zeros = _Sum(jnp.full(tokens, -jnp.inf, dtype), jnp.zeros(tokens, dtype)), jnp.zeros(tokens, dtype)
  sums: dict[str, Any] = {"student": empty} if _token_values.collects_log_sum(plan) else {}
  if plan.divergence in DIVERGENCES:
    sums["teacher"] = empty
  if plan.divergence in ("kl", "reverse_kl"):
    sums |= {"cross": zeros, "infinite": zeros}
  if _token_values.collects_label_log_sum(plan, rows):
    sums["plain"] = empty
  found = {} if rows.kept is None else {"kept": jnp.zeros(rows.kept.shape, dtype)}
  return sums, found | ({} if rows.labels is None else {"label": zeros})


def _collect(plan: Plan, rows: Rows, shared: Shared, carry, start, size: int):
  """The first pass over one chunk."""
  sums, found = carry
  new: dict[str, Any] = {}
  part, first = _heads.columns(shared, start, size), _first_class(plan, shared) + start
  plain = _heads.logits(_heads.raw_logits(rows.student, part.student), part.student, part.class_mask)
  z = _token_values.tempered(plan, plain, part)
  if "kept" in found:
    found = {**found, "kept": found["kept"] + at(z, rows.kept - first)}
  if "label" in found:
    chosen = _token_values.is_label(rows.labels - first, size)
    found = {**found, "label": found["label"] + jnp.where(chosen, plain, 0).sum(-1)}
  if "plain" in sums:
    new["plain"] = _grown(sums["plain"], plain)
  if "student" in sums:
    seen = put(z, rows.kept - first, -jnp.inf) if plan.divergence == "bucket" else z
    new["student"] = _grown(sums["student"], seen)
  if "teacher" in sums:
    t = _token_values.teacher_logits(plan, rows, part)
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
  return value, exists.astype(value.dtype) if plan.divergence == "kl" else jnp.where(exists, -1 - value, 0)


def _second_pass(plan, rows, shared, log_sum, teacher_log_sum) -> tuple[jax.Array, jax.Array]:
  """A divergence to a mixture, and its derivative by the student's log sum with the logits held."""

  def body(carry, start, size):
    part = _heads.columns(shared, start, size)
    plain = _heads.logits(_heads.raw_logits(rows.student, part.student), part.student, part.class_mask)
    z = _token_values.tempered(plan, plain, part)
    log_p = normalised(_token_values.teacher_logits(plan, rows, part), teacher_log_sum)

    def divergence(log_sum):
      return DIVERGENCES[plan.divergence](log_p, normalised(z, log_sum), shared.mix)

    value, pull = jax.vjp(divergence, log_sum)
    return carry[0] + value, carry[1] + pull(jnp.ones_like(value))[0]

  axes = _heads.axes((rows, shared))
  log_sum, zeros = _heads.vary((log_sum, jnp.zeros_like(log_sum)), axes)
  found = _heads.in_parts(shared.student.kernel.shape[-1], plan.size, body, (zeros, zeros))
  return found if plan.axis_name is None else jax.lax.psum(found, plan.axis_name)


def _first_class(plan: Plan, shared: Shared):
  """The index, in the whole vocabulary, of this device's first class."""
  return 0 if plan.axis_name is None else jax.lax.axis_index(plan.axis_name) * shared.student.kernel.shape[-1]


def _finite(peak: jax.Array) -> jax.Array:
  return jnp.where(peak == -jnp.inf, 0, peak)


def _given(x) -> tuple:
  return () if x is None else (x,)
