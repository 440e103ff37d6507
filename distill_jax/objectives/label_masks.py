"""Lets terms that compare two networks count pixels by their labels, on the labels' grid."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.losses import resize_logits
from distill_jax.objectives.calls import LossCall, batch_entry, has_true_label, valid_rows
from distill_jax.objectives.class_labels import check_ignore_label, class_labels
from distill_jax.objectives.label_settings import check_names, class_weights_array
from distill_jax.objectives.loss_checks import name_of
from distill_jax.types import Batch


class LabelMask(NamedTuple):
  """The labels that say which positions count in a term without labels, and how much.

  Attributes:
    label: name of the batch's entry with class numbers [...], negative where there is none; next to
      one logit [..., 1] they are 0 and 1.
    ignore_label: a further number that is no label; None: no other one.
    class_weights: float32 [C]; None: all are 1.
  """

  label: str
  ignore_label: int | None
  class_weights: np.ndarray | None

  def value(
    self, call: LossCall, s: jax.Array, t: Any, batch: Batch, step: jax.Array, axis_name: Any
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the loss as a term's value: weighted values [...], and which have a label.

    Raises:
      ValueError: labels that do not fit the logits, or a loss without a value for each label.
    """
    # One logit is that of class 1.
    number, labeled, outside = class_labels(
      batch_entry(batch, self.label),
      (*s.shape[:-1], max(s.shape[-1], 2)),
      where=batch.get("where"),
      entry=self.label,
      ignore_label=self.ignore_label,
    )
    labeled = valid_rows(batch, has_true_label(batch, labeled))
    masked = {**batch, "label": jnp.where(labeled, number, -1), "where": labeled}
    values, where = call.value(s, t, masked, step, axis_name, self.shape_error)
    if values.shape != labeled.shape:
      raise self.shape_error(call.loss, values.shape)
    if self.class_weights is not None:
      values = values * jnp.asarray(self.class_weights, values.dtype)[number]
    # `fit` checks labels before; a compiled function cannot raise.
    return jnp.where(outside & labeled, jnp.nan, values), where

  def shape_error(self, loss: Callable, values: Any, mask: Any = None) -> ValueError:
    """Returns the error for a loss that has no value for each label."""
    del mask
    field = "class_weights" if self.ignore_label is None else "ignore_label"
    return ValueError(
      f"{field}: expected a loss with one value per label, got {values} of {name_of(loss)}: "
      f"use one such as losses.kl_divergence, or leave {field} out"
    )


def make_label_mask(
  call: LossCall, label: str, ignore_label: int | None, class_weights: Sequence[float] | None
) -> LabelMask | None:
  """Returns the mask of a term's arguments; None where they ask for none.

  Raises:
    ValueError: an argument of another type, weights that are negative or all 0, or a loss that
      relates rows.
  """
  check_names(label=label)
  check_ignore_label(ignore_label)
  weights = class_weights_array(class_weights)
  if ignore_label is None and weights is None:
    return None
  mask = LabelMask(label, ignore_label, weights)
  if "where" in call.step_arguments:
    raise mask.shape_error(call.loss, "a scalar")
  return mask


def resize_pair(
  output: str, s: jax.Array, t: jax.Array, size: tuple[int, ...] | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns logits of both networks on one grid.

  Args:
    output: their name, for messages.
    s, t: logits [B, ..., C] of the student and of the teacher.
    size: the grid; None: the larger one of both.

  Raises:
    ValueError: grids that `losses.resize_logits` cannot bring together.
  """
  if size is None:
    size = max(s.shape[1:-1], t.shape[1:-1], key=np.prod)
  return (
    resize_logits(s, size, name=f"{output} of the student"),
    resize_logits(t, size, name=f"{output} of the teacher"),
  )
