"""Reads weights in the forms that users have, and checks that they are the network's."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze

from distill_jax.errors import suggest
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.trees import batch_specs, named_leaves
from distill_jax.types import Batch, Model, TrainState, Variables


def as_variables(field: str, values: Any) -> Variables:
  """Returns weights as `Variables`.

  Args:
    field: name of the argument, for messages.
    values: `Variables`, or a pair of params and state; Linen's dict of collections, `{'params':
      ..., 'batch_stats': ...}`; or the params alone of a network without state.

  Raises:
    ValueError: it is a network or a result, which have variables, or no tree of arrays.
  """
  if isinstance(values, TrainState):
    raise ValueError(
      f"{field}: expected Variables, got a TrainState: write result.variables, not result.state"
    )
  if hasattr(values, "variables"):
    raise ValueError(
      f"{field}: expected Variables, got {type(values).__name__}: pass its .variables"
    )
  if isinstance(values, (tuple, list)) and len(values) == 2:
    variables = Variables(*values)
  elif isinstance(values, Mapping):
    collections = unfreeze(dict(values))
    has_collections = isinstance(collections.get("params"), Mapping)
    params = collections.pop("params") if has_collections else collections
    variables = Variables(params, collections if has_collections else {})
  else:
    variables = Variables(values, {})
  for name, leaf in named_leaves(tuple(variables)):
    if not hasattr(leaf, "dtype"):
      raise ValueError(
        f"{field}: expected Variables(params, state) of arrays, got {type(leaf).__name__} at "
        f"{_path(name)!r}: pass Variables, or {{'params': ..., 'batch_stats': ...}}"
      )
  return variables


def check_weights(
  model: Model, variables: Variables, arrays: Mapping[str, Any], field: str = "teacher_variables"
) -> Variables:
  """Checks that weights are the model's: most networks would compute with another's as well.

  Args:
    model: its weights, or those that its init would create, have the expected shapes.
    variables: to be used with it.
    arrays: examples [N, ...]; only shapes and dtypes are used.
    field: name of the argument, for messages.

  Returns:
    The expected shapes and dtypes.

  Raises:
    ValueError: a leaf is missing, unknown or has another shape; the message names it.
  """
  reference = model.variables
  if reference is None:
    reference = jax.eval_shape(model.init, jax.random.key(0), batch_specs(arrays, rows=1))
  expected = {name: np.shape(leaf) for name, leaf in named_leaves(tuple(reference))}
  actual = {name: np.shape(leaf) for name, leaf in named_leaves(tuple(variables))}
  for name in [*expected, *actual]:
    if actual.get(name) != expected.get(name):
      raise ValueError(
        f"{field}: expected {_shape_of(name, expected)}, got {_shape_of(name, actual)}: pass this "
        "network's own weights, Variables(params, state) or {'params': ..., 'batch_stats': ...}"
        f"{_hint(name, expected, actual)}"
      )
  return reference


def start_from(student: Model, values: Any, batch: Batch) -> Model:
  """Returns the student with an init that returns a copy of the given weights.

  Args:
    student: a Model.
    values: as in `as_variables`; they are cast to the dtypes that the student's init returns.
    batch: an example.

  Raises:
    ValueError: they are not the student's.
  """
  variables = as_variables("student_variables", values)
  fresh = student._replace(variables=None)
  shapes = check_weights(fresh, variables, batch, "student_variables")
  leaves = dict(named_leaves(tuple(variables)))

  def init(key: jax.Array, batch: Batch) -> Variables:
    del key, batch
    # By path: a list and a tuple of the same layers are equal weights.
    copies = [jnp.array(leaves[name], x.dtype) for name, x in named_leaves(tuple(shapes))]
    return Variables(*jax.tree.unflatten(jax.tree.structure(tuple(shapes)), copies))

  return fresh._replace(init=init)


def check_start(student: Model, variables: Variables) -> None:
  """Checks that a student starts from the weights that it carries.

  Args:
    student: a Model; without `variables` nothing is checked.
    variables: those that training starts from.

  Raises:
    ValueError: they differ: one of `init` and `variables` was replaced.
  """
  if student.variables is None:
    return
  carried, initial = (
    fingerprint(jax.tree.map(jnp.asarray, tuple(v))) for v in (student.variables, variables)
  )
  if carried != initial:
    raise ValueError(
      "student: expected an init that returns the Model's variables, got other weights: pass the "
      "weights to start from as student_variables= instead of replacing one of the two"
    )


def check_no_nan(field: str, variables: Any) -> None:
  """Checks that weights have no NaN, which no training removes.

  Args:
    field: name of the argument, for the message.
    variables: `Variables`, or () and None for none.

  Raises:
    ValueError: an array has NaN; the message names the first one.
  """
  leaves = named_leaves(tuple(variables or ()))
  names = [
    name
    for name, leaf in leaves
    if jnp.issubdtype(leaf.dtype, jnp.inexact) and bool(jnp.isnan(leaf).any())
  ]
  if names:
    raise ValueError(
      f"{field}: expected numbers, got NaN at {_path(names[0])!r} (in {len(names)} of "
      f"{len(leaves)} arrays): pass weights of a run that did not diverge"
    )


def check_trainable(field: str, params: Any) -> None:
  """Checks that all parameters can be differentiated.

  Raises:
    ValueError: one is no floating array; the message names it.
  """
  for name, leaf in named_leaves(params):
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise ValueError(
        f"{field}: expected floating parameters, got {dtype} at {name!r}: move it to the "
        "network's state, which is not differentiated"
      )


def _shape_of(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
  shape = shapes.get(name)
  return f"no {_path(name)!r}" if shape is None else f"shape {tuple(shape)} of {_path(name)!r}"


def _path(name: str) -> str:
  """Returns a leaf's path with the field's name: 'params/w' for '0/w'."""
  index, _, path = name.partition("/")
  return "/".join(filter(None, (Variables._fields[int(index)], path)))


def _hint(name: str, expected: Mapping[str, Any], actual: Mapping[str, Any]) -> str:
  others = actual if name in expected else expected
  return "" if name in others else suggest(_path(name), map(_path, others))
