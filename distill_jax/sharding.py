"""Where arrays live: parameters on every device, a batch's rows spread over the axis `data`."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(devices: int | None = None) -> Mesh:
  """A mesh with the one axis `data`.

  Args:
    devices: how many of this process' devices to use; None: all.

  Raises:
    ValueError: there are not so many.
  """
  available = jax.local_devices()
  count = len(available) if devices is None else devices
  if not 1 <= count <= len(available):
    raise ValueError(f"devices: expected 1 to {len(available)} ({available[0].device_kind}), got {devices}")
  return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=available[:count])


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
  """The leading axis spread over `data`."""
  return NamedSharding(mesh, PartitionSpec("data"))


def replicate(tree: Any, mesh: Mesh) -> Any:
  """A copy of the tree on every device of the mesh; the caller's arrays stay valid when it is donated."""
  return jax.tree.map(lambda x: jax.device_put(x, replicated(mesh), may_alias=False), tree)


def check_divisible(rows: int, mesh: Mesh, *, microbatches: int = 1) -> None:
  """Raises a ValueError with the nearest sizes where `rows` do not divide evenly."""
  parts = mesh.shape["data"] * microbatches
  if rows % parts:
    down = rows // parts * parts
    sizes = f"{down} or {down + parts}" if down else f"{parts}"
    raise ValueError(
      f"batch_size {rows} does not divide over {mesh.shape['data']} devices x {microbatches} microbatches; "
      f"nearest: {sizes}"
    )
