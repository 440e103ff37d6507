"""Prunes channels, neurons or heads while training, with one mask for all arrays of a group.

    def groups(params):
      return under("student", groups_of(params["student"]))

    prune_channels(optax.adamw(1e-3), groups, PolynomialSchedule(1000, 5000, 500), sparsity=0.5)

`shrink.shrink` then removes them from the network; `layers` does the same with residual blocks.
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax import reduce
from distill_jax.compression.pruning.groups import Group, Groups, Slot, widths
from distill_jax.compression.pruning.masks import (
  PolynomialSchedule,
  check_sparsity,
  keep_highest,
  with_masks,
)
from distill_jax.errors import suggest
from distill_jax.trees import named_leaves
from distill_jax.types import Tree

Leaves = dict[str, jax.Array]
Score = Callable[[Leaves, Leaves, Group], jax.Array]
"""`(params by path, gradients by path, group) -> scores [channels]`."""
SCOPES = ("uniform", "global")


def norm(params: Leaves, gradients: Leaves, group: Group) -> jax.Array:
  """Returns the root mean square of each channel's kernels (Li et al. 2017, with the 2-norm).

  The mean instead of a sum makes groups of different widths comparable.
  """
  del gradients
  kernels = [channel_rows(params, s, group) for s in group.writers if params[s[0]].ndim > 1]
  return jnp.sqrt((jnp.concatenate(kernels, 1) ** 2).mean(1))


def scale(params: Leaves, gradients: Leaves, group: Group) -> jax.Array:
  """Returns the mean |scale| of each channel's batch norms (Liu et al. 2017, network slimming).

  Raises:
    ValueError: the group has none.
  """
  del gradients
  scales = [channel_rows(params, s, group) for s in group.writers if s[0].endswith("/scale")]
  if not scales:
    names = [name for name, _ in group.writers]
    raise ValueError(f"score: expected a batch norm among the writers of the group, got {names}")
  return jnp.abs(jnp.concatenate(scales, 1)).mean(1)


def taylor(params: Leaves, gradients: Leaves, group: Group) -> jax.Array:
  """Returns |sum of w g| over all that writes a channel: to first order, its effect on the loss.

  Molchanov et al. 2019, equation 8, before the square. With batch norm the term of a kernel is 0,
  as the loss does not depend on the kernel's size, and those of the norm's scale and bias remain.
  """
  products = [
    channel_rows(params, slot, group) * channel_rows(gradients, slot, group)
    for slot in group.writers
  ]
  return jnp.abs(jnp.concatenate(products, 1).sum(1))


def prune_channels(
  inner: optax.GradientTransformation,
  groups: Groups | Callable[[Tree], Groups],
  schedule: PolynomialSchedule,
  *,
  sparsity: float,
  score: Score = norm,
  distribution: str = "uniform",
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer with structured pruning: the channels with the lowest scores become zero.

  Args:
    inner: the optimizer.
    groups: groups by name, with paths in the optimized tree; or a function of that tree.
    schedule: the steps of pruning, and how much is pruned at each.
    sparsity: final fraction of zero channels, in [0, 1); at least one of each group remains.
    score: `(params by path, gradients by path, group) -> [channels]`: `norm`, `scale` or `taylor`.
    distribution: 'uniform', the same fraction of each group; 'global', the lowest scores of all.

  Raises:
    ValueError: at once, an invalid sparsity or distribution; in init, groups that do not fit the
      tree.
  """
  check_sparsity(sparsity)
  if distribution not in SCOPES:
    raise ValueError(
      f"distribution: expected one of {SCOPES}, got {distribution!r}{suggest(distribution, SCOPES)}"
    )

  def init_masks(params):
    sizes = widths(resolve_groups(groups, params), params).values()
    jax.eval_shape(lambda p: group_scores(groups, score, p, p), params)
    return tuple(jnp.ones(size, bool) for size in sizes)

  def update_masks(index, masks, params, gradients):
    scores = group_scores(groups, score, params, gradients)
    sizes = [mask.size for mask in masks]
    if distribution == "uniform":
      counts = [jnp.asarray(schedule.remaining(size, sparsity))[index] for size in sizes]
      return tuple(map(keep_highest, scores, masks, counts))
    counts = np.maximum(len(sizes), schedule.remaining(sum(sizes), sparsity))
    return _keep_highest_of_all(scores, masks, jnp.asarray(counts)[index])

  def broadcast(masks, params):
    return broadcast_masks(masks, params, resolve_groups(groups, params))

  return with_masks(
    inner, schedule, init_masks=init_masks, update_masks=update_masks, broadcast=broadcast
  )


def resolve_groups(groups: Groups | Callable[[Tree], Groups], params: Tree) -> Groups:
  """Returns the groups of a tree, which may be a function of it."""
  return groups(params) if callable(groups) else groups


def group_scores(
  groups: Groups | Callable[[Tree], Groups], score: Score, params: Tree, gradients: Tree
) -> list[jax.Array]:
  """Returns the scores of each group's channels, float32 [channels] each."""
  leaves = dict(named_leaves(params))
  gradient_leaves = dict(named_leaves(gradients))
  return [
    score(leaves, gradient_leaves, group).astype(jnp.float32)
    for group in resolve_groups(groups, params).values()
  ]


def channel_rows(leaves: Mapping[str, jax.Array], slot: Slot, group: Group) -> jax.Array:
  """Returns the values of each channel in one array of its group, float32 [channels, values]."""
  name, axis = slot
  leaf = jnp.moveaxis(leaves[name], axis, 0)
  rows = leaf.reshape(group.parts or leaf.shape[0], -1)
  return rows.astype(reduce.common_dtype(leaf.dtype, jnp.float32))


def broadcast_masks(masks: Iterable[jax.Array], params: Tree, groups: Groups) -> Tree:
  """Returns a mask per group as masks that broadcast against the params.

  Leaves without a group get `optax.MaskedNode()`.
  """
  leaf_masks: dict[str, jax.Array] = {}
  leaves = dict(named_leaves(params))
  for mask, group in zip(masks, groups.values(), strict=True):
    for name, axis in group.writers:
      shape = [1] * leaves[name].ndim
      shape[axis] = -1
      leaf_mask = mask.repeat(leaves[name].shape[axis] // mask.size).reshape(shape)
      leaf_masks[name] = leaf_masks[name] & leaf_mask if name in leaf_masks else leaf_mask
  masks_or_nodes = [leaf_masks.get(name, optax.MaskedNode()) for name in leaves]
  return jax.tree.unflatten(jax.tree.structure(params), masks_or_nodes)


def _keep_highest_of_all(
  scores: list[jax.Array], masks: tuple[jax.Array, ...], count: jax.Array
) -> tuple[jax.Array, ...]:
  """Returns masks of the `count` highest scores of all groups, at least one of each."""
  # The best of each group comes first: a group without channels would cut the network in two. Only
  # one is the best: where all are equal, as scales are at the start, the first group would else
  # take the full count.
  best = [jnp.where(m, s, -jnp.inf).argmax() for s, m in zip(scores, masks)]
  scores = [s.at[index].set(jnp.inf) for s, index in zip(scores, best)]
  mask = keep_highest(jnp.concatenate(scores), jnp.concatenate(masks), count)
  ends = np.cumsum([mask.size for mask in masks])[:-1].tolist()
  return tuple(jnp.split(mask, ends))
