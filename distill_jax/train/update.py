"""The update of a train step: optimizer, moving average, and what is skipped where numbers are not
finite.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill_jax.train.gradients import Sums
from distill_jax.train.optimizers import apply_optimizer, as_optimizer
from distill_jax.types import Model, Skips, TrainState, Variables


def make_update(
  teacher: Model | None, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Sums, Any], tuple[TrainState, dict[str, Any]]]:
  """Returns `(state, sums, model_state) -> (state, metrics)`.

  An update is skipped as a whole where the loss or the gradients' norm is not finite. Single
  entries of an update that are not finite are left out.
  """
  extended = as_optimizer(optimizer)

  def updated(state: TrainState, sums: Sums, model_state):
    updates, opt_state = apply_optimizer(
      extended, sums.grads, state.opt_state, state.params, sums.loss
    )
    # Finite gradients can make an update that is not (Adam with eps 0, a learning rate of NaN).
    # Entry by entry: to decide for all of them at once, memory would have to hold all.
    finite = jnp.stack([jnp.isfinite(u).all() for u in jax.tree.leaves(updates)]).all()
    updates = jax.tree.map(lambda u: jnp.where(jnp.isfinite(u), u, 0), updates)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if teacher is not None and teacher.ema_update is not None:
      student = Variables(params["student"], model_state["student"])
      average = teacher.ema_update(average, student, state.step)
    return finite, (params, model_state, opt_state, average)

  def update(state: TrainState, sums: Sums, model_state):
    norm = optax.tree.norm(sums.grads)
    finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
    old = state.params, state.model_state, state.opt_state, state.average
    finite, (params, model_state, opt_state, average) = _if(
      finite,
      lambda: updated(state, sums, model_state),
      (jnp.zeros((), bool), old),
    )
    skips = _count_skips(state.skips, finite)
    new_state = TrainState(
      state.step + 1, state.key, params, model_state, opt_state, average, skips
    )
    return new_state, _metrics(sums, norm, finite)

  return update


def _count_skips(skips: Skips, finite: jax.Array) -> Skips:
  streak = jnp.where(finite, 0, skips.streak + 1)
  total = skips.total + jnp.where(finite, 0, 1)
  return Skips(total, streak, jnp.maximum(skips.longest, streak))


def _metrics(sums: Sums, norm: jax.Array, finite: jax.Array) -> dict[str, Any]:
  one = jnp.ones((), jnp.float32)
  empty = jnp.stack([count == 0 for _, count in sums.terms.values()]).any()
  # A skipped update counts in no mean, or one would make all that are reported with it NaN.
  pairs = sums.terms | sums.metrics | {"loss": (sums.loss, one), "grad_norm": (norm, one)}
  metrics = jax.tree.map(lambda x: jnp.where(finite, x, 0), pairs)
  for name, flag in {"nonfinite": ~finite, "empty": empty}.items():
    metrics[name] = flag.astype(jnp.float32), one
  return metrics


def _if(condition: jax.Array, new: Callable[[], Any], old: Any) -> Any:
  """Returns the tree `new()` where the scalar condition holds, else `old`."""
  # A select keeps the old values alive: XLA:CPU then copies Adam's moments in every step, and a
  # conditional updates in place. On a GPU a conditional makes the host wait for the gradients.
  if jax.default_backend() == "cpu":
    return jax.lax.cond(condition, new, lambda: old)
  return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new(), old)
