"""Lets the errors of networks say which of them does not take a batch."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from distill_jax.models.networks import input_names

OWN_ERROR = re.compile(r"[\w./]+(: [\w./]+)*: expected ")
"""Messages that name a field already."""


@contextlib.contextmanager
def name_network(field: str, batch: Mapping[str, Any]) -> Iterator[None]:
  """Raises a ValueError in place of an error of shapes that a network raises inside, and names the
  network whose inputs the batch lacks.

  Args:
    field: name of the network's argument.
    batch: what it is applied to: arrays or `ShapeDtypeStruct`s [B, ...].
  """
  try:
    yield
  except Exception as error:
    if isinstance(error, ValueError) and str(error).startswith("inputs: "):
      raise ValueError(f"{field}: {error}") from error
    # Flax has types of its own; all others raise those of jax.numpy.
    is_shape_error = isinstance(error, TypeError) or type(error).__module__.startswith("flax.")
    is_shape_error |= isinstance(error, ValueError) and not OWN_ERROR.match(str(error))
    if not is_shape_error:
      raise
    shapes = {name: f"{batch[name].dtype} {list(batch[name].shape)}" for name in input_names(batch)}
    reason = str(error).strip().splitlines()[0].rstrip(".")
    raise ValueError(
      f"{field}: expected a network that takes the batch's {shapes}, got one with "
      f"{type(error).__name__}: {reason}: {_hint(batch)}"
    ) from error


def _hint(batch: Mapping[str, Any]) -> str:
  """Returns what to write where an image may lack an axis."""
  name = next((name for name in input_names(batch) if len(batch[name].shape) in (2, 3)), None)
  if name is None or (name != "image" and len(batch[name].shape) == 2):
    return "change its inputs or the entries"
  return (
    f"write {name}[..., None] for gray images [B, H, W] and {name}[None] for a single example, or "
    "change the network's inputs or the entries"
  )
