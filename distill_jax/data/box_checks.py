"""Checks boxes of objects on the host."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from distill_jax.data.checks import example_name

TOLERANCE = 1.0
"""How far boxes may be outside the image, in pixels: annotations are rounded."""


def check_boxes(
  arrays: Mapping[str, np.ndarray], ids: Any = None, ignore_label: int | None = None
) -> None:
  """Checks the boxes of objects: 'boxes' [N, M, 4] next to class numbers 'label' [N, M].

  Other entries of these names may mean anything, and are not checked. Boxes whose label is negative
  are padding; those without an area count nowhere.

  Args:
    arrays: the entries; 'image' [N, H, W, channels] and 'crowd' are optional.
    ids: [N], the example ids that an error names; None names the row.
    ignore_label: the class number of padding, if it is not negative.

  Raises:
    ValueError: a box is not (left, top, right, bottom) in pixels, but e.g. (x, y, width, height) or
      normalized; it is outside of the image; or 'crowd' is not bool [N, M].
  """
  if not _has_boxes(arrays):
    return
  boxes = np.asarray(arrays["boxes"])
  label = np.asarray(arrays["label"])
  _check_crowd(arrays.get("crowd"), label)
  is_object = (label >= 0) & (label != ignore_label)
  is_inverted = is_object & (boxes[..., 2:] < boxes[..., :2]).any(-1)
  hint = 'write boxes.convert(x, "xywh", "xyxy") if these are the left, top, width and height'
  check_each("boxes", "(left, top, right, bottom)", boxes, is_inverted, ids, hint)
  image = np.asarray(arrays.get("image", 0))
  if image.ndim != 4 or not is_object.any():
    return
  height, width = image.shape[1:3]
  if boxes[is_object].max() <= 1 < min(height, width):
    raise ValueError(
      f"boxes: expected pixels of images of {height} x {width}, got no number above 1: write "
      f"boxes * np.array([{width}, {height}, {width}, {height}]) if they are normalized"
    )
  limits = np.array([width, height, width, height])
  is_outside = is_object & ((boxes < -TOLERANCE) | (boxes > limits + TOLERANCE)).any(-1)
  expected = f"boxes inside the image of {height} x {width} pixels"
  hint = f"scale them with the image, or write boxes.clip(x, {height}, {width})"
  check_each("boxes", expected, boxes, is_outside, ids, hint)


def check_each(
  name: str, expected: str, values: np.ndarray, invalid: np.ndarray, ids: Any, hint: str
) -> None:
  """Checks that no box is invalid.

  Args:
    name: the field that the error names.
    expected: what every value has to be.
    values: of each box, [N, M] or [N, M, 4].
    invalid: which of them are not so, bool [N, M].
    ids: [N], the example ids that an error names; None names the row.
    hint: what to do about it.

  Raises:
    ValueError: it names the first box that is not as expected.
  """
  if not invalid.any():
    return
  row, column = np.argwhere(invalid)[0].tolist()
  got = jax.tree.map(lambda x: round(x, 3), values[row, column].tolist())
  raise ValueError(
    f"{name}: expected {expected}, got {got} in {example_name(ids, row)}, box {column}: {hint}"
  )


def check_no_boxes(arrays: Mapping[str, np.ndarray], function: str) -> None:
  """Checks that removed labels do not turn images with objects into images without any.

  Raises:
    ValueError: the entries are those of detection.
  """
  if _has_boxes(arrays):
    raise ValueError(
      f"boxes: expected examples without boxes for {function}, got {list(arrays['boxes'].shape)}, "
      "and an image without their labels counts as one without objects: write rest, few = "
      "data.split(source, 0.05), and train on few, or on all with a mask as another entry, "
      "np.isin(source.ids, few.ids)"
    )


def _has_boxes(arrays: Mapping[str, np.ndarray]) -> bool:
  """Returns whether there are 'boxes' [N, M, 4] next to class numbers 'label' [N, M]."""
  boxes, label = (np.asarray(arrays.get(name, 0)) for name in ("boxes", "label"))
  is_class = np.issubdtype(label.dtype, np.integer) and label.ndim == 2
  return is_class and boxes.shape == (*label.shape, 4)


def _check_crowd(crowd: np.ndarray | None, label: np.ndarray) -> None:
  if crowd is not None and (crowd.dtype != np.bool_ or crowd.shape != label.shape):
    raise ValueError(
      f"crowd: expected bool {list(label.shape)} as 'label', got {crowd.dtype} "
      f"{list(crowd.shape)}: write crowd.astype(bool)"
    )
