"""Lets the errors of networks say which of them does not take a batch."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from distill_jax.models.networks import input_names


@contextlib.contextmanager
def name_network(field: str, batch: Mapping[str, Any]) -> Iterator[None]:
  """Raises a ValueError in place of an error of shapes that a network raises inside.

  Args:
    field: name of the network's argument.
    batch: what it is applied to: arrays or `ShapeDtypeStruct`s [B, ...].
  """
  try:
    yield
  except Exception as error:
    # Flax has types of its own; all others raise those of jax.numpy.
    if not isinstance(error, TypeError) and not type(error).__module__.startswith("flax."):
      raise
    shapes = {name: f"{batch[name].dtype} {list(batch[name].shape)}" for name in input_names(batch)}
    reason = str(error).strip().splitlines()[0].rstrip(".")
    raise ValueError(
      f"{field}: expected a network that takes the batch's {shapes}, got one with "
      f"{type(error).__name__}: {reason}: change its inputs or the entries"
    ) from error
