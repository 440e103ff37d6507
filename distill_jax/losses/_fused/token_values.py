"""Values of the `linear_*` losses token by token, from a few statistics of a token's logits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.losses import _softmax
from distill_jax.losses._fused.heads import Plan, Rows, Shared


class Statistics(NamedTuple):
  """Statistics of every token's student logits z; None where no term needs one.

  Attributes:
    divergence: divergence from a dense teacher at the temperature, [T].
    log_sum: log sum exp(z / temperature) over all classes, for 'bucket' without the targets'
      classes, [T].
    at_indices: z / temperature at the targets' classes, [T, K].
    at_label: z at the label, [T].
    label_log_sum: log sum exp(z) over all classes, where log_sum does not give it, [T].
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
    values = shared.temperature**2 * _divergence(plan, statistics, rows)
    divergence = _weighted_sum(rows.weights, values)
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


def over_temperature(plan: Plan, z: jax.Array, shared: Shared) -> jax.Array:
  """Returns z / temperature; z where the temperature is 1."""
  return z if plan.unit_temperature else z / shared.temperature


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


def one_hot(labels: jax.Array, num_classes: int) -> jax.Array:
  """Returns bool [T, num_classes], all False where a label is outside [0, num_classes)."""
  return labels[:, None] == jnp.arange(num_classes)


def normalized(z: jax.Array, log_sum: jax.Array) -> jax.Array:
  """Returns log-probabilities [T, V] of some of the classes, from log sum exp of all, [T]."""
  return z - jnp.where(log_sum == -jnp.inf, 0, log_sum)[:, None]


def _divergence(plan: Plan, statistics: Statistics, rows: Rows) -> jax.Array:
  if plan.divergence in DIVERGENCES:
    return statistics.divergence
  z = statistics.at_indices
  if plan.divergence == "conditional":
    return _softmax.divergence(_softmax.log_softmax(rows.log_probs), _softmax.log_softmax(z))
  if plan.divergence == "sampled":
    return _softmax.cross_entropy(rows.log_probs, normalized(z, statistics.log_sum))
  log_p = jnp.concatenate([rows.log_probs, rows.log_tail[:, None]], -1)
  log_q = _softmax.log_softmax(jnp.concatenate([z, statistics.log_sum[:, None]], -1))
  return _softmax.divergence(log_p, log_q)


def _cross_entropy(plan: Plan, statistics: Statistics) -> jax.Array:
  log_sum = statistics.label_log_sum
  if log_sum is None:
    log_sum = statistics.log_sum
    if plan.divergence == "bucket":
      parts = jnp.concatenate([statistics.at_indices, log_sum[:, None]], -1)
      log_sum = _softmax.log_sum(parts)
  exists = log_sum != -jnp.inf
  missing = statistics.at_label == -jnp.inf  # The label is no class that exists.
  at_label = jnp.where(missing, 0, statistics.at_label)
  value = jnp.where(missing, jnp.nan, jnp.where(exists, log_sum, 0) - at_label)
  return jnp.where(exists, value, 0)


def _weighted_sum(weights: jax.Array, values: jax.Array) -> jax.Array:
  return jnp.where(weights != 0, weights * jnp.where(weights != 0, values, 0), 0).sum()
