"""Values of the `linear_*` losses token by token, from a few statistics of a token's logits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.losses import _softmax
from distill_jax.losses._checks import Scalar
from distill_jax.losses._fused.heads import Plan, Rows, Shared
from distill_jax.losses._fused.log_sums import LogSum, finite


class Statistics(NamedTuple):
  """Statistics of every token's student logits; None where no term needs one.

  Attributes:
    divergence: divergence from a dense teacher at the temperature, [T].
    log_sum: `LogSum` at the temperature over all classes, for 'bucket' without the targets'
      classes.
    at_indices: logits of the targets' classes, [T, K].
    at_label: logits of the labels, [T].
    label_log_sum: `LogSum` at temperature 1 over all classes, where log_sum does not give it.
  """

  divergence: Any = None
  log_sum: Any = None
  at_indices: Any = None
  at_label: Any = None
  label_log_sum: Any = None


def _kl(log_p, log_q, mix):
  del mix
  return _softmax.divergence(log_p, log_q)


def _reverse_kl(log_p, log_q, mix):
  del mix
  return _softmax.divergence(log_q, log_p)


def _jensen_shannon(log_p, log_q, w):
  log_m = _softmax.mixture(log_p, log_q, w)
  return w * _softmax.divergence(log_p, log_m) + (1 - w) * _softmax.divergence(log_q, log_m)


def _skew_kl(log_p, log_q, alpha):
  return _softmax.divergence(log_p, _softmax.mixture(log_p, log_q, alpha))


def _skew_reverse_kl(log_p, log_q, alpha):
  return _softmax.divergence(log_q, _softmax.mixture(log_q, log_p, alpha))


# (log p of the teacher, log q of the student, mix) -> sums over the classes that are passed, all or
# some, [T].
DIVERGENCES: dict[str, Callable] = {
  "kl": _kl,
  "reverse_kl": _reverse_kl,
  "jensen_shannon": _jensen_shannon,
  "skew_kl": _skew_kl,
  "skew_reverse_kl": _skew_reverse_kl,
}
TAILS = ("bucket", "conditional", "sampled")


def totals(
  plan: Plan, statistics: Statistics, rows: Rows, shared: Shared
) -> tuple[jax.Array, tuple]:
  """Returns `(loss, (divergence, cross entropy))`, each summed under its weights.

  A row of weight 0 adds exactly 0, even if it contains NaN.
  """
  divergence = cross_entropy = jnp.zeros((), rows.weights.dtype)
  if plan.divergence is not None:
    t = temperature(plan, shared)
    divergence = _weighted_sum(rows.weights, t**2 * _divergence(plan, statistics, rows, t))
  if rows.labels is not None:
    cross_entropy = _weighted_sum(rows.label_weights, _cross_entropy(plan, statistics))
  return divergence + cross_entropy, (divergence, cross_entropy)


def nan_at_invalid(statistics: Statistics, rows: Rows, num_classes: int) -> Statistics:
  """Returns the statistics with NaN where an index or a label is no class: jit cannot raise."""

  def valid(values, classes):
    if classes is None:
      return None
    return jnp.where((classes >= 0) & (classes < num_classes), values, jnp.nan)

  return statistics._replace(
    at_indices=valid(statistics.at_indices, rows.indices),
    at_label=valid(statistics.at_label, rows.labels),
  )


def needs_log_sum(plan: Plan) -> bool:
  """Returns whether the divergence has a normalizer over all classes."""
  return plan.divergence not in (None, "conditional")


def needs_label_log_sum(plan: Plan, rows: Rows) -> bool:
  """Returns whether the cross entropy needs a normalizer that the divergence does not have."""
  return rows.labels is not None and not (plan.unit_temperature and needs_log_sum(plan))


def temperature(plan: Plan, shared: Shared) -> Scalar:
  """Returns the temperature, as a number where it is 1: XLA then leaves the division out."""
  return 1.0 if plan.unit_temperature else shared.temperature


def at(z: jax.Array, indices: jax.Array) -> jax.Array:
  """Returns z [T, V] at indices [T, K]; 0 where an index is outside [0, V)."""
  inside = (indices >= 0) & (indices < z.shape[-1])
  return jnp.where(inside, jnp.take_along_axis(z, jnp.where(inside, indices, 0), -1), 0)


def put(z: jax.Array, indices: jax.Array, values: Any, add: bool = False) -> jax.Array:
  """Returns z [T, V] with `values` set at, or added to, indices [T, K] inside [0, V)."""
  indices = jnp.where(indices < 0, z.shape[-1], indices)  # A negative one would count from the end.
  values = jnp.broadcast_to(values, indices.shape)

  # One scatter of all rows would gather tokens from all devices: map over the rows.
  def put_in_row(z, indices, values):
    target = z.at[indices]
    return target.add(values, mode="drop") if add else target.set(values, mode="drop")

  return jax.vmap(put_in_row)(z, indices, values)


def _divergence(plan: Plan, statistics: Statistics, rows: Rows, t: Scalar) -> jax.Array:
  if plan.divergence in DIVERGENCES:
    return statistics.divergence
  logits = statistics.at_indices
  if plan.divergence == "conditional":
    log_q = _softmax.log_softmax(logits, temperature=t)
    return _softmax.divergence(_softmax.log_softmax(rows.log_probs), log_q)
  if plan.divergence == "sampled":
    return _softmax.cross_entropy(rows.log_probs, statistics.log_sum.normalize(logits, t))
  log_p = jnp.concatenate([rows.log_probs, rows.log_tail[:, None]], -1)
  parts, _ = _bucket(statistics, t)
  return _softmax.divergence(log_p, _softmax.log_softmax(parts))


def _cross_entropy(plan: Plan, statistics: Statistics) -> jax.Array:
  log_sum = statistics.label_log_sum
  if log_sum is None:
    log_sum = statistics.log_sum
    if plan.divergence == "bucket":
      parts, peak = _bucket(statistics, 1.0)
      log_sum = LogSum(peak, _softmax.log_sum(parts))
  exists = log_sum.peak != -jnp.inf
  missing = statistics.at_label == -jnp.inf  # The label is no class that exists.
  at_label = jnp.where(missing, 0, statistics.at_label) - finite(log_sum.peak)
  value = jnp.where(missing, jnp.nan, log_sum.log_total - at_label)
  return jnp.where(exists, value, 0)


def _bucket(statistics: Statistics, t: Scalar) -> tuple[jax.Array, jax.Array]:
  """Returns logits / t [T, K + 1] of the targets and of all others as one, minus the peak; and it.

  All others have a peak of their own: relative to that of the targets their sum could underflow.
  """
  logits, log_sum = statistics.at_indices, statistics.log_sum
  peak = jax.lax.stop_gradient(jnp.maximum(log_sum.peak, logits.max(-1)))
  tail = (log_sum.peak - finite(peak)) / t + log_sum.log_total
  return jnp.concatenate([(logits - finite(peak)[:, None]) / t, tail[:, None]], -1), peak


def _weighted_sum(weights: jax.Array, values: jax.Array) -> jax.Array:
  return jnp.where(weights != 0, weights * jnp.where(weights != 0, values, 0), 0).sum()
