"""Prunes residual blocks while training, and removes them: a block that ends in zeros adds nothing.

    def blocks(params):
      return under("student", layers_of(params["student"]))

    prune_layers(optax.adamw(1e-3), blocks, PolynomialSchedule(1000, 5000, 500), sparsity=0.5)

`drop_layers` then removes them from the network; names with a block's number count the rest.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from distill_jax.compression.pruning.channels import (
  Score,
  broadcast_masks,
  group_scores,
  norm,
  resolve_groups,
)
from distill_jax.compression.pruning.groups import Group, Groups, widths
from distill_jax.compression.pruning.masks import (
  PolynomialSchedule,
  check_sparsity,
  keep_highest,
  with_masks,
)
from distill_jax.compression.pruning.shrink import living_channels
from distill_jax.errors import suggest
from distill_jax.trees import named_leaves
from distill_jax.types import Tree, Variables


def layers_of(params: Tree) -> dict[str, Group]:
  """Returns the blocks of a `Decoder` or `ViT`, each a group of one: the ends of its two branches.

  Raises:
    ValueError: another network, whose blocks must be written by hand: names as 'blocks/3',
      `parts=1`.
  """
  names = [name for name, _ in named_leaves(params)]
  ends: dict[str, list[str]] = {}
  for name in names:
    if match := re.fullmatch(r"(blocks/\d+)/(output|down)/(kernel|bias)", name):
      ends.setdefault(match[1], []).append(name)
  if not ends:
    raise ValueError(
      f"params: expected a Decoder or ViT, got the leaves {', '.join(names[:8])}, ...: write the "
      "groups of another network by hand"
    )
  return {
    block: Group(tuple((name, 0) for name in paths), (), parts=1) for block, paths in ends.items()
  }


def prune_layers(
  inner: optax.GradientTransformation,
  layers: Groups | Callable[[Tree], Groups],
  schedule: PolynomialSchedule,
  *,
  sparsity: float,
  score: Score = norm,
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer with pruning of blocks: those with the lowest scores add nothing.

  Args:
    inner: the optimizer.
    layers: groups of one by name, with paths in the optimized tree; or a function of that tree.
    schedule: the steps of pruning, and how much is pruned at each.
    sparsity: final fraction of dead blocks, in [0, 1); at least one remains.
    score: as in `channels.prune_channels`; `channels.taylor` estimates how the loss changes without
      the block.

  Raises:
    ValueError: at once, an invalid sparsity; in init, groups that do not fit the tree, or not of
      one.
  """
  check_sparsity(sparsity)

  def init_masks(params):
    sizes = widths(resolve_groups(layers, params), params)
    if set(sizes.values()) != {1}:
      raise ValueError(f"layers: expected groups with parts=1, got {sizes}")
    return jnp.ones(len(sizes), bool)

  def update_masks(index, mask, params, gradients):
    scores = jnp.concatenate(group_scores(layers, score, params, gradients))
    count = jnp.asarray(schedule.remaining(mask.size, sparsity))[index]
    return keep_highest(scores, mask, count)

  def broadcast(mask, params):
    return broadcast_masks(jnp.split(mask, mask.size), params, resolve_groups(layers, params))

  return with_masks(
    inner, schedule, init_masks=init_masks, update_masks=update_masks, broadcast=broadcast
  )


def drop_layers(variables: Variables, layers: Groups) -> Variables:
  """Returns the network without its dead blocks; if all are dead, the first stays.

  Args:
    variables: variables of the network.
    layers: from `layers_of`, or written by hand: groups of one by the block's path, which ends in
      its number.

  Returns:
    New `Variables` whose blocks are numbered from 0, for a network of as many blocks
    (`rebuild.arguments_of`).

  Raises:
    ValueError: groups that do not fit the network, or names that are no blocks.
  """
  names = [name for name, _ in named_leaves(variables.params)]
  dead: dict[str, list[int]] = {}
  for name, mask in living_channels(variables.params, layers).items():
    stack, _, number = name.rpartition("/")
    if not number.isdecimal() or not any(other.startswith(f"{name}/") for other in names):
      raise ValueError(
        f"layers: expected paths of blocks such as 'blocks/3', got {name!r}{suggest(name, names)}"
      )
    if not mask.any():
      dead.setdefault(stack, []).append(int(number))
  if sum(map(len, dead.values())) == len(layers):
    next(iter(dead.values())).pop(0)
  params, state = variables
  for stack, numbers in dead.items():
    params = _without(params, stack.split("/"), numbers)
    state = _without(state, stack.split("/"), numbers)
  return Variables(params, state)


def _without(tree: Any, path: list[str], numbers: list[int]) -> Any:
  """Returns the tree with the rest of the stack at the path numbered from 0.

  A tree without such a stack stays the same.
  """
  if not path:
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    rest = [value for number, value in sorted(items) if int(number) not in numbers]
    return dict(enumerate(rest)) if isinstance(tree, Mapping) else type(tree)(rest)
  if not isinstance(tree, Mapping):
    return tree
  return {k: _without(v, path[1:], numbers) if str(k) == path[0] else v for k, v in tree.items()}
