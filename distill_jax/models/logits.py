"""Checks that a network's 'logits' are no probabilities: losses apply a softmax themselves."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from distill_jax.distributed import sharding
from distill_jax.types import Batch, Model, Variables

ROWS = 8  # Enough that logits do not look like probabilities by chance.
_TOLERANCE = 1e-2  # In bfloat16 a probability is off by up to 2^-9 of itself.


def check_logits(field: str, model: Model, variables: Variables, batch: Batch) -> None:
  """Checks on a batch that the logits of a network are no probabilities.

  Args:
    field: name of the argument, for the message.
    model: a network; without an output 'logits' of two classes or more nothing is computed.
    variables: its weights.
    batch: some rows of its inputs, at least `ROWS`.

  Raises:
    ValueError: all logits are >= 0 and the sum of each row is 1.
  """
  if not _has_classes(jax.eval_shape(lambda v, b: _outputs(model, v, b), variables, batch)):
    return
  logits = sharding.gather_to_host(_outputs(model, variables, batch)["logits"])
  if is_probabilities(logits):
    raise probabilities_error(field, "probabilities: its 'logits' are all >= 0 with rows of sum 1")


def is_probabilities(logits: np.ndarray) -> bool:
  """Returns whether all values are >= 0 and those of each row (last axis) have the sum 1."""
  values = np.asarray(logits, np.float64)
  sums = values.sum(-1)
  return bool((values >= 0).all() and (abs(sums - 1) < _TOLERANCE).all())


def probabilities_error(field: str, actual: str) -> ValueError:
  """Returns the error for probabilities in the place of logits.

  Args:
    field: name of the argument.
    actual: what came.
  """
  return ValueError(
    f"{field}: expected logits, got {actual}: leave the last softmax or sigmoid out "
    "(activation=None; classifier_activation=None in keras.applications), return "
    "jnp.log(jnp.maximum(probabilities, 1e-30)), or give this output another name than 'logits'"
  )


def _outputs(model: Model, variables: Variables, batch: Batch) -> Mapping[str, Any]:
  outputs, _ = model.apply(*variables, batch, train=False, key=None)
  return outputs


def _has_classes(outputs: Mapping[str, Any]) -> bool:
  logits = outputs.get("logits")
  # Of a cache they may be an object that decodes them later.
  return isinstance(logits, jax.ShapeDtypeStruct) and logits.ndim > 1 and logits.shape[-1] > 1
