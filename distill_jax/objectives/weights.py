"""The student's weights against the teacher's."""

import re
from collections.abc import Callable, Mapping

import jax

from distill_jax import losses
from distill_jax.errors import suggest
from distill_jax.objectives.calls import any_output_of
from distill_jax.objectives.terms import Term
from distill_jax.types import Variables


def weights(
  loss: Callable[..., jax.Array] = losses.weight_alignment,
  *,
  layers: Mapping[str, str] | None = None,
) -> Term:
  """A loss between weights of the student and frozen ones of the teacher, both from `models.with_weights`.

      blocks = {rf"^blocks/{s - 1}/": f"blocks/{t - 1}/" for s, t in layer_map(2, 4)}
      weighted(hard=(1.0, labels()), same=(0.1, weights(layers=blocks)))

  Weights of other shapes cannot be aligned: leave them out by the pattern of `with_weights`.

  Args:
    loss: `(student, teacher) -> scalar` of two dicts, both by the student's paths.
    layers: `{pattern: replacement}`: the first pattern (`re.search`) found in a student's path is replaced there once,
      as by `re.sub`, and what comes out is the path in the teacher (as `compression.inject`). None: the same paths.

  Raises:
    ValueError: in init, a network without 'weights', or a path or shape that the teacher does not have.
  """

  def pair(student, teacher):
    own, theirs = (
      any_output_of(student, "weights", "student"),
      any_output_of(teacher, "weights", "teacher"),
    )
    sources = {name: _source(name, layers or {}) for name in own}
    for name, source in sources.items():
      if source not in theirs:
        raise ValueError(
          f"the teacher has no weights {source!r} for the student's {name!r}{suggest(source, theirs)}"
        )
      if theirs[source].shape != own[name].shape:
        raise ValueError(
          f"student {name!r} {own[name].shape} and teacher {source!r} {theirs[source].shape}: expected one shape"
        )
    return own, {name: theirs[source] for name, source in sources.items()}

  def init(key, student, teacher):
    del key
    jax.eval_shape(loss, *pair(student, teacher))
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name):
    del params, batch, step, key, axis_name
    return loss(*pair(student, teacher)), state

  return Term(init, apply)


def _source(name: str, layers: Mapping[str, str]) -> str:
  for pattern, replacement in layers.items():
    if re.search(pattern, name):
      return re.sub(pattern, replacement, name, count=1)
  return name
