"""Checks a teacher and finds its weights before anything is computed."""

from typing import Any

from distill_jax.models.variables import as_variables
from distill_jax.types import Model, Variables


def teacher_variables_of(teacher: Any, teacher_variables: Variables | None) -> Variables:
  """Returns the weights of a teacher whose outputs can be stored.

  Args:
    teacher: a frozen Model.
    teacher_variables: its weights, as in `as_variables`; None: those that the Model carries.

  Raises:
    ValueError: no Model, an EMA of the student, or no weights.
  """
  if not isinstance(teacher, Model):
    raise ValueError(
      f"teacher: expected a Model, got {type(teacher).__name__}: wrap it with from_nnx, from_linen "
      "or from_apply"
    )
  if teacher.ema_update is not None:
    raise ValueError(
      "teacher: expected a frozen Model, got an EMA of the student, whose outputs change at every "
      "step: use it live"
    )
  variables = teacher.variables if teacher_variables is None else teacher_variables
  if variables is None:
    raise ValueError(
      "teacher: expected a Model with weights, got none: pass teacher_variables=, or build the "
      "Model from trained weights"
    )
  return as_variables("teacher_variables", variables)
