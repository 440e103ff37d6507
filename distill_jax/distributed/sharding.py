"""Builds meshes of named axes over devices, and places arrays and batches on them.

The axes are `data`, `fsdp` and `tensor`. A batch's rows are split over `data` and `fsdp`; large
parameters, and their optimizer's moments, over `fsdp` (Rajbhandari et al. 2020, ZeRO-3; jit inserts
the collectives); over `tensor` what a rule of `partition.py` names. Everything else is replicated.
"""

import bisect
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from distill_jax.distributed.partition import nearest_multiples
from distill_jax.types import Batch

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")


def make_mesh(
  data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Returns a mesh with the axes `data`, `fsdp` and `tensor`, all of `AxisType.Auto`.

  Args:
    data, fsdp, tensor: number of devices along each axis; one of them may be -1: all that are left.
    devices: devices of the mesh; None: all devices of all processes.

  Raises:
    ValueError: the product of the sizes is not the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = resolve_axis_sizes({"data": data, "fsdp": fsdp, "tensor": tensor}, len(devices))
  return jax.make_mesh(
    tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices
  )


def data_mesh(devices: int | None = None) -> Mesh:
  """Returns a mesh with the one axis `data` over devices of this process.

  Args:
    devices: number of devices; None: all.

  Raises:
    ValueError: the process has fewer devices, or a mesh of explicit axes is set.
  """
  _check_context()
  available = jax.local_devices()
  count = len(available) if devices is None else devices
  if not 1 <= count <= len(available):
    raise ValueError(
      f"devices: expected 1 to {len(available)} ({available[0].device_kind}), got {devices}"
    )
  return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=available[:count])


