"""Writes and reads train states with Orbax, the only file that imports it.

Orbax commits a checkpoint by renaming its directory, so a killed process leaves no half of one. But
Orbax notices neither flipped bits nor renamed directories, and casts other dtypes silently:
`seal.py` covers those.
"""

import errno
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
from orbax.checkpoint import v1 as ocp

from distill_jax.storage import seal
from distill_jax.trees import named_leaves
from distill_jax.types import TrainState

Save: TypeAlias = ocp.AsyncResponse[None]
# Part of the format on disk.
_METADATA_FILE = "_CHECKPOINT_METADATA"
_STATE = "state"
_UNFINISHED = "*.orbax-checkpoint-tmp*"
# What a system and TensorStore report of a machine, not of a file's content.
_MACHINE_ERRNOS = {
  getattr(errno, name)
  for name in (
    "EACCES EPERM EMFILE ENFILE ENOMEM ENOSPC EDQUOT EAGAIN EBUSY EINTR ESTALE ETIMEDOUT ENOTCONN "
    "EHOSTDOWN EHOSTUNREACH ECONNRESET ECONNREFUSED ENODEV ENXIO"
  ).split()
}
_MACHINE_CODES = (
  "RESOURCE_EXHAUSTED",
  "PERMISSION_DENIED",
  "UNAUTHENTICATED",
  "UNAVAILABLE",
  "DEADLINE_EXCEEDED",
  "CANCELLED",
  "ABORTED",
)


def start_save(path: Path, state: TrainState, metadata: Mapping[str, Any]) -> Save:
  """Starts to write a state in the background; the caller may donate it right after.

  The state is not copied: Orbax transfers to the host before it returns, and where that is only a
  view (CPU) jax does not reuse the donated buffer while the view exists.

  Returns:
    The save in progress. Its `result()` waits, raises what went wrong, and ends its thread: call
    it for every save.
  """
  context = ocp.Context()
  # Weights hardly shrink, and uncompressed ones are read in half the time.
  context.array.saving.use_compression = False
  with context:
    # Leaves by name: a tree that differs only in its empty nodes can read them.
    leaves = dict(named_leaves(state))
    return ocp.save_checkpointables_async(path, {_STATE: leaves}, custom_metadata=dict(metadata))


def remove_unfinished(folder: Path) -> None:
  """Removes the temporary directories of killed and failed saves."""
  for path in folder.glob(_UNFINISHED):
    shutil.rmtree(path, ignore_errors=True)


def load_seal(path: Path, step: int) -> dict[str, Any]:
  """Returns the seal stored with the checkpoint at `path`.

  Raises:
    CorruptFile: it is missing, was changed, or is the seal of another step.
    OSError: it cannot be read now.
  """
  try:
    # Orbax's own reader of this file opens every array too, and logs errors when one is corrupt.
    metadata = json.loads((path / _METADATA_FILE).read_bytes())["custom_metadata"]
  except Exception as error:
    raise _corrupt_or_not(error) from error
  return seal.open_seal(metadata, step)


def load_state(path: Path, like: TrainState) -> TrainState:
  """Returns this process' part of the state at `path`, in the shardings of `like`.

  Raises:
    CorruptFile: its files were changed.
    Exception: it cannot be read now, or not in these shardings.
  """
  leaves = dict(_named_leaves(like))
  try:
    loaded = _load(path, leaves)
  except Exception as error:
    cause = _corrupt_or_not(error)
    if isinstance(cause, seal.CorruptFile) and _is_readable(path, leaves):
      raise _root_cause(error) from None
    raise cause from error
  return jax.tree.unflatten(jax.tree.structure(like), [loaded[name] for name in leaves])


def is_checkpoint(path: Path) -> bool:
  """Returns whether a directory looks like a checkpoint that `start_save` wrote."""
  return (path / _STATE).is_dir()


def _load(path: Path, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  # Without Orbax's barriers: a process whose part is valid would wait in vain for one whose part is
  # not.
  process = jax.process_index()
  context = ocp.Context()
  context.multiprocessing_options.primary_host = process
  context.multiprocessing_options.active_processes = {process}
  with context:
    return ocp.load_checkpointables(path, {_STATE: dict(leaves)})[_STATE]


def _is_readable(path: Path, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> bool:
  """Returns whether the leaves can be read onto one device: then only the shardings did not fit."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if all(leaf.sharding == device for leaf in leaves.values()):
    return False
  try:
    _load(path, {name: _abstract(leaf, device) for name, leaf in leaves.items()})
  except Exception as error:
    if not isinstance(_corrupt_or_not(error), seal.CorruptFile):
      raise
    return False
  return True


def _corrupt_or_not(error: Exception) -> Exception:
  """Returns `CorruptFile` where a reader's error tells of a file's content, else its cause."""
  error = _root_cause(error)
  types = (MemoryError, ImportError, NotImplementedError, jax.errors.JaxRuntimeError)
  if (
    isinstance(error, types)
    or getattr(error, "errno", None) in _MACHINE_ERRNOS
    or any(code in str(error) for code in _MACHINE_CODES)
  ):
    return error
  return seal.CorruptFile(f"it cannot be read ({type(error).__name__}: {str(error)[:300]})")


def _root_cause(error: Exception) -> Exception:
  """Returns the error from which Orbax' own errors, which name every leaf, were raised."""
  while isinstance(error.__cause__, Exception):
    error = error.__cause__
  return error


def _named_leaves(like: TrainState) -> list[tuple[str, jax.ShapeDtypeStruct]]:
  """Returns shape, dtype and sharding of the leaves; by default the first local device."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return [
    (name, _abstract(leaf, getattr(leaf, "sharding", None) or device))
    for name, leaf in named_leaves(like)
  ]


def _abstract(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  if leaf.ndim == 0 and isinstance(sharding, jax.sharding.NamedSharding):
    # Orbax gives restored scalar keys a spec of rank 1, which nothing can be restored into again.
    sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
