"""Channels that are dead, removed from a network: smaller arrays, the same outputs.

A network of Flax NNX computes with arrays of any width: `model.apply(*shrink(variables, groups), batch, ...)` runs as
it is, and so does an export. To build the smaller network, take the widths of its arrays: `groups.widths`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.compression.groups import Groups, Slot, widths
from distill_jax.errors import suggest
from distill_jax.fingerprint import named_leaves
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
      found[name] |= (rows != 0).reshape(len(rows), -1).any(1)
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
  params = _cut(variables.params, {n: (*g.writers, *g.readers) for n, g in groups.items()}, living)
  return Variables(params, _cut(variables.state, {n: g.state for n, g in groups.items()}, living))


def _indices(mask: np.ndarray) -> np.ndarray:
  found = np.flatnonzero(mask)
  return found if found.size else np.zeros(1, int)


def _cut(tree: Tree, slots: Mapping[str, tuple[Slot, ...]], living: Mapping[str, np.ndarray]) -> Tree:
  leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(tree)}
  for group, found in slots.items():
    for name, axis in found:
      if name not in leaves:
        raise ValueError(f"group {group!r}: there is no {name!r}{suggest(name, leaves)}")
      shape, width = leaves[name].shape, living[group].size
      if not -len(shape) <= axis < len(shape) or shape[axis] != width:
        raise ValueError(
          f"group {group!r}: expected {width} channels along axis {axis} of {name} {list(shape)}"
        )
      leaves[name] = leaves[name].take(_indices(living[group]), axis)
  return jax.tree.unflatten(jax.tree.structure(tree), list(map(jnp.asarray, leaves.values())))
