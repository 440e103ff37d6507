"""Reads class numbers from a batch: which are labels, and which are no class at all."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BINARY = 0
"""In place of a number of classes: the entry holds 0, 1 or probabilities, in any shape."""
SUM_TOLERANCE = 0.01
"""How far the sum of a row of probabilities may be from 1."""


class Entries(NamedTuple):
  """The batch's entries that terms read.

  Attributes:
    classes: `{entry: (number of classes, ignore label or None)}` of those with labels; `BINARY`
      classes: 0, 1 or probabilities.
    numbers: `{entry: ignore label or None}` of those with numbers to predict.
    weights: names of those with weights.
    transcripts: names of those with classes in rows of any length, padded by -1.
  """

  classes: dict[str, tuple[int, int | None]]
  numbers: dict[str, int | None]
  weights: set[str]
  transcripts: set[str]


_recorded: ContextVar[Entries | None] = ContextVar("_recorded", default=None)


@contextlib.contextmanager
def record_entries() -> Iterator[Entries]:
  """Collects the batch's entries that hold classes or weights while a function is traced."""
  entries = Entries({}, {}, set(), set())
  token = _recorded.set(entries)
  try:
    yield entries
  finally:
    _recorded.reset(token)


def record(entry: str, classes: int, ignore_label: int | None = None) -> None:
  """Adds an entry that holds class numbers or rows of probabilities; of several outputs the fewest
  classes count.
  """
  entries = _recorded.get()
  if entries is not None:
    others, declared = entries.classes.get(entry, (classes, None))
    ignore_label = declared if ignore_label is None else ignore_label
    entries.classes[entry] = min(classes, others), ignore_label


def record_numbers(entry: str, ignore_label: int | None) -> None:
  """Adds an entry that holds numbers to predict, such as regression targets."""
  entries = _recorded.get()
  if entries is not None:
    entries.numbers[entry] = ignore_label


def record_transcripts(entry: str, classes: int) -> None:
  """Adds an entry that holds transcripts of class numbers."""
  entries = _recorded.get()
  if entries is not None:
    entries.transcripts.add(entry)
  record(entry, classes)


def record_weights(entry: str) -> None:
  """Adds an entry that holds weights of examples."""
  entries = _recorded.get()
  if entries is not None:
    entries.weights.add(entry)


def check_ignore_label(value: Any) -> None:
  """Raises a ValueError for an ignore label that is no integer."""
  is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
  if value is not None and not is_integer:
    raise ValueError(
      f"ignore_label: expected an integer or None, got {value!r}: write the one number that marks "
      "what has no label, such as 255 or -100"
    )


def outside_probabilities(rows: Any) -> Any:
  """Returns bool [...]: which rows [..., C] are negative somewhere or sum to more than 1.

  A sum below 1 is what mixing an example with an unlabeled one leaves; where rows come from the
  data, `data.check_batch` asks for a sum of 1.
  """
  # Rows may have been rounded to bfloat16.
  return (rows < 0).any(-1) | (rows.sum(-1) >= 1 + SUM_TOLERANCE)


class ClassLabels(NamedTuple):
  """Class numbers and what counts of them, all of the labels' shape [...].

  Attributes:
    number: class numbers; 0 where there is no label, or none that is a class.
    labeled: bool, which have a label.
    outside: bool, which labels are no class. All are False outside of a compiled function, where
      such a label raises.
  """

  number: jax.Array
  labeled: jax.Array
  outside: jax.Array


def class_labels(
  label: jax.Array,
  shape: tuple[int, ...],
  *,
  where: jax.Array | None = None,
  entry: str = "label",
  ignore_label: int | None = None,
) -> ClassLabels:
  """Returns the class numbers of logits of a shape.

  Args:
    label: integers or bools [...]; negative ones, and `ignore_label`, are no labels.
    shape: of the logits, [..., C].
    where: valid rows or positions, bool, a prefix of [...]; the others may hold anything.
    entry: name of the batch's entry, for messages.
    ignore_label: a further number that is no label, such as 255.

  Raises:
    ValueError: labels of another dtype or shape, an ignore label that is a class; outside of
      compiled functions also a number that is no class.
  """
  label = jnp.asarray(label)
  if label.dtype == jnp.bool_:
    label = label.astype(jnp.int32)
  if not jnp.issubdtype(label.dtype, jnp.integer) or label.shape != shape[:-1]:
    raise ValueError(
      f"{entry}: expected integers {shape[:-1]} for logits {shape}, got {label.dtype} "
      f"{label.shape}: {_shape_hint(entry, label, shape)}"
    )
  record(entry, shape[-1], ignore_label)
  if ignore_label is not None and 0 <= ignore_label < shape[-1]:
    raise ValueError(
      f"ignore_label: expected no class, got {ignore_label}, one of 0 to {shape[-1] - 1}: choose a "
      "negative number"
    )
  label = label.astype(int)  # As `argmax` gives them.
  labeled = label >= 0
  if ignore_label is not None:
    labeled &= label != ignore_label
  outside = labeled & (label >= shape[-1])
  if where is not None:
    outside &= where.reshape(where.shape + (1,) * (label.ndim - where.ndim))
  _check_inside(entry, label, outside, shape[-1])
  return ClassLabels(jnp.where(labeled & ~outside, label, 0), labeled, outside)


def _check_inside(entry: str, label: jax.Array, outside: jax.Array, classes: int) -> None:
  if isinstance(outside, jax.core.Tracer):
    return
  values = np.asarray(label)[np.asarray(outside)]
  if values.size:
    raise ValueError(
      f"{entry}: expected a class 0 to {classes - 1}, got {values[0]} ({values.size} such labels): "
      f"pass ignore_label={values[0]} if it marks what has no label"
    )


def float_hint(entry: str, shape: tuple[int, ...], logits: tuple[int, ...]) -> str:
  """Returns what to write for floats of a shape next to logits of another one."""
  is_map = len(shape) == len(logits) - 1 > 2
  if shape not in (logits[:-1], (*logits[:-1], 1)) and not is_map:
    return "give one row of C probabilities for each row of C logits"
  cast = f"write {entry}.astype(np.int32) for class numbers"
  if logits[-1] == 2:
    cast += f", np.stack([1 - {entry}, {entry}], -1) for probabilities of class 1"
  return f"{cast}; numbers to predict take one output and labels(optax.squared_error)"


def _shape_hint(entry: str, label: jax.Array, shape: tuple[int, ...]) -> str:
  """Returns what to write for labels of another shape."""
  if label.shape == (*shape[:-1], 1):
    return f"drop the last axis, {entry}[..., 0]"
  if label.shape == shape:
    return (
      f"one-hot rows are {entry}.argmax(-1); for several labels an example use "
      "labels(optax.sigmoid_binary_cross_entropy) and tasks.multi_label"
    )
  if label.shape == shape[:-1]:
    return "cast whole numbers to int32; use a loss such as optax.squared_error for real numbers"
  if label.ndim == len(shape) - 1 > 2 and label.shape[:1] == shape[:1]:
    return (
      "resize=True resizes the logits to the labels' grid; resize label maps by nearest neighbor"
    )
  if label.ndim == 2 and label.ndim < len(shape) and label.shape[:1] == shape[:1]:
    return "one per position; a transcript of another length needs optax.ctc_loss in a Term"
  return "give one per row or position of the logits"
