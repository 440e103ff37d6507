"""Removes dead channels, neurons and heads from a network: smaller arrays, the same outputs.

A convolutional network of Flax NNX computes with arrays of any width, so `model.apply(*shrink(
variables, groups), batch, ...)` runs with the same Model, and so does an export. A transformer with
fewer heads must be built again: `rebuild.arguments_of`.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.compression.pruning.groups import Group, Groups, Slot, widths
from distill_jax.errors import suggest
from distill_jax.trees import named_leaves
from distill_jax.types import Tree, Variables


def living_channels(params: Tree, groups: Groups) -> dict[str, np.ndarray]:
  """Returns a mask per group, bool [channels]: True where a writer has a value that is not zero.

  Raises:
    ValueError: groups that do not fit the tree (`groups.widths`).
  """
  leaves = dict(named_leaves(params))
  masks = {name: np.zeros(width, bool) for name, width in widths(groups, params).items()}
  for name, group in groups.items():
    for path, axis in group.writers:
      rows = np.moveaxis(np.asarray(jax.device_get(leaves[path])), axis, 0)
      masks[name] |= (rows != 0).reshape(len(masks[name]), -1).any(1)
  return masks


def shrink(variables: Variables, groups: Groups) -> Variables:
  """Returns the network without its dead channels; a group of only dead ones keeps its first.

  Args:
    variables: variables of the network. The paths of readers and writers are in `params`, those of
      `state` in `state`.
    groups: from `groups_of`, or written by hand.

  Returns:
    New, smaller `Variables`. Outputs are those of the large network up to rounding; features that
    are channels of a group lose the removed ones.

  Raises:
    ValueError: groups that do not fit the network.
  """
  living = living_channels(variables.params, groups)
  params = _select(variables.params, groups, living, lambda group: (*group.writers, *group.readers))
  state = _select(variables.state, groups, living, lambda group: group.state)
  return Variables(params, state)


def _select(
  tree: Tree,
  groups: Groups,
  living: Mapping[str, np.ndarray],
  slots: Callable[[Group], tuple[Slot, ...]],
) -> Tree:
  """Returns the tree with only the living channels along the slots of each group."""
  leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(tree)}
  for name, group in groups.items():
    mask = living[name] if living[name].any() else np.arange(living[name].size) == 0
    for path, axis in slots(group):
      if path not in leaves:
        raise ValueError(f"group {name!r}: expected a leaf {path!r}{suggest(path, leaves)}")
      leaf = leaves[path]
      size = leaf.shape[axis] if -leaf.ndim <= axis < leaf.ndim else 0
      if not size or size % mask.size or (group.parts is None and size != mask.size):
        raise ValueError(
          f"group {name!r}: expected {mask.size} channels along axis {axis} of {path}, got "
          f"{list(leaf.shape)}"
        )
      leaves[path] = leaf.compress(mask.repeat(size // mask.size), axis)
  return jax.tree.unflatten(jax.tree.structure(tree), list(map(jnp.asarray, leaves.values())))
