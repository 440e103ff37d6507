"""Tells which metrics follow from a task's statistics, and which from the text of a network."""

from typing import Any

import jax
import numpy as np

from distill_jax.tasks.logits import OUTSIDE
from distill_jax.train.evaluation import make_eval_step
from distill_jax.train.generation import sample_text
from distill_jax.train.optimizers import evaluation_variables
from distill_jax.types import Batch, Model, Task, TrainState


def computed_metrics(task: Task, shapes: Any) -> list[str]:
  """Returns the names of the metrics that a task computes from statistics of these shapes."""
  scores = task.compute(jax.tree_util.tree_map_with_path(_some_sums, shapes))
  return [metric.name for metric in task.metrics if metric.name in scores]


def without_text(
  student: Model,
  task: Task,
  best: str | None,
  state: TrainState,
  teacher_variables: Any,
  example: Batch,
) -> Task:
  """Returns a task that generates text without its predictions, unless the metric that chooses the
  weights comes from them: text costs much to generate, once more in every evaluation.

  Args:
    student: the Model, which generates.
    task: what is measured.
    best: the metric that chooses the weights; None: the task's.
    state, teacher_variables: of the run.
    example: a batch of the evaluation.

  Raises:
    ValueError: the student cannot generate text.
  """
  jax.eval_shape(
    lambda state, batch: sample_text("student", student, evaluation_variables(state), batch),
    state,
    example,
  )
  without = task._replace(predict=None, evaluate_predictions=None, generates=False)
  shapes, _ = jax.eval_shape(make_eval_step(student, without), state, teacher_variables, example)
  of_text = {metric.name for metric in task.metrics} - set(computed_metrics(task, shapes))
  return task if (best or task.decides or task.metrics[0].name) in of_text else without


def with_text(task: Task, whole: Task | None) -> Task:
  """Returns a task with the predictions of the one that it was derived from by `without_text`."""
  if whole is None or not set(whole.metrics) <= set(task.metrics):
    return task
  return task._replace(
    predict=whole.predict,
    evaluate_predictions=whole.evaluate_predictions,
    generates=whole.generates,
  )


def _some_sums(path: Any, leaf: Any) -> np.ndarray:
  """Returns ones, so that something was counted; zeros for labels that are no class."""
  is_outside = OUTSIDE in jax.tree_util.keystr(path)
  return (np.zeros if is_outside else np.ones)(leaf.shape, leaf.dtype)
