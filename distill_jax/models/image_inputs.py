"""Checks the images that networks read, before they are applied."""

from collections.abc import Iterable
from typing import Any

from distill_jax.data.image_checks import check_images
from distill_jax.models.batch_dependencies import entries_read
from distill_jax.types import Batch, Model, Variables


def check_image_inputs(field: str, models: Iterable[tuple[Model, Variables]], batch: Batch) -> None:
  """Checks the images of a batch that any of some networks reads.

  Args:
    field: name of the argument that holds the images, for messages.
    models: (Model, variables) each.
    batch: arrays [B, ...].

  Raises:
    ValueError: an image is uint8, or the label map has its axes in another order. Pixels up to 255
      and channels first only warn.
  """

  def all_entries_read() -> set[str]:
    return set().union(*(entries_read(_apply(model), values, batch) for model, values in models))

  check_images(batch, all_entries_read, field)


def _apply(model: Model) -> Any:
  return lambda variables, batch: model.apply(*variables, batch, train=False, key=None)[0]
