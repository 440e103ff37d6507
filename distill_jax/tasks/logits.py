"""Statistics of logits [rows, classes] with one label a row: what classification and language
models share.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import reduce
from distill_jax.losses import kl_divergence
from distill_jax.types import Metric

BINS = 15
"""Confidence bins of the reliability diagram and of the expected calibration error."""
OUTSIDE = "outside_labels"
"""The statistic that counts labels that are no class: compiled code cannot raise, `means` does."""

NLL = Metric("nll", "negative log-likelihood", "nats", "min", ".4f", short="NLL")
ECE = Metric("ece", "expected calibration error", "%", "min", ".2%", short="ECE")
AGREEMENT = Metric("agreement", "agreement with the teacher", "%", "max", ".2%")
TEACHER_KL = Metric("teacher_kl", "KL(teacher ‖ student)", "nats", "min", ".4f")


def logit_statistics(
  logits: jax.Array,
  labels: jax.Array,
  labeled: jax.Array,
  valid: jax.Array,
  teacher_logits: jax.Array | None = None,
  *,
  targets: jax.Array | None = None,
  bins: int = BINS,
) -> dict[str, Any]:
  """Returns sums over rows.

  Args:
    logits: [rows, classes], float32 or wider.
    labels: int [rows], classes.
    labeled: bool [rows], the rows with a label; others count in the comparison with the teacher
      only.
    valid: bool [rows], the rows that are no padding.
    teacher_logits: [rows, classes], to compare with; None: nothing is compared.
    targets: rows of probabilities [rows, classes], of which `labels` are the most probable
      classes; None: the labels are certain.
    bins: number of confidence bins.

  Returns:
    Pairs (sum, count) 'accuracy', 'nll' (nats) and, with a teacher, 'agreement' (both predict the
    same class) and 'teacher_kl' (KL(teacher || student), nats), with targets 'mae' (the mean
    absolute error of probabilities); 'calibration' [bins, 3]: examples, sum of their confidence,
    number correct. The lowest class wins a tie.
  """
  labeled = valid & labeled
  predicted = logits.argmax(-1)
  labels = jnp.where(labels >= 0, labels, 0).astype(predicted.dtype)
  correct = predicted == labels
  log_probs = jax.nn.log_softmax(logits)
  if targets is None:
    nll = -jnp.take_along_axis(log_probs, labels[:, None], -1)[:, 0]
  else:
    nll = -jnp.where(targets > 0, targets * log_probs, 0).sum(-1)
  confidence = jnp.exp(log_probs.max(-1))
  statistics: dict[str, Any] = {
    "accuracy": reduce.total(correct, labeled),
    "nll": reduce.total(nll, labeled),
    "calibration": _calibration(confidence, correct, labeled, bins),
  }
  if targets is not None:
    statistics["mae"] = reduce.total(jnp.abs(jnp.exp(log_probs) - targets).mean(-1), labeled)
  if teacher_logits is not None:
    same = predicted == teacher_logits.argmax(-1)
    statistics["agreement"] = reduce.total(same, valid)
    statistics["teacher_kl"] = reduce.total(kl_divergence(logits, teacher_logits), valid)
  return statistics


def confusion_matrix(
  labels: jax.Array, predicted: jax.Array, labeled: jax.Array, classes: int
) -> jax.Array:
  """Returns int32 [classes, classes], label by prediction: numbers of rows or pixels.

  Args:
    labels: integers of any width, [...].
    predicted: int, of the same shape.
    labeled: bool, of the same shape; the others do not count.
    classes: number of classes.
  """
  # The index is an int32: labels of 8 bits overflow. On a CPU a product of one-hot rows takes
  # 3 times as long with 3 classes, and 270 times with 21.
  rows = jnp.where(labeled, labels, 0).astype(jnp.int32)
  pair = rows * classes + predicted.astype(jnp.int32)
  counts = jax.ops.segment_sum(labeled.astype(jnp.int32).ravel(), pair.ravel(), classes**2)
  return counts.reshape(classes, classes)


def count_outside(outside: jax.Array, valid: jax.Array | None = None) -> jax.Array:
  """Returns the number of labels that are no class, for the statistic `OUTSIDE`."""
  return (outside if valid is None else outside & valid).sum(dtype=jnp.int32)


def means(statistics: Mapping[str, Any]) -> dict[str, float]:
  """Returns the mean of each (sum, count) pair among the statistics that counted something.

  Raises:
    ValueError: `OUTSIDE` counted labels that are no class: the scores would be wrong.
  """
  outside = int(statistics.get(OUTSIDE, 0))
  if outside:
    raise ValueError(
      f"label: expected class numbers below the number of classes, got {outside} labels that are "
      "no class: give the task its ignore_label, or correct them"
    )
  pairs = {name: value for name, value in statistics.items() if isinstance(value, tuple)}
  return {name: float(reduce.value(pair)) for name, pair in pairs.items() if pair[1] > 0}


def calibration_error(calibration: np.ndarray) -> float:
  """Returns the expected calibration error (Guo et al. 2017, equation 3) of [bins, 3] sums; 0 of no
  example.
  """
  number, confidence, correct = np.asarray(calibration, np.float64).T
  return float(np.abs(correct - confidence).sum() / max(number.sum(), 1))


def _calibration(confidence, correct, labeled, bins: int) -> jax.Array:
  # Bins are open below and closed above, as in Guo et al. 2017.
  index = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
  ones = jnp.ones_like(confidence)
  columns = jnp.stack([ones, confidence, correct.astype(confidence.dtype)], -1)
  columns = jnp.where(labeled[:, None], columns, 0)
  return jnp.zeros((bins, 3), columns.dtype).at[index].add(columns)
