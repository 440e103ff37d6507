"""Channels, neurons and heads that are dead, removed from a network: smaller arrays, the same outputs.

A convolutional network of Flax NNX computes with arrays of any width: `model.apply(*shrink(variables, groups), batch,
...)` runs as it is, and so does an export. To build the smaller network, as a transformer with fewer heads must be:
`rebuild.arguments_of`.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.compression.pruning.groups import Groups, widths
from distill_jax.errors import suggest
from distill_jax.trees import named_leaves
from distill_jax.types import Tree, Variables


def alive(params: Tree, groups: Groups) -> dict[str, np.ndarray]:
  """Which channels of each group are not dead, bool [channels]: a writer has a number for them that is not zero.

  Raises:
    ValueError: groups that are not the tree's (`groups.widths`).
  """
  leaves = dict(named_leaves(params))
  found = {name: np.zeros(width, bool) for name, width in widths(groups, params).items()}
  for name, group in groups.items():
    for path, axis in group.writers:
      rows = np.moveaxis(np.asarray(jax.device_get(leaves[path])), axis, 0)
      found[name] |= (rows != 0).reshape(len(found[name]), -1).any(1)
  return found


def shrink(variables: Variables, groups: Groups) -> Variables:
  """The network without the channels that are dead; one of a group in which all are stays.

  Args:
    variables: of the network. Paths of the groups' readers and writers are in `params`, those of `state` in `state`.
    groups: from `groups_of`, or your own.

  Returns:
    New, smaller `Variables`. Outputs are those of the large network to rounding; features that are channels of a
    group lose those removed.

  Raises:
    ValueError: groups that are not the network's.
  """
  living = alive(variables.params, groups)
  params = _cut(variables.params, groups, living, lambda group: (*group.writers, *group.readers))
  return Variables(params, _cut(variables.state, groups, living, lambda group: group.state))


def _cut(tree: Tree, groups: Groups, living: Mapping[str, np.ndarray], slots: Callable) -> Tree:
  leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(tree)}
  for name, group in groups.items():
    mask = living[name] if living[name].any() else np.arange(living[name].size) == 0
    for path, axis in slots(group):
      if path not in leaves:
        raise ValueError(f"group {name!r}: there is no {path!r}{suggest(path, leaves)}")
      leaf = leaves[path]
      size = leaf.shape[axis] if -leaf.ndim <= axis < leaf.ndim else 0
      if not size or size % mask.size or (group.parts is None and size != mask.size):
        raise ValueError(
          f"group {name!r}: expected {mask.size} channels along axis {axis} of {path} {list(leaf.shape)}"
        )
      leaves[path] = leaf.compress(mask.repeat(size // mask.size), axis)
  return jax.tree.unflatten(jax.tree.structure(tree), list(map(jnp.asarray, leaves.values())))
