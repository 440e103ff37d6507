"""Plain functions as Models, hence the modules of every other library."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.models.adapters.outputs import as_outputs, select_inputs
from distill_jax.types import Batch, Model, Outputs, Variables


def from_apply(
  init: Callable[..., Any] | None,
  apply: Callable[..., Any],
  *,
  variables: Any = None,
  inputs: str | Sequence[str] = "image",
) -> Model:
  """Plain functions as a Model: `apply(params, *inputs) -> outputs`.

  Args:
    init: `(key, *inputs) -> params`, or `-> (params, state)` if `apply` takes `state`. None: there are only
      the given `variables`.
    apply: takes `params` and the inputs; arguments of the names `state`, `train` and `key`, if it has them,
      are passed by keyword. With `state` it returns `(outputs, new state)`.
    variables: trained params, or `(params, state)`.
    inputs: the batch entry, or entries, passed in order.

  >>> model = from_apply(lambda key, x: jnp.zeros((64, 10)), lambda w, x: x.reshape(len(x), -1) @ w)
  """
  accepted = set(inspect.signature(apply).parameters) & {"state", "train", "key"}

  def as_variables(values) -> Variables:
    if "state" not in accepted:
      return Variables(values, {})
    return Variables(
      *_two(values, "with an argument `state`, init and variables must be (params, state)")
    )

  def full_init(key: jax.Array, batch: Batch) -> Variables:
    if variables is not None:
      return as_variables(jax.tree.map(jnp.copy, variables))
    if init is None:
      raise ValueError("the model has neither init nor variables: give one of them to from_apply")
    return as_variables(init(key, *select_inputs(batch, inputs)))

  def full_apply(params, state, batch, *, train: bool, key) -> tuple[Outputs, Any]:
    given = {"state": state, "train": train, "key": key}
    result = apply(
      params, *select_inputs(batch, inputs), **{name: given[name] for name in accepted}
    )
    if "state" in accepted:
      result, state = _two(
        result, "with an argument `state`, apply must return (outputs, new state)"
      )
    return as_outputs(result), state

  return Model(full_init, full_apply, as_variables(variables) if variables is not None else None)


def _two(values: Any, expected: str) -> tuple[Any, Any]:
  if not isinstance(values, (tuple, list)) or len(values) != 2:
    raise ValueError(f"{expected}, got {type(values).__name__}")
  return values[0], values[1]
