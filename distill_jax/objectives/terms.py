"""Defines a term, and the objective that is the weighted sum of terms."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from distill_jax.objectives.hyperparameters import Number, at_step, check_number
from distill_jax.objectives.left_out import collect_left_out, name_term
from distill_jax.types import Batch, Objective, Outputs, Tree, Variables

# The names of the step's own metrics, and of other values in a line of metrics.jsonl.
RESERVED = (
  "loss",
  "accuracy",
  "grad_norm",
  "learning_rate",
  "nonfinite",
  "empty",
  "auxiliary_loss",
  "step",
  "phase",
  "examples_per_second",
  "sparsity",
  "line_number",
  "checksum",
)


class Term(NamedTuple):
  """One loss over (student, teacher, batch), as `weighted` takes it.

  Attributes:
    init: `(key, student_outputs, teacher_outputs) -> Variables`, the term's learned parts; it
      raises a `ValueError` where the two do not fit. The outputs may be `ShapeDtypeStruct`s.
    apply: `(params, state, student, teacher, batch, *, step, key, axis_name=None)
      -> (value, state)`. The value is `(values, where)`, unreduced with the valid ones (None:
      all), or a scalar where the loss relates rows. `axis_name` is the mapped axis under `pmap`
      or `shard_map`, else None; a term that does not relate rows may leave the argument out.

  >>> from distill_jax import objectives
  >>> from distill_jax.types import Variables
  >>> def apply(params, state, student, teacher, batch, *, step, key):
  ...   return ((student["score"] - batch["score"]) ** 2, None), state
  >>> term = objectives.Term(lambda key, student, teacher: Variables({}, {}), apply)
  >>> objective = objectives.weighted(squared=(1.0, term))
  >>> student, batch = {"score": jnp.array([1.0, 2.0])}, {"score": jnp.array([1.0, 0.0])}
  >>> term.apply({}, {}, student, {}, batch, step=0, key=None)
  ((Array([0., 4.], dtype=float32), None), {})
  """

  init: Callable[..., Variables]
  apply: Callable[..., tuple[Any, Any]]


def weighted(**terms: tuple[Number, Term]) -> Objective:
  """Returns the weighted sum of named terms; each unweighted value is a metric of that name.

  What a term leaves out of a batch is a metric, too, of weight 0: 'name/too_long' of `ctc`.
  What a term raises, in `init` or `apply`, becomes a `ValueError` that begins with its name.

  Args:
    **terms: `name=(weight, term)`; a weight is a finite number >= 0 or a schedule `step -> weight`
      (optax), a function of `TrainState.step`.

  Raises:
    ValueError: no terms, a name that the step's own metrics use, a value that is not
      (weight, term), a weight that is negative or not finite, or weights that are all 0.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> from distill_jax import losses, objectives
  >>> student, teacher = {"logits": jnp.zeros((2, 3))}, {"logits": jnp.eye(2, 3)}
  >>> batch, key = {"label": jnp.array([0, 1])}, jax.random.key(0)
  >>> objective = objectives.weighted(
  ...   hard=(0.1, objectives.labels()),
  ...   soft=(0.9, objectives.logits(losses.kl_divergence, temperature=4.0)),
  ... )
  >>> params, state = objective.init(key, student, teacher)
  >>> terms, state = objective.apply(params, state, student, teacher, batch, step=0, key=key)
  >>> {name: weight for name, (weight, value) in terms.items()}
  {'hard': 0.1, 'soft': 0.9}
  """
  if not terms:
    raise ValueError("terms: expected at least one, got none: pass hard=(1.0, labels())")
  for name, weighted_term in terms.items():
    _check_term(name, weighted_term)
  if all(not callable(weight) and weight == 0 for weight, _ in terms.values()):
    raise ValueError(
      f"terms: expected a weight above 0, got 0 for all of {list(terms)}: nothing would be trained"
    )

  weights = {name: weight for name, (weight, _) in terms.items()}
  parts = {name: term for name, (_, term) in terms.items()}

  def init(key: jax.Array, student: Outputs, teacher: Outputs) -> Variables:
    for name, weight in weights.items():
      with _error_prefix(name):
        check_number("weight", weight, low=0)  # In `fit` also at later steps.
    return init_parts(parts, key, student, teacher)

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
    with collect_left_out() as fractions:
      values, new_state = apply_parts(
        parts, params, state, student, teacher, batch, step=step, key=key, axis_name=axis_name
      )
    terms = {name: (at_step(weights[name], step), x) for name, x in values.items()}
    return terms | {name: (0.0, x) for name, x in fractions.items()}, new_state

  return Objective(init, apply)


def init_parts(
  parts: Mapping[str, Term], key: jax.Array, student: Outputs, teacher: Outputs
) -> Variables:
  """Returns the variables of named terms by name; what a term raises begins with its name."""
  params: dict[str, Tree] = {}
  state: dict[str, Tree] = {}
  for i, (name, term) in enumerate(parts.items()):
    with _error_prefix(name):
      variables = term.init(jax.random.fold_in(key, i), student, teacher)
    params[name] = variables.params
    state[name] = variables.state
  return Variables(params, state)


def apply_parts(
  parts: Mapping[str, Term],
  params: Tree,
  state: Tree,
  student: Outputs,
  teacher: Outputs,
  batch: Batch,
  *,
  step: jax.Array,
  key: jax.Array,
  axis_name: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tree]]:
  """Returns values and new states of named terms by name; each has its own key."""
  values: dict[str, Any] = {}
  new_state: dict[str, Tree] = {}
  _check_parts("params", params, parts)
  _check_parts("state", state, parts)
  for i, (name, term) in enumerate(parts.items()):
    context: dict[str, Any] = {"step": step, "key": jax.random.fold_in(key, i)}
    if takes_axis_name(term.apply):
      context["axis_name"] = axis_name
    with _error_prefix(name), name_term(name):
      values[name], new_state[name] = _pair(
        term.apply(params[name], state[name], student, teacher, batch, **context)
      )
  return values, new_state


def takes_axis_name(apply: Callable) -> bool:
  """Returns whether a function of a term or an objective has the argument `axis_name`."""
  parameters = inspect.signature(apply).parameters.values()
  return any(p.name == "axis_name" or p.kind is p.VAR_KEYWORD for p in parameters)


def _check_parts(field: str, tree: Tree, terms: Mapping[str, Any]) -> None:
  """Checks that the objective's parameters or state are those of its terms."""
  names = list(tree) if isinstance(tree, Mapping) else type(tree).__name__
  if not isinstance(tree, Mapping) or set(tree) != set(terms):
    raise ValueError(
      f"objective: expected {field} of the terms {list(terms)}, got {names}: use those of "
      "objective.init, or of make_init's state"
    )


