"""Sums of exponentials, and KL from them, of logits that are read some classes at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.losses._fused.heads import Plan


class ExpSum(NamedTuple):
  """A sum of exponentials, exp(peak) * total, of the classes read so far; [T] each."""

  peak: jax.Array
  total: jax.Array

  @classmethod
  def empty(cls, size: int, dtype: jnp.dtype) -> "ExpSum":
    """Returns the sum of no classes."""
    return cls(jnp.full(size, -jnp.inf, dtype), jnp.zeros(size, dtype))

  def log(self) -> jax.Array:
    """Returns log sum exp, [T]."""
    return jnp.log(jnp.where(self.total == 0, 1, self.total)) + self.peak

  def add(self, z: jax.Array) -> "ExpSum":
    """Returns the sum with the exponentials of z [T, C]."""
    peak = jnp.maximum(self.peak, z.max(-1))
    base = finite(peak)
    old = self.total * jnp.exp(self.peak - base)
    return ExpSum(peak, old + jnp.exp(z - base[:, None]).sum(-1))

  def over_devices(self, axis_name: str) -> "ExpSum":
    """Returns the sum over all devices of `axis_name`."""
    peak = jax.lax.pmax(self.peak, axis_name)
    total = self.total * jnp.exp(self.peak - finite(peak))
    return ExpSum(peak, jax.lax.psum(total, axis_name))


# KL from a to b: the sum of exp(a - peak_a) ((a - peak_a) - (b - peak_b)), which a new peak moves.
# It is relative to the peaks, so that a constant added to all logits costs no digits.


def kl_sides(plan: Plan) -> tuple[str, str]:
  """Returns the names of a and b in KL(a || b)."""
  return ("teacher", "student") if plan.divergence == "kl" else ("student", "teacher")


def move_cross(
  cross: jax.Array, a: ExpSum, b: ExpSum, peak_a: jax.Array, peak_b: jax.Array
) -> jax.Array:
  """Returns the cross sum relative to new peaks."""
  shift = (finite(a.peak) - finite(peak_a)) - (finite(b.peak) - finite(peak_b))
  return jnp.exp(a.peak - finite(peak_a)) * (cross + a.total * shift)


def cross_sum(
  a: jax.Array, b: jax.Array, peak_a: jax.Array, peak_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the cross sum of one chunk, and 1 where b is impossible and a is not."""
  a = a - finite(peak_a)[:, None]
  b = b - finite(peak_b)[:, None]
  gap = jnp.where((a == -jnp.inf) | (b == -jnp.inf), 0, a - b)
  infinite = (a != -jnp.inf) & (b == -jnp.inf)
  return (jnp.exp(a) * gap).sum(-1), infinite.any(-1).astype(a.dtype)


def over_devices(sums: dict, plan: Plan) -> dict:
  """Returns the sums over all devices along the plan's axis."""
  axis_name = plan.axis_name
  assert axis_name is not None
  total = {name: x.over_devices(axis_name) for name, x in sums.items() if isinstance(x, ExpSum)}
  if "cross" in sums:
    a, b = kl_sides(plan)
    cross = move_cross(sums["cross"], sums[a], sums[b], total[a].peak, total[b].peak)
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
