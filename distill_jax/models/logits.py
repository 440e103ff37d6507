"""Checks that a network's 'logits' are no probabilities: losses apply a softmax themselves."""

import warnings
from typing import Any

import jax
import numpy as np

from distill_jax.distributed import sharding
from distill_jax.types import Batch, Model, Variables

ROWS = 8  # Enough that logits do not look like probabilities by chance.
MIN_VALUES = 16
"""Number of values from which all of them in [0, 1] are a sigmoid's: one logit in three of a normal
distribution is there, and those of an example depend on one another."""
MIN_RANGE = 0.5
"""Range of a class over the rows from which on values in [0, 1] are a sigmoid's: a network of a few
steps gives all rows nearly the same logits, which may lie in [0, 1] by chance."""
_UNCHANGED = ("convert_element_type", "reshape", "squeeze", "broadcast_in_dim", "transpose", "copy")
_TOLERANCE = 1e-2  # In bfloat16 a probability is off by up to 2^-9 of itself.


def check_logits(field: str, model: Model, variables: Variables, batch: Batch) -> None:
  """Checks on a batch that the logits of a network are no probabilities.

  Warns of those of a sigmoid: a network for numbers in [0, 1] may have it.

  Args:
    field: name of the argument, for the message.
    model: a network; without an output 'logits' nothing is computed.
    variables: its weights.
    batch: some rows of its inputs, at least `ROWS`.

  Raises:
    ValueError: all logits are >= 0 and the sum of each row is 1.
  """

  def apply(variables, batch):
    outputs, _ = model.apply(*variables, batch, train=False, key=None)
    logits = outputs.get("logits")
    # Of a cache they may be an object that decodes them later.
    return logits if isinstance(logits, jax.Array) and logits.ndim > 1 else None

  # Compiled as in training: quantized layers of qwix fail otherwise.
  predict = jax.jit(apply).trace(variables, batch)
  if predict.out_info is None:
    return
  logits = sharding.gather_to_host(predict.lower().compile()(variables, batch))
  if logits.shape[-1] > 1 and is_probabilities(logits):
    raise probabilities_error(field, "probabilities: its 'logits' are all >= 0 with rows of sum 1")
  # By chance an untrained student's are in [0, 1], too.
  is_trained = field != "student"
  jaxpr = predict.jaxpr.jaxpr
  if (is_trained and is_in_unit_range(logits)) or _is_sigmoid(jaxpr, jaxpr.outvars[0]):
    text = str(probabilities_error(field, "'logits' in [0, 1], as of a sigmoid"))
    warnings.warn(text, stacklevel=2)


def is_probabilities(logits: np.ndarray) -> bool:
  """Returns whether all values are >= 0 and those of each row (last axis) have the sum 1."""
  values = np.asarray(logits, np.float64)
  sums = values.sum(-1)
  return bool((values >= 0).all() and (abs(sums - 1) < _TOLERANCE).all())


def is_in_unit_range(logits: np.ndarray) -> bool:
  """Returns whether `MIN_VALUES` or more are all in [0, 1], differ by row, and are no flags."""
  values = np.asarray(logits, np.float64)
  if values.size < MIN_VALUES or np.isin(values, (0, 1)).all():
    return False
  if np.ptp(values, axis=0).max() < MIN_RANGE:
    return False
  return bool(((values >= 0) & (values <= 1)).all())


def _is_sigmoid(jaxpr: Any, variable: Any) -> bool:
  """Returns whether a sigmoid is the last computation of a variable."""
  for equation in reversed(jaxpr.eqns):
    if variable not in equation.outvars:
      continue
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    if inner is not None:  # Of a function that is jitted.
      inner = getattr(inner, "jaxpr", inner)
      return _is_sigmoid(inner, inner.outvars[equation.outvars.index(variable)])
    if equation.primitive.name not in _UNCHANGED:
      return equation.primitive.name == "logistic"
    variable = equation.invars[0]
  return False


def probabilities_error(field: str, actual: str) -> ValueError:
  """Returns the error for probabilities in the place of logits.

  Args:
    field: name of the argument.
    actual: what came.
  """
  return ValueError(
    f"{field}: expected logits, got {actual}: leave the last softmax or sigmoid out "
    "(activation=None; classifier_activation=None in keras.applications), return "
    "jnp.log(jnp.maximum(probabilities, 1e-30)), of a sigmoid jax.scipy.special.logit(p), or give "
    "this output another name than 'logits'"
  )