def _check_term(name: str, weighted_term: Any) -> None:
  if name in RESERVED:
    raise ValueError(
      f"{name}: expected another name for a term, got one of the names in a log {RESERVED}"
    )
  if type(weighted_term) is not tuple or len(weighted_term) != 2:
    raise ValueError(
      f"{name}: expected (weight, term), got {type(weighted_term).__name__}: "
      f"write {name}=(1.0, labels())"
    )
  weight, term = weighted_term
  if not isinstance(term, Term):
    raise ValueError(
      f"{name}: expected (weight, term) with a Term such as labels(), got "
      f"{type(term).__name__}: write {name}=(1.0, labels())"
    )
  check_number(f"{name}: weight", weight, low=0)


def _pair(result: Any) -> tuple[Any, Any]:
  """Returns what a term's `apply` returned, if it is (value, state)."""
  if not isinstance(result, tuple) or len(result) != 2:
    raise ValueError(f"apply: expected (value, state), got {type(result).__name__}")
  return result


@contextlib.contextmanager
def _error_prefix(name: str) -> Iterator[None]:
  """Puts the term's name in front of what is raised inside, as a ValueError."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"term {name!r}: {error}") from error
  except (ArithmeticError, MemoryError, RuntimeError) as error:
    error.add_note(f"term {name!r}")  # Of the run, not of its arguments: the type matters.
    raise
  except Exception as error:
    raise ValueError(f"term {name!r}: {type(error).__name__}: {error}") from error
