"""Statistics of logits [rows, classes] with one label a row: what classification and language
models share.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import reduce
from distill_jax.losses import kl_divergence
from distill_jax.types import Metric, Outputs

BINS = 15
"""Confidence bins of the reliability diagram and of the expected calibration error."""

NLL = Metric("nll", "negative log-likelihood", "nats", "min", ".4f", short="NLL")
ECE = Metric("ece", "expected calibration error", "%", "min", ".2%", short="ECE")
AGREEMENT = Metric("agreement", "agreement with the teacher", "%", "max", ".2%")
TEACHER_KL = Metric("teacher_kl", "KL(teacher ‖ student)", "nats", "min", ".4f")


def num_classes(outputs: Outputs) -> int:
  """Returns the width of the logits, or of the head of a model that returns hidden states."""
  return outputs["logits"].shape[-1] if "logits" in outputs else outputs["head"][0].shape[-1]


def logit_statistics(
  logits: jax.Array,
  labels: jax.Array,
  valid: jax.Array,
  teacher_logits: jax.Array | None = None,
  *,
  bins: int = BINS,
) -> dict[str, Any]:
  """Returns sums over rows.

  Args:
    logits: [rows, classes], float32 or wider.
    labels: int [rows]; a negative one marks a row without a label, which counts in the comparison
      with the teacher only.
    valid: bool [rows], the rows that are no padding.
    teacher_logits: [rows, classes], to compare with; None: nothing is compared.
    bins: number of confidence bins.

  Returns:
    Pairs (sum, count) 'accuracy', 'nll' (nats) and, with a teacher, 'agreement' (both predict the
    same class) and 'teacher_kl' (KL(teacher || student), nats); 'calibration' [bins, 3]: examples,
    sum of their confidence, number correct. The lowest class wins a tie.
  """
  labeled = valid & (labels >= 0)
  predicted = logits.argmax(-1)
  labels = jnp.where(labels >= 0, labels, 0).astype(predicted.dtype)
  correct = predicted == labels
  log_probs = jax.nn.log_softmax(logits)
  nll = -jnp.take_along_axis(log_probs, labels[:, None], -1)[:, 0]
  confidence = jnp.exp(log_probs.max(-1))
  statistics: dict[str, Any] = {
    "accuracy": reduce.total(correct, labeled),
    "nll": reduce.total(nll, labeled),
    "calibration": _calibration(confidence, correct, labeled, bins),
  }
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
  # Two indices: `labels * classes + predicted` overflows in labels of 8 bits.
  zeros = jnp.zeros((classes, classes), jnp.int32)
  return zeros.at[jnp.where(labeled, labels, 0), predicted].add(labeled.astype(jnp.int32))


def means(statistics: dict[str, Any]) -> dict[str, float]:
  """Returns the mean of each (sum, count) pair among the statistics; 0 where nothing was
  counted.
  """
  pairs = {name: value for name, value in statistics.items() if isinstance(value, tuple)}
  return {name: float(reduce.value(pair)) for name, pair in pairs.items()}


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
