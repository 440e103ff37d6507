"""Adds the learning rate to a step's metrics, so that it is fetched with them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.train.step import Step
from distill_jax.types import Batch, TrainState, Tree

NAME = "learning_rate"


def with_learning_rate(step_fn: Step, schedule: Callable[[Any], Any] | float | None) -> Step:
  """Returns a step that also returns the learning rate of its update, as (value, 1).

  It is that of the optimizer's state where `optax.inject_hyperparams` keeps it there. Several, of
  `optax.partition`, have the names of their groups ('learning_rate/student'). Else it is the
  schedule's.

  Args:
    step_fn: of `make_train_step`.
    schedule: number of updates so far -> rate, or a constant; None: it is not known.
  """

  def step(state: TrainState, teacher_variables: Any, batch: Batch):
    new_state, metrics = step_fn(state, teacher_variables, batch)
    rates = _injected_rates(new_state.opt_state)
    if not rates and schedule is not None:
      rates = {NAME: _rate_at(schedule, state.step - state.skips.total)}
    one = jnp.ones((), jnp.float32)
    return new_state, metrics | {
      name: (jnp.asarray(rate, jnp.float32), one) for name, rate in rates.items()
    }

  return step


def _rate_at(schedule: Callable[[Any], Any] | float, updates: jax.Array) -> Any:
  if not callable(schedule):
    return schedule
  # Optax mixes floats and step counts.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    return schedule(updates)


def is_learning_rate(name: str) -> bool:
  """Returns whether a metric is one of `with_learning_rate`."""
  return name.partition("/")[0] == NAME


def _injected_rates(opt_state: Tree) -> dict[str, Any]:
  """Returns the learning rates of states of `optax.inject_hyperparams`, by name."""
  leaves = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_has_hyperparams)
  found = [(path, x.hyperparams.get(NAME)) for path, x in leaves if _has_hyperparams(x)]
  rates = [(_group(path), rate) for path, rate in found if jnp.ndim(rate) == 0 and rate is not None]
  if len(rates) == 1:
    return {NAME: rates[0][1]}
  groups = [group or str(number) for number, (group, _) in enumerate(rates)]
  return {f"{NAME}/{group}": rate for group, (_, rate) in zip(groups, rates)}


def _has_hyperparams(x: Any) -> bool:
  return isinstance(getattr(x, "hyperparams", None), dict)


def _group(path: tuple) -> str:
  """Returns the names of the groups of parameters along a path, such as 'student'."""
  return "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
