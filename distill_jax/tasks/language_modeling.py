"""Next-token prediction: perplexity and calibration over tokens, with few logits in memory at a
time.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import reduce
from distill_jax.models.llm.head import head_logits
from distill_jax.objectives.calls import batch_entry
from distill_jax.tasks.logits import (
  AGREEMENT,
  ECE,
  NLL,
  TEACHER_KL,
  calibration_error,
  logit_statistics,
  means,
  num_classes,
)
from distill_jax.types import Batch, Metric, Outputs, Task

PERPLEXITY = Metric("perplexity", "perplexity", "", "min", ".3f")


def language_modeling(*, memory: int = 2**26) -> Task:
  """Returns the task of next tokens: labels int [B, L], negative ones left out.

  Its metrics are perplexity, accuracy, negative log-likelihood per token, expected calibration
  error (15 bins) and, next to a teacher of the same vocabulary, agreement with it and KL(teacher ||
  student). Models return 'logits' [B, L, V], or 'hidden' [B, L, D] and 'head' (kernel [D, V], bias
  or None, soft-cap or None).

  Args:
    memory: bytes that one network's logits may take at once.
  """

  def statistics(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Any]:
    return _statistics(outputs, batch, teacher, memory)

  return Task(
    metrics=(
      PERPLEXITY,
      Metric("accuracy", "accuracy", "%", "max", ".2%"),
      NLL,
      ECE._replace(detail=0),
      AGREEMENT,
      TEACHER_KL,
    ),
    statistics=statistics,
    compute=_compute,
    num_classes=num_classes,
    references=("id",),
    figures=_figures,
  )


def _statistics(
  outputs: Outputs, batch: Batch, teacher: Outputs | None, memory: int
) -> dict[str, Any]:
  labels = batch_entry(batch, "label")
  vocab_size = num_classes(outputs)
  if labels.shape != _tokens_of(outputs).shape[:-1] or labels.ndim != 2:
    raise ValueError(
      f"'label': expected integers [rows, tokens], one per token of the outputs "
      f"{_tokens_of(outputs).shape}, got {labels.shape}"
    )
  if teacher is not None and num_classes(teacher) != vocab_size:
    raise ValueError(
      f"teacher: expected the student's vocabulary of {vocab_size} tokens, got "
      f"{num_classes(teacher)}"
    )
  valid = labels >= 0
  if "where" in batch:
    valid &= batch["where"][:, None]
  tokens = valid.size
  chunk = min(tokens, max(1, memory // (4 * vocab_size)))

  def chunks(x: jax.Array) -> jax.Array:
    x = x.reshape(tokens, *x.shape[2:])
    x = jnp.pad(x, ((0, -tokens % chunk),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(-1, chunk, *x.shape[1:])

  def score(part):
    rows, teacher_rows, label, valid = part
    logits = _token_logits(rows, outputs)
    teacher_logits = None if teacher is None else _token_logits(teacher_rows, teacher)
    return logit_statistics(logits, label, valid, teacher_logits)

  teacher_chunks = None if teacher is None else chunks(_tokens_of(teacher))
  parts = chunks(_tokens_of(outputs)), teacher_chunks, chunks(labels), chunks(valid)
  return jax.tree.map(lambda x: x.sum(0), jax.lax.map(score, parts))


def _tokens_of(outputs: Outputs) -> jax.Array:
  """Returns what there is one of per token: logits [B, L, V], or hidden states [B, L, D]."""
  return outputs["logits"] if "logits" in outputs else outputs["hidden"]


def _token_logits(rows: jax.Array, outputs: Outputs) -> jax.Array:
  """Returns logits [tokens, V] in float32 or wider, of rows of `_tokens_of(outputs)`."""
  if "logits" not in outputs:
    return head_logits({"hidden": rows, "head": outputs["head"]})
  return rows.astype(reduce.common_dtype(rows.dtype, jnp.float32))


def _compute(statistics: Mapping[str, Any]) -> dict[str, float]:
  scores = means(dict(statistics)) | {"ece": calibration_error(statistics["calibration"])}
  # Without a token there is no perplexity; 1 would be the best of all.
  scores["perplexity"] = float(np.exp(scores["nll"])) if statistics["nll"][1] > 0 else math.nan
  return scores


def _figures(entries, references, class_names):
  from distill_jax.tasks._class_figures import (
    calibration_figures,
  )  # matplotlib: reports alone need it

  del references, class_names
  return calibration_figures(entries)
