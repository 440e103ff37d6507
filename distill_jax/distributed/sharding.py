"""Where arrays live: a mesh of named axes over devices, and rules that place arrays on it.

The axes are `data`, `fsdp` and `tensor`. A batch's rows are spread over `data` and `fsdp`; what is large among the
parameters, and their optimizer's moments, over `fsdp` (Rajbhandari et al. 2020, ZeRO-3; jit inserts the
collectives); over `tensor` goes what a rule says. Everything else is the same on every device.
"""

import bisect
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from distill_jax.trees import named_leaves
from distill_jax.types import Batch, TrainState

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")
MIN_SIZE_TO_SHARD = 2**16
"""Elements from which on an array is spread over `fsdp`."""

Rules = Sequence[tuple[str, PartitionSpec]]
"""`(pattern, where)`: the first rule whose regular expression is found in an array's path places it, such as
`(r"mlp/.*kernel$", PartitionSpec("fsdp", "tensor"))` for `params/student/layer1/mlp/up/kernel`."""


def make_mesh(
  data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh with the axes `data`, `fsdp` and `tensor`, all of `AxisType.Auto`.

  Args:
    data, fsdp, tensor: devices along each axis; one of them may be -1: what is left.
    devices: None: all devices of all processes.

  Raises:
    ValueError: the product of the sizes is not the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = resolve_axis_sizes({"data": data, "fsdp": fsdp, "tensor": tensor}, len(devices))
  return jax.make_mesh(
    tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices
  )


def data_mesh(devices: int | None = None) -> Mesh:
  """A mesh with the one axis `data` over devices of this process.

  Args:
    devices: how many; None: all.

  Raises:
    ValueError: there are not so many.
  """
  available = jax.local_devices()
  count = len(available) if devices is None else devices
  if not 1 <= count <= len(available):
    raise ValueError(
      f"devices: expected 1 to {len(available)} ({available[0].device_kind}), got {devices}"
    )
  return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=available[:count])


def resolve_axis_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
  """The sizes of a mesh's axes for a number of devices, -1 replaced by what is left.

  Raises:
    ValueError: an axis is unknown, or the product of the sizes is not the number of devices; with those that are
      possible.
  """
  unknown = set(sizes) - set(AXES)
  if unknown:
    raise ValueError(f"mesh: expected the axes {', '.join(AXES)}, got {', '.join(sorted(unknown))}")
  left = [name for name, size in sizes.items() if size == -1]
  if len(left) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise ValueError(f"mesh: expected sizes >= 1, and -1 at most once, got {dict(sizes)}")
  given = math.prod(size for size in sizes.values() if size != -1)
  if devices % given or (not left and given != devices):
    possible = [size for size in range(1, devices + 1) if devices % size == 0]
    raise ValueError(
      f"mesh: {dict(sizes)} does not fit {devices} devices: the product of the sizes must be {devices}; sizes that "
      f"divide it: {possible}"
    )
  return {name: devices // given if size == -1 else size for name, size in sizes.items()}


def check_mesh(mesh: Mesh) -> None:
  """Refuses a mesh with other axes, or with axes whose sharding the user would have to write out.

  Raises:
    ValueError: see above.
  """
  resolve_axis_sizes(dict(mesh.shape), mesh.size)
  if any(kind != AxisType.Auto for kind in mesh.axis_types):
    raise ValueError(
      f"mesh: expected axes of AxisType.Auto, got {mesh.axis_types}: use sharding.make_mesh, or pass axis_types to "
      "jax.make_mesh"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, PartitionSpec())


def row_spec(mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """The leading axis spread over `data` and `fsdp`."""
  return PartitionSpec(tuple(axis for axis in ROW_AXES if axis in mesh.axis_names))


def row_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis spread over `data` and `fsdp`."""
  return NamedSharding(mesh, row_spec(mesh))


def specs(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = ()) -> Any:
  """A `PartitionSpec` for every leaf, by the rules, or by default: large leaves over `fsdp`, along their largest axis
  that divides evenly; all else everywhere.

  Args:
    tree: arrays, or `ShapeDtypeStruct`s.

  Raises:
    ValueError: a rule fits no leaf, names an axis that the mesh lacks, or splits an axis into parts of unequal size.
  """
  _check_rules(rules, mesh, [name for name, _ in named_leaves(tree)])
  found = [_spec(name, np.shape(leaf), mesh, rules) for name, leaf in named_leaves(tree)]
  return jax.tree.unflatten(jax.tree.structure(tree), found)


def state_specs(state: TrainState, mesh: Mesh | AbstractMesh, rules: Rules = ()) -> TrainState:
  """`specs` of a train state; what the optimizer keeps of a parameter's shape lies as the parameter does, and so does
  the student's moving average."""
  _check_rules(rules, mesh, [name for name, _ in named_leaves(state._replace(opt_state=()))])
  params = {
    name: (leaf.shape, _spec(f"params/{name}", leaf.shape, mesh, rules))
    for name, leaf in named_leaves(state.params)
  }

  def place(name: str, shape: tuple[int, ...]) -> PartitionSpec:
    rest, kept = name, name.startswith("opt_state/")
    followed = params.get(name.replace("average/params/", "student/", 1))
    if followed is not None and followed[0] == shape:
      return followed[1]
    while kept and "/" in rest:
      rest = rest.partition("/")[2]
      if rest in params and params[rest][0] == shape:
        return params[rest][1]
    return _spec(name, shape, mesh, () if kept else rules)

  found = [place(name, leaf.shape) for name, leaf in named_leaves(state)]
  return jax.tree.unflatten(jax.tree.structure(state), found)


def place(tree: Any, mesh: Mesh, partition: Any) -> Any:
  """A copy of the tree on the mesh; the caller's arrays stay valid when it is donated.

  Every process gives the same values.

  Args:
    partition: a tree of `PartitionSpec`s, or one for all.
  """
  partition = jax.tree.broadcast(partition, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))
  return jax.tree.map(lambda x, spec: _put(x, NamedSharding(mesh, spec)), tree, partition)


def replicate(tree: Any, mesh: Mesh) -> Any:
  """A copy of the tree on every device of the mesh; the caller's arrays stay valid when it is donated."""
  return place(tree, mesh, PartitionSpec())


def gather_to_host(tree: Any) -> Any:
  """The tree with whole arrays that each process can use alone: those that lie over several hosts, as numpy arrays.

  All processes call it at once.
  """

  def gather(x):
    if getattr(x, "is_fully_addressable", True):
      return x
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(gather, tree)


@functools.lru_cache(maxsize=16)
def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
  """The rows of a batch that lie on this process' devices, in order.

  Raises:
    ValueError: this process has no device in the mesh.
  """
  parts = row_sharding(mesh).addressable_devices_indices_map((rows,)).values()
  if not parts:
    raise ValueError(
      f"mesh: process {jax.process_index()} has none of its devices, and all processes must take part"
    )
  found = np.unique(np.concatenate([np.arange(rows)[index] for index in parts]))
  found.setflags(write=False)
  return found


def place_rows(batch: Mapping[str, np.ndarray], mesh: Mesh, rows: int) -> Batch:
  """A batch of `rows` rows on the mesh, of which every process gives those that `local_rows` names.

  Raises:
    ValueError: it gives more of them, or fewer.
  """
  sharding = row_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(dict(batch), sharding)
  local = local_rows(mesh, rows)

  def whole(name: str, values: np.ndarray) -> jax.Array:
    if len(values) != len(local):
      raise ValueError(
        f"{name!r} has {len(values)} rows; of the {rows} of a batch this process gives {len(local)}, those of "
        "sharding.local_rows"
      )

    def part(index):
      start, stop, _ = index[0].indices(rows)
      first = bisect.bisect_left(local, start)
      return values[first : first + stop - start]

    return jax.make_array_from_callback((rows, *values.shape[1:]), sharding, part)

  return {name: whole(name, np.asarray(values)) for name, values in batch.items()}


def check_divisible(rows: int, mesh: Mesh, *, microbatches: int = 1) -> None:
  """Raises a ValueError with the nearest sizes where `rows` do not divide evenly."""
  devices = math.prod(mesh.shape[axis] for axis in ROW_AXES if axis in mesh.shape)
  parts = devices * microbatches
  if rows % parts:
    raise ValueError(
      f"batch_size {rows} does not divide over {devices} devices x {microbatches} microbatches; nearest: "
      f"{_nearest(rows, parts)}"
    )


def _put(x, sharding: NamedSharding) -> jax.Array:
  if sharding.is_fully_addressable:
    return jax.device_put(x, sharding, may_alias=False)
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(
      _put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x)
    )
  # Other than `device_put`, this does not compare the processes' values, array by array.
  values = np.asarray(x)
  return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _spec(name: str, shape: tuple[int, ...], mesh, rules: Rules) -> PartitionSpec:
  for pattern, spec in rules:
    if shape and re.search(pattern, name):
      _check_fits(name, shape, mesh, pattern, spec)
      return spec
  parts = mesh.shape.get("fsdp", 1)
  axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
  if parts == 1 or not axes or math.prod(shape) < MIN_SIZE_TO_SHARD:
    return PartitionSpec()
  largest = max(axes, key=lambda axis: shape[axis])
  return PartitionSpec(*[None] * largest, "fsdp")


