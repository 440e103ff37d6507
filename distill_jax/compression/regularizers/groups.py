"""Applies the group lasso to channels, neurons, heads or blocks: groups of several arrays.

    def groups(params):
      return under("student", groups_of(params["student"], head_dim=64))

    optax.chain(optax.adamw(rate), proximal_groups(groups, lambda step: weight * rate(step)))

`penalties.group_soft_threshold` is the same proximal step for groups of one array.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from distill_jax.compression.pruning.channels import channel_rows, resolve_groups
from distill_jax.compression.pruning.groups import Group, Groups, Slot, widths
from distill_jax.compression.regularizers.penalties import (
  Strength,
  StrengthState,
  check_strength,
  next_state,
  require_params,
  strength_at,
)
from distill_jax.trees import named_leaves
from distill_jax.types import Tree


def proximal_groups(
  groups: Groups | Callable[[Tree], Groups], strength: Strength
) -> optax.GradientTransformation:
  """Shrinks the kernels of each channel together, to exact zeros; the last step of a chain.

  All values of a channel in the kernels that write it, w, become w max(1 - strength sqrt(size) /
  2-norm, 0), with the size and the 2-norm of all of them together: the proximal step of strength *
  sum of sqrt(size) * 2-norm (Yuan & Lin 2006, equation 2.1; Parikh & Boyd 2014, section 6.5).

  Writers of one dimension stay: biases, and scales of norms. So a channel without kernels is a
  constant, and dead for `shrink` only where it has no bias; elsewhere `channels.prune_channels`
  prunes it, whose score `norm` is 0 for it.

  Args:
    groups: groups by name, with paths in the optimized tree; or a function of that tree.
      `groups_of` returns those of channels, neurons and heads, `layers_of` those of blocks.
    strength: a finite number >= 0, or a schedule of the update's number.

  Raises:
    ValueError: at once, a strength that is negative or not finite; in init, groups that do not fit
      the tree, without a kernel, or with a kernel of another group.
  """
  check_strength(strength)

  def init(params):
    _check_kernels(resolve_groups(groups, params), params)
    return StrengthState(jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    params = require_params(params)
    amount = strength_at(strength, state.step)
    pairs = zip(named_leaves(params), jax.tree.leaves(updates), strict=True)
    leaves = {name: (param, update) for (name, param), update in pairs}
    updated = {name: param + update for name, (param, update) in leaves.items()}
    factors: dict[str, jax.Array] = {}
    for group in resolve_groups(groups, params).values():
      factor = _factor(updated, group, amount)
      for name, axis in _kernels(updated, group):
        factors[name] = _broadcast(factor, updated[name], axis)
    new = []
    for name, (param, update) in leaves.items():
      if name in factors:
        # p + (0 - p) is 0 in floating point.
        update = (updated[name] * factors[name] - param).astype(update.dtype)
      new.append(update)
    return jax.tree.unflatten(jax.tree.structure(updates), new), next_state(state)

  return optax.GradientTransformation(init, update)


def _kernels(leaves: dict[str, jax.Array], group: Group) -> list[Slot]:
  return [(name, axis) for name, axis in group.writers if leaves[name].ndim > 1]


def _factor(leaves: dict[str, jax.Array], group: Group, amount: jax.Array) -> jax.Array:
  """Returns the factor of each channel's kernels, float32 [channels]."""
  rows = [channel_rows(leaves, slot, group) for slot in _kernels(leaves, group)]
  norms = jnp.sqrt(jnp.stack([(w * w).sum(1) for w in rows]).sum(0))
  size = sum(w.shape[1] for w in rows)
  return jnp.maximum(1 - amount * math.sqrt(size) / jnp.where(norms > 0, norms, 1), 0)


def _broadcast(factor: jax.Array, leaf: jax.Array, axis: int) -> jax.Array:
  """Returns [channels] in a shape that broadcasts along an axis with as many equal parts."""
  shape = [1] * leaf.ndim
  shape[axis] = -1
  return factor.repeat(leaf.shape[axis] // factor.size).reshape(shape)


def _check_kernels(groups: Groups, params: Tree) -> None:
  """Raises a ValueError unless each group has kernels, and each kernel one group."""
  widths(groups, params)
  leaves = dict(named_leaves(params))
  seen: dict[str, str] = {}
  for name, group in groups.items():
    kernels = _kernels(leaves, group)
    if not kernels:
      raise ValueError(
        f"group {name!r}: expected a kernel, got writers {[path for path, _ in group.writers]}"
      )
    for path, _ in kernels:
      if path in seen:
        raise ValueError(
          f"groups: expected each kernel in one group, got {path} in {seen[path]!r} and {name!r}"
        )
      seen[path] = name
