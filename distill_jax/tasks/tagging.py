"""Tagging: one class per token."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import reduce
from distill_jax.objectives.calls import batch_entry, outputs_of, valid_rows
from distill_jax.objectives.class_labels import ClassLabels, check_ignore_label, class_labels
from distill_jax.tasks._class_names import checked_names
from distill_jax.tasks._entities import entity_scores, entity_types, is_iob
from distill_jax.tasks.classification import class_scores, class_statistics, train_accuracy
from distill_jax.tasks.logits import AGREEMENT, ECE, NLL, TEACHER_KL
from distill_jax.types import Batch, Metric, Outputs, Task

Decode = Callable[[np.ndarray], Sequence[str]]

_ENTITY_METRICS = (
  Metric("f1", "entity F1", "%", "max", ".2%"),
  Metric("precision", "entity precision", "%", "max", ".2%", detail=2),
  Metric("recall", "entity recall", "%", "max", ".2%", detail=2),
)
_TOKEN_METRICS = (
  Metric("accuracy", "token accuracy", "%", "max", ".2%"),
  Metric("macro_f1", "macro F1", "%", "max", ".2%"),
  Metric("macro_precision", "macro precision", "%", "max", ".2%", detail=2),
  Metric("macro_recall", "macro recall", "%", "max", ".2%", detail=2),
  NLL,
  ECE,
  AGREEMENT,
  TEACHER_KL,
)


def tagging(
  *,
  class_names: Sequence[str] = (),
  label: str = "label",
  output: str = "logits",
  ignore_label: int | None = None,
  tokens: str = "tokens",
  decode: Decode | None = None,
) -> Task:
  """Returns the task of logits [B, L, C] and labels int [B, L], negative on all tokens that do not
  count: padding, and the second and later sub-words of a word.

  Its metrics are token accuracy; macro precision, recall and F1 over the classes that occur as
  label or prediction (scikit-learn's, with `zero_division=0`); negative log-likelihood and expected
  calibration error; and, next to a teacher, agreement with it and KL(teacher || student).

  Where `class_names` are IOB tags ('O', 'B-person', 'I-person', ...; 'E-' and 'S-' too), precision,
  recall and F1 of entities come first, and the F1 of each type, 'f1/person', ... They are those of
  seqeval (the extra 'tagging') in its default mode, equal to CoNLL's script. Other names have the
  F1 of each class, 'f1/noun', ...

  A type or class that neither occurs nor is predicted has no score. Where a logit of a token that
  counts is NaN, scores of entities are NaN.

  Args:
    class_names: a name for each class; empty: numbers, and no scores of single classes.
    label: the batch's entry with the labels.
    output: the output of both networks with the logits.
    ignore_label: a further number that is no label (-100 and other negative ones never are).
    tokens: the batch's entry with token ids [B, L], for the examples of a report.
    decode: maps the ids [L] of an example to L words or parts of words, for the same; None: the
      examples show labels only.

  Raises:
    ValueError: two classes have one name, or only some are IOB tags. When it is measured: logits
      and labels that do not fit, or labels beyond the classes.

  >>> import jax.numpy as jnp
  >>> from distill_jax import tasks
  >>> task = tasks.tagging(class_names=["noun", "verb"])
  >>> outputs = {"logits": jnp.array([[[2.0, 0.0], [1.0, 0.0], [0.0, 5.0]]])}
  >>> sums = task.statistics(outputs, {"label": jnp.array([[0, 1, -1]])}, None)
  >>> scores = task.compute(sums)
  >>> scores["accuracy"], round(scores["f1/noun"], 4)
  (0.5, 0.6667)
  """
  check_ignore_label(ignore_label)
  names = checked_names(class_names)
  options = _Options(names, is_iob(names), label, output, ignore_label, tokens, decode)
  kinds = entity_types(names) if options.has_entities else names
  kind_metrics = [
    Metric(f"f1/{kind}", f"F1 of {kind}", "%", format=".2%", detail=3) for kind in kinds
  ]
  entity_metrics = _ENTITY_METRICS if options.has_entities else ()
  score_entities = functools.partial(_evaluate_predictions, options)
  return Task(
    metrics=(*entity_metrics, *_TOKEN_METRICS, *kind_metrics),
    statistics=functools.partial(_statistics, options),
    compute=functools.partial(_compute, options),
    label_classes=lambda outputs: {label: outputs_of(outputs, output, "student").shape[-1]},
    ignore_label=ignore_label,
    train_metrics=lambda outputs, batch: train_accuracy(
      outputs[output], batch, label, ignore_label
    ),
    predict=functools.partial(_predict, options),
    evaluate_predictions=score_entities if options.has_entities else None,
    references=(),
    figures=functools.partial(_figures, options),
    figure_references=(tokens, "id"),
    scores_parts=True,
  )


class _Options(NamedTuple):
  """The arguments of `tagging`, and whether its classes are IOB tags."""

  class_names: tuple[str, ...]
  has_entities: bool
  label: str
  output: str
  ignore_label: int | None
  tokens: str
  decode: Decode | None

  def read(self, outputs: Outputs, batch: Batch) -> tuple[jax.Array, ClassLabels]:
    """Returns the student's logits [B, L, C] in float32 or wider, and the labels [B, L]; those of
    rows of padding are none.
    """
    logits = outputs_of(outputs, self.output, "student")
    if logits.ndim != 3 or logits.shape[-1] < 2:
      raise ValueError(
        f"{self.output!r}: expected logits [rows, tokens, classes] of at least 2 classes, got "
        f"{logits.shape}: use tasks.classification for one class per row"
      )
    if self.class_names and len(self.class_names) != logits.shape[-1]:
      raise ValueError(
        f"class_names: expected one for each of the {logits.shape[-1]} classes, got "
        f"{len(self.class_names)}"
      )
    labels = class_labels(
      batch_entry(batch, self.label),
      logits.shape,
      where=batch.get("where"),
      entry=self.label,
      ignore_label=self.ignore_label,
    )
    labels = labels._replace(labeled=valid_rows(batch, labels.labeled))
    return logits.astype(reduce.common_dtype(logits.dtype, jnp.float32)), labels


def _statistics(
  options: _Options, outputs: Outputs, batch: Batch, teacher: Outputs | None
) -> dict[str, Any]:
  logits, labels = options.read(outputs, batch)
  teacher_logits = None
  if teacher is not None:
    teacher_logits = outputs_of(teacher, options.output, "teacher")
    if teacher_logits.shape != logits.shape:
      raise ValueError(
        f"teacher {options.output!r}: expected the student's shape {logits.shape}, got "
        f"{teacher_logits.shape}: both networks need the same tokens and classes"
      )
    teacher_logits = teacher_logits.reshape(-1, logits.shape[-1])
  return class_statistics(
    logits.reshape(-1, logits.shape[-1]),
    jnp.asarray(batch[options.label]).reshape(-1),
    labels.labeled.reshape(-1),
    teacher_logits,
    options.label,
    options.ignore_label,
  )


def _compute(options: _Options, statistics: Mapping[str, Any]) -> dict[str, float]:
  scores = class_scores(statistics)
  if options.has_entities:
    return scores
  correct, predicted, labeled = np.asarray(statistics["per_class"], np.float64).T
  both = predicted + labeled
  by_class = zip(options.class_names, 2 * correct / np.maximum(both, 1), both)
  return scores | {f"f1/{name}": float(score) for name, score, number in by_class if number}


def _predict(options: _Options, outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Returns classes and labels [B, L]; labels are -1 where they do not count, and classes where a
  logit is NaN.
  """
  logits, labels = options.read(outputs, batch)
  dtype = jnp.int16 if logits.shape[-1] < 2**15 else jnp.int32
  predicted = jnp.where(jnp.isnan(logits).any(-1), -1, logits.argmax(-1))
  true = jnp.where(labels.labeled & ~labels.outside, labels.number, -1)
  return {"class": predicted.astype(dtype), "label": true.astype(dtype)}


def _evaluate_predictions(
  options: _Options, predictions: Mapping[str, Any], references: Mapping[str, Any]
) -> dict[str, float]:
  del references
  predicted, labels = predictions["class"], predictions["label"]
  scores = entity_scores(np.maximum(predicted, 0), labels, options.class_names)
  return dict.fromkeys(scores, np.nan) if (predicted[labels >= 0] < 0).any() else scores


def _figures(
  options: _Options,
  entries: Sequence[Any],
  references: Mapping[str, Any],
  class_names: Sequence[str],
) -> Sequence[Any]:
  from distill_jax.tasks._class_figures import tag_figures  # matplotlib: reports alone need it

  return tag_figures(
    entries,
    references,
    options.class_names or tuple(class_names),
    has_entities=options.has_entities,
    tokens=options.tokens,
    decode=options.decode,
  )
