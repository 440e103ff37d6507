"""Compares the student's outputs with the batch's labels: classes, regression, multi-label."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.losses import resize_logits
from distill_jax.objectives.calls import batch_entry, has_true_label, outputs_of, valid_rows
from distill_jax.objectives.class_labels import (
  check_ignore_label,
  class_labels,
  float_hint,
  outside_probabilities,
  record,
  record_weights,
)
from distill_jax.objectives.label_losses import class_loss, is_class_number, loss_per_row
from distill_jax.objectives.label_settings import (
  LabelSettings,
  check_classes,
  check_loss,
  check_names,
  check_resize,
  class_weights_array,
  label_entry,
)
from distill_jax.objectives.terms import Term
from distill_jax.types import Batch, Variables


def labels(
  loss: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
  *,
  output: str = "logits",
  entry: str | None = None,
  label_smoothing: float | Callable[[jax.Array], jax.Array] = 0.0,
  class_weights: Sequence[float] | None = None,
  example_weights: str | None = None,
  ignore_label: int | None = None,
  resize: bool = False,
) -> Term:
  """Compares the student with labels of the batch: softmax cross entropy, or another loss.

      labels()  # classes; the cross entropy is always at temperature 1
      labels(output="type")  # a second head, with the batch's entry 'type'
      labels(optax.squared_error, output="depth", entry="label")  # regression
      labels(optax.sigmoid_binary_cross_entropy)  # several labels an example, or one logit

  Without a loss the label is int [...] or probabilities [..., C] (mixup). A negative label, the
  ignore label, or a row of zeros, is unlabeled: it is masked here, while other terms still use the
  row. A row that sums to less than 1 (an example mixed with an unlabeled one) counts by its sum.
  Another number that is no class, or a row with a negative number or a sum above 1, raises, and
  makes the loss NaN in a compiled function, which cannot raise (`train.fit` checks labels before).

  With a loss the label has the output's shape, or is [...] for an output [..., 1]; the loss gets
  both in float32, and its values are averaged over all axes but the first, to one value a row. A
  row with the ignore label is unlabeled; so is a negative integer next to a sigmoid loss of optax,
  whose labels are from 0 to 1. In maps [B, H, W], and next to an output [B, ..., 1], a loss with a
  value for each position leaves out only these positions. Integers [...] next to an output [..., C]
  reach the loss as class numbers, and its values are [...].

  Where only some rows have a number to predict, write another one for the others, such as
  ignore_label=-999 (also in the task, `tasks.regression`), or give them the weight 0. In a loop of
  your own, a row with a NaN in its label is unlabeled, too; `train.fit` refuses NaN in its data.

  Rows that the batch's 'where' masks do not count, nor do 'generated' ones
  (`models.llm.on_policy`).

  Args:
    loss: `(predictions [B, ...], label) -> values`; None: softmax cross entropy.
    output: name of the student's output that holds the logits [..., C] or predictions [B, ...].
    entry: name of the batch's entry with the labels. None: 'label' for 'logits' and for those of a
      cohort's network ('0/logits'), and the output's own name for all others.
    label_smoothing: fraction in [0, 1) that is spread evenly over all classes (Szegedy et al.
      2016, section 7), or over those that exist, where a logit is -inf; a number or a schedule.
      Without a loss only.
    class_weights: C numbers >= 0 by which the cross entropy of each class is multiplied. The mean
      still divides by the number of examples, as in Keras; PyTorch divides by the sum of weights.
    example_weights: name of the batch's entry with a number >= 0 per row [B] or label [...] that
      multiplies its loss, in the same mean. None: all are 1.
    ignore_label: the class number of what has no label (255, -100); negative ones never count.
    resize: where heights and widths differ, resize the output [B, h, w, C] to the labels' grid
      (`losses.resize_logits`). False: it is refused.

  Raises:
    ValueError: at once, label_smoothing outside [0, 1) or next to a loss, class weights that are
      negative or all 0, names that are no strings, or a loss that is no function; in init, another
      number of class weights than of classes, or one class; in a step, an entry that is missing,
      labels that do not fit the output (both shapes are shown), a loss that takes other labels, or
      values that are not one or several a row.

  >>> import jax.numpy as jnp
  >>> from distill_jax import objectives
  >>> term = objectives.labels(label_smoothing=0.1)
  >>> student, batch = {"logits": jnp.zeros((1, 2))}, {"label": jnp.array([0])}
  >>> (values, where), _ = term.apply({}, {}, student, {}, batch, step=0, key=None)
  >>> values.round(4)
  Array([0.6931], dtype=float32)
  """
  check_loss(loss, label_smoothing)
  check_ignore_label(ignore_label)
  check_names(output=output, entry=entry, example_weights=example_weights)
  check_resize(resize)
  settings = LabelSettings(
    loss,
    output,
    entry,
    class_weights_array(class_weights),
    example_weights,
    ignore_label,
    resize,
  )

  def init(key, student, teacher):
    del key, teacher
    check_loss(loss, label_smoothing)
    check_classes(settings, outputs_of(student, output, "student").shape)
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del params, teacher, key, axis_name
    predictions = jnp.asarray(outputs_of(student, output, "student"))
    predictions = predictions.astype(reduce.common_dtype(predictions.dtype, jnp.float32))
    check_classes(settings, predictions.shape)
    label, name = label_entry(settings, batch)
    if resize:
      size = label.shape[1 : predictions.ndim - 1]
      predictions = resize_logits(predictions, size, name=output)
    if loss is None:
      smoothing = label_smoothing(step) if callable(label_smoothing) else label_smoothing
      values, where = _cross_entropy(settings, predictions, label, name, batch, smoothing)
    elif is_class_number(predictions.shape, label):
      values, where = class_loss(settings, predictions, label, name, batch)
    else:
      values, where = loss_per_row(settings, predictions, label, name, batch)
    return (_weighted(settings, values, batch), where), state

  return Term(init, apply)


def _cross_entropy(
  settings: LabelSettings, z: jax.Array, label: jax.Array, name: str, batch: Batch, smoothing: Any
):
  """Returns the softmax cross entropy [...] of logits [..., C], and which of the values count."""
  if jnp.issubdtype(label.dtype, jnp.floating):
    if label.shape != z.shape:
      raise ValueError(
        f"{name}: expected integers {z.shape[:-1]} or rows of probabilities {z.shape}, got "
        f"{label.dtype} {label.shape}: {float_hint(name, label.shape, z.shape)}"
      )
    record(name, z.shape[-1])
    target = label.astype(z.dtype)
    sums = target.sum(-1)
    labeled = sums > 0
    outside = outside_probabilities(target)
    _check_rows(name, outside, sums, batch.get("where"))
  else:
    index, labeled, outside = class_labels(
      label,
      z.shape,
      where=batch.get("where"),
      entry=name,
      ignore_label=settings.ignore_label,
    )
    target = jax.nn.one_hot(index, z.shape[-1], dtype=z.dtype)
  where = valid_rows(batch, has_true_label(batch, labeled))
  # Blank before the loss: after it, a NaN would reach the gradient as NaN times zero.
  z = jnp.where(where[..., None], z, 0)
  log_q = jax.nn.log_softmax(z)
  exists = z > -jnp.inf
  uniform = exists.astype(z.dtype) / jnp.maximum(exists.sum(-1, keepdims=True, dtype=z.dtype), 1)
  smoothing = jnp.asarray(smoothing, z.dtype)
  # A row mixed with an unlabeled one sums to less than 1; its smoothing has the same share.
  target = (1 - smoothing) * target + smoothing * target.sum(-1, keepdims=True) * uniform
  if settings.class_weights is not None:
    target = target * jnp.broadcast_to(settings.class_weights.astype(z.dtype), z.shape)
  values = -jnp.where(target > 0, target * log_q, 0).sum(-1)
  return jnp.where(outside & where, jnp.nan, values), where


def _check_rows(name: str, outside: jax.Array, sums: jax.Array, where: jax.Array | None) -> None:
  """Raises outside of compiled functions for a row that holds no probabilities."""
  if where is not None:
    outside = outside & where.reshape(where.shape + (1,) * (outside.ndim - where.ndim))
  if not isinstance(outside, jax.core.Tracer) and outside.any():
    raise ValueError(
      f"{name}: expected rows of probabilities >= 0 that sum to 1, or only zeros (no label), got "
      f"the sum {float(sums[outside][0]):g}: for several labels an example pass a loss such as "
      "optax.sigmoid_binary_cross_entropy"
    )


def _weighted(settings: LabelSettings, values: jax.Array, batch: Batch) -> jax.Array:
  """Returns the values times the examples' weights; NaN where one is negative."""
  if settings.example_weights is None:
    return values
  weights = batch_entry(batch, settings.example_weights)
  record_weights(settings.example_weights)
  if weights.shape != values.shape[: weights.ndim] or weights.ndim == 0:
    raise ValueError(
      f"{settings.example_weights}: expected a weight per row {values.shape[:1]}, got "
      f"{weights.shape}: drop other axes, such as {settings.example_weights}[..., 0]"
    )
  weights = weights.astype(values.dtype).reshape(
    weights.shape + (1,) * (values.ndim - weights.ndim)
  )
  if not isinstance(weights, jax.core.Tracer) and bool((weights < 0).any()):
    raise ValueError(
      f"{settings.example_weights}: expected weights >= 0, got {float(weights.min())}"
    )
  # A compiled function cannot raise: NaN is what the train step reports.
  return values * jnp.where(weights >= 0, weights, jnp.nan)
