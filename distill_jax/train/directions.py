"""Finds optimizers whose updates follow the gradient, so that training climbs the loss."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.train.optimizers import apply_optimizer, as_optimizer
from distill_jax.trees import named_leaves
from distill_jax.types import Tree


def check_directions(optimizer: optax.GradientTransformation, params: Tree) -> None:
  """Checks on small parameters of 0 and gradients of 1 that no first update is above 0.

  Warns where all parameters climb, as with `optax.scale_by_adam()` or a negative learning rate.

  Raises:
    ValueError: some parameters climb: the False part of `optax.masked` gets the raw gradient.
  """
  try:
    updates = _small_updates(optimizer, params)
  except Exception:  # One for other shapes: the first step reports it.
    return
  climbing = [name for name, update in updates.items() if update > 0]
  if climbing and len(climbing) < len(updates):
    raise ValueError(
      f"optimizer: expected updates against the gradient, got ones along it for {climbing[0]!r} "
      f"({len(climbing)} of {len(updates)} parameters): optax.masked does not freeze, it passes "
      "the gradient on; write optax.multi_transform({'train': optax.adamw(1e-3), 'freeze': "
      "optax.set_to_zero()}, labels)"
    )
  if climbing:
    warnings.warn(
      "optimizer: its updates follow the gradient, so that training climbs the loss: pass a "
      "positive learning rate, or add optax.scale_by_learning_rate(1e-3) to the chain",
      UserWarning,
      stacklevel=2,
    )


def _small_updates(optimizer: optax.GradientTransformation, params: Tree) -> dict[str, Any]:
  """Returns the mean first update of each floating parameter, by name."""
  with jax.ensure_compile_time_eval():
    small = jax.tree.map(lambda x: jnp.zeros([min(n, 2) for n in x.shape], x.dtype), params)
    grads = jax.tree.map(jnp.ones_like, small)
    extended = as_optimizer(optimizer)
    state = extended.init(small)
    updates, _ = apply_optimizer(extended, grads, state, small, jnp.ones(()))
  return {name: np.mean(np.asarray(x, np.float32)) for name, x in named_leaves(updates)}
