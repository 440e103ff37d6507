"""Finds and cuts the padding of rows of frames or columns, such as recordings and pictures."""

from collections.abc import Mapping

import numpy as np

from distill_jax.data.label_checks import UNLABELED

_AXES = {"frames": ("features", 1), "widths": ("image", 2)}
"""The entry that has the number of valid frames or columns, and what it counts along which axis."""


def sizes(arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
  """Returns the numbers of valid frames or columns, int [N]; None for other rows.

  Raises:
    ValueError: a number is negative, or larger than there are; other numbers of rows or axes.

  >>> sizes({"features": np.zeros((2, 9, 4)), "frames": np.array([3, 9])})
  array([3, 9])
  """
  name = _name(arrays)
  if name is None:
    return None
  counts = np.asarray(arrays[name])
  entry, axis = _AXES[name]
  shape = np.shape(arrays[entry])
  if len(shape) != axis + 2:
    axes = ("N", "T", "F") if axis == 1 else ("N", "H", "W", "C")
    raise ValueError(f"{entry}: expected [{', '.join(axes)}], got {list(shape)}")
  rows, most = shape[0], shape[axis]
  invalid = (counts < 0) | (counts > most)
  if counts.shape != (rows,) or counts.dtype.kind not in "iu" or invalid.any():
    got = counts[invalid][0] if invalid.any() else f"{counts.dtype} {list(counts.shape)}"
    raise ValueError(f"{name}: expected integers [{rows}] from 0 to {most} of {entry!r}, got {got}")
  return counts


def cut(batch: Mapping[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
  """Returns rows of at most `length` frames or columns.

  Of frames all entries [N, T] and [N, T, ...] are cut. A 'label' stays where it would lose classes:
  it is a transcript that by chance has as many classes as there are frames.

  >>> rows = {"features": np.zeros((2, 9, 4)), "frames": np.array([3, 5])}
  >>> cut(rows, 6)["features"].shape
  (2, 6, 4)
  """
  name = _name(batch)
  assert name is not None
  entry, axis = _AXES[name]
  size = batch[entry].shape[axis]

  def shortened(key: str, values: np.ndarray) -> np.ndarray:
    is_cut = key == entry if axis == 2 else values.shape[1:2] == (size,)
    if key == "label" and is_cut and (values[:, length:] != UNLABELED).any():
      return values
    return (
      values[:, :, :length] if is_cut and axis == 2 else values[:, :length] if is_cut else values
    )

  return {key: shortened(key, values) for key, values in batch.items()}


def _name(arrays: Mapping[str, np.ndarray]) -> str | None:
  return next((x for x, (entry, _) in _AXES.items() if x in arrays and entry in arrays), None)
