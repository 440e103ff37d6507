"""Calls a loss for a term: reads outputs, labels, masks and entries of the batch by name."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.errors import suggest
from distill_jax.losses import SparseTargets
from distill_jax.objectives.class_labels import record
from distill_jax.objectives.hyperparameters import (
  at_step,
  check_types,
  numbers_at_steps,
  step_in_error,
)
from distill_jax.objectives.loss_checks import (
  check_free,
  check_loss,
  check_names,
  check_rows,
  check_values,
  mask_error,
  name_of,
)
from distill_jax.types import Batch, Outputs

Names = str | tuple[str, ...]
STEP_ARGUMENTS = frozenset({"labels", "where", "axis_name"})


class LossCall(NamedTuple):
  """A loss with all arguments but the two sides; `prepare` builds it.

  Attributes:
    loss: `(student, teacher, ...)`.
    step_arguments: which of `labels`, `where` and `axis_name` the loss takes from the step.
    hyperparameters: its other arguments.
    schedules: which of the hyper-parameters are schedules of the step.
    entries: arguments that are entries of the batch, `{argument: entry}`.
    valid: the entry of the batch that marks the loss's valid values; None: no entry.
  """

  loss: Callable[..., jax.Array]
  step_arguments: frozenset[str]
  hyperparameters: dict[str, Any]
  schedules: frozenset[str]
  entries: dict[str, str]
  valid: str | None

  def check(self, s: Any, t: Any, label_shape: tuple[int, ...]) -> None:
    """Raises what the loss raises for arrays of these shapes, such as a value out of its range.

    With `entries` the first step checks instead: the shapes of entries are not known before.
    """
    if self.entries:
      return
    rows = jax.tree.leaves(s)[0].shape[:1]
    shapes = {
      "labels": jax.ShapeDtypeStruct(label_shape, jnp.int32),
      "where": jax.ShapeDtypeStruct(rows, jnp.bool_),
    }
    extras = {name: shape for name, shape in shapes.items() if name in self.step_arguments}
    for step, constants in numbers_at_steps(self.hyperparameters, self.schedules):
      with step_in_error(step, self.schedules):
        values = jax.eval_shape(
          lambda s, t, extras, constants=constants: self.loss(s, t, **extras, **constants),
          s,
          t,
          extras,
        )
    check_values(self.loss, values, rows[0])
    if self.schedules:
      first = jax.ShapeDtypeStruct((), jnp.int32)
      jax.eval_shape(lambda s, t, extras, step: self.at(step)(s, t, **extras), s, t, extras, first)

  def at(self, step: jax.Array) -> Callable[..., jax.Array]:
    """Returns `(student, teacher, **extras) -> values`, the loss at this step."""
    scheduled = {name: at_step(self.hyperparameters[name], step) for name in self.schedules}
    hyperparameters = self.hyperparameters | scheduled

    def loss(s: Any, t: Any, **extras: Any) -> jax.Array:
      try:
        return self.loss(s, t, **extras, **hyperparameters)
      except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        if not self.schedules:
          raise
        raise ValueError(
          f"{', '.join(sorted(self.schedules))}: expected a number, got a schedule: "
          f"{name_of(self.loss)} needs its value before it is traced"
        ) from error

    return loss

  def mask(self, batch: Batch) -> jax.Array | None:
    """Returns which values count, bool, rows first; None: all."""
    mask = None
    if "labels" in self.step_arguments:
      mask = _integer_labels(batch) >= 0
    if self.valid is not None:
      valid = batch_entry(batch, self.valid)
      mask = valid if mask is None else mask & valid
    return valid_rows(batch, mask)

  def value(
    self, s: Any, t: Any, batch: Batch, step: Any, axis_name: Any, error: Callable = mask_error
  ) -> Any:
    """Returns `(values, where)`, or a scalar; `error` makes that of a mask that does not fit."""
    mask = self.mask(batch)
    extras = {argument: batch_entry(batch, name) for argument, name in self.entries.items()}
    s, t, extras = blank(mask, (s, t, extras))
    if "labels" in self.step_arguments:
      labels = _integer_labels(batch)
      if getattr(s, "shape", ())[:-1] == labels.shape:
        record("label", s.shape[-1])
      extras["labels"] = jnp.maximum(labels, 0)
    if "where" in self.step_arguments:
      extras["where"] = mask
    loss = self.at(step)
    if "axis_name" in self.step_arguments:
      loss = functools.partial(loss, axis_name=axis_name)
    values = loss(s, t, **extras)
    check_values(self.loss, values, len(jax.tree.leaves(s)[0]))
    if mask is not None and values.ndim and mask.shape != values.shape[: mask.ndim]:
      raise error(self.loss, values.shape, mask.shape)
    check_rows(lambda x: loss(x[0], x[1], **x[2]), self.loss, (s, t, extras), values.shape)
    if values.ndim:
      return values, mask
    if mask is not None and "where" not in self.step_arguments:
      raise ValueError(
        f"loss: expected one value a row of a batch with masked rows, got a scalar of "
        f"{name_of(self.loss)}: return values [rows], or take an argument `where`, bool [rows]"
      )
    return values


def prepare(
  loss: Callable[..., jax.Array],
  hyperparameters: Mapping[str, Any],
  *,
  entries: Mapping[str, str] | None = None,
  valid: str | None = None,
) -> LossCall:
  """Returns a `LossCall` whose arguments the loss has by name.

  The ranges of their values are checked by `LossCall.check`, which knows the outputs' shapes.

  Args:
    loss, hyperparameters, entries, valid: as in `LossCall`.

  Raises:
    ValueError: it is no loss, has no argument of a name, requires one that is missing, or a value
      has another type than it declares.
  """
  check_loss(loss)
  check_free(loss, hyperparameters, STEP_ARGUMENTS)
  entries = dict(entries or {})
  passed = set(hyperparameters) | set(entries)
  step_arguments = STEP_ARGUMENTS & set(inspect.signature(loss).parameters) - passed
  check_names(loss, step_arguments, passed)
  schedules = check_types(loss, hyperparameters)
  return LossCall(loss, step_arguments, dict(hyperparameters), schedules, entries, valid)


def blank(mask: jax.Array | None, tree: Any) -> Any:
  """Returns outputs with 0 where the mask is False, so that no NaN from there reaches a gradient.

  Args:
    mask: bool, rows first; None: all count.
    tree: arrays, rows first. Where the mask has other axes than an array, rows without any valid
      value are blanked.
  """
  if mask is None:
    return tree

  def leaf(x):
    fits = mask.shape == x.shape[: mask.ndim]
    return reduce.blank(mask if fits else mask.reshape(len(mask), -1).any(1), x)

  return jax.tree.map(leaf, tree)


def label_of(batch: Batch) -> jax.Array:
  """Returns the batch's labels; raises a `ValueError` where it has none."""
  if "label" not in batch:
    raise ValueError(f"label: expected labels in the batch, got only {sorted(batch)}")
  return jnp.asarray(batch["label"])


