"""How a term reads its inputs and calls a loss: by name, with what the loss wants of labels, masks and axis."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.errors import suggest
from distill_jax.losses import SparseTargets
from distill_jax.types import Batch, Outputs

Names = str | tuple[str, ...]


class Call(NamedTuple):
  """A loss with everything but its inputs; `prepare` makes one.

  Attributes:
    loss: `(student, teacher, ...)`.
    wanted: which of `labels`, `where` and `axis_name` the loss takes from the step.
    hyperparameters: its other arguments.
    entries: arguments that are entries of the batch, `{argument: entry}`.
    valid: the batch entry that says which of the loss's values are valid, or None.
  """

  loss: Callable[..., jax.Array]
  wanted: frozenset[str]
  hyperparameters: dict[str, Any]
  entries: dict[str, str]
  valid: str | None

  def check(self, s, t, label_shape) -> None:
    """Raises what the loss raises for arrays of these shapes; what comes from the batch has none yet."""
    if self.entries:
      return
    rows = jax.tree.leaves(s)[0].shape[:1]
    shapes = {"labels": (label_shape, jnp.int32), "where": (rows, jnp.bool_)}
    extras = {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items() if name in self.wanted}
    jax.eval_shape(
      lambda s, t, extras: self.loss(s, t, **extras, **self.hyperparameters), s, t, extras
    )

  def value(self, s, t, batch: Batch, axis_name):
    """The loss as a term's value."""
    known, extras = None, dict(self.hyperparameters)
    extras |= {argument: batch_entry(batch, name) for argument, name in self.entries.items()}
    if "labels" in self.wanted:
      label = _integer_labels(batch)
      known, extras["labels"] = label >= 0, jnp.maximum(label, 0)
    if "where" in self.wanted:
      extras["where"] = valid_rows(batch, known)
    if "axis_name" in self.wanted:
      extras["axis_name"] = axis_name
    values = self.loss(s, t, **extras)
    if values.ndim == 0:
      return values
    if self.valid is not None:
      own = batch_entry(batch, self.valid)
      known = own if known is None else known & own
    return values, valid_rows(batch, known)


def prepare(loss, hyperparameters, *, entries=None, valid=None, several: bool = False) -> Call:
  """A `Call`, once its hyper-parameters are known to the loss and in range.

  Args:
    loss, hyperparameters, entries, valid: as in `Call`.
    several: the loss takes trees of arrays (tuples, `SparseTargets`).

  Raises:
    ValueError: an argument that the loss does not have, lacks or refuses.
  """
  entries = dict(entries or {})
  given = set(hyperparameters) | set(entries)
  wanted = frozenset(
    set(inspect.signature(loss).parameters) & {"labels", "where", "axis_name"} - given
  )
  call = Call(loss, wanted, hyperparameters, entries, valid)
  _check_arguments(call)
  if not several:
    _check_ranges(call)
  return call


def _check_arguments(call: Call) -> None:
  signature = inspect.signature(call.loss)
  given = {**call.hyperparameters, **call.entries}
  try:
    signature.bind(None, None, **dict.fromkeys(call.wanted), **given)
  except TypeError as error:
    unknown = sorted(set(given) - set(signature.parameters))
    hint = suggest(unknown[0], set(list(signature.parameters)[2:]) - call.wanted) if unknown else ""
    name = getattr(call.loss, "__name__", type(call.loss).__name__)
    raise ValueError(f"hyper-parameters of {name}: {error}{hint}") from error


def _check_ranges(call: Call) -> None:
  """Makes what the loss refuses an error when the config is read, by calling it on shapes alone.

  The real shapes are not known yet: images of each rank are tried, and only an error that names a
  hyper-parameter counts. The rest, and arrays (a class mask), wait for init.
  """
  arrays = (np.ndarray, jax.Array)
  if any(isinstance(value, arrays) and value.ndim for value in call.hyperparameters.values()):
    return
  refusals = []
  for axes in ((64,), (64, 64), (64, 64, 64)):
    shape = jax.ShapeDtypeStruct((*axes, 4096), jnp.float32)
    try:
      return call.check(shape, shape, axes)
    except Exception as error:
      refusals.append(error)
  for refusal in refusals:
    if any(re.search(rf"\b{name}\b", str(refusal)) for name in call.hyperparameters):
      raise refusal


def label_of(batch: Batch):
  if "label" not in batch:
    raise ValueError(f"this needs labels and the batch has no 'label'; it has {sorted(batch)}")
  return jnp.asarray(batch["label"])


def _integer_labels(batch: Batch):
  label = label_of(batch)
  if not jnp.issubdtype(label.dtype, jnp.integer):
    raise ValueError(
      f"this loss needs integer labels, got {label.dtype} {label.shape}: "
      "it cannot be used with mixed labels (mixup, cutmix)"
    )
  return label


def valid_rows(batch: Batch, known=None):
  """The batch's valid rows and, of those, what is `known` (bool, rows first); None where all are."""
  where = batch.get("where")
  if where is None:
    return known
  if known is None:
    return where
  rank = max(where.ndim, known.ndim)
  where, known = (x.reshape(x.shape + (1,) * (rank - x.ndim)) for x in (where, known))
  return where & known


def has_true_label(batch: Batch, known):
  """Of what is `known` (bool, rows first), that whose label is true: the student did not write the row."""
  if "generated" not in batch:
    return known
  sampled = jnp.asarray(batch["generated"])
  if sampled.dtype != jnp.bool_ or sampled.shape != known.shape[:1]:
    raise ValueError(
      f"sampled: expected rows, bool {known.shape[:1]}, got {sampled.dtype} {sampled.shape}"
    )
  return known & ~sampled.reshape(sampled.shape + (1,) * (known.ndim - 1))


def batch_entry(batch: Mapping[str, Any], name: str):
  if name not in batch:
    raise ValueError(f"the batch has no {name!r}{suggest(name, batch)}")
  return jnp.asarray(batch[name])


def outputs_of(outputs: Outputs, names: Names, whose: str):
  """The output of this name, all of it, or a tuple of those of these names."""
  if not isinstance(names, str):
    return type(names)(outputs_of(outputs, name, whose) for name in names)
  value = any_output_of(outputs, names, whose)
  if isinstance(value, SparseTargets):
    raise ValueError(
      f"the {whose}'s {names!r} keeps {value.indices.shape[-1]} of its classes (SparseTargets), and this term needs "
      "all: use objectives.sparse with a loss such as losses.sparse_kl, or a dense cache"
    )
  return value


def any_output_of(outputs: Outputs, name: str, whose: str):
  """The output of this name, an array or `SparseTargets`."""
  if not outputs:
    raise ValueError(f"there is no {whose}, or it gives no outputs: this term needs its {name!r}")
  if name not in outputs:
    raise ValueError(f"the {whose} has no output {name!r}{suggest(name, outputs)}")
  return outputs[name]
