"""Arguments that do not fit, refused before anything is computed."""

import operator
import re
from collections.abc import Mapping
from typing import Any

import jax

from distill_jax.cache.codecs.dense import Codec, Dense
from distill_jax.trees import named_leaves
from distill_jax.types import Model, Variables


def check_teacher(teacher: Any, given: Variables | None) -> Variables:
  """The weights of a teacher whose outputs can be kept.

  Raises:
    ValueError: it is no Model, follows the student, or has no weights and none are given.
  """
  if not isinstance(teacher, Model):
    raise ValueError(
      f"teacher: expected a Model, got {type(teacher).__name__}: wrap it with from_nnx, from_linen or from_apply"
    )
  if teacher.ema_update is not None:
    raise ValueError(
      "the teacher follows the student and says something else at every step: it cannot be cached"
    )
  variables = given if given is not None else teacher.variables
  if variables is None:
    raise ValueError(
      "the teacher has no weights: pass teacher_variables=, or make the Model from trained weights"
    )
  return Variables(*variables)


def check_weights(teacher: Model, variables: Variables, arrays: Mapping[str, Any]) -> None:
  """Refuses another network's weights, the student's in the teacher's place: most networks would compute with them.

  Args:
    teacher: its own weights, or those that its init would make, have the shapes to compare.
    variables: to be used with it.
    arrays: examples [N, ...]; only shapes and dtypes are used.

  Raises:
    ValueError: a leaf has another shape; it is named.
  """
  own = teacher.variables
  if own is None:
    batch = {name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in arrays.items()}
    own = jax.eval_shape(teacher.init, jax.random.key(0), batch)
  expected = {name: leaf.shape for name, leaf in named_leaves(tuple(own))}
  for name, leaf in named_leaves(tuple(variables)):
    if name in expected and leaf.shape != expected[name]:
      raise ValueError(
        f"teacher_variables: {name!r} has shape {tuple(leaf.shape)}, the teacher's has {tuple(expected[name])}: these "
        "are another network's weights"
      )


def check_outputs(outputs: Any) -> dict[str, Codec]:
  """The outputs to keep: one at least, each with its codec; None stands for float16 logits.

  Raises:
    ValueError: none, no mapping, no codec, or a name that cannot be kept.
  """
  if outputs is None:
    return {"logits": Dense()}
  example = "such as {'logits': Dense('float16')}"
  if not isinstance(outputs, Mapping):
    raise ValueError(
      f"outputs: expected a mapping from output to codec, {example}; got {type(outputs).__name__}"
    )
  if not outputs:
    raise ValueError(f"outputs: expected at least one, {example}; got none")
  for name, codec in outputs.items():
    if not isinstance(codec, Codec):
      raise ValueError(f"outputs[{name!r}]: expected Dense, TopK or RandomSampling, got {codec!r}")
    if "@" in name and not re.fullmatch(r"[^@]+@[\w-]+", name):
      raise ValueError(
        f"outputs[{name!r}]: expected letters, digits, '_' or '-' after the one '@', as in 'logits@top8'"
      )
  return dict(outputs)


def check_count(name: str, value: Any) -> int:
  """A whole number from 1."""
  try:
    number = operator.index(value)
  except TypeError:
    number = 0
  if number < 1:
    raise ValueError(f"{name}: expected a whole number from 1, got {value!r}")
  return number


def check_part(part: tuple[int, int] | None) -> None:
  """Refuses a part that is none of so many."""
  if part is not None and not (len(part) == 2 and 0 <= part[0] < part[1]):
    raise ValueError(f"part: expected (index, count) with 0 <= index < count, got {part}")
