"""Defines a term, and the objective that is the weighted sum of terms."""

import contextlib
import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from distill_jax.types import Batch, Objective, Outputs, Tree, Variables

Weight = float | Callable[[jax.Array], jax.Array]
RESERVED = (
  "loss",
  "accuracy",
  "grad_norm",
  "nonfinite",
  "empty",
  "auxiliary_loss",
)  # the step's own metrics


class Term(NamedTuple):
  """One loss over (student, teacher, batch), as `weighted` takes it.

  Attributes:
    init: `(key, student_outputs, teacher_outputs) -> Variables`, the term's learned parts; it
      raises a `ValueError` where the two do not fit. The outputs may be `ShapeDtypeStruct`s.
    apply: `(params, state, student, teacher, batch, *, step, key, axis_name=None)
      -> (value, state)`. The value is `(values, where)`, unreduced with the valid ones (None:
      all), or a scalar where the loss relates rows. `axis_name` is the mapped axis under `pmap`
      or `shard_map`, else None; `weighted` always passes it.
  """

  init: Callable[..., Variables]
  apply: Callable[..., tuple[Any, Any]]


def weighted(**terms: tuple[Weight, Term]) -> Objective:
  """Returns the weighted sum of named terms; each unweighted value is a metric of that name.

  Args:
    **terms: `name=(weight, term)`; a weight is a finite number >= 0 or a schedule `step -> weight`
      (optax), a function of `TrainState.step`.

  Raises:
    ValueError: no terms, a name that the step's own metrics use, a value that is not
      (weight, term), or a weight that is negative or not finite.
  """
  if not terms:
    raise ValueError("terms: expected at least one, got none: pass hard=(1.0, labels())")
  for name, weighted_term in terms.items():
    _check_term(name, weighted_term)

  def init(key: jax.Array, student: Outputs, teacher: Outputs) -> Variables:
    params: dict[str, Tree] = {}
    state: dict[str, Tree] = {}
    for i, (name, (_, term)) in enumerate(terms.items()):
      with _error_prefix(name):
        variables = term.init(jax.random.fold_in(key, i), student, teacher)
      params[name] = variables.params
      state[name] = variables.state
    return Variables(params, state)

  def apply(
    params: Tree,
    state: Tree,
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    step: jax.Array,
    key: jax.Array,
    axis_name: str | None = None,
  ) -> tuple[dict[str, tuple[Any, Any]], Tree]:
    values: dict[str, tuple[Any, Any]] = {}
    new_state: dict[str, Tree] = {}
    for i, (name, (weight, term)) in enumerate(terms.items()):
      context = {"step": step, "key": jax.random.fold_in(key, i), "axis_name": axis_name}
      with _error_prefix(name):
        value, new_state[name] = term.apply(
          params[name], state[name], student, teacher, batch, **context
        )
      values[name] = (weight(step) if callable(weight) else weight), value
    return values, new_state

  return Objective(init, apply)


def _check_term(name: str, weighted_term: Any) -> None:
  if name in RESERVED:
    raise ValueError(
      f"{name}: expected another name for a term, got one of the step's metrics {RESERVED}"
    )
  if type(weighted_term) is not tuple or len(weighted_term) != 2:
    raise ValueError(f"{name}: expected (weight, term), got {type(weighted_term).__name__}")
  weight, term = weighted_term
  if not isinstance(term, Term):
    raise ValueError(f"{name}: expected a Term such as labels(), got {type(term).__name__}")
  if callable(weight):
    return
  scalar = isinstance(weight, numbers.Real) or (isinstance(weight, jax.Array) and weight.ndim == 0)
  if not scalar or not (math.isfinite(weight) and weight >= 0):
    raise ValueError(
      f"{name}: expected a weight that is a finite number >= 0 or a schedule, got {weight!r}"
    )


@contextlib.contextmanager
def _error_prefix(name: str) -> Iterator[None]:
  """Puts the term's name in front of a ValueError raised inside."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"term {name!r}: {error}") from error
