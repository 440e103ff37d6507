"""Whole residual blocks: pruned while training, and then removed. A block whose branches end in zeros adds nothing.

    def blocks(params):
      return under("student", layers_of(params["student"]))

    prune_layers(optax.adamw(1e-3), blocks, PolynomialSchedule(1000, 5000, 500), sparsity=0.5)

`drop_layers` then removes them from the network; what is named by a block's number counts those that are left.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill_jax.compression.pruning.channels import Leaves, norm, spread_over
from distill_jax.compression.pruning.groups import Group, Groups, widths
from distill_jax.compression.pruning.masks import (
  PolynomialSchedule,
  check_sparsity,
  keep_highest,
  masked,
)
from distill_jax.compression.pruning.shrink import alive
from distill_jax.errors import suggest
from distill_jax.trees import named_leaves
from distill_jax.types import Tree, Variables


def layers_of(params: Tree) -> dict[str, Group]:
  """The blocks of a `Decoder` or `ViT` by path, each a group of one: the layers that end its two branches.

  Raises:
    ValueError: another network; then write them down: names as 'blocks/3', `parts=1`.
  """
  names = [name for name, _ in named_leaves(params)]
  ends: dict[str, list[str]] = {}
  for name in names:
    if found := re.fullmatch(r"(blocks/\d+)/(output|down)/(kernel|bias)", name):
      ends.setdefault(found[1], []).append(name)
  if not ends:
    raise ValueError(
      f"layers_of knows Decoder and ViT; this network's leaves are {', '.join(names[:8])}, ..."
    )
  return {
    block: Group(tuple((name, 0) for name in found), (), parts=1) for block, found in ends.items()
  }


def prune_layers(
  inner: optax.GradientTransformation,
  layers: Groups | Callable[[Tree], Groups],
  schedule: PolynomialSchedule,
  *,
  sparsity: float,
  score: Callable[[Leaves, Leaves, Group], jax.Array] = norm,
) -> optax.GradientTransformationExtraArgs:
  """Ever more of the blocks with the lowest scores add nothing.

  Args:
    inner: the optimizer.
    layers: groups of one by name, with paths in the tree that is optimized; or a function of that tree.
    schedule: when, and how much at each time.
    sparsity: the share in [0, 1) of blocks that are dead in the end; at least one is kept.
    score: as in `channels.prune_channels`; `channels.taylor` tells what the loss changes by without the block.

  Raises:
    ValueError: at once, a sparsity that there is not; in init, groups that are not the tree's, or not of one.
  """
  check_sparsity(sparsity)

  def of(params) -> Groups:
    return layers(params) if callable(layers) else layers

  def start(params):
    sizes = widths(of(params), params)
    if set(sizes.values()) != {1}:
      raise ValueError(f"layers: expected groups with parts=1, got {sizes}")
    return jnp.ones(len(sizes), bool)

  def remake(which, mask, params, gradients):
    own = of(params).values()
    params, gradients = dict(named_leaves(params)), dict(named_leaves(gradients))
    scores = jnp.concatenate([score(params, gradients, group) for group in own]).astype(jnp.float32)
    return keep_highest(scores, mask, jnp.asarray(schedule.kept(len(own), sparsity))[which])

  def spread(mask, params):
    return spread_over(jnp.split(mask, mask.size), params, of(params))

  return masked(inner, schedule, start=start, remake=remake, spread=spread)


def drop_layers(variables: Variables, layers: Groups) -> Variables:
  """The network without the blocks that are dead; if all are, the first stays.

  Args:
    variables: of the network.
    layers: from `layers_of`, or your own: groups of one by the block's path, which ends in its number.

  Returns:
    New `Variables` whose blocks are numbered from 0: those of a network of so many blocks (`rebuild.arguments_of`).

  Raises:
    ValueError: groups that are not the network's, or names that are no blocks.
  """
  names = [name for name, _ in named_leaves(variables.params)]
  dead: dict[str, list[int]] = {}
  for name, mask in alive(variables.params, layers).items():
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
    params, state = (
      _without(params, stack.split("/"), numbers),
      _without(state, stack.split("/"), numbers),
    )
  return Variables(params, state)


def _without(tree: Any, path: list[str], numbers: list[int]) -> Any:
  """The tree with new numbers for what is left of the stack at the path; as it is where there is no such stack."""
  if not path:
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    kept = [value for number, value in sorted(items) if int(number) not in numbers]
    return dict(enumerate(kept)) if isinstance(tree, Mapping) else type(tree)(kept)
  if not isinstance(tree, Mapping):
    return tree
  return {k: _without(v, path[1:], numbers) if str(k) == path[0] else v for k, v in tree.items()}
