"""Several heads of one network, each with a task of its own."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from distill_jax.types import Batch, Outputs, Task


def heads(main: Task, /, **others: Task) -> Task:
  """Returns the task of a network with several heads.

      tasks.heads(
        tasks.classification(),
        type=tasks.classification(label="type", output="type"),
        score=tasks.regression(label="score", output="score"),
      )

  The metrics of the main task keep their names; those of another are 'type/accuracy', ... The first
  metric of the main task decides which weights are kept, unless `best=` names another.

  Args:
    main: of the head that heads the report, with its figures.
    **others: `name=task`; each task names its own output and entry of the batch.

  Raises:
    ValueError: no other task, or ignore labels that differ.

  >>> from distill_jax import tasks
  >>> depth = tasks.regression(label="depth", output="depth")
  >>> task = tasks.heads(tasks.classification(), depth=depth)
  >>> task.metrics[0].name
  'accuracy'
  """
  if not others:
    raise ValueError("others: expected at least one further task, got none: use the task itself")
  tasks = {"": main} | {f"{name}/": task for name, task in others.items()}
  metrics = [
    metric if not prefix else _prefixed(metric, prefix)
    for prefix, task in tasks.items()
    for metric in task.metrics
  ]

  def statistics(outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Any]:
    return {name: task.statistics(outputs, batch, teacher) for name, task in tasks.items()}

  def compute(sums: Mapping[str, Any]) -> dict[str, float]:
    return _join({name: task.compute(sums[name]) for name, task in tasks.items()})

  def label_classes(outputs: Outputs) -> dict[str, int | None]:
    entries: dict[str, int | None] = {}
    for task in tasks.values():
      entries |= {} if task.label_classes is None else task.label_classes(outputs)
    return entries

  return Task(
    metrics=tuple(metrics),
    statistics=statistics,
    compute=compute,
    label_classes=label_classes,
    ignore_label=_ignore_label(tasks),
    generates=any(task.generates for task in tasks.values()),
    decides=main.decides,
    groups=next((task.groups for task in tasks.values() if task.groups), ""),
    references=tuple(dict.fromkeys(name for task in tasks.values() for name in task.references)),
    **_train_metrics(tasks),
    **_predictions(tasks),
    **_figures(main),
  )


def _prefixed(metric, prefix: str):
  title = f"{metric.title} of {prefix[:-1]}"
  short = metric.short and f"{metric.short} of {prefix[:-1]}"
  return dataclasses.replace(metric, name=prefix + metric.name, title=title, short=short)


def _join(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the values of all tasks under their prefixes."""
  return {f"{prefix}{name}": x for prefix, part in values.items() for name, x in part.items()}


def _ignore_label(tasks: Mapping[str, Task]) -> int | None:
  values = {task.ignore_label for task in tasks.values() if task.ignore_label is not None}
  if len(values) > 1:
    raise ValueError(
      f"ignore_label: expected one for all heads, got {sorted(values)}: renumber one of the entries"
    )
  return values.pop() if values else None


def _train_metrics(tasks: Mapping[str, Task]) -> dict[str, Any]:
  functions = {name: task.train_metrics for name, task in tasks.items() if task.train_metrics}
  if not functions:
    return {}
  return {
    "train_metrics": lambda outputs, batch: _join(
      {name: function(outputs, batch) for name, function in functions.items()}
    )
  }


def _predictions(tasks: Mapping[str, Task]) -> dict[str, Any]:
  """Returns `predict` and `evaluate_predictions` of the tasks that have them."""
  predictors = {name: task.predict for name, task in tasks.items() if task.predict}
  scorers = {
    name: task.evaluate_predictions for name, task in tasks.items() if task.evaluate_predictions
  }

  def predict(outputs: Outputs, batch: Batch) -> dict[str, Any]:
    return _join({name: function(outputs, batch) for name, function in predictors.items()})

  def evaluate_predictions(predictions, references) -> dict[str, float]:
    parts = {}
    for prefix, scorer in scorers.items():
      own = {
        name.removeprefix(prefix): x for name, x in predictions.items() if name.startswith(prefix)
      }
      parts[prefix] = scorer(own, references)
    return _join(parts)

  if not scorers:
    return {"predict": predict} if predictors else {}
  return {
    "predict": predict,
    "evaluate_predictions": evaluate_predictions,
    "scores_parts": all(tasks[name].scores_parts for name in scorers),
  }


def _figures(main: Task) -> dict[str, Any]:
  """Returns the figures of the main task, of its own statistics."""
  if main.figures is None:
    return {}
  figures = main.figures

  def main_figures(entries, references, class_names):
    own = [
      entry._replace(statistics=None if entry.statistics is None else entry.statistics[""])
      for entry in entries
    ]
    return figures(own, references, class_names)

  return {"figures": main_figures, "figure_references": main.figure_references}
