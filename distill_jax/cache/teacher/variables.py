"""Checks a teacher and its weights before anything is computed."""

from collections.abc import Mapping
from typing import Any

import jax

from distill_jax.trees import named_leaves
from distill_jax.types import Model, Variables


def teacher_variables_of(teacher: Any, teacher_variables: Variables | None) -> Variables:
  """Returns the weights of a teacher whose outputs can be stored.

  Args:
    teacher: a frozen Model.
    teacher_variables: its weights; None: those that the Model carries.

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
  return Variables(*variables)


def check_weights(teacher: Model, variables: Variables, arrays: Mapping[str, Any]) -> None:
  """Checks that weights are the teacher's: most networks would compute with the student's as well.

  Args:
    teacher: its weights, or those that its init would create, have the expected shapes.
    variables: to be used with it.
    arrays: examples [N, ...]; only shapes and dtypes are used.

  Raises:
    ValueError: a leaf has another shape; the message names it.
  """
  reference = teacher.variables
  if reference is None:
    batch = {name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in arrays.items()}
    reference = jax.eval_shape(teacher.init, jax.random.key(0), batch)
  expected = {name: leaf.shape for name, leaf in named_leaves(tuple(reference))}
  for name, leaf in named_leaves(tuple(variables)):
    if name in expected and leaf.shape != expected[name]:
      raise ValueError(
        f"teacher_variables: expected shape {tuple(expected[name])} of {name!r}, got "
        f"{tuple(leaf.shape)}: pass the teacher's weights, not another network's"
      )
