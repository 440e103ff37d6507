"""Sums of exponentials, and KL from them, of logits that are read some classes at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.losses._checks import Scalar
from distill_jax.losses._fused.heads import Plan


class LogSum(NamedTuple):
  """log sum exp(logits / temperature) as peak / temperature + log_total, [T] each.

  Their sum would round the logits' differences to the digits of the logits.

  Attributes:
    peak: the largest logit, -inf where no class exists; a constant.
    log_total: log sum exp((logits - peak) / temperature), 0 where no class exists.
  """

  peak: jax.Array
  log_total: jax.Array

  def normalize(self, logits: jax.Array, temperature: Scalar) -> jax.Array:
    """Returns log-probabilities of some of the classes, logits [T, C]."""
    return (logits - finite(self.peak)[:, None]) / temperature - self.log_total[:, None]


class ExpSum(NamedTuple):
  """The sum of exp(logits / temperature) of the classes read so far; [T] each.

  Attributes:
    peak: the largest logit.
    total: sum of exp((logits - peak) / temperature).
  """

  peak: jax.Array
  total: jax.Array

  @classmethod
  def empty(cls, size: int, dtype: jnp.dtype) -> "ExpSum":
    """Returns the sum of no classes."""
    return cls(jnp.full(size, -jnp.inf, dtype), jnp.zeros(size, dtype))

  def log(self) -> LogSum:
    """Returns the logarithm."""
    return LogSum(self.peak, jnp.log(jnp.where(self.total == 0, 1, self.total)))

  def add(self, logits: jax.Array, temperature: Scalar) -> "ExpSum":
    """Returns the sum with the exponentials of logits [T, C]."""
    peak = jnp.maximum(self.peak, logits.max(-1))
    new = jnp.exp((logits - finite(peak)[:, None]) / temperature).sum(-1)
    return ExpSum(peak, self.relative_to(peak, temperature) + new)

  def over_devices(self, axis_name: str, temperature: Scalar) -> "ExpSum":
    """Returns the sum over all devices of `axis_name`."""
    peak = jax.lax.pmax(self.peak, axis_name)
    return ExpSum(peak, jax.lax.psum(self.relative_to(peak, temperature), axis_name))

  def relative_to(self, peak: jax.Array, temperature: Scalar) -> jax.Array:
    """Returns the total relative to a higher peak."""
    return self.total * jnp.exp((self.peak - finite(peak)) / temperature)


# KL from a to b: the sum of exp(a) (a - b), where a = (logits - peak) / temperature of that side,
# and b of the other, which a new peak moves. It is relative to the peaks, so that a constant added
# to all logits costs no digits.


def kl_sides(plan: Plan) -> tuple[str, str]:
  """Returns the names of a and b in KL(a || b)."""
  return ("teacher", "student") if plan.divergence == "kl" else ("student", "teacher")


def move_cross(
  cross: jax.Array,
  a: ExpSum,
  b: ExpSum,
  peak_a: jax.Array,
  peak_b: jax.Array,
  temperature: Scalar,
) -> jax.Array:
  """Returns the cross sum relative to new peaks."""
  shift = (finite(a.peak) - finite(peak_a)) - (finite(b.peak) - finite(peak_b))
  scale = jnp.exp((a.peak - finite(peak_a)) / temperature)
  return scale * (cross + a.total * (shift / temperature))


def cross_sum(
  a: jax.Array, b: jax.Array, peak_a: jax.Array, peak_b: jax.Array, temperature: Scalar
) -> tuple[jax.Array, jax.Array]:
  """Returns the cross sum of one chunk's logits, and 1 where b is impossible and a is not."""
  a = (a - finite(peak_a)[:, None]) / temperature
  b = (b - finite(peak_b)[:, None]) / temperature
  gap = jnp.where((a == -jnp.inf) | (b == -jnp.inf), 0, a - b)
  infinite = (a != -jnp.inf) & (b == -jnp.inf)
  return (jnp.exp(a) * gap).sum(-1), infinite.any(-1).astype(a.dtype)


def over_devices(sums: dict, plan: Plan, temperature: Scalar) -> dict:
  """Returns the sums over all devices along the plan's axis; labels are at temperature 1."""
  axis_name = plan.axis_name
  assert axis_name is not None
  total = {
    name: x.over_devices(axis_name, 1.0 if name == "label" else temperature)
    for name, x in sums.items()
    if isinstance(x, ExpSum)
  }
  if "cross" in sums:
    a, b = kl_sides(plan)
    peaks = total[a].peak, total[b].peak
    cross = move_cross(sums["cross"], sums[a], sums[b], *peaks, temperature)
    total["cross"] = jax.lax.psum(cross, axis_name)
    total["infinite"] = jax.lax.pmax(sums["infinite"], axis_name)
  return total


def kl(plan: Plan, sums: dict) -> tuple[jax.Array, jax.Array]:
  """Returns the divergence, and its derivative by the student's log sum with the logits fixed."""
  a, b = (sums[name] for name in kl_sides(plan))
  exists = a.total > 0
  a_total, b_total = (jnp.where(side.total > 0, side.total, 1) for side in (a, b))
  value = sums["cross"] / a_total + jnp.log(b_total) - jnp.log(a_total)
  value = jnp.where(sums["infinite"] > 0, jnp.inf, jnp.where(exists, value, 0))
  if plan.divergence == "kl":
    return value, exists.astype(value.dtype)
  return value, jnp.where(exists, -1 - value, 0)


def finite(peak: jax.Array) -> jax.Array:
  """Returns the peak, 0 where no class exists."""
  return jnp.where(peak == -jnp.inf, 0, peak)
