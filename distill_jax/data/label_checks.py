"""Checks labels on the host, and marks those that are none."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from distill_jax.data.box_checks import check_boxes
from distill_jax.data.checks import cast_hint, check_rows, check_values, example_name
from distill_jax.objectives.class_labels import BINARY, SUM_TOLERANCE, outside_probabilities

UNLABELED = -1
"""The class number of an example without a label, which hard-label terms and metrics leave out."""
IgnoreLabel = int | Mapping[str, int | None] | None
"""The value of "no label", of all entries or of each; None: none."""


def check_batch(
  batch: Mapping[str, Any],
  classes: int | Mapping[str, int | None] | None = None,
  ignore_label: IgnoreLabel = None,
) -> None:
  """Checks a batch that is not from a `Source`; rows that 'where' leaves out may hold anything.

  Args:
    batch: arrays [rows, ...]; 'id' and 'label' are optional. With `classes`, 'label' holds class
      numbers, or probabilities [rows, classes] that sum to 1 (a row of zeros is an example without
      a label). Without, it may also hold finite floats of any shape.
    classes: number of classes; or those of each entry that holds class numbers, `{"label": 10,
      "type": 3}` ({}: no entry does; `BINARY`: numbers from 0 to 1 of any shape); None: labels are
      floats, multi-hot rows or class numbers of unknown range. Floats [rows] or [rows, 1] next to
      2 classes are probabilities of class 1.
    ignore_label: as in `check_labels`; or that of each entry, `{"label": 255, "type": -100}`.

  Raises:
    ValueError: arrays of different lengths, no rows, NaN or infinity (-inf is allowed in
      'teacher/...': a logit of probability 0), an integer that 32 bits do not hold, labels outside
      their range, or boxes that `Source` rejects.

  >>> check_batch({"image": np.zeros((2, 8, 8, 1)), "label": np.array([0, 1])}, classes=2)
  """
  arrays = {name: np.asarray(values) for name, values in batch.items()}
  check_rows(arrays)
  where = arrays.pop("where", None)
  if where is not None:
    arrays = {name: values[where] for name, values in arrays.items()}
  ids = arrays.get("id")
  entries = classes if isinstance(classes, Mapping) else {"label": classes}
  for name, values in arrays.items():
    if name in entries:
      ignored = ignore_label_of(ignore_label, name)
      check_label_entry(name, values, entries[name], ids, ignored)
    else:
      check_values(name, values, ids)
  check_boxes(arrays, ids, ignore_label_of(ignore_label, "label"))


def class_numbers(
  batch: Mapping[str, Any],
  classes: Mapping[str, int | None],
  ignore_label: IgnoreLabel = None,
) -> dict[str, Any]:
  """Returns the batch with `UNLABELED` in place of the ignore label, after a check of its labels.

  Args:
    batch: arrays [rows, ...]; rows that 'where' leaves out may hold anything.
    classes: entries that hold labels of classes, `{entry: number of classes}`; they are optional.
    ignore_label: as in `check_labels`.

  Raises:
    ValueError: as in `check_batch`, of these entries only.

  >>> class_numbers({"label": np.array([0, 255])}, {"label": 2}, ignore_label=255)["label"].tolist()
  [0, -1]
  """
  valid = slice(None) if batch.get("where") is None else np.asarray(batch["where"])
  ids = None if "id" not in batch else np.asarray(batch["id"])[valid]
  labels = {name: np.asarray(batch[name]) for name in classes if name in batch}
  for name, label in labels.items():
    check_label_entry(name, label[valid], classes[name], ids, ignore_label_of(ignore_label, name))
  return {**batch, **mark_entries(labels, labels, ignore_label)}


def mark_unlabeled(labels: np.ndarray, ignore_label: int | None) -> np.ndarray:
  """Returns integer labels with `UNLABELED` for the ignore label; other labels as they are.

  >>> mark_unlabeled(np.array([0, 255, 1]), 255).tolist()
  [0, -1, 1]
  """
  if ignore_label is None or not np.issubdtype(labels.dtype, np.integer):
    return labels
  # Wide first: no unsigned integer holds UNLABELED.
  return np.where(labels == ignore_label, UNLABELED, labels.astype(np.int64)).astype(np.int32)


def mark_entries(
  batch: Mapping[str, Any], entries: Iterable[str], ignore_label: IgnoreLabel
) -> dict[str, np.ndarray]:
  """Returns the entries that the batch has, with `UNLABELED` for the ignore label of each."""
  return {
    name: mark_unlabeled(np.asarray(batch[name]), ignore_label_of(ignore_label, name))
    for name in entries
    if name in batch
  }


def ignore_label_of(ignore_label: IgnoreLabel, name: str) -> int | None:
  """Returns the ignore label of an entry."""
  return ignore_label.get(name) if isinstance(ignore_label, Mapping) else ignore_label


def check_label_entry(
  name: str, label: np.ndarray, classes: int | None, ids: Any, ignore_label: int | None
) -> None:
  """Checks an entry with labels: class numbers, or probabilities where they are floats.

  Args:
    name, label: the entry [rows, ...].
    classes, ids, ignore_label: as in `check_batch` and `check_labels`.

  Raises:
    ValueError: as in `check_batch`.
  """
  is_float = jnp.issubdtype(label.dtype, jnp.floating)
  if classes == BINARY and classes is not None:
    if not is_float:
      check_labels(label, 2, ids, ignore_label, name=name)
    else:
      check_values(name, label, ids)
      _check_positive(name, label, ids, ignore_label)
  elif classes is None and not jnp.issubdtype(label.dtype, jnp.integer):
    check_values(name, label, ids)
  elif classes == 2 and is_float and label.shape[1:] in ((), (1,)):
    check_values(name, label, ids)
    _check_positive(name, label, ids, ignore_label)
  elif is_float and label.ndim > 1:
    check_values(name, label, ids)
    _check_probabilities(name, label, classes, ids)
  else:
    check_labels(label, classes, ids, ignore_label, name=name)


def check_labels(
  labels: Any,
  classes: int | None,
  ids: Any = None,
  ignore_label: int | None = None,
  *,
  name: str = "label",
) -> None:
  """Checks that integer labels are class numbers.

  Args:
    labels: integers or bools [rows, ...].
    classes: number of classes, for labels 0 to classes - 1; None allows every label from 0 up.
    ids: [rows], the example ids that an error names; None names the row.
    ignore_label: the value of "no label", e.g. -1 or -100; None allows no other value than the
      classes. As an index, -1 silently means the last class and -100 gives NaN.
    name: the entry that an error names.

  Raises:
    ValueError: labels are not integers, a label is outside the range, or `ignore_label` is itself a
      class.

  >>> check_labels(np.array([0, 1, 2]), classes=3)
  >>> check_labels(np.array([0, 1, 3]), classes=3)  # doctest: +IGNORE_EXCEPTION_DETAIL
  Traceback (most recent call last):
  ValueError: label: ...
  """
  labels = np.asarray(labels)
  if labels.dtype == np.bool_:
    labels = labels.astype(np.int32)
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(
      f"{name}: expected integers (class numbers), got {labels.dtype} {list(labels.shape)}: "
      f"{cast_hint(labels)}"
    )
  last = np.iinfo(np.int32).max if classes is None else classes - 1
  if ignore_label is not None and classes is not None and 0 <= ignore_label <= last:
    raise ValueError(
      f"ignore_label: expected no class, got {ignore_label}, one of 0 to {last}: choose a negative "
      "number"
    )
  outside = (labels < 0) | (labels > last)
  if ignore_label is not None:
    outside &= labels != ignore_label
  if outside.any():
    index = tuple(np.argwhere(outside)[0])
    value = int(labels[index])
    hint = _range_hint(name, labels, value, last, ignore_label)
    raise ValueError(
      f"{name}: expected a class 0 to {last}, got {value} for {example_name(ids, index[0])}: {hint}"
    )


def _check_positive(name: str, label: np.ndarray, ids: Any, ignore_label: int | None) -> None:
  """Checks probabilities of the positive class."""
  outside = (label < 0) | (label > 1)
  if ignore_label is not None:
    outside &= label != ignore_label
  if outside.any():
    index = tuple(np.argwhere(outside)[0])
    value = float(label[index])
    hint = _range_hint(name, label, value, 1, ignore_label)
    raise ValueError(
      f"{name}: expected probabilities 0 to 1 of class 1, got {value:.6g} in "
      f"{example_name(ids, index[0])}: {hint}"
    )


def _check_probabilities(name: str, label: np.ndarray, classes: int | None, ids: Any) -> None:
  """Checks rows of probabilities [..., classes]; a row of zeros is one without a label."""
  if label.shape[-1] != classes:
    is_whole = (label == label.round()).all()
    hint = f": write {name}.astype(np.int32) for class numbers" if is_whole else ""
    raise ValueError(
      f"{name}: expected integers (class numbers), or rows of {classes} probabilities, one per "
      f"class, got {label.dtype} {list(label.shape)}{hint}"
    )
  label = label.astype(np.float64)
  sums = label.sum(-1)
  invalid = outside_probabilities(label) | ((sums <= 1 - SUM_TOLERANCE) & (sums != 0))
  if invalid.any():
    index = tuple(np.argwhere(invalid)[0])
    raise ValueError(
      f"{name}: expected non-negative probabilities that sum to 1, or only zeros (no label), got "
      f"the sum {sums[index]:.6g} and the smallest entry {label[index].min():.6g} in "
      f"{example_name(ids, index[0])}: {_row_hint(name, label)}"
    )


def _range_hint(
  name: str, labels: np.ndarray, value: float, last: int, ignore_label: int | None
) -> str:
  """Returns what to write for labels of which one value is not from 0 to `last`."""
  low, high = labels.min(), labels.max()
  if last == 1 and high == 1 and np.isin(labels, (-1, 1)).all():
    return f"write ({name} + 1) // 2 for labels -1 and 1"
  if last == 1 and low == 0 and np.isin(labels, (0, high)).all():
    return f"write {name} // {high:g} for labels 0 and {high:g}"
  if low >= 1 and high == last + 1:
    return f"labels begin at 1: write {name} - 1"
  nearest = f"the nearest class is {min(max(int(value), 0), last)}"
  if ignore_label not in (None, UNLABELED) or not float(value).is_integer():
    return nearest
  declare = f"declare ignore_label={value:g} if it marks examples without a label"
  return declare if value < 0 else f"{nearest}, or {declare}"


def _row_hint(name: str, label: np.ndarray) -> str:
  """Returns what to write for rows of numbers that are no probabilities."""
  if np.isin(label, (0, 1)).all():
    return (
      "several labels an example take labels(optax.sigmoid_binary_cross_entropy), "
      "tasks.multi_label() and a Source without classes"
    )
  if label.ndim > 2 and (label == label.round()).all():
    return f"write {name}.astype(np.int32) for class numbers"
  if (label < 0).any():
    return f"write jax.nn.softmax({name}) for logits"
  return f"write {name} / {name}.sum(-1, keepdims=True)"