def resolve_axis_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
  """Returns the sizes of a mesh's axes, with -1 replaced by the number of devices left.

  Raises:
    ValueError: an axis is unknown, or the product of the sizes is not the number of devices; with
      the possible sizes.
  """
  unknown = set(sizes) - set(AXES)
  if unknown:
    raise ValueError(f"mesh: expected the axes {', '.join(AXES)}, got {', '.join(sorted(unknown))}")
  open_axes = [name for name, size in sizes.items() if size == -1]
  if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise ValueError(f"mesh: expected sizes >= 1, and -1 at most once, got {dict(sizes)}")
  product = math.prod(size for size in sizes.values() if size != -1)
  if devices % product or (not open_axes and product != devices):
    possible = [size for size in range(1, devices + 1) if devices % size == 0]
    raise ValueError(
      f"mesh: expected sizes with the product {devices}, got {dict(sizes)}: use sizes of {possible}"
    )
  return {name: devices // product if size == -1 else size for name, size in sizes.items()}


def check_mesh(mesh: Mesh) -> None:
  """Checks that a mesh has the axes of `AXES` only, all of `AxisType.Auto`.

  Raises:
    ValueError: it has others, or another mesh is set (`jax.set_mesh`).
  """
  _check_context()
  context = dict(jax.sharding.get_abstract_mesh().shape)
  if context and context != dict(mesh.shape):
    raise ValueError(
      f"mesh: expected {context}, the mesh of jax.set_mesh, got {dict(mesh.shape)}: pass the same "
      "one as RunOptions(mesh=...), or call it outside"
    )
  resolve_axis_sizes(dict(mesh.shape), mesh.size)
  if any(kind != AxisType.Auto for kind in mesh.axis_types):
    raise ValueError(
      f"mesh: expected axes of AxisType.Auto, got {mesh.axis_types}: use sharding.make_mesh, or "
      "pass axis_types to jax.make_mesh"
    )


def _check_context() -> None:
  """Checks that no mesh of explicit axes is set: its types would contradict the run's own mesh."""
  context = jax.sharding.get_abstract_mesh()
  if any(kind != AxisType.Auto for kind in context.axis_types):
    raise ValueError(
      f"mesh: expected no mesh of explicit axes to be set, got {context.axis_types} of "
      f"{context.axis_names} by jax.set_mesh: set sharding.make_mesh(...), or call it outside"
    )


def replicated_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds."""
  return NamedSharding(mesh, PartitionSpec())


def row_spec(mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """Returns the `PartitionSpec` that splits rows over `data` and `fsdp`."""
  return PartitionSpec(tuple(axis for axis in ROW_AXES if axis in mesh.axis_names))


def row_sharding(mesh: Mesh) -> NamedSharding:
  """Returns `row_spec(mesh)` as a `NamedSharding`."""
  return NamedSharding(mesh, row_spec(mesh))


def place(tree: Any, mesh: Mesh, specs: Any) -> Any:
  """Returns a copy of the tree on the mesh; the caller's arrays stay valid when it is donated.

  Args:
    tree: arrays with the same values on every process.
    mesh: must include devices of this process.
    specs: a tree of `PartitionSpec`s, or one for all leaves.
  """
  specs = jax.tree.broadcast(specs, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))
  return jax.tree.map(lambda x, spec: _put(x, NamedSharding(mesh, spec)), tree, specs)


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Returns a copy of the tree on every device of the mesh, as `place` does."""
  return place(tree, mesh, PartitionSpec())


def gather_to_host(tree: Any) -> Any:
  """Returns the tree with full arrays: those that are split over several hosts become numpy arrays.

  All processes must call it at the same point.
  """

  def gather(x):
    if getattr(x, "is_fully_addressable", True):
      return x
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(gather, tree)


@functools.lru_cache(maxsize=16)
def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
  """Returns the indices of a batch's rows that are on this process' devices, in order, int [local].

  Raises:
    ValueError: this process has no device in the mesh.
  """
  slices = row_sharding(mesh).addressable_devices_indices_map((rows,)).values()
  if not slices:
    raise ValueError(
      f"mesh: expected devices of every process, got none of process {jax.process_index()}"
    )
  indices = np.unique(np.concatenate([np.arange(rows)[index] for index in slices]))
  indices.setflags(write=False)
  return indices


def place_rows(batch: Mapping[str, np.ndarray], mesh: Mesh, rows: int) -> Batch:
  """Returns a global batch on the mesh, of which every process passes its own rows.

  Args:
    batch: arrays with the rows `local_rows(mesh, rows)`, in this order.
    mesh: must include devices of every process.
    rows: number of rows of the global batch.

  Raises:
    ValueError: the batch has another number of rows.
  """
  sharding = row_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(dict(batch), sharding)
  local = local_rows(mesh, rows)
  return {
    name: _place_local(name, np.asarray(values), local, rows, sharding)
    for name, values in batch.items()
  }


def next_divisible(rows: int, mesh: Mesh | AbstractMesh) -> int:
  """Returns the least number of at least `rows` rows that divides evenly over the devices."""
  devices = _row_devices(mesh)
  return -(-rows // devices) * devices


def check_divisible(rows: int, mesh: Mesh | AbstractMesh, *, microbatches: int = 1) -> None:
  """Checks that a batch divides evenly over devices and microbatches.

  Raises:
    ValueError: it does not; with the nearest sizes that do.
  """
  devices = _row_devices(mesh)
  parts = devices * microbatches
  if rows % parts:
    raise ValueError(
      f"batch_size: expected a multiple of {devices} devices x {microbatches} microbatches, got "
      f"{rows}: use {nearest_multiples(rows, parts)}"
    )


def _place_local(
  name: str, values: np.ndarray, local: np.ndarray, rows: int, sharding: NamedSharding
) -> jax.Array:
  """Returns the global array of which `values` are the rows `local`."""
  if len(values) != len(local):
    raise ValueError(
      f"batch: expected the {len(local)} of {rows} rows of sharding.local_rows in {name!r}, got "
      f"{len(values)}"
    )

  def read(index: Any) -> np.ndarray:
    start, stop, _ = index[0].indices(rows)
    first = bisect.bisect_left(local, start)
    return values[first : first + stop - start]

  return jax.make_array_from_callback((rows, *values.shape[1:]), sharding, read)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
  """Returns a copy of one array, of which every process has all values."""
  if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    data = _put(jax.random.key_data(x), sharding)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
  if sharding.is_fully_addressable:
    if isinstance(x, jax.Array) and sharding.is_fully_replicated:
      # From one device to several or back, `device_put` ignores `may_alias` and shares the buffer.
      x = jnp.copy(x)
    return jax.device_put(x, sharding, may_alias=False)
  # `device_put` would compare the processes' values, array by array.
  values = np.asarray(x)
  return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _row_devices(mesh: Mesh | AbstractMesh) -> int:
  return math.prod(mesh.shape[axis] for axis in ROW_AXES if axis in mesh.shape)
