"""Initializes a narrower student by merging the teacher's units: Net2Net's widening in reverse.

Net2WiderNet (Chen et al. 2016, section 2.3) duplicates units and divides the weights that read
them. Here the units of a group (`pruning.groups`) that are most alike become one: the mean of the
weights that write them, read by the sum of the weights that read them. This undoes such a widening
exactly; for any other teacher the merged units are an approximation.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.compression.initialization.provenance import Origin, Provenance
from distill_jax.compression.pruning.groups import Group, Groups, widths
from distill_jax.errors import suggest
from distill_jax.trees import named_leaves
from distill_jax.types import Variables

Leaves = dict[str, np.ndarray]


class _Slot(NamedTuple):
  """An axis of an array that numbers the units of a group; averaged where it writes them."""

  part: str
  path: str
  axis: int
  averaged: bool


def merge(student: Variables, teacher: Variables, groups: Groups) -> tuple[Variables, Provenance]:
  """Returns the teacher's variables with each group merged to as many units as the student has.

  Ward's clustering (1963) of all values that write a unit, running statistics included, selects
  the units that are alike; groups are merged in their order.

  Args:
    student: variables of the same network with smaller groups; only shapes and dtypes matter.
    teacher: the teacher's variables.
    groups: groups of the teacher's params, from `groups_of`; with `parts` the student has as many
      values per unit as the teacher.

  Returns:
    (a tree of the student's structure and dtypes, the origin of each leaf: 'merged' or 'copied').

  Raises:
    ValueError: groups that are not the teacher's; a group that is larger in the student; leaves
      that are missing or of other shapes after merging, with a line for each.
  """
  sizes = widths(groups, teacher.params)
  leaves = {
    "params": {name: np.asarray(leaf) for name, leaf in named_leaves(teacher.params)},
    "state": {name: np.asarray(leaf) for name, leaf in named_leaves(teacher.state)},
  }
  student_params = dict(named_leaves(student.params))
  merged: set[str] = set()
  for name, group in groups.items():
    slots = _slots(group)
    _check_slots(name, slots, leaves, sizes[name])
    target = _target_size(name, sizes[name], group, leaves["params"], student_params)
    labels = _cluster(slots, leaves, sizes[name], target)
    for part, path, axis, averaged in slots:
      leaves[part][path] = _merge_units(leaves[part][path], axis, labels, averaged)
      merged.add(f"{part}/{path}")
  return _fill(student, teacher, leaves, merged)


def _slots(group: Group) -> list[_Slot]:
  writers = [_Slot("params", path, axis, True) for path, axis in group.writers]
  state = [_Slot("state", path, axis, True) for path, axis in group.state]
  readers = [_Slot("params", path, axis, False) for path, axis in group.readers]
  return writers + state + readers


def _check_slots(name: str, slots: list[_Slot], leaves: Mapping[str, Leaves], size: int) -> None:
  for part, path, axis, _ in slots:
    if path not in leaves[part] or leaves[part][path].shape[axis] % size:
      raise ValueError(
        f"group {name!r}: expected {path!r} with {size} units along axis {axis}"
        f"{suggest(path, leaves[part])}"
      )


def _target_size(
  name: str, size: int, group: Group, params: Leaves, student_params: Mapping[str, jax.Array]
) -> int:
  """Returns the number of units that the student has in a group of `size` units."""
  path, axis = group.writers[0]
  if path not in student_params:
    raise ValueError(
      f"group {name!r}: expected {path!r} in the student{suggest(path, student_params)}"
    )
  teacher_width = params[path].shape[axis]
  student_width = student_params[path].shape[axis]
  target, rest = divmod(student_width * size, teacher_width)
  if rest or not 1 <= target <= size:
    raise ValueError(
      f"group {name!r}: expected 1 to {size} units of {teacher_width // size} values in the "
      f"student, got {student_width} values along axis {axis} of {path}"
    )
  return target


def _cluster(
  slots: list[_Slot], leaves: Mapping[str, Leaves], size: int, target: int
) -> np.ndarray:
  """Returns the cluster of each unit, int [size]; in the order of their first units."""
  if target == size:
    return np.arange(size)
  from sklearn.cluster import AgglomerativeClustering

  rows = [
    np.moveaxis(leaves[slot.part][slot.path], slot.axis, 0).reshape(size, -1)
    for slot in slots
    if slot.averaged
  ]
  features = np.concatenate(rows, 1).astype(np.float64)
  labels = AgglomerativeClustering(target).fit(features).labels_
  _, first = np.unique(labels, return_index=True)
  return np.argsort(np.argsort(first))[labels]


def _merge_units(array: np.ndarray, axis: int, labels: np.ndarray, averaged: bool) -> np.ndarray:
  """Returns the sums, or means, over the units of each cluster."""
  rows = np.moveaxis(array, axis, 0)
  units = rows.reshape(len(labels), -1).astype(np.float64)
  membership = np.arange(labels.max() + 1)[:, None] == labels
  if averaged:
    membership = membership / membership.sum(1, keepdims=True)
  merged = (membership @ units).reshape(-1, *rows.shape[1:])
  return np.moveaxis(merged, 0, axis).astype(array.dtype)


def _fill(
  student: Variables, teacher: Variables, leaves: Mapping[str, Leaves], merged: set[str]
) -> tuple[Variables, Provenance]:
  """Returns the student's tree with these leaves, and their origins."""
  arrays = {f"{part}/{name}": leaf for part in leaves for name, leaf in leaves[part].items()}
  teacher_shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(teacher)}
  values, origins, lines = [], {}, []
  for name, leaf in named_leaves(student):
    if name not in arrays or arrays[name].shape != leaf.shape:
      got = list(arrays[name].shape) if name in arrays else "none"
      lines.append(f"{name}: expected {list(leaf.shape)} after merging, got {got}")
      continue
    values.append(jnp.asarray(arrays[name], leaf.dtype))
    how = "merged" if name in merged and teacher_shapes[name] != leaf.shape else "copied"
    origins[name] = Origin(tuple(leaf.shape), name, teacher_shapes[name], how)
  if lines:
    raise ValueError(
      "the teacher does not fit the student:" + "".join(f"\n  {line}" for line in lines)
    )
  return jax.tree.unflatten(jax.tree.structure(student), values), origins
