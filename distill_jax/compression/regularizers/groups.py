"""The group lasso over channels, neurons, heads or blocks: a proximal step for groups that are parts of several arrays.

    def groups(params):
      return under("student", groups_of(params["student"], head_width=64))

    optax.chain(optax.adamw(rate), proximal_groups(groups, lambda step: weight * rate(step)))

Groups of one array are `regularize.group_soft_threshold`'s, whose proximal step this is for the others.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from distill_jax.compression.pruning.channels import rows
from distill_jax.compression.pruning.groups import Group, Groups, Slot, widths
from distill_jax.compression.regularizers.penalties import (
  Strength,
  StrengthState,
  at,
  check_strength,
  following,
  given,
)
from distill_jax.trees import named_leaves
from distill_jax.types import Tree


def proximal_groups(
  groups: Groups | Callable[[Tree], Groups], strength: Strength
) -> optax.GradientTransformation:
  """Last in a chain: what the update has made of a channel's kernels shrinks together, to exact zeros in the end.

  All numbers of a channel in the kernels that write it, w, become w max(1 - strength sqrt(size) / 2-norm, 0), with the
  size and the 2-norm of all of them together: the proximal step of strength * sum of sqrt(size) * 2-norm (Yuan & Lin
  2006, equation 2.1; Parikh & Boyd 2014, section 6.5).

  Writers of one dimension stay: biases, and scales of norms. So a channel without kernels is a constant, and dead for
  `shrink` only where it has no bias; elsewhere let `channels.prune_channels` cut it, whose `norm` is 0 for it.

  Args:
    groups: by name, with paths in the tree that is optimized; or a function of that tree. `groups_of` makes them for
      channels, neurons and heads, `layers_of` for blocks.
    strength: a finite number >= 0, or a schedule of the update's number.

  Raises:
    ValueError: at once, a strength that is negative or not finite; in init, groups that are not the tree's, that no
      kernel writes, or that share a kernel.
  """
  check_strength(strength)

  def of(params) -> Groups:
    return groups(params) if callable(groups) else groups

  def init(params):
    _check(of(params), params)
    return StrengthState(jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    params, amount = given(params), at(strength, state.step)
    moved = {
      name: p + u
      for (name, p), u in zip(named_leaves(params), jax.tree.leaves(updates), strict=True)
    }
    factors: dict[str, jax.Array] = {}
    for group in of(params).values():
      factor = _factor(moved, group, amount)
      factors |= {name: _along(factor, moved[name], axis) for name, axis in _kernels(moved, group)}

    def shrunk(name, p, u):
      # p + (0 - p) is 0 in floating point.
      return (moved[name] * factors[name] - p).astype(u.dtype) if name in factors else u

    leaves = zip(named_leaves(params), jax.tree.leaves(updates), strict=True)
    new = [shrunk(name, p, u) for (name, p), u in leaves]
    return jax.tree.unflatten(jax.tree.structure(updates), new), following(state)

  return optax.GradientTransformation(init, update)


def _kernels(leaves: dict[str, jax.Array], group: Group) -> list[Slot]:
  return [(name, axis) for name, axis in group.writers if leaves[name].ndim > 1]


def _factor(leaves: dict[str, jax.Array], group: Group, amount: jax.Array) -> jax.Array:
  """What a channel's kernels are multiplied with, float32 [channels]."""
  own = [rows(leaves, slot, group) for slot in _kernels(leaves, group)]
  norms = jnp.sqrt(jnp.stack([(w * w).sum(1) for w in own]).sum(0))
  size = sum(w.shape[1] for w in own)
  return jnp.maximum(1 - amount * math.sqrt(size) / jnp.where(norms > 0, norms, 1), 0)


def _along(factor: jax.Array, leaf: jax.Array, axis: int) -> jax.Array:
  """[channels] so that it broadcasts against the array, along an axis with as many equal parts."""
  shape = [1] * leaf.ndim
  shape[axis] = -1
  return factor.repeat(leaf.shape[axis] // factor.size).reshape(shape)


def _check(groups: Groups, params: Tree) -> None:
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
          f"groups: expected each kernel in one group, once, got {path} in {seen[path]!r} and {name!r}"
        )
      seen[path] = name
