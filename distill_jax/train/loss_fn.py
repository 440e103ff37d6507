"""The loss of a train step as a function of the parameters, for this package's step and for loops
of your own.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax import compat, reduce
from distill_jax.models.adapters.kinds import check_model
from distill_jax.models.adapters.outputs import AUXILIARY_LOSS
from distill_jax.models.variables import as_variables
from distill_jax.objectives.terms import RESERVED, takes_axis_name
from distill_jax.types import CACHED, Batch, Model, Objective, Outputs

Terms = dict[str, tuple[Any, Any]]


class Aux(NamedTuple):
  """What the loss function returns next to the loss.

  Attributes:
    outputs: the student's, in training mode.
    terms: (sum, count) of each term of the objective, unweighted, by name.
    model_state: `{'student': ..., 'objective': ...}` after this batch.
  """

  outputs: Outputs
  terms: dict[str, reduce.Pair]
  model_state: dict[str, Any]


def make_loss_fn(
  student: Model, teacher: Model | None, objective: Objective, *, axis_name: str | None = None
) -> Callable[..., tuple[jax.Array, Aux]]:
  """Returns `loss_fn(params, model_state, teacher_variables, batch, *, step, key) -> (loss, aux)`.

  Differentiate it with respect to `params`, in a loop and with a train state of your own:

      loss_fn = make_loss_fn(student, teacher, objective)
      (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        params, model_state, teacher.variables, batch, step=step, key=key
      )

  Args:
    student, teacher: Models. None: the objective gets no teacher outputs.
    objective: what to minimize.
    axis_name: as in `StepOptions`.

  The function's arguments:
    params, model_state: `{'student': ..., 'objective': ...}` as in `make_init`'s `TrainState`.
    teacher_variables: the teacher's `Variables`; `()` without a teacher.
    batch: arrays, rows first.
    step: int32 scalar, for schedules.
    key: typed PRNG key of this step.

  Returns:
    The function. Its loss is a float32 scalar, its `aux` an `Aux`.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> from distill_jax import models, objectives
  >>> from distill_jax.train import make_loss_fn
  >>> linear = lambda w, x: x @ w
  >>> student = models.from_apply(lambda key, x: jnp.zeros((4, 2)), linear, inputs="x")
  >>> objective = objectives.weighted(hard=(1.0, objectives.labels()))
  >>> loss_fn = make_loss_fn(student, None, objective)
  >>> batch = {"x": jnp.ones((8, 4)), "label": jnp.zeros(8, int)}
  >>> params = {"student": jnp.zeros((4, 2)), "objective": {"hard": {}}}
  >>> state = {"student": {}, "objective": {"hard": {}}}
  >>> loss, aux = loss_fn(params, state, (), batch, step=0, key=jax.random.key(0))
  >>> loss.round(4)
  Array(0.6931, dtype=float32)
  """
  check_models(student, teacher)
  loss_of_outputs = make_loss_of_outputs(student, objective, axis_name=axis_name)

  def loss_fn(params, model_state, teacher_variables, batch: Batch, *, step, key):
    batch = as_dict(batch)
    check_key(key)
    for field, tree in {"params": params, "model_state": model_state}.items():
      _check_parts(field, tree)
    teacher_outputs = apply_teacher(teacher, teacher_variables, batch)
    keys = tuple(jax.random.split(key))
    return loss_of_outputs(params, model_state, teacher_outputs, batch, step=step, keys=keys)

  return loss_fn


def as_dict(batch: Any) -> dict[str, Any]:
  """Returns a batch as a dict: JAX traces no other mapping.

  Raises:
    ValueError: it is no mapping.
  """
  if isinstance(batch, Mapping):
    return dict(batch)
  raise ValueError(
    f"batch: expected a mapping of arrays, got {type(batch).__name__}: write "
    "{'image': images, 'label': labels}"
  )


def check_models(student: Any, teacher: Any) -> None:
  """Checks that both are Models, or that the teacher is None.

  Raises:
    ValueError: one is a network of another library, for which `fit` calls the adapter.
  """
  check_model("student", student)
  if teacher is not None:
    check_model("teacher", teacher)


def make_loss_of_outputs(
  student: Model, objective: Objective, *, axis_name: str | None = None, microbatches: int = 1
) -> Callable[..., tuple[jax.Array, Aux]]:
  """Returns the loss function of teacher outputs that were computed before.

  `(params, model_state, teacher_outputs, batch, *, step, keys, denominators=None) -> (loss, Aux)`:
  `keys` are the student's and the objective's, `denominators` the terms' counts over the full
  batch, where it is one of several `microbatches`.
  """
  takes = axis_name is not None and takes_axis_name(objective.apply)
  context = {"axis_name": axis_name} if takes else {}

  def loss_of_outputs(
    params, model_state, teacher_outputs, batch, *, step, keys, denominators=None
  ):
    student_key, objective_key = keys
    inputs = with_shared_outputs(student, teacher_outputs, batch)
    outputs, student_state = student.apply(
      params["student"], model_state["student"], inputs, train=True, key=student_key
    )
    outputs = dict(outputs)
    auxiliary_loss = outputs.pop(AUXILIARY_LOSS, None)
    terms, objective_state = objective.apply(
      params["objective"],
      model_state["objective"],
      outputs,
      teacher_outputs,
      batch,
      step=step,
      key=objective_key,
      **context,
    )
    _check_names("objective", terms, RESERVED)
    if auxiliary_loss is not None:
      terms = {**terms, AUXILIARY_LOSS: (1.0, auxiliary_loss)}
    loss, pairs = _sum_terms(terms, denominators, microbatches, axis_name)
    model_state = {"student": student_state, "objective": objective_state}
    return loss, Aux(outputs, pairs, model_state)

  return loss_of_outputs


def apply_teacher(teacher: Model | None, teacher_variables: Any, batch: Batch) -> Outputs:
  """Returns the teacher's outputs in evaluation mode; `{}` without a teacher.

  Raises:
    ValueError: there is a teacher and no variables.
  """
  if teacher is None:
    return {}
  if isinstance(teacher_variables, tuple | None) and not teacher_variables:
    raise ValueError(
      "teacher_variables: expected the teacher's Variables, got none: pass them as an argument of "
      "the step"
    )
  variables = as_variables("teacher_variables", teacher_variables)
  return teacher.apply(*variables, batch, train=False, key=None)[0]


def with_shared_outputs(student: Model, teacher_outputs: Outputs, batch: Batch) -> Batch:
  """Returns the batch with the teacher's outputs that the student reads, as 'teacher/name'."""
  shared = {
    CACHED + name: teacher_outputs[name] for name in student.reads if name in teacher_outputs
  }
  return {**batch, **shared} if shared else batch


