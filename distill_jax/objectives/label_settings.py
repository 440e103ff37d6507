"""The arguments of `objectives.labels`, and their checks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.errors import nearest_names
from distill_jax.objectives.hyperparameters import check_number
from distill_jax.types import Batch


class LabelSettings(NamedTuple):
  """The arguments of `labels` that each batch needs."""

  loss: Callable[[jax.Array, jax.Array], jax.Array] | None
  output: str
  entry: str | None
  class_weights: np.ndarray | None
  example_weights: str | None
  ignore_label: int | None
  resize: bool


def label_entry(settings: LabelSettings, batch: Batch) -> tuple[jax.Array, str]:
  """Returns the labels, and the name of their entry."""
  name = settings.entry
  if name is None:
    name = "label" if settings.output.split("/")[-1] == "logits" else settings.output
    if name != "label" and name not in batch:
      raise ValueError(
        f"entry: expected the labels of output {settings.output!r} in the batch's entry of that "
        f"name, got only {sorted(batch)}: pass entry='label' or another one"
      )
  if name not in batch:
    nearest = nearest_names(name, sorted(batch))
    hint = f"write labels(entry={nearest[0]!r})" if nearest else "add them, or leave this term out"
    raise ValueError(f"{name}: expected labels in the batch, got only {sorted(batch)}: {hint}")
  return jnp.asarray(batch[name]), name


def check_loss(loss: Any, label_smoothing: Any) -> None:
  """Raises a ValueError for a loss that is no function, or a label smoothing that does not fit."""
  if loss is not None and not callable(loss):
    raise ValueError(f"loss: expected a function (predictions, label) -> values, got {loss!r}")
  check_number("label_smoothing", label_smoothing, low=0, high=1, open_high=True)
  if loss is not None and (callable(label_smoothing) or label_smoothing):
    raise ValueError(
      f"label_smoothing: expected 0 next to a loss, got {label_smoothing}: only the softmax cross "
      "entropy (loss None) smooths labels"
    )


def check_resize(resize: Any) -> None:
  """Raises a ValueError for an argument `resize` that is no bool."""
  if not isinstance(resize, bool):
    raise ValueError(
      f"resize: expected True or False, got {resize!r}: True resizes logits to the labels' grid"
    )


def check_names(**names: Any) -> None:
  """Raises a ValueError for an argument that is not the name of an entry or output, nor None."""
  for argument, name in names.items():
    if name is None or isinstance(name, str):
      continue
    hint = f"write {argument}='weight' for numbers in the batch's entry 'weight'"
    if argument != "example_weights":
      hint = f"write {argument}='type', for example"
    shape = f" {np.shape(name)}" if hasattr(name, "shape") else ""
    raise ValueError(f"{argument}: expected a name, got {type(name).__name__}{shape}: {hint}")


def class_weights_array(weights: Sequence[float] | None) -> np.ndarray | None:
  """Returns the weights as float32 [C]; raises a ValueError where they are no weights."""
  if weights is None:
    return None
  if isinstance(weights, Mapping):
    raise ValueError(
      f"class_weights: expected a list of a number per class, got {weights}: write "
      "[weights[i] for i in range(C)] for C classes"
    )
  if isinstance(weights, str):
    raise ValueError(
      f"class_weights: expected one number per class, got {weights!r}: weights of balanced classes "
      "are data.class_weights(source)"
    )
  array = np.asarray(weights)
  is_number = array.dtype.kind in "iuf" and array.ndim == 1 and array.size > 1
  if not is_number or not np.isfinite(array).all() or (array < 0).any() or not array.any():
    raise ValueError(
      "class_weights: expected one finite number >= 0 per class, not all 0, got "
      f"{weights if array.size < 20 else f'{array.dtype} {array.shape}'}: 1 leaves a class as it is"
    )
  return array.astype(np.float32)


def check_classes(settings: LabelSettings, shape: tuple[int, ...]) -> None:
  """Raises a ValueError where an output of a shape has one class, or other ones than weights."""
  if settings.loss is None and (len(shape) < 2 or shape[-1] < 2):
    raise ValueError(
      f"{settings.output}: expected logits [..., C] of at least 2 classes, got {shape}: one logit "
      "takes labels(optax.sigmoid_binary_cross_entropy) and tasks.binary(), one per pixel "
      "tasks.segmentation(), a number labels(optax.squared_error) and tasks.regression()"
    )
  check_class_weights(settings.class_weights, settings.output, shape)


def check_class_weights(weights: np.ndarray | None, output: str, shape: tuple[int, ...]) -> None:
  """Raises a ValueError where weights [C] are not those of the classes of an output of a shape."""
  if weights is None or shape[-1:] == weights.shape:
    return
  if shape[-1:] == (1,):
    raise ValueError(
      f"class_weights: expected None for one logit, {output!r} {shape}, got "
      f"{len(weights)} numbers: put the weight of each example into an entry of the batch, and "
      "pass its name as example_weights"
    )
  raise ValueError(
    f"class_weights: expected {shape[-1]} numbers, one per class of {output!r} {shape}, "
    f"got {len(weights)}: give each class one, 1 leaves it as it is"
  )
