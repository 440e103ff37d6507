"""Trains the student with a loss of one's own, a function of its outputs and the batch."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.errors import naming_missing
from distill_jax.objectives.calls import batch_entry, has_true_label, valid_rows
from distill_jax.objectives.loss_checks import check_rows, name_of
from distill_jax.objectives.terms import Term
from distill_jax.types import Batch, Outputs, Variables

_CONTEXT = ("where", "step", "key", "axis_name")
_WITHOUT_ROWS = "head"  # The kernel of a large vocabulary, where others have an array of rows.


def student_loss(function: Callable[..., jax.Array], *, valid: str | None = None) -> Term:
  """Trains the student with a loss of one's own, where `labels` has none, such as a detector's.

      student_loss(retinanet.loss)
      student_loss(lambda outputs, batch: optax.ctc_loss(outputs["logits"], ...))

  Rows that do not count (the batch's 'where', and 'generated' ones) are 0 in every float array
  that the function gets, and its values of them are left out: a NaN there reaches neither value
  nor gradient. The mean is over the rows that count.

  Args:
    function: `(outputs, batch) -> values [B]`, one number a row, not their mean. `outputs` are the
      student's (`types.Outputs`), float32 or wider, and `batch` is a `types.Batch`, each a dict of
      arrays, rows first. A normalizer, such as the number of boxes, is that of the row.
      It also gets those of its other arguments that are called `where` (the rows that count, bool
      [B]), `step`, `key` or `axis_name`. A function that relates rows has `where`, and may return
      a scalar that is the same on every device of `axis_name`.
    valid: name of a bool entry [B] of the batch that marks the rows that count in addition to
      'where', such as the images in which boxes were looked for: one without boxes would else be
      all background.

  Raises:
    ValueError: at once, no function of (outputs, batch); in a step, an output or entry that is
      missing, values that are not one float a row, such as their mean or a sum over the batch, or
      an entry `valid` of another kind.

  >>> import jax.numpy as jnp
  >>> from distill_jax import objectives
  >>> def distance(outputs, batch):
  ...   exists = batch["label"] >= 0  # Padding has a negative label.
  ...   error = jnp.abs(outputs["boxes"] - batch["boxes"]).sum(-1)
  ...   return (error * exists).sum(-1) / jnp.maximum(exists.sum(-1), 1)
  >>> term = objectives.student_loss(distance)
  >>> outputs = {"boxes": jnp.ones((2, 3, 4))}  # Of 2 images with 3 boxes each.
  >>> boxes, label = jnp.zeros((2, 3, 4)), jnp.array([[0, 1, -1], [-1, -1, -1]])
  >>> batch = {"boxes": boxes, "label": label}
  >>> (values, where), _ = term.apply({}, {}, outputs, {}, batch, step=0, key=None)
  >>> values
  Array([4., 0.], dtype=float32)
  """
  _check_function(function)
  parameters = inspect.signature(function).parameters

  def init(key, student, teacher):
    del key, student, teacher
    return Variables({}, {})

  def apply(params, state, student, teacher, batch, *, step, key, axis_name=None):
    del params, teacher
    outputs, batch, where = _blank(student, batch, valid)
    context = {"where": where, "step": step, "key": key, "axis_name": axis_name}
    taken = {name: x for name, x in context.items() if name in parameters}
    names = {*outputs, *batch}
    missing = naming_missing("an output of the student or an entry of the batch", names)
    with missing, _naming_labels(batch):
      values = function(outputs, batch, **taken)
    _check_values(function, values, len(where), relates_rows="where" in parameters)
    if values.ndim == 0:
      return values, state
    _check_order(functools.partial(function, **taken), function, outputs, batch, len(where))
    return (values, where), state

  return Term(init, apply)


@contextlib.contextmanager
def _naming_labels(batch: Batch) -> Iterator[None]:
  """Names labels that are not one a box, where a function cannot compute with them."""
  try:
    yield
  except (TypeError, ValueError) as error:
    boxes, label = (jnp.shape(batch.get(name, 0)) for name in ("boxes", "label"))
    if len(boxes) != 3 or boxes[-1] != 4 or label in ((), boxes[:2]):
      raise
    raise ValueError(
      f"label: expected the class of each box, {list(boxes[:2])} next to boxes {list(boxes)}, got "
      f"{list(label)}: write one number a box, -1 where there is none"
    ) from error


def _check_function(function: Any) -> None:
  """Checks that it is a function of (outputs, batch) without other required arguments."""
  hint = "pass a function such as `lambda outputs, batch: values`"
  if not callable(function) or inspect.isclass(function):
    kind = "the class " if inspect.isclass(function) else ""
    got = kind + getattr(function, "__name__", f"a {type(function).__name__}")
    if hasattr(function, "loss"):
      hint = "pass its `loss`"
    raise ValueError(f"function: expected (outputs, batch) -> values, got {got}: {hint}")
  signature = inspect.signature(function)
  taken = [name for name in _CONTEXT if name in signature.parameters]
  try:
    signature.bind(None, None, **dict.fromkeys(taken))
  except TypeError as error:
    raise ValueError(
      f"function: expected (outputs, batch) -> values, got {name_of(function)}{signature} "
      f"({error}): bind its other arguments with functools.partial"
    ) from error


def _blank(student: Outputs, batch: Batch, valid: str | None) -> tuple[dict, dict, jax.Array]:
  """Returns outputs in float32 and the batch, with 0 in rows that do not count, and which do."""
  if not student or not batch:
    missing = "outputs of the student" if not student else "a batch"
    raise ValueError(f"function: expected {missing}, got none: pass a mapping of arrays")
  rows = jnp.shape(jax.tree.leaves(dict(batch))[0])[0]
  if "where" in batch and jnp.shape(batch["where"]) != (rows,):
    raise ValueError(f"where: expected one bool a row, ({rows},), got {batch['where'].shape}")
  counted = jnp.ones(rows, bool) if valid is None else _bools(batch, valid, rows)
  where = valid_rows(batch, has_true_label(batch, counted))

  def leaf(x):
    return reduce.blank(where, x) if _has_rows(x, rows) else x

  outputs = {
    name: jax.tree.map(_widen if name == _WITHOUT_ROWS else lambda x: leaf(_widen(x)), x)
    for name, x in student.items()
  }
  return outputs, jax.tree.map(leaf, dict(batch)), where


def _bools(batch: Batch, name: str, rows: int) -> jax.Array:
  values = batch_entry(batch, name)
  if values.dtype != jnp.bool_ or values.shape != (rows,):
    raise ValueError(
      f"{name}: expected one bool a row, ({rows},), got {values.dtype} {values.shape}: write "
      f"{name} > 0"
    )
  return values


def _widen(x: Any) -> jax.Array:
  x = jnp.asarray(x)
  is_float = jnp.issubdtype(x.dtype, jnp.floating)
  return x.astype(reduce.common_dtype(x.dtype, jnp.float32)) if is_float else x


def _has_rows(x: Any, rows: int) -> bool:
  return jnp.shape(x)[:1] == (rows,)


def _check_values(function: Callable, values: Any, rows: int, *, relates_rows: bool) -> None:
  """Checks that a function returned a float of each row, or a scalar if it relates rows."""
  shape = getattr(values, "shape", None)
  is_float = shape is not None and jnp.issubdtype(values.dtype, jnp.floating)
  if is_float and (shape == (rows,) or (relates_rows and shape == ())):
    return
  got = type(values).__name__ if shape is None else f"{values.dtype} {tuple(shape)}"
  hint = f"return an array [{rows}], reduced over the other axes"
  if shape == ():
    hint += ", or take an argument `where`, bool [rows], if it relates rows"
  raise ValueError(
    f"function: expected {name_of(function)} to return one float a row, ({rows},), got {got}: "
    f"{hint}"
  )


def _check_order(call: Callable, function: Callable, outputs: dict, batch: dict, rows: int) -> None:
  """Checks that the values are those of the rows, where another axis has as many entries."""
  constant = outputs.pop(_WITHOUT_ROWS, None)
  leaves, structure = jax.tree.flatten((outputs, batch))
  with_rows = {i: x for i, x in enumerate(leaves) if _has_rows(x, rows)}

  def longer(arrays):
    merged = [arrays.get(i, x) for i, x in enumerate(leaves)]
    outputs, batch = jax.tree.unflatten(structure, merged)
    return call(outputs if constant is None else outputs | {_WITHOUT_ROWS: constant}, batch)

  check_rows(longer, function, with_rows, (rows,))