def check_key(key: Any) -> None:
  """Checks that a key is one of JAX.

  Raises:
    ValueError: it is a number or another value.
  """
  is_typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
  is_raw = getattr(key, "dtype", None) == jnp.uint32  # Of jax.random.PRNGKey.
  if not (is_typed or is_raw) or key.ndim != int(is_raw):
    raise ValueError(f"key: expected a PRNG key, got {key!r:.80}: write jax.random.key(0)")


def check_metrics(metrics: Mapping[str, Any], terms: Iterable[str]) -> None:
  """Checks that a log has room for metrics of training beside these terms.

  Raises:
    ValueError: a metric has the name of a term or of another value in the log.
  """
  _check_names("metrics", metrics, [name for name in RESERVED if name != "accuracy"] + list(terms))


def _check_parts(field: str, tree: Any) -> None:
  """Checks that a tree has the parts of a `TrainState`, and is not the student's alone."""
  if not isinstance(tree, Mapping) or not {"student", "objective"} <= tree.keys():
    got = sorted(map(str, tree)) if isinstance(tree, Mapping) else type(tree).__name__
    raise ValueError(
      f"{field}: expected {{'student': ..., 'objective': ...}}, got {got}: write state.{field}, of "
      "state = make_init(student, teacher, objective, optimizer)(key, batch)"
    )


def _check_names(field: str, names: Iterable[str], taken: Iterable[str]) -> None:
  for name in names:
    if name in taken:
      raise ValueError(
        f"{field}: expected names that the log does not use, got {name!r}: rename it; the log has "
        f"{sorted(taken)}"
      )


def count_terms(terms: dict[str, reduce.Pair]) -> dict[str, jax.Array]:
  """Returns how many values each term averages."""
  return {name: count for name, (_, count) in terms.items()}


def _sum_terms(
  terms: Terms, denominators: dict[str, jax.Array] | None, microbatches: int, axis_name: str | None
) -> tuple[jax.Array, dict[str, reduce.Pair]]:
  """Returns the loss of one device and microbatch, and each term's (sum, count).

  The mean over devices of the sum over microbatches of this loss is the full batch's.
  """
  devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  parts = []
  pairs = {}
  for name, (weight, value) in terms.items():
    if isinstance(value, tuple):
      term_sum, count = reduce.total(*value)
      denominator = count if denominators is None else denominators[name]
      if axis_name is not None:
        denominator = jax.lax.psum(denominator, axis_name)
      parts.append(_scaled(weight, devices * reduce.value((term_sum, denominator))))
      pairs[name] = term_sum, count
    else:
      parts.append(_scaled(weight, value) / microbatches)
      pairs[name] = value, jnp.ones((), jnp.float32)
  dtype = reduce.common_dtype(*parts)
  loss = jnp.zeros((), dtype)
  if axis_name is not None:
    # Varying: the gradient of a scalar equal on all devices would be divided by their number.
    loss = compat.pcast_varying(loss, axis_name)
  return sum((part.astype(dtype) for part in parts), loss), pairs


def _scaled(weight: Any, value: jax.Array) -> jax.Array:
  """Returns weight times value in the value's dtype, float32 or wider."""
  dtype = reduce.common_dtype(value.dtype, jnp.float32)
  return jnp.asarray(weight, dtype) * value.astype(dtype)
