"""Compares the student's outputs with the batch's labels: classes, regression, multi-label."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.objectives.calls import has_true_label, label_of, outputs_of, valid_rows
from distill_jax.objectives.terms import Term
from distill_jax.types import Batch, Variables


def labels(
  loss: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
  *,
  label_smoothing: float = 0.0,
  output: str = "logits",
) -> Term:
  """Compares the student with the batch's 'label': softmax cross entropy, or another loss.

      labels()  # classes; the cross entropy is always at temperature 1
      labels(optax.squared_error, output="prediction")  # regression
      labels(optax.sigmoid_binary_cross_entropy)  # several labels an example

  Without a loss the label is int [...] or probabilities [..., C] (mixup). A negative label, or a
  row of zeros, is unlabeled: it is masked here, while other terms still use the row. (`data`
  rejects negative labels that were not declared.)

  With a loss the label has the output's shape, or is [...] for an output [..., 1]. The loss gets
  both in float32, and its values are averaged over all axes but the first, to one value a row. A
  row with a NaN in its label is unlabeled.

  Rows that the batch's 'where' masks do not count, nor do 'generated' ones
  (`models.llm.on_policy`).

  Args:
    loss: `(predictions [B, ...], label [B, ...]) -> values [B] or [B, ...]`; None: softmax cross
      entropy.
    label_smoothing: fraction in [0, 1) that is spread evenly over all classes (Szegedy et al.
      2016, section 7), or over those that exist, where a logit is -inf. Without a loss only.
    output: name of the student's output that holds the logits [..., C] or predictions [B, ...].

  Raises:
    ValueError: at once, label_smoothing outside [0, 1) or next to a loss, or a loss that is no
      function; in a step, labels that do not fit the output (both shapes are shown), or values
      that are not one or several a row.
  """
  if not 0 <= label_smoothing < 1:
    raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
  if loss is not None and not callable(loss):
    raise ValueError(f"loss: expected a function (predictions, label) -> values, got {loss!r}")
  if loss is not None and label_smoothing:
    raise ValueError(
      f"label_smoothing: expected 0 next to a loss, got {label_smoothing}: only the softmax cross "
      "entropy (loss None) smooths labels"
    )

  def init(key, student, teacher):
    del key, teacher
    outputs_of(student, output, "student")
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del params, teacher, step, key, axis_name
    predictions = jnp.asarray(outputs_of(student, output, "student"))
    predictions = predictions.astype(reduce.common_dtype(predictions.dtype, jnp.float32))
    if loss is None:
      return _cross_entropy(predictions, batch, label_smoothing), state
    return _loss_per_row(loss, predictions, batch), state

  return Term(init, apply)


def _cross_entropy(z: jax.Array, batch: Batch, label_smoothing: float):
  """Returns the softmax cross entropy [...] of logits [..., C], and which of the values count."""
  log_q = jax.nn.log_softmax(z)
  target, labeled = _targets(label_of(batch), log_q)
  exists = z > -jnp.inf
  uniform = exists.astype(z.dtype) / jnp.maximum(exists.sum(-1, keepdims=True, dtype=z.dtype), 1)
  target = (1 - label_smoothing) * target + label_smoothing * uniform
  values = -jnp.where(target > 0, target * log_q, 0).sum(-1)
  return values, valid_rows(batch, has_true_label(batch, labeled))


def _targets(label: jax.Array, log_q: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns rows of probabilities [..., C], and which rows are labeled [...]."""
  if jnp.issubdtype(label.dtype, jnp.integer):
    if label.shape != log_q.shape[:-1]:
      raise ValueError(
        f"label: expected integers {log_q.shape[:-1]} for logits {log_q.shape}, got {label.shape}"
      )
    return jax.nn.one_hot(label, log_q.shape[-1], dtype=log_q.dtype), label >= 0
  if label.shape != log_q.shape:
    raise ValueError(
      f"label: expected integers {log_q.shape[:-1]} or rows of probabilities {log_q.shape}, "
      f"got {label.dtype} {label.shape}"
    )
  return label.astype(log_q.dtype), label.sum(-1) > 0


def _loss_per_row(loss, predictions: jax.Array, batch: Batch):
  """Returns the loss of predictions and labels, one value a row [B], and which rows count [B]."""
  label = label_of(batch)
  if predictions.shape == (*label.shape, 1):
    predictions = predictions[..., 0]
  if predictions.shape != label.shape:
    raise ValueError(
      f"label: expected the shape of the output {predictions.shape}, got {label.shape}: "
      "nothing is broadcast"
    )
  label = label.astype(predictions.dtype)
  labeled = ~jnp.isnan(label).any(tuple(range(1, label.ndim)))
  where = valid_rows(batch, has_true_label(batch, labeled))
  if where.shape != labeled.shape:
    raise ValueError(f"where: expected one bool a row, {labeled.shape}, got {where.shape}")
  # Blank before the loss: after it, a NaN would reach the gradient as NaN times zero.
  keep = where.reshape(where.shape + (1,) * (label.ndim - 1))
  values = jnp.asarray(loss(jnp.where(keep, predictions, 0), jnp.where(keep, label, 0)))
  if values.shape[:1] != where.shape:
    raise ValueError(
      f"loss: expected values of {where.shape} rows, or more axes, got {values.shape}"
    )
  return values.mean(tuple(range(1, values.ndim))), where
