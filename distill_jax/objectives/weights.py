"""Compares the student's weights with the teacher's."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from distill_jax import losses
from distill_jax.errors import suggest
from distill_jax.objectives.calls import any_output_of
from distill_jax.objectives.loss_checks import check_loss, name_of
from distill_jax.objectives.terms import Term
from distill_jax.types import Outputs, Variables


def weights(
  loss: Callable[..., jax.Array] = losses.weight_alignment,
  *,
  layers: Mapping[str, str] | None = None,
) -> Term:
  """Compares weights of the student with frozen ones of the teacher.

  Both networks come from `models.with_weights`.

      blocks = {rf"^blocks/{s - 1}/": f"blocks/{t - 1}/" for s, t in layer_map(2, 4)}
      weighted(hard=(1.0, labels()), same=(0.1, weights(layers=blocks)))

  Weights of other shapes cannot be aligned: leave them out by the pattern of `with_weights`.

  Args:
    loss: `(student, teacher) -> scalar` of two dicts, both by the student's paths.
    layers: `{pattern: replacement}`: the first pattern (`re.search`) in a student's path is
      replaced there once, as by `re.sub`, and the result is the path in the teacher (as in
      `compression.initialization`). None: the same paths.

  Raises:
    ValueError: at once, a loss that is no function; in init, one that returns no scalar, a network
      without 'weights', or a path or shape that the teacher does not have.

  >>> from distill_jax import objectives
  >>> term = objectives.weights(layers={"^blocks/0/": "blocks/3/"})
  >>> student = {"weights": {"blocks/0/kernel": jnp.ones((2, 2))}}
  >>> teacher = {"weights": {"blocks/3/kernel": jnp.zeros((2, 2))}}
  >>> value, _ = term.apply({}, {}, student, teacher, {}, step=0, key=None)
  >>> value  # the mean squared difference
  Array(1., dtype=float32)
  """
  check_loss(loss)
  layers = layers or {}

  def init(key, student, teacher):
    del key
    value = jax.eval_shape(loss, *_matched(student, teacher, layers))
    if getattr(value, "shape", None) != ():
      raise ValueError(f"loss: expected a scalar of {name_of(loss)}, got {value}: sum its values")
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del params, batch, step, key, axis_name
    return loss(*_matched(student, teacher, layers)), state

  return Term(init, apply)


def _matched(
  student: Outputs, teacher: Outputs, layers: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the weights of both networks, by the student's paths."""
  s_weights = any_output_of(student, "weights", "student")
  t_weights = any_output_of(teacher, "weights", "teacher")
  matched = {}
  for name, weight in s_weights.items():
    path = _teacher_path(name, layers)
    if path not in t_weights:
      raise ValueError(
        f"{path}: expected weights of the teacher for the student's {name!r}, got none"
        f"{suggest(path, t_weights)}"
      )
    if t_weights[path].shape != weight.shape:
      raise ValueError(
        f"{path}: expected the shape {weight.shape} of the student's {name!r}, got "
        f"{t_weights[path].shape} of the teacher"
      )
    matched[name] = t_weights[path]
  return s_weights, matched


def _teacher_path(name: str, layers: Mapping[str, str]) -> str:
  for pattern, replacement in layers.items():
    if re.search(pattern, name):
      return re.sub(pattern, replacement, name, count=1)
  return name
