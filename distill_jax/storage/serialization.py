"""Writes and reads train states with Orbax, the only file that imports it.

Orbax commits a checkpoint by renaming its directory, so a killed process leaves no half of one. But
Orbax notices neither flipped bits nor renamed directories, and casts other dtypes silently:
`seal.py` covers those.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
from orbax.checkpoint import v1 as ocp

from distill_jax.storage import seal
from distill_jax.types import TrainState

Writer: TypeAlias = ocp.training.Checkpointer
# Part of the format on disk.
_METADATA_FILE = "_CHECKPOINT_METADATA"
_STATE = "state"


def open_writer(folder: Path) -> Writer:
  """Returns a writer of checkpoints; removes temporary directories of killed writers."""
  context = ocp.Context()
  # Weights hardly shrink, and uncompressed ones are read in half the time.
  context.array.saving.use_compression = False
  writer = Writer(folder, context=context, cleanup_tmp_directories=True)
  # Orbax asks jax at every save, also from its threads, whether this is the step to stop at, and no
  # option turns that off. jax agrees on the number after the last one asked for: where
  # `Interruption` counts other numbers, a SIGTERM during a save would be lost.
  writer._manager.reached_preemption = lambda step: False
  return writer


def start_save(writer: Writer, step: int, state: TrainState, metadata: Mapping[str, Any]) -> None:
  """Starts to write a state in the background; the caller may donate it right after.

  The state is not copied: Orbax transfers to the host before it returns, and where that is only a
  view (CPU) jax does not reuse the donated buffer while the view exists.
  """
  writer.save_checkpointables_async(
    step, {_STATE: state}, custom_metadata=dict(metadata), force=True
  )


def load_seal(path: Path, step: int) -> dict[str, Any]:
  """Returns the seal stored with the checkpoint at `path`.

  Raises:
    CorruptFile: it cannot be read, was changed, or is the seal of another step.
  """
  with _read_errors_as_corrupt():
    # Orbax's own reader of this file opens every array too, and logs errors when one is corrupt.
    metadata = json.loads((path / _METADATA_FILE).read_bytes())["custom_metadata"]
  return seal.open_seal(metadata, step)


def load_state(path: Path, like: TrainState) -> TrainState:
  """Returns this process' part of the state at `path`, in the shardings of `like`.

  Raises:
    CorruptFile: it cannot be read.
  """
  # Without Orbax's barriers: a process whose part is valid would wait in vain for one whose part is
  # not.
  process = jax.process_index()
  context = ocp.Context()
  context.multiprocessing_options.primary_host = process
  context.multiprocessing_options.active_processes = {process}
  with _read_errors_as_corrupt(), context:
    return ocp.load_checkpointables(path, {_STATE: jax.tree.map(_abstract, like)})[_STATE]


def is_checkpoint(path: Path) -> bool:
  """Returns whether a directory looks like a checkpoint that `start_save` wrote."""
  return (path / _STATE).is_dir()


@contextlib.contextmanager
def _read_errors_as_corrupt() -> Iterator[None]:
  """Raises any error of a reader as `CorruptFile`, unless the machine is short of memory."""
  try:
    yield
  except (MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:
    text = f"it cannot be read ({type(error).__name__}: {str(error)[:300]})"
    raise seal.CorruptFile(text) from error


def _abstract(leaf) -> jax.ShapeDtypeStruct:
  """Returns shape, dtype and sharding of a leaf; by default the first local device."""
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if leaf.ndim == 0 and isinstance(sharding, jax.sharding.NamedSharding):
    # Orbax gives restored scalar keys a spec of rank 1, which nothing can be restored into again.
    sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
