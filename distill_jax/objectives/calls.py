"""How a term reads its inputs and calls a loss: by name, with what the loss wants of labels, masks and axis."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.errors import suggest
from distill_jax.types import Outputs


def accepted(loss, hyperparameters) -> set[str]:
  return (set(inspect.signature(loss).parameters) & {"labels", "where", "axis_name"}) - set(hyperparameters)


def check_hyperparameters(loss, wanted: set[str], hyperparameters) -> None:
  """Makes what the loss refuses an error when the config is read, by calling it on shapes alone.

  The real shapes are not known yet: images of each rank are tried, and only an error that names a
  hyper-parameter counts. The rest, and arrays (a class mask), wait for init.
  """
  name = getattr(loss, "__name__", type(loss).__name__)
  signature = inspect.signature(loss)
  known = set(list(signature.parameters)[2:]) - wanted
  try:
    signature.bind(None, None, **dict.fromkeys(wanted), **hyperparameters)
  except TypeError as error:
    unknown = sorted(set(hyperparameters) - set(signature.parameters))
    hint = suggest(unknown[0], known) if unknown else ""
    raise ValueError(f"hyper-parameters of {name}: {error}{hint}") from error
  if any(isinstance(value, np.ndarray | jax.Array) and value.ndim for value in hyperparameters.values()):
    return
  refusals = []
  for axes in ((64,), (64, 64), (64, 64, 64)):
    shape = jax.ShapeDtypeStruct((*axes, 4096), jnp.float32)
    try:
      return check_call(loss, shape, shape, axes, wanted, hyperparameters)
    except Exception as error:
      refusals.append(error)
  for refusal in refusals:
    if any(re.search(rf"\b{name}\b", str(refusal)) for name in hyperparameters):
      raise refusal


def check_call(loss, s, t, label_shape, wanted: set[str], hyperparameters) -> None:
  """Raises what the loss raises for arrays of these shapes."""
  shapes = {"labels": (label_shape, jnp.int32), "where": (s.shape[:1], jnp.bool_)}
  extras = {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items() if name in wanted}
  jax.eval_shape(lambda s, t, extras: loss(s, t, **extras, **hyperparameters), s, t, extras)


def evaluate(loss, s, t, wanted: set[str], batch, axis_name, hyperparameters):
  """The loss as a term's value, with what it wants of `labels`, `where` and `axis_name`."""
  known, extras = None, dict(hyperparameters)
  if "labels" in wanted:
    label = _integer_labels(batch)
    known, extras["labels"] = label >= 0, jnp.maximum(label, 0)
  if "where" in wanted:
    extras["where"] = valid_rows(batch, s.shape[:1], known)
  if "axis_name" in wanted:
    extras["axis_name"] = axis_name
  values = loss(s, t, **extras)
  return values if values.ndim == 0 else (values, valid_rows(batch, values.shape, known))


def label_of(batch):
  if "label" not in batch:
    raise ValueError(f"this needs labels and the batch has no 'label'; it has {sorted(batch)}")
  return jnp.asarray(batch["label"])


def _integer_labels(batch):
  label = label_of(batch)
  if not jnp.issubdtype(label.dtype, jnp.integer):
    raise ValueError(
      f"this loss needs integer labels, got {label.dtype} {label.shape}: "
      "it cannot be used with mixed labels (mixup, cutmix)"
    )
  return label


def valid_rows(batch, shape, known=None):
  """The batch's valid rows, and those that are `known`, for values of this shape; None where all are."""
  where = batch.get("where")
  if where is None:
    return known
  if known is None:
    return where
  return where.reshape(where.shape + (1,) * (len(shape) - where.ndim)) & known


def entry(outputs: Outputs, name: str, whose: str):
  if name not in outputs:
    raise ValueError(f"the {whose} has no output {name!r}{suggest(name, outputs)}")
  return outputs[name]
