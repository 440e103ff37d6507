"""Starting a narrower student from its teacher by merging units that are alike: Net2Net's widening backward.

Net2WiderNet (Chen et al. 2016, section 2.3) duplicates units and divides the weights that read them. Here the units of
a group (`groups`) that are most alike become one: the mean of what writes them, read by the sum of what reads them. A
teacher that was widened so is undone, and says the same; of any other the merged units are an approximation.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.compression.initialization.provenance import Origin, Provenance
from distill_jax.compression.pruning.groups import Groups, Slot, widths
from distill_jax.errors import suggest
from distill_jax.trees import named_leaves
from distill_jax.types import Variables

Leaves = dict[str, np.ndarray]


def merge(student: Variables, teacher: Variables, groups: Groups) -> tuple[Variables, Provenance]:
  """A student's variables with the teacher's in them, each group merged to as many units as the student has.

  Which units are alike is found by Ward's clustering (1963) of all numbers that write them, running statistics
  included; groups are merged in their order.

  Args:
    student: the same network with smaller groups; of its numbers only shapes and dtypes count.
    teacher: its variables.
    groups: of the teacher's params, from `groups_of`; with `parts` the student has the teacher's numbers for each unit.

  Returns:
    (a tree of the student's structure and dtypes, where each leaf came from: 'merged' or 'copied').

  Raises:
    ValueError: groups that are not the teacher's; a group that is larger in the student; leaves that are missing or of
      other shapes after merging: each has a line.
  """
  sizes = widths(groups, teacher.params)
  params, state = ({n: np.asarray(w) for n, w in named_leaves(tree)} for tree in teacher)
  targets = dict(named_leaves(student.params))
  touched: set[str] = set()
  for name, group in groups.items():
    slots = [
      *((params, slot, True) for slot in group.writers),
      *((state, slot, True) for slot in group.state),
    ]
    slots += [(params, slot, False) for slot in group.readers]
    for tree, (path, axis), _ in slots:
      if path not in tree or tree[path].shape[axis] % sizes[name]:
        raise ValueError(
          f"group {name!r}: expected {path!r} with {sizes[name]} units along axis {axis}{suggest(path, tree)}"
        )
    labels = _labels(
      slots, sizes[name], _target(name, sizes[name], group.writers[0], params, targets)
    )
    for tree, (path, axis), averaged in slots:
      tree[path] = _merged(tree[path], axis, labels, averaged)
    touched |= {f"{'state' if tree is state else 'params'}/{path}" for tree, (path, _), _ in slots}
  return _into(student, teacher, {"params": params, "state": state}, touched)


def _target(
  name: str, size: int, slot: Slot, params: Leaves, targets: Mapping[str, jax.Array]
) -> int:
  path, axis = slot
  if path not in targets:
    raise ValueError(f"group {name!r}: the student has no {path!r}{suggest(path, targets)}")
  numbers, own = params[path].shape[axis], targets[path].shape[axis]
  target, rest = divmod(own * size, numbers)
  if rest or not 1 <= target <= size:
    raise ValueError(
      f"group {name!r}: expected 1 to {size} units in the student, of {numbers // size} numbers each; its {path} has "
      f"{own} numbers along axis {axis}"
    )
  return target


def _labels(slots: list, size: int, target: int) -> np.ndarray:
  """The number of each unit's cluster, int [size]; clusters are in the order of their first units."""
  if target == size:
    return np.arange(size)
  from sklearn.cluster import AgglomerativeClustering

  rows = [
    np.moveaxis(tree[path], axis, 0).reshape(size, -1)
    for tree, (path, axis), written in slots
    if written
  ]
  found = AgglomerativeClustering(target).fit(np.concatenate(rows, 1).astype(np.float64)).labels_
  _, first = np.unique(found, return_index=True)
  return np.argsort(np.argsort(first))[found]


def _merged(array: np.ndarray, axis: int, labels: np.ndarray, averaged: bool) -> np.ndarray:
  """Sums, or means, over the units of each cluster."""
  rows = np.moveaxis(array, axis, 0)
  units = rows.reshape(len(labels), -1).astype(np.float64)
  belongs = np.arange(labels.max() + 1)[:, None] == labels
  if averaged:
    belongs = belongs / belongs.sum(1, keepdims=True)
  merged = (belongs @ units).reshape(-1, *rows.shape[1:])
  return np.moveaxis(merged, 0, axis).astype(array.dtype)


def _into(
  student: Variables, teacher: Variables, merged: Mapping[str, Leaves], touched: set[str]
) -> tuple[Variables, Provenance]:
  found = {
    f"{part}/{name}": leaf for part, leaves in merged.items() for name, leaf in leaves.items()
  }
  shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(teacher)}
  values, origins, lines = [], {}, []
  for name, leaf in named_leaves(student):
    if name not in found or found[name].shape != leaf.shape:
      got = list(found[name].shape) if name in found else "nothing"
      lines.append(f"{name} {list(leaf.shape)}: merging gives {got}")
      continue
    values.append(jnp.asarray(found[name], leaf.dtype))
    how = "merged" if name in touched and shapes[name] != leaf.shape else "copied"
    origins[name] = Origin(tuple(leaf.shape), name, shapes[name], how)
  if lines:
    raise ValueError(
      "the teacher does not fit the student:" + "".join(f"\n  {line}" for line in lines)
    )
  return jax.tree.unflatten(jax.tree.structure(student), values), origins
