"""Checks a teacher and finds its weights before anything is computed."""

from distill_jax.models.variables import as_variables
from distill_jax.types import Model, Variables


def teacher_variables_of(teacher: Model, teacher_variables: Variables | None) -> Variables:
  """Returns the weights of a teacher whose outputs can be stored.

  Args:
    teacher: a frozen Model.
    teacher_variables: its weights, as in `as_variables`; None: those that the Model carries.

  Raises:
    ValueError: an EMA of the student, or no weights.
  """
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
