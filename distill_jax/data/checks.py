"""Checks arrays on the host, before they are placed on a device: compiled code cannot raise."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.errors import check_integer


def count_rows(arrays: Mapping[str, np.ndarray]) -> int:
  """Returns the number of rows of all arrays.

  Raises:
    ValueError: there is no array or no row, an array is a scalar, or lengths differ.

  >>> count_rows({"image": np.zeros((3, 8, 8, 1)), "label": np.zeros(3)})
  3
  """
  if not arrays:
    raise ValueError("arrays: expected at least one, e.g. 'image', got none")
  scalars = [name for name, values in arrays.items() if values.ndim == 0]
  if scalars:
    raise ValueError(f"{scalars[0]}: expected an array with one row per example, got a scalar")
  lengths = {name: len(values) for name, values in arrays.items()}
  if len(set(lengths.values())) > 1:
    raise ValueError(f"arrays: expected one row per example in each, got lengths {lengths}")
  rows = next(iter(lengths.values()))
  if rows == 0:
    raise ValueError(f"{', '.join(arrays)}: expected at least 1 row, got 0")
  return rows


def check_rows(batch: Mapping[str, np.ndarray]) -> None:
  """Checks that a batch has rows, the same number in each entry, and a mask if it has 'where'.

  Raises:
    ValueError: it does not.
  """
  rows = count_rows(batch)
  where = batch.get("where")
  if where is not None and (where.dtype != np.bool_ or where.shape != (rows,)):
    raise ValueError(
      f"where: expected bool [{rows}], which rows count, got {where.dtype} {list(where.shape)}: "
      "write where=mask > 0; weights of examples are labels(example_weights=)"
    )


def check_values(name: str, values: np.ndarray, ids: Any = None) -> None:
  """Checks that an array holds finite numbers, and no integer that the device would wrap.

  Args:
    name: the entry that an error names; logits of 'teacher/...' may be -inf.
    values: an array [rows, ...].
    ids: [rows], the example ids that an error names; None names the row.

  Raises:
    ValueError: it does not.
  """
  if jnp.issubdtype(values.dtype, jnp.integer):
    limits = np.iinfo(jax.dtypes.canonicalize_dtype(values.dtype))
    invalid = (values < limits.min) | (values > limits.max)
    expected = f"integers {limits.min} to {limits.max}"
  elif jnp.issubdtype(values.dtype, jnp.inexact):
    invalid = ~np.isfinite(values)
    expected = "finite numbers"
    if name.startswith("teacher/"):
      invalid &= ~np.isneginf(values)
      expected = "finite numbers or -inf"
  elif values.dtype == np.bool_:
    return
  else:
    raise ValueError(f"{name}: expected numbers, got {values.dtype}: {cast_hint(values)}")
  if invalid.any():
    index = tuple(int(i) for i in np.argwhere(invalid)[0])
    raise ValueError(
      f"{name}: expected {expected}, got {values[index]} in {example_name(ids, index[0])}: leave "
      "such rows out, or mask them in 'where'"
    )


def check_seed(seed: int) -> None:
  """Raises a ValueError unless a seed is an integer of 32 bits, which NumPy and JAX both take."""
  check_integer("seed", seed, 0, 2**32 - 1)


def check_number(name: str, value: Any) -> None:
  """Raises a ValueError unless a value is a number."""
  if isinstance(value, bool) or not isinstance(value, int | float | np.number):
    raise ValueError(f"{name}: expected a number such as 0.1, got {type(value).__name__}")


def check_fraction(fraction: Any) -> None:
  """Raises a ValueError unless a fraction is a number in (0, 1)."""
  check_number("fraction", fraction)
  if not 0 < fraction < 1:
    raise ValueError(f"fraction: expected a number in (0, 1), got {fraction}")


def cast_hint(values: np.ndarray) -> str:
  """Returns what to write where an array holds other values than integers."""
  if values.dtype.kind in "USO":
    return "number them: classes, label = np.unique(values, return_inverse=True)"
  if values.dtype.kind == "f" and np.isfinite(values).all() and (values == values.round()).all():
    return "write label.astype(np.int32) for class numbers, or give no classes (classes=None)"
  return "numbers to predict take a Source without classes and tasks.regression()"


def example_name(ids: Any, row: int) -> str:
  """Returns how an error names a row: by its id where there are ids."""
  return f"row {row}" if ids is None else f"example id {np.asarray(ids)[row]}"
