"""What a kind of problem measures: a `Task` each, for `train.fit`, `Config.task` and
`report.write`.

    fit(..., evaluation=validation, task=tasks.multi_label())

A task needs nothing from the code that trains, runs jobs or writes reports: it is plain data and
pure functions. `Task.with_metric` adds a score of your own; `infer` chooses a task by the shapes of
outputs and labels, where that is safe.
"""

from distill_jax.errors import naming_extras

with naming_extras():
  from distill_jax.tasks._case_scores import Cases
  from distill_jax.tasks._transcripts import normalize_transcript
  from distill_jax.tasks.binary import binary
  from distill_jax.tasks.classification import classification
  from distill_jax.tasks.detection import detection
  from distill_jax.tasks.embedding import embedding
  from distill_jax.tasks.heads import heads
  from distill_jax.tasks.inference import infer
  from distill_jax.tasks.language_modeling import language_modeling
  from distill_jax.tasks.multi_label import multi_label
  from distill_jax.tasks.objective_terms import objective_terms
  from distill_jax.tasks.regression import regression
  from distill_jax.tasks.segmentation import segmentation
  from distill_jax.tasks.spans import spans
  from distill_jax.tasks.tagging import tagging
  from distill_jax.tasks.transcription import transcription
  from distill_jax.tasks.transduction import transduction
  from distill_jax.tasks.translation import translation
  from distill_jax.types import Metric, Task

__all__ = [
  "Cases",
  "Metric",
  "Task",
  "binary",
  "classification",
  "detection",
  "embedding",
  "heads",
  "infer",
  "language_modeling",
  "multi_label",
  "normalize_transcript",
  "objective_terms",
  "regression",
  "segmentation",
  "spans",
  "tagging",
  "transcription",
  "transduction",
  "translation",
]