def _integer_labels(batch: Batch) -> jax.Array:
  label = label_of(batch)
  if label.dtype == jnp.bool_:
    return label.astype(jnp.int32)
  if not jnp.issubdtype(label.dtype, jnp.integer):
    hint = "write label.astype(np.int32) for class numbers"
    if label.ndim > 1:
      hint = "write label.argmax(-1) for one-hot rows; mixed ones (mixup, CutMix) have no class"
    raise ValueError(f"label: expected integers, got {label.dtype} {label.shape}: {hint}")
  return label


@overload
def valid_rows(batch: Batch, mask: jax.Array) -> jax.Array: ...


@overload
def valid_rows(batch: Batch, mask: jax.Array | None = None) -> jax.Array | None: ...


def valid_rows(batch: Batch, mask: jax.Array | None = None) -> jax.Array | None:
  """Returns the batch's valid rows within a mask.

  Args:
    batch: with bool 'where', rows first, or without it.
    mask: bool, rows first; None: all.

  Returns:
    'where' and `mask` combined, bool of the higher rank; None where both are missing.
  """
  where = batch.get("where")
  if where is None:
    return mask
  if mask is None:
    return where
  rank = max(where.ndim, mask.ndim)
  where, mask = (x.reshape(x.shape + (1,) * (rank - x.ndim)) for x in (where, mask))
  return where & mask


def has_true_label(batch: Batch, mask: jax.Array) -> jax.Array:
  """Returns `mask` (bool, rows first) without the rows that the student generated.

  Their labels belong to another text.

  Raises:
    ValueError: the batch's 'generated' is not bool [rows].
  """
  if "generated" not in batch:
    return mask
  generated = jnp.asarray(batch["generated"])
  if generated.dtype != jnp.bool_ or generated.shape != mask.shape[:1]:
    raise ValueError(
      f"generated: expected one bool a row, {mask.shape[:1]}, "
      f"got {generated.dtype} {generated.shape}"
    )
  return mask & ~generated.reshape(generated.shape + (1,) * (mask.ndim - 1))


def batch_entry(batch: Mapping[str, Any], name: str) -> jax.Array:
  """Returns the entry of the batch; raises a `ValueError` that names the nearest one."""
  if name not in batch:
    raise ValueError(f"{name}: expected an entry of the batch, got none{suggest(name, batch)}")
  return jnp.asarray(batch[name])


def outputs_of(outputs: Outputs, names: Names, side: str) -> Any:
  """Returns the output of this name, with all classes, or a tuple of those of these names.

  Args:
    outputs: of one network.
    names: a name, or a tuple of names.
    side: 'student' or 'teacher', for messages.

  Raises:
    ValueError: no output of a name, or one that stores only some of the classes.
  """
  if not isinstance(names, str):
    return type(names)(outputs_of(outputs, name, side) for name in names)
  value = any_output_of(outputs, names, side)
  if isinstance(value, SparseTargets):
    raise ValueError(
      f"{names}: expected all classes of the {side}, got {value.indices.shape[-1]} of them "
      "(SparseTargets): use objectives.sparse with a loss such as losses.sparse_kl, "
      "or a dense cache"
    )
  return value


def any_output_of(outputs: Outputs, name: str, side: str) -> Any:
  """Returns the output of this name, an array, a tree or `SparseTargets`; arguments as above."""
  if not outputs:
    raise ValueError(f"{name}: expected an output of the {side}, got no {side} or no outputs")
  if name not in outputs:
    hint = suggest(name, outputs)
    if f"0/{name}" in outputs:
      hint = (
        f" but those of several networks: average it in teachers.ensemble(mean={{{name!r}: ...}})"
      )
    elif name in ("hidden", "head") and "logits" in outputs:
      hint = (
        ", but logits: they take objectives.labels() and logits(losses.kl_divergence), or "
        "sparse(losses.sparse_kl) from a top-k cache, in place of tokens"
      )
    raise ValueError(f"{name}: expected an output of the {side}, got none{hint}")
  return outputs[name]
