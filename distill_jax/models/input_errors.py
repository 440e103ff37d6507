"""Lets the errors of networks say which of them does not take a batch."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from distill_jax.models.networks import input_names

OWN_ERROR = re.compile(r"[\w./]+(: [\w./]+)*: expected ")
"""Messages that name a field already."""
STRIDES = (2, 4, 8, 16, 32, 64)


@contextlib.contextmanager
def name_network(
  field: str, batch: Mapping[str, Any], output_shapes: Callable[[Mapping[str, Any]], Any]
) -> Iterator[None]:
  """Raises a ValueError in place of an error of shapes that a network raises inside, and names the
  network whose inputs the batch lacks.

  Args:
    field: name of the network's argument.
    batch: what it is applied to: arrays or `ShapeDtypeStruct`s [B, ...].
    output_shapes: `batch -> shapes of its outputs`; called with `ShapeDtypeStruct`s after an error,
      to find the sides of images that it takes.
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
      f"{type(error).__name__}: {reason}: {_stride_hint(batch, output_shapes) or _hint(batch)}"
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


def _stride_hint(
  batch: Mapping[str, Any], output_shapes: Callable[[Mapping[str, Any]], Any]
) -> str | None:
  """Returns how to pad images of which a network takes multiples of its stride only, or None."""
  shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
  images = [name for name in input_names(shapes) if len(shapes[name].shape) >= 4]
  for stride in STRIDES:
    padded = {name: _padded(shapes[name], stride) for name in images}
    if all(padded[name].shape == shapes[name].shape for name in images):
      continue
    try:
      output_shapes(shapes | padded)
    except Exception:  # Any that a network raises.
      continue
    name = next(name for name in images if padded[name].shape != shapes[name].shape)
    sides, multiples = (" x ".join(map(str, x[name].shape[1:-1])) for x in (shapes, padded))
    return (
      f"it takes sides that {stride} divides, not {sides}: pad {name!r} to {multiples}, and label "
      "maps with the ignore label"
    )
  return None


def _padded(image: jax.ShapeDtypeStruct, stride: int) -> jax.ShapeDtypeStruct:
  """Returns the shape of an image [B, ..., channels] whose sides are multiples of a stride."""
  rows, *sides, channels = image.shape
  multiples = (-(-side // stride) * stride for side in sides)
  return jax.ShapeDtypeStruct((rows, *multiples, channels), image.dtype)
