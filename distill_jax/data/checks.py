"""What jit cannot raise is checked here, on the host, before anything is placed on a device."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

UNLABELED = -1
"""The label of an example that has none; the hard-label term and the metrics leave such examples out."""


def check_labels(labels, classes: int | None, ids=None, ignore_label: int | None = None) -> None:
  """Check that integer labels name a class.

  Args:
    labels: integers of any shape, one row per example.
    classes: number of classes; labels are 0 to classes - 1. None: any label from 0 up.
    ids: [rows], to name the example in an error; None names the row.
    ignore_label: the value that marks "no label", e.g. -1 or -100. Every other negative label is refused:
      as an index, -1 silently means the last class and -100 gives NaN.

  Raises:
    ValueError: labels are not integers, one lies outside the range (with its example id, its value and the
      range), or `ignore_label` is itself a class.
  """
  labels = np.asarray(labels)
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f"label must be integers (class numbers), got {labels.dtype}")
  last = np.iinfo(np.int32).max if classes is None else classes - 1
  if ignore_label is not None and 0 <= ignore_label <= last:
    raise ValueError(
      f"ignore_label {ignore_label} is one of the classes 0 to {last}: use a negative number"
    )
  wrong = (labels < 0) | (labels > last)
  if ignore_label is not None:
    wrong &= labels != ignore_label
  if wrong.any():
    place = tuple(np.argwhere(wrong)[0])
    value = int(labels[place])
    hint = f"nearest is {min(max(value, 0), last)}"
    if value < 0 and ignore_label is None:
      hint = f"declare ignore_label={value} if it marks examples without a label"
    raise ValueError(
      f"label {value} of {_example(ids, place[0])} is not a class 0 to {last}; {hint}"
    )


def check_batch(
  batch: Mapping[str, Any], classes: int | None = None, ignore_label: int | None = None
) -> None:
  """Check a batch that did not come from a `Source`; rows that `where` leaves out may hold anything.

  Args:
    batch: arrays with one row per example; 'id' is optional. 'label' holds integers, or rows of
      probabilities [rows, classes] that sum to 1 (a row of zeros is an example without a label).
    classes, ignore_label: as in `check_labels`.

  Raises:
    ValueError: arrays of different lengths, no rows, NaN or infinity (-inf is allowed in 'teacher/...': a
      logit of probability 0), an integer that 32 bits do not hold, or labels outside their range.
  """
  arrays = {name: np.asarray(values) for name, values in batch.items()}
  rows = check_lengths(arrays)
  where = arrays.pop("where", None)
  if where is not None:
    if where.dtype != np.bool_ or where.shape != (rows,):
      raise ValueError(f"where must be bool [{rows}], got {where.dtype} {list(where.shape)}")
    arrays = {name: values[where] for name, values in arrays.items()}
  ids = arrays.get("id")
  label = arrays.pop("label", None)
  for name, values in arrays.items():
    check_numbers(name, values, ids)
  if label is None:
    return
  if label.ndim == 2 and jnp.issubdtype(label.dtype, jnp.floating):
    check_numbers("label", label, ids)
    _check_probabilities(label, classes, ids)
  else:
    check_labels(label, classes, ids, ignore_label)


def check_lengths(arrays: Mapping[str, np.ndarray]) -> int:
  """The number of rows that all arrays have; a ValueError if they differ or there are none."""
  if not arrays:
    raise ValueError("no arrays: expected at least one, e.g. 'image'")
  scalars = [name for name, values in arrays.items() if values.ndim == 0]
  if scalars:
    raise ValueError(
      f"{scalars[0]!r} is a single value: expected an array with one row per example"
    )
  lengths = {name: len(values) for name, values in arrays.items()}
  if len(set(lengths.values())) > 1:
    raise ValueError(f"arrays must have one row per example, got lengths {lengths}")
  rows = next(iter(lengths.values()))
  if rows == 0:
    raise ValueError(
      f"no examples: {', '.join(map(repr, arrays))} have 0 rows, expected at least 1"
    )
  return rows


def check_numbers(name: str, values: np.ndarray, ids=None) -> None:
  """Raise a ValueError for NaN, infinity, an integer that the device would wrap, or no numbers at all."""
  if jnp.issubdtype(values.dtype, jnp.integer):
    limits = np.iinfo(jax.dtypes.canonicalize_dtype(values.dtype))
    wrong, expected = (values < limits.min) | (values > limits.max), f"{limits.min} to {limits.max}"
  elif jnp.issubdtype(values.dtype, jnp.inexact):
    wrong, expected = ~np.isfinite(values), "finite numbers"
    if name.startswith("teacher/"):
      wrong, expected = wrong & ~np.isneginf(values), "numbers or -inf"
  elif values.dtype == np.bool_:
    return
  else:
    raise ValueError(f"{name!r} must hold numbers, got {values.dtype}")
  if wrong.any():
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    raise ValueError(
      f"{name!r} of {_example(ids, place[0])} holds {values[place]}, expected {expected}"
    )


def check_seed(seed: int) -> None:
  """Raise a ValueError unless a seed is a whole number of 32 bits, which both NumPy and JAX take as it is."""
  if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
    raise ValueError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed!r}")


def _check_probabilities(label, classes, ids) -> None:
  if classes is not None and label.shape[1] != classes:
    raise ValueError(
      f"label has rows of {label.shape[1]} probabilities, expected {classes}, one per class"
    )
  label = label.astype(np.float64)
  sums = label.sum(1)
  # Rows may have been rounded to bfloat16.
  whole = (np.abs(sums - 1) < 0.01) | (sums == 0)
  wrong = (label < 0).any(1) | ~whole
  if wrong.any():
    row = int(np.flatnonzero(wrong)[0])
    raise ValueError(
      f"label of {_example(ids, row)} sums to {sums[row]:.6g} with smallest entry {label[row].min():.6g}, "
      "expected non-negative probabilities that sum to 1 (or only zeros: no label)"
    )


def _example(ids, row) -> str:
  return f"row {row}" if ids is None else f"example id {np.asarray(ids)[row]}"
