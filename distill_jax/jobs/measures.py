"""Chooses what a job measures, and measures the objective's terms where no example has a label."""

import functools
from typing import Any

import jax

from distill_jax import tasks
from distill_jax.cache.teacher.predictor import with_cached_outputs
from distill_jax.jobs import data
from distill_jax.jobs.config import Examples
from distill_jax.jobs.plan import Job, Network, train_data
from distill_jax.jobs.trained import teacher_variables_of, trained_teacher_of
from distill_jax.storage.student import load_student
from distill_jax.tasks.logits import AGREEMENT, TEACHER_KL
from distill_jax.tasks.objective_terms import OUTPUT, evaluate_terms
from distill_jax.train import make_init
from distill_jax.train.evaluation import Evaluated, evaluate_models
from distill_jax.train.inputs import has_labels
from distill_jax.types import Batch, Model, Objective, Outputs, Task, Variables

COMPARISONS = (AGREEMENT.name, TEACHER_KL.name)
OBJECTIVE = "objective"
"""Folder in a network's with the objective's own variables, where its terms are its scores."""


def job_task(job: Job) -> Task:
  """Returns the config's task, or the one that the student's outputs and the labels fit; that of no
  labels where none does.
  """
  task = job.config.task()
  if task is None:
    task = tasks.infer(*_first(job, job.splits.validation))
  return task or tasks.objective_terms(())


def best_of(job: Job, network: Network) -> str | None:
  """Returns the metric that chooses a network's weights; None: its task's first.

  A network that learns from labels alone has neither comparisons with a teacher nor the terms of
  the students' objective.
  """
  best = job.config.best or None
  if best is None or network.role == "student":
    return best
  names = [metric.name for metric in job_task(job).metrics]
  return best if best in names and best.split("/")[-1] not in COMPARISONS else None


def is_labeled(job: Job, examples: Examples) -> bool:
  """Returns whether the job's task has labels in a set."""
  outputs, batch = _first(job, examples)
  task = job.config.task() or tasks.infer(outputs, batch)
  if task is None:
    return False
  classes = None if task.label_classes is None else task.label_classes(outputs)
  return has_labels(data.evaluation(job.config, examples), classes, task.ignore_label)


def measure_terms(
  job: Job, network: Network, variables: Variables, examples: Examples
) -> Evaluated:
  """Returns the terms of a student's objective on a set, and how it compares with its teacher."""
  teacher_variables = teacher_variables_of(job, network)
  trained_teacher = trained_teacher_of(network, teacher_variables, train_data(job, network.role))
  objective = network.objective(trained_teacher)
  teacher = network.teacher
  if teacher is not None and network.cached:
    teacher = with_cached_outputs(teacher, job.config.cached_outputs())
  learned = _load_learned(job, network, teacher, objective)
  task = tasks.objective_terms(("loss",))

  def statistics(outputs: Outputs, batch: Batch, teacher_outputs: Outputs | None) -> Any:
    step, key = network.training.steps, jax.random.key(0)
    terms = evaluate_terms(
      objective, learned, outputs, teacher_outputs or {}, batch, step=step, key=key
    )
    return task.statistics({**outputs, OUTPUT: terms}, batch, teacher_outputs)

  return evaluate_models(
    [(network.model, variables)],
    data.evaluation(job.config, examples),
    task._replace(statistics=statistics),
    teacher=teacher and trained_teacher and (teacher, trained_teacher.variables),
  )[0]


def _load_learned(
  job: Job, network: Network, teacher: Model | None, objective: Objective
) -> Variables:
  """Returns the objective's variables from the step of the network's exported weights."""
  init = make_init(network.train_model, teacher, objective, network.training.optimizer())
  state = jax.eval_shape(init, jax.random.key(0), data.first(job.config, job.splits.train))
  like = Variables(state.params["objective"], state.model_state["objective"])
  if not jax.tree.leaves(like):
    return like
  return load_student(network.folder / OBJECTIVE, network.model._replace(variables=like))


def _first(job: Job, examples: Examples) -> tuple[Outputs, Batch]:
  """Returns the shapes of the student's outputs, and the first example."""
  student, batch = job.student_model, data.first(job.config, examples)
  variables = student.variables or jax.eval_shape(student.init, jax.random.key(0), batch)
  apply = functools.partial(student.apply, train=False, key=None)
  return jax.eval_shape(lambda v, b: apply(*v, b)[0], variables, batch), batch
