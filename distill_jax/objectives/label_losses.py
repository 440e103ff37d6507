"""Calls the loss that `objectives.labels` is given, with class numbers or numbers to predict."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill_jax.objectives.calls import has_true_label, valid_rows
from distill_jax.objectives.class_labels import BINARY, class_labels, record, record_numbers
from distill_jax.objectives.label_settings import LabelSettings
from distill_jax.objectives.loss_checks import check_rows, name_of
from distill_jax.types import Batch

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def is_class_number(shape: tuple[int, ...], label: jax.Array) -> bool:
  """Whether labels are class numbers of an output of a shape, not numbers to predict."""
  is_integer = jnp.issubdtype(label.dtype, jnp.integer)
  return is_integer and label.shape == shape[:-1] and shape[-1] > 1


def class_loss(
  settings: LabelSettings, predictions: jax.Array, label: jax.Array, name: str, batch: Batch
):
  """Returns a loss of logits [..., C] and class numbers [...], and which of its values count."""
  assert settings.loss is not None
  index, labeled, outside = class_labels(
    label,
    predictions.shape,
    where=batch.get("where"),
    entry=name,
    ignore_label=settings.ignore_label,
  )
  where = valid_rows(batch, has_true_label(batch, labeled))
  predictions = jnp.where(where[..., None], predictions, 0)
  values = _class_values(settings.loss, predictions, index, name)
  if settings.class_weights is not None:
    values = values * jnp.asarray(settings.class_weights, values.dtype)[index]
  return jnp.where(outside, jnp.nan, values), where


def loss_per_row(
  settings: LabelSettings, predictions: jax.Array, label: jax.Array, name: str, batch: Batch
):
  """Returns the loss of predictions and labels, and which of its values count.

  There is one value a row [B], or one a position of maps and of one number per position.
  """
  assert settings.loss is not None
  if settings.class_weights is not None:
    raise ValueError(
      f"class_weights: expected class numbers in {name!r}, got {label.dtype} {label.shape} for an "
      f"output {predictions.shape}: pass example_weights"
    )
  has_positions = label.ndim > 2
  if predictions.shape == (*label.shape, 1):
    predictions = predictions[..., 0]
    has_positions = label.ndim > 1
  elif label.shape == (*predictions.shape, 1):
    raise ValueError(
      f"{name}: expected the shape of the output {predictions.shape}, got {label.shape}: drop the "
      f"last axis, {name}[..., 0]"
    )
  if predictions.shape != label.shape:
    raise ValueError(
      f"{name}: expected the shape of the output {predictions.shape}, got {label.shape}: give such "
      f"labels, or the student an output {label.shape} (nothing is broadcast)"
    )
  axes = tuple(range(1, label.ndim))
  labeled = jnp.ones(label.shape, bool)
  if settings.ignore_label is not None:
    labeled &= label != settings.ignore_label
  loss = settings.loss
  is_binary = _is_binary(loss)
  if is_binary:
    record(name, BINARY, settings.ignore_label)
  else:
    record_numbers(name, settings.ignore_label)
  if is_binary and jnp.issubdtype(label.dtype, jnp.signedinteger):
    labeled &= label >= 0
  label = label.astype(predictions.dtype)
  labeled &= ~jnp.isnan(label)
  hint = _rows_hint(name, label.shape)
  shape = jax.eval_shape(lambda z, y: _values(loss, z, y, hint), predictions, label).shape
  has_positions &= shape == label.shape
  if not has_positions:
    labeled = labeled.all(axes)
  where = valid_rows(batch, has_true_label(batch, labeled))
  if where.shape != labeled.shape:
    raise ValueError(f"where: expected one bool a row, {label.shape[:1]}, got {where.shape}")
  keep = where.reshape(where.shape + (1,) * (label.ndim - where.ndim))
  blank = jnp.where(keep, predictions, 0), jnp.where(keep, label, 0)
  values = _values(loss, *blank, hint)
  if values.shape[:1] != label.shape[:1]:
    raise ValueError(
      f"loss: expected values of {label.shape[:1]} rows, or more axes, got {values.shape}: return "
      "them unreduced"
    )
  check_rows(lambda x: _values(loss, x[0], x[1], hint), loss, blank, values.shape)
  outside = (label < 0) | (label > 1)
  if not has_positions:
    values = values.mean(tuple(range(1, values.ndim)))
    outside = outside.any(axes)
  if is_binary:
    # `fit` checks labels before; a compiled function cannot raise.
    values = jnp.where(outside & where, jnp.nan, values)
  return values, where


def _class_values(loss: Loss, predictions: jax.Array, index: jax.Array, name: str) -> jax.Array:
  """Returns the values [...] of a loss of logits [..., C] and class numbers [...].

  Raises:
    ValueError: the loss takes rows of the output's shape, or returns other values.
  """
  classes = predictions.shape[-1]
  hint = (
    f"leave the loss out or write optax.softmax_cross_entropy_with_integer_labels; a loss of rows "
    f"takes {predictions.shape}, such as np.eye({classes})[{name}]; a number to predict takes an "
    f"output {index.shape}"
  )
  if index.shape[-1] in (1, classes):
    # A loss of rows would broadcast them: tried with a number of rows that it cannot.
    shape = (*index.shape[:-1], classes + 1)
    jax.eval_shape(
      lambda z, y: _values(loss, z, y, f"{hint} (tried with {classes + 1} rows)"),
      jax.ShapeDtypeStruct((*shape, classes), predictions.dtype),
      jax.ShapeDtypeStruct(shape, index.dtype),
    )
  values = _values(loss, predictions, index, hint)
  if values.ndim > index.ndim:
    raise ValueError(
      f"loss: expected values {index.shape}, one per class number of {name!r}, got "
      f"{values.shape}: {hint}"
    )
  if values.shape != index.shape:
    raise ValueError(
      f"loss: expected values {index.shape}, one per class number of {name!r}, got "
      f"{values.shape}: return them unreduced"
    )
  check_rows(lambda x: _values(loss, x[0], x[1], hint), loss, (predictions, index), values.shape)
  return values


def _values(loss: Loss, predictions: jax.Array, label: jax.Array, hint: str) -> jax.Array:
  """Returns the values of a loss; an error says what it was called with."""
  try:
    return jnp.asarray(loss(predictions, label))
  except (TypeError, ValueError) as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise ValueError(
      f"loss: expected a loss of outputs {predictions.shape} and labels {label.dtype} "
      f"{label.shape}, got {name_of(loss)} ({reason}): {hint}"
    ) from error


def _rows_hint(name: str, shape: tuple[int, ...]) -> str:
  """Returns what to write where a loss does not take labels of the output's shape."""
  if len(shape) < 2:
    return "a loss of class numbers takes an output [..., C]"
  return f"a loss of class numbers takes integers {shape[:-1]}, {name}.argmax(-1)"


def _is_binary(loss: Any) -> bool:
  """Whether a loss, or the one that a `functools.partial` calls, takes labels from 0 to 1."""
  loss = getattr(loss, "func", loss)
  return loss in (optax.sigmoid_binary_cross_entropy, optax.sigmoid_focal_loss)
