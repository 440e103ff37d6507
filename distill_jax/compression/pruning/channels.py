"""Pruning of whole channels, neurons or heads while training: as `prune`, with one mask for all arrays of a group.

    def groups(params):
      return under("student", groups_of(params["student"]))

    prune_channels(optax.adamw(1e-3), groups, PolynomialSchedule(1000, 5000, 500), sparsity=0.5)

`shrink` then removes them from the network; `layers` does the same with whole residual blocks.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.compression.pruning.groups import Group, Groups, Slot, widths
from distill_jax.compression.pruning.masks import (
  PolynomialSchedule,
  check_sparsity,
  keep_highest,
  masked,
)
from distill_jax.errors import suggest
from distill_jax.trees import named_leaves
from distill_jax.types import Tree

Leaves = dict[str, jax.Array]
SCOPES = ("uniform", "global")


def norm(params: Leaves, gradients: Leaves, group: Group) -> jax.Array:
  """The root mean square of a channel's kernels (Li et al. 2017, with the 2-norm; the mean makes widths comparable)."""
  del gradients
  kernels = [rows(params, slot, group) for slot in group.writers if params[slot[0]].ndim > 1]
  return jnp.sqrt((jnp.concatenate(kernels, 1) ** 2).mean(1))


def scale(params: Leaves, gradients: Leaves, group: Group) -> jax.Array:
  """The mean |scale| of a channel's batch norms (Liu et al. 2017, network slimming).

  Raises:
    ValueError: the group has none.
  """
  del gradients
  scales = [rows(params, slot, group) for slot in group.writers if slot[0].endswith("/scale")]
  if not scales:
    raise ValueError(
      f"score: no batch norm writes the group, only {[name for name, _ in group.writers]}"
    )
  return jnp.abs(jnp.concatenate(scales, 1)).mean(1)


def taylor(params: Leaves, gradients: Leaves, group: Group) -> jax.Array:
  """|sum of w g| over all that writes a channel: what the loss changes by without it, to first order.

  Molchanov et al. 2019, equation 8, before the square. Batch norm makes a kernel's share 0, as the loss does not depend
  on the kernel's size, and leaves its own scale's and bias'.
  """
  products = [rows(params, slot, group) * rows(gradients, slot, group) for slot in group.writers]
  return jnp.abs(jnp.concatenate(products, 1).sum(1))


def prune_channels(
  inner: optax.GradientTransformation,
  groups: Groups | Callable[[Tree], Groups],
  schedule: PolynomialSchedule,
  *,
  sparsity: float,
  score: Callable[[Leaves, Leaves, Group], jax.Array] = norm,
  distribution: str = "uniform",
) -> optax.GradientTransformationExtraArgs:
  """Structured pruning: ever more of the channels with the lowest scores are zero.

  Args:
    inner: the optimizer.
    groups: by name, with paths in the tree that is optimized; or a function of that tree.
    schedule: when, and how much at each time.
    sparsity: the share in [0, 1) of channels that are zero in the end; at least one of each group is kept.
    score: `(params by path, gradients by path, group) -> [channels]`: `norm`, `scale` or `taylor`.
    distribution: 'uniform', the same share of each group; 'global', the lowest scores of all.

  Raises:
    ValueError: at once, a sparsity or distribution that there is not; in init, groups that are not the tree's.
  """
  check_sparsity(sparsity)
  if distribution not in SCOPES:
    raise ValueError(
      f"distribution: expected one of {SCOPES}, got {distribution!r}{suggest(distribution, SCOPES)}"
    )

  def of(params) -> Groups:
    return groups(params) if callable(groups) else groups

  def start(params):
    sizes = widths(of(params), params).values()
    jax.eval_shape(lambda p: _scores(p, p), params)
    return tuple(jnp.ones(size, bool) for size in sizes)

  def _scores(params, gradients):
    own = of(params).values()
    params, gradients = dict(named_leaves(params)), dict(named_leaves(gradients))
    return [score(params, gradients, group).astype(jnp.float32) for group in own]

  def remake(which, masks, params, gradients):
    scores = _scores(params, gradients)
    sizes = [mask.size for mask in masks]
    if distribution == "uniform":
      kept = [jnp.asarray(schedule.kept(size, sparsity))[which] for size in sizes]
      return tuple(map(keep_highest, scores, masks, kept))
    # The best of each group comes first: a group without channels would cut the network in two. One alone: where all
    # are equal, as scales are at the start, the first group would take what is kept.
    best = [jnp.where(m, s, -jnp.inf).argmax() for s, m in zip(scores, masks)]
    scores = [s.at[index].set(jnp.inf) for s, index in zip(scores, best)]
    total = np.maximum(len(sizes), schedule.kept(sum(sizes), sparsity))
    whole = keep_highest(jnp.concatenate(scores), jnp.concatenate(masks), jnp.asarray(total)[which])
    return tuple(jnp.split(whole, np.cumsum(sizes)[:-1].tolist()))

  def spread(masks, params):
    return spread_over(masks, params, of(params))

  return masked(inner, schedule, start=start, remake=remake, spread=spread)


def rows(leaves: Leaves, slot: Slot, group: Group) -> jax.Array:
  """A channel's numbers in an array of its group, [channels, the rest of the array], float32."""
  name, axis = slot
  leaf = jnp.moveaxis(leaves[name], axis, 0)
  return leaf.reshape(group.parts or leaf.shape[0], -1).astype(
    jnp.promote_types(leaf.dtype, jnp.float32)
  )


def spread_over(masks: Iterable[jax.Array], params: Tree, groups: Groups) -> Tree:
  """A mask for each group as masks that broadcast against the params; `optax.MaskedNode()` for those of no group."""
  found: dict[str, jax.Array] = {}
  leaves = dict(named_leaves(params))
  for mask, group in zip(masks, groups.values(), strict=True):
    for name, axis in group.writers:
      shape = [1] * leaves[name].ndim
      shape[axis] = -1
      own = mask.repeat(leaves[name].shape[axis] // mask.size).reshape(shape)
      found[name] = found[name] & own if name in found else own
  masked_leaves = [found.get(name, optax.MaskedNode()) for name in leaves]
  return jax.tree.unflatten(jax.tree.structure(params), masked_leaves)
