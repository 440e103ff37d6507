"""The losses of linear.py token by token, as functions of a few statistics of a token's logits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.losses import _softmax
from distill_jax.losses._fused.heads import Plan, Rows, Shared


class Statistics(NamedTuple):
  """Of every token's student logits z; None where no term needs it.

  Attributes:
    divergence: from a dense teacher, both at the temperature, [T].
    log_sum: log of the sum of exp(z / temperature) over all classes, for a bucket over those not kept, [T].
    kept: z / temperature at the kept classes, [T, K].
    label: z at the label, [T].
    label_log_sum: log of the sum of exp(z) over all classes, where log_sum does not give it, [T].
  """

  divergence: Any = None
  log_sum: Any = None
  kept: Any = None
  label: Any = None
  label_log_sum: Any = None


def _jensen_shannon(log_p, log_q, w):
  log_m = _softmax.mixture(log_p, log_q, w)
  return w * _softmax.divergence(log_p, log_m) + (1 - w) * _softmax.divergence(log_q, log_m)


# (log p, log q, mix) -> sums over the classes given, be they all or some, [T]: p the teacher's, q the student's.
DIVERGENCES = {
  "kl": lambda log_p, log_q, _: _softmax.divergence(log_p, log_q),
  "reverse_kl": lambda log_p, log_q, _: _softmax.divergence(log_q, log_p),
  "jensen_shannon": _jensen_shannon,
  "skew_kl": lambda log_p, log_q, a: _softmax.divergence(log_p, _softmax.mixture(log_p, log_q, a)),
  "skew_reverse_kl": lambda log_p, log_q, a: _softmax.divergence(
    log_q, _softmax.mixture(log_q, log_p, a)
  ),
}
TAILS = ("bucket", "conditional", "sampled")


def totals(plan: Plan, found: Statistics, rows: Rows, shared: Shared):
  """The loss, and its parts: the divergence and the cross entropy, each summed under its weights.

  A row of weight 0 adds exactly 0, whatever it holds.
  """
  divergence = cross_entropy = jnp.zeros((), rows.weights.dtype)
  if plan.divergence is not None:
    divergence = _weigh(rows.weights, shared.temperature**2 * _divergence(plan, found, rows))
  if rows.labels is not None:
    cross_entropy = _weigh(rows.label_weights, _cross_entropy(plan, found))
  return divergence + cross_entropy, (divergence, cross_entropy)


def classified(found: Statistics, rows: Rows, classes: int) -> Statistics:
  """NaN where an index is no class."""
  kept = None if rows.kept is None else known(found.kept, rows.kept, classes)
  label = None if rows.labels is None else known(found.label, rows.labels, classes)
  return found._replace(kept=kept, label=label)


def collects_log_sum(plan: Plan) -> bool:
  return plan.divergence not in (None, "conditional")


def collects_label_log_sum(plan: Plan, rows: Rows) -> bool:
  return rows.labels is not None and not (plan.one_temperature and collects_log_sum(plan))


def tempered(plan: Plan, z: jax.Array, shared: Shared) -> jax.Array:
  return z if plan.one_temperature else z / shared.temperature


def at(z: jax.Array, places: jax.Array) -> jax.Array:
  """z [T, V] at places [T, K]; 0 where a place is outside."""
  inside = (places >= 0) & (places < z.shape[-1])
  return jnp.where(inside, jnp.take_along_axis(z, jnp.where(inside, places, 0), -1), 0)


def put(z: jax.Array, places: jax.Array, values, add: bool = False) -> jax.Array:
  """z [T, V] with `values` set at, or added to, places [T, K]; nothing where a place is outside."""
  places = jnp.where(places < 0, z.shape[-1], places)  # a negative one would count from the end
  values = jnp.broadcast_to(values, places.shape)

  def row(
    z, places, values
  ):  # mapped: as one scatter of all rows it would gather tokens from all devices
    return z.at[places].add(values, mode="drop") if add else z.at[places].set(values, mode="drop")

  return jax.vmap(row)(z, places, values)


def is_label(labels: jax.Array, classes: int) -> jax.Array:
  """Bool [T, classes]."""
  return labels[:, None] == jnp.arange(classes)


def known(values: jax.Array, indices: jax.Array, classes: int) -> jax.Array:
  """NaN where an index is no class: jit cannot raise."""
  return jnp.where((indices >= 0) & (indices < classes), values, jnp.nan)


def normalized(z: jax.Array, log_sum: jax.Array) -> jax.Array:
  """log-probabilities [T, V] of some of the classes, given log sum exp of all, [T]."""
  return z - jnp.where(log_sum == -jnp.inf, 0, log_sum)[:, None]


def _divergence(plan: Plan, found: Statistics, rows: Rows) -> jax.Array:
  if plan.divergence in DIVERGENCES:
    return found.divergence
  if plan.divergence == "conditional":
    return _softmax.divergence(
      _softmax.log_softmax(rows.log_probs), _softmax.log_softmax(found.kept)
    )
  if plan.divergence == "sampled":
    return _softmax.cross_entropy(rows.log_probs, normalized(found.kept, found.log_sum))
  log_q = _softmax.log_softmax(jnp.concatenate([found.kept, found.log_sum[:, None]], -1))
  return _softmax.divergence(jnp.concatenate([rows.log_probs, rows.log_tail[:, None]], -1), log_q)


def _cross_entropy(plan: Plan, found: Statistics) -> jax.Array:
  log_sum = found.label_log_sum
  if log_sum is None:
    log_sum = found.log_sum
    if plan.divergence == "bucket":
      log_sum = _softmax.log_sum(jnp.concatenate([found.kept, log_sum[:, None]], -1))
  exists = log_sum != -jnp.inf
  missing = found.label == -jnp.inf  # no class that exists
  value = jnp.where(
    missing, jnp.nan, jnp.where(exists, log_sum, 0) - jnp.where(missing, 0, found.label)
  )
  return jnp.where(exists, value, 0)


def _weigh(weights: jax.Array, values: jax.Array) -> jax.Array:
  return jnp.where(weights != 0, weights * jnp.where(weights != 0, values, 0), 0).sum()
