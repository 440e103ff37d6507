"""Compares the groups of examples: numbers of persons or places, or rectangles of one image."""

from typing import Any

import numpy as np

CHUNK = 64


def check_groups(name: str, values: np.ndarray, source: str) -> None:
  """Checks that an entry numbers groups, or holds rectangles.

  Args:
    name: the entry.
    values: integers [N], or rectangles [N, 4]: left, top, right, bottom.
    source: the name of the data set.

  Raises:
    ValueError: it is something else, or a rectangle has no area.
  """
  is_number = values.ndim == 1 and np.issubdtype(values.dtype, np.integer)
  if is_number:
    return
  if values.ndim != 2 or values.shape[1] != 4:
    raise ValueError(
      "groups: expected integers [N], or rectangles [N, 4] (left, top, right, bottom), in "
      f"{name!r} of {source}, got {values.dtype} {list(values.shape)}: number the groups, "
      "np.unique(values, return_inverse=True)[1]"
    )
  empty = (values[:, 2] <= values[:, 0]) | (values[:, 3] <= values[:, 1])
  if empty.any():
    row = int(np.flatnonzero(empty)[0])
    raise ValueError(
      f"groups: expected rectangles (left, top, right, bottom) with left < right and top < bottom "
      f"in {name!r} of {source}, got {values[row].tolist()} in row {row}: write them in this order"
    )


def group_entry(source: Any) -> str | None:
  """Returns the entry by whose numbers the examples of a `Source` or `Videos` are grouped.

  Raises:
    ValueError: it holds rectangles.
  """
  examples = getattr(source, "examples", source)  # Of `Videos`.
  name = getattr(examples, "groups", "")
  if name and examples.arrays[name].ndim == 2:
    raise ValueError(
      f"groups: expected integers [N] in {name!r} of {examples.name}, got rectangles, of which "
      "neighbors touch: write data.split_regions(source, ..., region=256)"
    )
  return name or None


def near(rectangles: np.ndarray, others: np.ndarray, gap: float = 1) -> np.ndarray:
  """Returns bool [N]: which rectangles are nearer than `gap` pixels to one of the others.

  The distance is the larger one of the horizontal and the vertical: 0 for rectangles that share an
  edge or a corner, negative where they overlap.

  Args:
    rectangles: [N, 4], left, top, right and bottom.
    others: [M, 4].
    gap: least distance that is not near.
  """
  result = np.zeros(len(rectangles), bool)
  rectangles, others = rectangles.astype(np.float64), others.astype(np.float64)
  # In chunks: all pairs may not fit into memory.
  for start in range(0, len(others), CHUNK):
    chunk = others[start : start + CHUNK, None]
    before = rectangles[:, :2] - chunk[..., 2:]
    after = chunk[..., :2] - rectangles[:, 2:]
    distance = np.maximum(before, after).max(-1)
    result |= (distance < gap).any(0)
  return result


def shared_groups(train: Any, evaluation: Any) -> tuple[str, int]:
  """Returns the entry with the groups, and how many evaluation examples share one with training.

  Args:
    train: a `Source`.
    evaluation: a `Source`. The entry is what one of them names as its `groups`; 0 examples are
      shared where neither does, or where they have not both got it.
  """
  name = train.groups or evaluation.groups
  if not name or name not in train.arrays or name not in evaluation.arrays:
    return name, 0
  ours, theirs = train.arrays[name], evaluation.arrays[name]
  if ours.shape[1:] != theirs.shape[1:]:
    return name, 0
  is_shared = near(theirs, ours) if ours.ndim == 2 else np.isin(theirs, ours)
  return name, int(is_shared.sum())
