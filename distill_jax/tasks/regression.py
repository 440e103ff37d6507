"""Numbers as labels."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import reduce
from distill_jax.objectives.calls import batch_entry, outputs_of
from distill_jax.objectives.class_labels import check_ignore_label
from distill_jax.tasks._correlations import correlations
from distill_jax.types import Batch, Metric, Outputs, Task


def regression(
  *,
  label: str = "label",
  output: str = "logits",
  unit: str = "",
  ignore_label: int | None = None,
) -> Task:
  """Returns the task of predictions [B] or [B, ...] and labels of the same shape; [B, 1] goes with
  [B].

  Its metrics are the root mean squared error, the mean absolute error, and R^2 = 1 - squared error
  / variance of the labels (scikit-learn's `r2_score`, over all numbers together); with one number
  per example, [B] or [B, 1], also the correlations of Pearson and Spearman (scipy's `pearsonr` and
  `spearmanr`). Equal labels have neither R^2 nor correlations; equal predictions have correlations
  of NaN.

  In a loop of one's own, a NaN label is a number without one and does not count; `fit`, `evaluate`
  and `Source` refuse NaN. Sums are float32: R^2 loses digits where the labels' mean is over 1,000
  times their spread, so subtract it.

  Args:
    label: the batch's entry with the labels.
    output: the student's output with the predictions.
    unit: of the labels, for tables.
    ignore_label: the number that is no label (-999) and does not count; None: there is none.

  >>> import jax.numpy as jnp
  >>> from distill_jax import tasks
  >>> task = tasks.regression()
  >>> outputs = {"logits": jnp.array([1.0, 3.0])}
  >>> sums = task.statistics(outputs, {"label": jnp.array([1.0, 1.0])}, None)
  >>> round(task.compute(sums)["rmse"], 4)
  1.4142
  """
  check_ignore_label(ignore_label)

  def numbers(outputs: Outputs, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _inputs(
      outputs_of(outputs, output, "student"),
      batch_entry(batch, label),
      batch.get("where"),
      label,
      ignore_label,
    )

  def statistics(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Any]:
    del teacher
    prediction, target, valid = numbers(outputs, batch)
    error = jnp.where(valid, prediction - target, 0)
    target = jnp.where(valid, target, 0)
    # R^2 from moments around one label: around 0 they would cancel for labels far from 0.
    count = valid.sum(dtype=error.dtype)
    mean = target.sum() / jnp.maximum(count, 1)
    spread = jnp.where(valid, target - mean, 0)
    return {
      "squared": (error**2).sum(),
      "absolute": jnp.abs(error).sum(),
      "count": count,
      "variance": (spread**2).sum(),
      "between": jnp.stack([count * mean, count * mean**2]),
    }

  def predict(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    prediction, target, valid = numbers(outputs, batch)
    if target.size != len(target):
      return {}  # The host keeps all rows: maps of numbers would fill it.
    columns = {"prediction": prediction, "target": target, "labeled": valid}
    return {name: x.reshape(-1) for name, x in columns.items()}

  return Task(
    metrics=(
      Metric("rmse", "root mean squared error", unit, "min", ".4g"),
      Metric("mae", "mean absolute error", unit, "min", ".4g"),
      Metric("r2", "R²", "", "max", ".4f"),
      Metric("pearson", "Pearson correlation", "", "max", ".4f", short="Pearson"),
      Metric("spearman", "Spearman correlation", "", "max", ".4f", short="Spearman"),
    ),
    statistics=statistics,
    compute=_compute,
    ignore_label=ignore_label,
    predict=predict,
    evaluate_predictions=_correlations_of,
    references=(),
    figure_references=(label,),
    scores_parts=True,
  )


def _inputs(
  prediction, target, where, name: str, ignore_label: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns predictions and labels of one shape, and which of them count."""
  shape = prediction.shape
  if shape[-1:] == (1,) and target.shape == shape[:-1]:
    prediction = prediction[..., 0]
  if prediction.shape != target.shape:
    raise ValueError(
      f"{name}: expected the predictions' shape {shape}, got {target.shape}: reshape one of them, "
      "nothing is broadcast"
    )
  valid = ~jnp.isnan(target)
  if ignore_label is not None:
    valid &= target != ignore_label
  if where is not None:
    valid &= where.reshape(where.shape + (1,) * (target.ndim - 1))
  dtype = reduce.common_dtype(prediction.dtype, jnp.float32)
  return prediction.astype(dtype), target.astype(dtype), valid


def _correlations_of(predictions: Mapping[str, Any], references: Mapping[str, Any]):
  del references
  if not predictions:
    return {}
  labeled = predictions["labeled"]
  return correlations(predictions["prediction"][labeled], predictions["target"][labeled])


def _compute(statistics: Mapping[str, Any]) -> dict[str, float]:
  count = float(statistics["count"])
  if not count:
    return {}
  squared = float(statistics["squared"])
  total, total_squares = np.asarray(statistics["between"], np.float64)
  variance = float(statistics["variance"]) + total_squares - total**2 / count
  scores = {"rmse": math.sqrt(squared / count), "mae": float(statistics["absolute"]) / count}
  # Equal labels have no variance to explain.
  return scores | ({"r2": 1 - squared / variance} if variance > 0 else {})
