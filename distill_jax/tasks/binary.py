"""Binary classification by one logit per example."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax import reduce
from distill_jax.losses import binary_kl
from distill_jax.objectives.calls import batch_entry, has_true_label, outputs_of, valid_rows
from distill_jax.objectives.class_labels import check_ignore_label
from distill_jax.tasks.logits import AGREEMENT, OUTSIDE, TEACHER_KL, count_outside, means
from distill_jax.types import Batch, Metric, Outputs, Task

_METRICS = (
  Metric("auroc", "area under the ROC curve", "%", "max", ".2%", short="AUROC"),
  Metric("average_precision", "average precision", "%", "max", ".2%", short="AP"),
  Metric("f1", "F1 of the positive class", "%", "max", ".2%"),
  Metric("balanced_accuracy", "balanced accuracy", "%", "max", ".2%"),
  Metric("accuracy", "accuracy", "%", "max", ".2%"),
  Metric("brier", "Brier score", "", "min", ".4f"),
  Metric("nll", "negative log-likelihood", "nats", "min", ".4f", short="NLL"),
  Metric("mae", "mean absolute error of probabilities", "%", "min", ".2%", detail=2),
  AGREEMENT,
  TEACHER_KL,
)


def binary(
  *, label: str = "label", output: str = "logits", ignore_label: int | None = None
) -> Task:
  """Returns the task of one logit [B] or [B, 1] and labels 0 and 1, [B] or [B, 1].

  The positive class 1 is predicted where the logit is > 0. Labels may be integers, bools, or
  probabilities of the positive class: those of 0.5 and more then count as positive, and Brier
  score, negative log-likelihood and mean absolute error compare with the probability. A negative
  integer marks an example without a label, left out of all but the comparison with the teacher.

  Its metrics are AUROC and average precision (scikit-learn's `roc_auc_score` and
  `average_precision_score`), F1 of the positive class (0 where it neither occurs nor is predicted),
  balanced accuracy (the mean recall of the classes that occur), accuracy, Brier score, negative
  log-likelihood and mean absolute error of the probability; next to a teacher, agreement with it
  and KL(teacher || student). AUROC and average precision are left out where the labels are all of
  one class: they do not exist there.

  Args:
    label: the batch's entry with the labels.
    output: the output of both networks with the logits.
    ignore_label: a further integer that is no label (255, -100); None: negative ones only.

  >>> import jax.numpy as jnp
  >>> from distill_jax import tasks
  >>> task = tasks.binary()
  >>> outputs = {"logits": jnp.array([3.0, -1.0])}
  >>> sums = task.statistics(outputs, {"label": jnp.array([1, 1])}, None)
  >>> round(task.compute(sums)["accuracy"], 4)
  0.5
  """
  check_ignore_label(ignore_label)

  def rows(outputs: Outputs, batch: Batch):
    logits = _one_logit(outputs_of(outputs, output, "student"), output)
    target, labeled, outside = _targets(batch_entry(batch, label), logits, label, ignore_label)
    valid = jnp.ones(len(logits), bool) if "where" not in batch else jnp.asarray(batch["where"])
    return logits, target, labeled, outside & valid, valid

  def statistics(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Any]:
    logits, target, labeled, outside, valid = rows(outputs, batch)
    sums = _statistics(logits, target, labeled & valid & ~outside)
    sums[OUTSIDE] = count_outside(outside)
    if teacher is not None:
      teacher_logits = _one_logit(outputs_of(teacher, output, "teacher"), output)
      same = (logits > 0) == (teacher_logits > 0)
      divergence = binary_kl(logits[:, None], teacher_logits[:, None])
      sums["agreement"] = reduce.total(same, valid)
      sums["teacher_kl"] = reduce.total(divergence, valid)
    return sums

  def train_metrics(outputs: Outputs, batch: Batch) -> dict[str, reduce.Pair]:
    logits, target, labeled, outside, _ = rows(outputs, batch)
    where = valid_rows(batch, has_true_label(batch, labeled & ~outside))
    return {"accuracy": reduce.total((logits > 0) == (target >= 0.5), where)}

  def predict(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    logits, target, labeled, _, _ = rows(outputs, batch)
    return {
      "probability": jax.nn.sigmoid(logits),
      "logit": logits,
      "positive": target >= 0.5,
      "labeled": labeled,
    }

  return Task(
    metrics=_METRICS,
    statistics=statistics,
    compute=_compute,
    label_classes=lambda outputs: {label: 2},
    ignore_label=ignore_label,
    train_metrics=train_metrics,
    predict=predict,
    evaluate_predictions=_rank_scores,
    references=(label,),
  )


def _one_logit(logits: jax.Array, name: str) -> jax.Array:
  """Returns logits [B] in float32 or wider."""
  if logits.ndim == 2 and logits.shape[1] == 1:
    logits = logits[:, 0]
  if logits.ndim != 1 or not logits.size:
    raise ValueError(
      f"{name!r}: expected one logit per row, [rows] or [rows, 1], got {logits.shape}: use "
      "tasks.segmentation for one per pixel, and tasks.classification for more classes"
    )
  return logits.astype(reduce.common_dtype(logits.dtype, jnp.float32))


def _targets(label: jax.Array, logits: jax.Array, name: str, ignore_label: int | None):
  """Returns probabilities of the positive class, which rows are labeled, and which are neither."""
  if label.shape == (len(logits), 1):
    label = label[:, 0]
  if label.shape != logits.shape:
    raise ValueError(
      f"{name}: expected 0, 1 or a probability for each of {len(logits)} logits, got {label.dtype} "
      f"{label.shape}: use tasks.multi_label for several labels per example"
    )
  labeled = jnp.ones(label.shape, bool)
  if jnp.issubdtype(label.dtype, jnp.signedinteger):
    labeled = label >= 0
  if ignore_label is not None:
    labeled &= label != ignore_label
  target = label.astype(logits.dtype)
  outside = labeled & ~((target >= 0) & (target <= 1))
  return jnp.where(labeled & ~outside, target, 0), labeled, outside


def _statistics(logits: jax.Array, target: jax.Array, labeled: jax.Array) -> dict[str, Any]:
  probability = jax.nn.sigmoid(logits)
  predicted, positive = logits > 0, target >= 0.5
  table = (predicted & positive, predicted & ~positive, ~predicted & positive)
  return {
    "accuracy": reduce.total(predicted == positive, labeled),
    "brier": reduce.total((probability - target) ** 2, labeled),
    "nll": reduce.total(optax.sigmoid_binary_cross_entropy(logits, target), labeled),
    "mae": reduce.total(jnp.abs(probability - target), labeled),
    # True positives, false positives, false negatives, and all.
    "table": jnp.stack([(x & labeled).sum(dtype=jnp.int32) for x in table + (labeled,)]),
  }


def _compute(statistics: Mapping[str, Any]) -> dict[str, float]:
  scores = means(statistics)
  true_positive, false_positive, false_negative, number = np.asarray(
    statistics["table"], np.float64
  )
  if not number:
    return scores
  positive = true_positive + false_negative
  negative = number - positive
  recalls = []
  if positive:
    recalls.append(true_positive / positive)
  if negative:
    recalls.append((negative - false_positive) / negative)
  f1 = 2 * true_positive / max(positive + true_positive + false_positive, 1)
  return scores | {"f1": float(f1), "balanced_accuracy": float(np.mean(recalls))}


def _rank_scores(predictions: Mapping[str, Any], references: Mapping[str, Any]):
  """Returns AUROC and average precision of all labeled rows; nothing where one class is missing."""
  from sklearn.metrics import average_precision_score, roc_auc_score

  del references
  labeled = predictions["labeled"]
  positive, logit = predictions["positive"][labeled], predictions["logit"][labeled]
  if len(np.unique(positive)) < 2:
    return {}
  if np.isnan(logit).any():
    return {"auroc": math.nan, "average_precision": math.nan}
  return {
    "auroc": float(roc_auc_score(positive, logit)),
    "average_precision": float(average_precision_score(positive, logit)),
  }
