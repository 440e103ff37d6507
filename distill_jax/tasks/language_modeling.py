"""Next-token prediction: perplexity and calibration over tokens, with few logits in memory at a
time.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import reduce
from distill_jax.models.llm.head import head_logits
from distill_jax.objectives.calls import batch_entry, outputs_of
from distill_jax.objectives.class_labels import check_ignore_label, class_labels
from distill_jax.tasks.logits import (
  AGREEMENT,
  ECE,
  NLL,
  OUTSIDE,
  TEACHER_KL,
  calibration_error,
  count_outside,
  logit_statistics,
  means,
)
from distill_jax.types import Batch, Metric, Outputs, Task

PERPLEXITY = Metric("perplexity", "perplexity", "", "min", ".3f")


def language_modeling(*, ignore_label: int | None = None, memory: int = 2**26) -> Task:
  """Returns the task of next tokens: labels int [B, L], negative ones left out.

  Its metrics are perplexity, accuracy, negative log-likelihood per token, expected calibration
  error (15 bins) and, next to a teacher of the same vocabulary, agreement with it and KL(teacher ||
  student). Models return 'logits' [B, L, V], or 'hidden' [B, L, D] and 'head' (kernel [D, V], bias
  or None, soft-cap or None).

  Args:
    ignore_label: a further label that is left out; None: negative ones only.
    memory: bytes that one network's logits may take at once.

  >>> import jax.numpy as jnp
  >>> from distill_jax import tasks
  >>> task = tasks.language_modeling()
  >>> outputs, batch = {"logits": jnp.zeros((1, 2, 4))}, {"label": jnp.array([[3, -1]])}
  >>> round(task.compute(task.statistics(outputs, batch, None))["perplexity"], 4)  # of one token
  4.0
  """
  check_ignore_label(ignore_label)

  def statistics(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Any]:
    return _statistics(outputs, batch, teacher, ignore_label, memory)

  return Task(
    metrics=(
      PERPLEXITY,
      Metric("accuracy", "accuracy", "%", "max", ".2%"),
      NLL,
      dataclasses.replace(ECE, detail=0),
      AGREEMENT,
      TEACHER_KL,
    ),
    statistics=statistics,
    compute=_compute,
    label_classes=lambda outputs: {"label": vocabulary_size(outputs)},
    ignore_label=ignore_label,
    references=(),
    figures=_figures,
  )


def _statistics(
  outputs: Outputs,
  batch: Batch,
  teacher: Outputs | None,
  ignore_label: int | None,
  memory: int,
) -> dict[str, Any]:
  labels = batch_entry(batch, "label")
  vocab_size = vocabulary_size(outputs)
  grid = _tokens_of(outputs).shape[:-1]
  if len(grid) != 2:
    raise ValueError(f"'logits': expected [rows, tokens, vocabulary], got {(*grid, vocab_size)}")
  if teacher is not None and not {"logits", "head"} & set(teacher):
    raise ValueError(f"teacher: expected 'logits' or a 'head', got {sorted(teacher)}")
  if teacher is not None and vocabulary_size(teacher) != vocab_size:
    raise ValueError(
      f"teacher: expected the student's vocabulary of {vocab_size} tokens, got "
      f"{vocabulary_size(teacher)}"
    )
  where = batch.get("where")
  index, valid, outside = class_labels(
    labels, (*grid, vocab_size), where=where, ignore_label=ignore_label
  )
  valid &= ~outside
  if where is not None:
    valid &= where[:, None]
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
    return logit_statistics(logits, label, valid, valid, teacher_logits)

  teacher_chunks = None if teacher is None else chunks(_tokens_of(teacher))
  parts = chunks(_tokens_of(outputs)), teacher_chunks, chunks(index), chunks(valid)
  sums = jax.tree.map(lambda x: x.sum(0), jax.lax.map(score, parts))
  return sums | {OUTSIDE: count_outside(outside)}


def vocabulary_size(outputs: Outputs) -> int:
  """Returns the width of the logits, or of the head of a model that returns hidden states."""
  if "head" in outputs and "logits" not in outputs:
    return outputs["head"][0].shape[-1]
  return outputs_of(outputs, "logits", "model").shape[-1]


def _tokens_of(outputs: Outputs) -> jax.Array:
  """Returns what there is one of per token: logits [B, L, V], or hidden states [B, L, D]."""
  return outputs["logits"] if "logits" in outputs else outputs["hidden"]


def _token_logits(rows: jax.Array, outputs: Outputs) -> jax.Array:
  """Returns logits [tokens, V] in float32 or wider, of rows of `_tokens_of(outputs)`."""
  if "logits" not in outputs:
    return head_logits({"hidden": rows, "head": outputs["head"]})
  return rows.astype(reduce.common_dtype(rows.dtype, jnp.float32))


def _compute(statistics: Mapping[str, Any]) -> dict[str, float]:
  scores = means(statistics)
  if "nll" not in scores:
    return scores  # Without a token there is no perplexity; 1 would be the best of all.
  return scores | {
    "ece": calibration_error(statistics["calibration"]),
    "perplexity": float(np.exp(scores["nll"])),
  }


def _figures(entries, references, class_names):
  from distill_jax.tasks._class_figures import (
    calibration_figures,
  )  # matplotlib: reports alone need it

  del references, class_names
  return calibration_figures(entries)
