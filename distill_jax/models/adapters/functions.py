"""Turns plain functions into Models, and with them the modules of every other library."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.models.adapters.kinds import wrong_kind
from distill_jax.models.adapters.outputs import as_outputs, select_inputs
from distill_jax.types import Batch, Model, Outputs, Variables


def from_apply(
  init: Callable[..., Any] | None,
  apply: Callable[..., Any],
  *,
  variables: Any = None,
  inputs: str | Sequence[str] = "image",
) -> Model:
  """Returns a Model of plain functions: `apply(params, *inputs) -> outputs`.

  Args:
    init: `(key, *inputs) -> params`, or `-> (params, state)` if `apply` takes `state`. None: the
      model has only `variables`.
    apply: function of `params` and the inputs. Arguments named `state`, `train` and `key`, if it
      has them, are passed by keyword. With `state` it returns `(outputs, new state)`.
    variables: trained params, or `(params, state)`; None: the model is initialized by `init`.
    inputs: the batch entry, or entries, to pass in order.

  Raises:
    ValueError: no function; neither `init` nor `variables`; `variables` that are no pair where
      `apply` takes `state`; in init and apply, results that are none.

  >>> model = from_apply(lambda key, x: jnp.zeros((64, 10)), lambda w, x: x.reshape(len(x), -1) @ w)
  """
  if not callable(apply):
    raise wrong_kind("apply", "a function (params, *inputs) -> outputs", apply)
  if init is not None and not callable(init):
    raise wrong_kind("init", "a function (key, *inputs) -> params or None", init)
  arguments = list(inspect.signature(apply).parameters)
  if arguments and arguments[0] in ("key", "rng", "rngs"):
    raise ValueError(
      "apply: expected a function (params, *inputs) -> outputs, got one that begins with "
      f"{arguments[0]!r}: write from_apply(init, apply), in this order"
    )
  if init is None and variables is None:
    raise ValueError(
      "init, variables: expected one of them in from_apply, got neither: pass init, or the weights"
    )
  accepted = set(arguments) & {"state", "train", "key"}

  def as_variables(values) -> Variables:
    if "state" not in accepted:
      return Variables(values, {})
    return Variables(*_pair(values, "variables: expected (params, state), as apply takes `state`"))

  def init_model(key: jax.Array, batch: Batch) -> Variables:
    if variables is not None:
      return as_variables(jax.tree.map(jnp.copy, variables))
    assert init is not None
    return as_variables(init(key, *select_inputs(batch, inputs)))

  def apply_model(params, state, batch, *, train: bool, key) -> tuple[Outputs, Any]:
    options = {"state": state, "train": train, "key": key}
    options = {name: options[name] for name in accepted}
    result = apply(params, *select_inputs(batch, inputs), **options)
    if "state" in accepted:
      result, state = _pair(result, "apply: expected (outputs, new state), as it takes `state`")
    return as_outputs(result), state

  return Model(init_model, apply_model, None if variables is None else as_variables(variables))


def _pair(values: Any, expected: str) -> tuple[Any, Any]:
  if not isinstance(values, (tuple, list)) or len(values) != 2:
    raise ValueError(f"{expected}, got {type(values).__name__}")
  return values[0], values[1]
