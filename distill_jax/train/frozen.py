"""Finds batch statistics that training changes in layers that the optimizer freezes."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Var

from distill_jax.models.batch_dependencies import entries_read
from distill_jax.train.optimizers import apply_optimizer, as_optimizer
from distill_jax.trees import named_leaves
from distill_jax.types import Batch, Model, TrainState

_PREFIX = "student/"


def warn_of_frozen_statistics(
  student: Model, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch
) -> None:
  """Warns where the optimizer freezes all parameters of a layer and its statistics still change.

  A layer then normalizes by each batch in training and by moved statistics in evaluation. Only
  shapes are computed: an update of a frozen parameter is one that depends on no gradient.

  Args:
    student, optimizer: as in `make_train_step`.
    state: the initial train state.
    batch: an example.
  """
  params = [name.removeprefix(_PREFIX) for name in _student_params(state)]
  layers = {
    name: layer
    for name, _ in named_leaves(state.model_state["student"])
    if (layer := _layer_of(name, params))
  }
  if not layers:
    return
  trained = _trained_params(optimizer, state)
  frozen = [
    name
    for name, layer in layers.items()
    if not any(param.startswith(layer) and param in trained for param in params)
  ]
  changing = [name for name in frozen if _changes(student, state, batch, name)]
  if changing:
    warnings.warn(
      f"optimizer: it freezes the parameters of layers whose statistics training changes, "
      f"{_shorten(changing)}: keep these layers in evaluation mode: in Keras layer.trainable = "
      "False, in NNX use_running_average=True (or from_nnx(trainable=...)), elsewhere call them "
      "with train=False (from_linen(call=...))",
      UserWarning,
      stacklevel=2,
    )


def _student_params(state: TrainState) -> list[str]:
  return [name for name, _ in named_leaves(state.params) if name.startswith(_PREFIX)]


def _layer_of(statistic: str, params: list[str]) -> str:
  """Returns the path, with '/' at its end, of the nearest layer around a statistic that has
  parameters; '' where that is the network.
  """
  path = statistic.split("/")[:-1]
  # Linen's state begins with the name of a collection.
  for parts in (path, path[1:]):
    for count in range(len(parts), 0, -1):
      layer = "/".join(parts[:count]) + "/"
      if any(param.startswith(layer) for param in params):
        return layer
  return ""


def _trained_params(optimizer: optax.GradientTransformation, state: TrainState) -> set[str]:
  """Returns the names of the student's parameters whose updates depend on a gradient."""
  extended = as_optimizer(optimizer)
  loss = jnp.zeros(())

  def updates(grads, opt_state, params):
    return jax.tree.leaves(apply_optimizer(extended, grads, opt_state, params, loss)[0])

  shapes = jax.eval_shape(lambda x: x, (state.params, state.opt_state))
  jaxpr = jax.make_jaxpr(updates)(shapes[0], shapes[1], shapes[0]).jaxpr
  names = [name for name, _ in named_leaves(state.params)]
  # Forward, once over all equations: to look back from each parameter takes seconds.
  of_gradients = set(jaxpr.invars[: len(names)])
  for equation in jaxpr.eqns:
    if any(isinstance(x, Var) and x in of_gradients for x in equation.invars):
      of_gradients.update(equation.outvars)
  return {
    name.removeprefix(_PREFIX)
    for name, update in zip(names, jaxpr.outvars, strict=True)
    if isinstance(update, Var) and update in of_gradients
  }


def _changes(student: Model, state: TrainState, batch: Batch, statistic: str) -> bool:
  """Returns whether a statistic depends on the batch after a step."""
  variables = (state.params["student"], state.model_state["student"])

  def apply(variables, batch) -> Any:
    key = jax.random.key(0)
    new_state = student.apply(*variables, batch, train=True, key=key)[1]
    return dict(named_leaves(new_state))[statistic]

  return bool(entries_read(apply, variables, batch))


def _shorten(names: list[str]) -> str:
  return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
