"""Decides by rules over which axes of a mesh each array of a tree is split."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from distill_jax.trees import named_leaves
from distill_jax.types import TrainState

MIN_SIZE_TO_SHARD = 2**16
"""Number of elements from which an array that no rule matches is split over `fsdp`."""

Rules = Sequence[tuple[str, PartitionSpec]]
"""Pairs `(pattern, spec)`: the first whose regular expression is found in an array's path applies:
`(r"mlp/.*kernel$", PartitionSpec("fsdp", "tensor"))` for `params/student/layer1/mlp/up/kernel`."""


def specs(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = ()) -> Any:
  """Returns a `PartitionSpec` for every leaf.

  By default a large leaf is split over `fsdp`, along its largest axis that divides evenly, and any
  other leaf is replicated.

  Args:
    tree: arrays, or `ShapeDtypeStruct`s.
    mesh: decides the axes and their sizes.
    rules: exceptions from the default; scalars follow none.

  Raises:
    ValueError: a rule matches no leaf, names an axis that the mesh lacks, or splits an axis into
      parts of unequal size.
  """
  leaves = named_leaves(tree)
  _check_rules(rules, mesh, [name for name, _ in leaves])
  flat = [_spec(name, np.shape(leaf), mesh, rules) for name, leaf in leaves]
  return jax.tree.unflatten(jax.tree.structure(tree), flat)


def state_specs(state: TrainState, mesh: Mesh | AbstractMesh, rules: Rules = ()) -> TrainState:
  """Returns `specs` of a train state; what belongs to a parameter is split as the parameter is.

  These are the arrays of the optimizer that have the parameter's path and shape (its moments), and
  the student's moving average. The optimizer's other arrays follow no rule.

  Raises:
    ValueError: as `specs`.
  """
  _check_rules(rules, mesh, [name for name, _ in named_leaves(state._replace(opt_state=()))])
  params = {
    f"params/{name}": (leaf.shape, _spec(f"params/{name}", leaf.shape, mesh, rules))
    for name, leaf in named_leaves(state.params)
  }
  flat = []
  for name, leaf in named_leaves(state):
    parameter = _parameter_of(name, leaf.shape, params)
    if parameter is not None:
      flat.append(params[parameter][1])
    else:
      leaf_rules = () if name.startswith("opt_state/") else rules
      flat.append(_spec(name, leaf.shape, mesh, leaf_rules))
  return jax.tree.unflatten(jax.tree.structure(state), flat)


def nearest_multiples(size: int, parts: int) -> str:
  """Returns as text the sizes nearest to `size` that `parts` divides."""
  down = size // parts * parts
  return f"{down} or {down + parts}" if down else f"{parts}"


def _parameter_of(name: str, shape: tuple[int, ...], params: dict[str, Any]) -> str | None:
  """Returns the path of the parameter, of this shape, that a leaf of the state belongs to."""
  candidates = [name.replace("average/params/", "params/student/", 1)]
  if name.startswith("opt_state/"):
    # The optimizer's own path comes first: opt_state/0/mu/student/kernel.
    parts = name.split("/")
    candidates = ["/".join(["params", *parts[start:]]) for start in range(1, len(parts))]
  for candidate in candidates:
    if candidate in params and params[candidate][0] == shape:
      return candidate
  return None


def _spec(name: str, shape: tuple[int, ...], mesh, rules: Rules) -> PartitionSpec:
  for pattern, spec in rules:
    if shape and re.search(pattern, name):
      _check_divides(name, shape, mesh, pattern, spec)
      return spec
  parts = mesh.shape.get("fsdp", 1)
  axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
  if parts == 1 or not axes or math.prod(shape) < MIN_SIZE_TO_SHARD:
    return PartitionSpec()
  largest = max(axes, key=lambda axis: shape[axis])
  return PartitionSpec(*[None] * largest, "fsdp")


def _check_rules(rules: Rules, mesh: Mesh | AbstractMesh, names: Sequence[str]) -> None:
  if isinstance(rules, Mapping):
    raise ValueError(f"rules: expected pairs (pattern, PartitionSpec), got the mapping {rules!r}")
  for rule in rules:
    if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[1], PartitionSpec)):
      raise ValueError(f"rules: expected pairs (pattern, PartitionSpec), got {rule!r}")
    _check_rule(*rule, mesh, names)


def _check_rule(
  pattern: str, spec: PartitionSpec, mesh: Mesh | AbstractMesh, names: Sequence[str]
) -> None:
  prefix = f"rules: ({pattern!r}, {spec})"
  try:
    re.compile(pattern)
  except (re.error, TypeError) as error:
    raise ValueError(f"{prefix}: expected a regular expression: {error}") from error
  axes = [axis for part in spec for axis in _axes(part)]
  if len(set(axes)) < len(axes):
    raise ValueError(f"{prefix}: expected each axis of the mesh once")
  missing = sorted(set(axes) - set(mesh.axis_names))
  if missing:
    raise ValueError(f"{prefix}: expected axes of {mesh.axis_names}, got {missing[0]!r}")
  if not any(re.search(pattern, name) for name in names):
    raise ValueError(f"{prefix}: matches no array; some are {', '.join(names[:8])}")


def _check_divides(
  name: str, shape: tuple[int, ...], mesh, pattern: str, spec: PartitionSpec
) -> None:
  prefix = f"rules: ({pattern!r}, {spec}) for {name} {list(shape)}"
  if len(spec) > len(shape):
    raise ValueError(f"{prefix}: expected at most {len(shape)} axes, got {len(spec)}")
  for axis, part in enumerate(spec):
    parts = math.prod(mesh.shape[axis] for axis in _axes(part))
    if shape[axis] % parts:
      raise ValueError(
        f"{prefix}: expected a size that {parts} divides in axis {axis}, got {shape[axis]}: use "
        f"{nearest_multiples(shape[axis], parts)}"
      )


def _axes(part: Any) -> tuple[str, ...]:
  """Returns the axes of the mesh in one entry of a `PartitionSpec`."""
  if part is None:
    return ()
  return part if isinstance(part, tuple) else (part,)