def _check_rules(rules: Rules, mesh, names: Sequence[str]) -> None:
  for rule in [rules] if isinstance(rules, Mapping) else rules:
    if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[1], PartitionSpec)):
      raise ValueError(f"rules: expected pairs (pattern, PartitionSpec), got {rule!r}")
  for pattern, spec in rules:
    try:
      re.compile(pattern)
    except (re.error, TypeError) as error:
      raise ValueError(
        f"rule ({pattern!r}, {spec}): the pattern is no regular expression: {error}"
      ) from error
    used = [axis for part in spec for axis in _axes(part)]
    if len(set(used)) < len(used):
      raise ValueError(f"rule ({pattern!r}, {spec}) uses an axis of the mesh twice")
    missing = {axis for part in spec for axis in _axes(part)} - set(mesh.axis_names)
    if missing:
      raise ValueError(
        f"rule ({pattern!r}, {spec}): the mesh has the axes {', '.join(mesh.axis_names)}, and no {missing.pop()!r}"
      )
    if not any(re.search(pattern, name) for name in names):
      raise ValueError(f"rule ({pattern!r}, {spec}) fits no array; some are {', '.join(names[:8])}")


def _check_fits(name: str, shape: tuple[int, ...], mesh, pattern: str, spec: PartitionSpec) -> None:
  where = f"{name} {list(shape)}, placed by the rule ({pattern!r}, {spec})"
  if len(spec) > len(shape):
    raise ValueError(f"{where}: the rule is for {len(spec)} axes or more")
  for axis, part in enumerate(spec):
    parts = math.prod(mesh.shape[axis] for axis in _axes(part))
    if shape[axis] % parts:
      raise ValueError(
        f"{where}: axis {axis}, of {shape[axis]}, does not divide into {parts}; nearest sizes: "
        f"{_nearest(shape[axis], parts)}"
      )


def _axes(part) -> tuple[str, ...]:
  return part if isinstance(part, tuple) else () if part is None else (part,)


def _nearest(size: int, parts: int) -> str:
  down = size // parts * parts
  return f"{down} or {down + parts}" if down else f"{parts}"
