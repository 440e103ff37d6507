"""Checks true boxes and detections on the host, before they are compared."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.boxes import Detections, has_area
from distill_jax.boxes.detection import SCORE_TOLERANCE
from distill_jax.data.box_checks import check_each


class Found(NamedTuple):
  """The detections of all examples, as `boxes.Detections`.

  Attributes:
    boxes: float64 [N, K, 4], (left, top, right, bottom) in pixels.
    scores: float [N, K]; NaN where the network returned NaN.
    classes: int [N, K]; -1: there is no detection.
  """

  boxes: np.ndarray
  scores: np.ndarray
  classes: np.ndarray


class Truth(NamedTuple):
  """The true boxes of all examples.

  Attributes:
    boxes: float64 [N, M, 4], (left, top, right, bottom) in pixels.
    label: int [N, M], class numbers.
    crowd: bool [N, M], boxes around several objects.
    exists: bool [N, M]: the label is a class and the box has an area.
  """

  boxes: np.ndarray
  label: np.ndarray
  crowd: np.ndarray
  exists: np.ndarray

  @property
  def counted(self) -> np.ndarray:
    """Returns which boxes are to be found, bool [N, M]."""
    return self.exists & ~self.crowd

  def per_class(self, classes: int) -> np.ndarray:
    """Returns the number of boxes of each class that are to be found, int [classes]."""
    return np.bincount(self.label[self.counted], minlength=classes)


def check_detections(found: Any, rows: int) -> Detections:
  """Returns what `decode` returned.

  Args:
    found: arrays or their shapes.
    rows: number of images.

  Raises:
    ValueError: it is not (boxes [B, K, 4], scores [B, K], classes int [B, K]).
  """
  shapes = [jnp.shape(x) for x in found] if isinstance(found, tuple) else []
  is_integer = len(shapes) == 3 and jnp.issubdtype(found[2].dtype, jnp.integer)
  if not is_integer or len(shapes[1]) != 2 or shapes != _shapes(rows, shapes[1][1]):
    raise ValueError(
      f"decode: expected boxes.Detections of boxes [{rows}, K, 4], scores [{rows}, K] and integer "
      f"classes [{rows}, K], got {jax.tree.map(jnp.shape, found)}: return "
      "boxes.Detections(boxes, scores, classes), as boxes.detect does"
    )
  return Detections(*found)


def _shapes(rows: int, number: int) -> list[tuple[int, ...]]:
  return [(rows, number, 4), (rows, number), (rows, number)]


def check_truth(arrays: Mapping[str, Any]) -> None:
  """Checks the shapes and dtypes of true boxes, which may be abstract.

  Args:
    arrays: {name of the entry: array}, of boxes and labels, and of crowds if there are some.

  Raises:
    ValueError: they are not [B, N, 4], integers [B, N], and booleans [B, N].
  """
  (name, boxes), (label_name, label), *crowds = arrays.items()
  shape = jnp.shape(boxes)
  if len(shape) != 3 or shape[-1] != 4 or not jnp.issubdtype(boxes.dtype, jnp.number):
    raise ValueError(
      f"{name}: expected numbers [B, N, 4], (left, top, right, bottom) of N boxes per image, got "
      f"{boxes.dtype} {list(shape)}: fill up images with fewer boxes by zeros, labels by -1"
    )
  if jnp.shape(label) != shape[:2] or not jnp.issubdtype(label.dtype, jnp.integer):
    raise ValueError(
      f"{label_name}: expected integers {list(shape[:2])}, the class of each box, got "
      f"{label.dtype} {list(jnp.shape(label))}: write -1 where there is no box"
    )
  for crowd_name, crowd in crowds:
    if jnp.shape(crowd) != shape[:2] or jnp.issubdtype(crowd.dtype, jnp.inexact):
      raise ValueError(
        f"{crowd_name}: expected bool {list(shape[:2])}, whether a box is a crowd, got "
        f"{crowd.dtype} {list(jnp.shape(crowd))}: leave the entry out where there are none"
      )


def truth_of(arrays: Mapping[str, Any], ids: Any, classes: int | None) -> Truth:
  """Returns the true boxes of all examples, after checks of their values.

  Args:
    arrays: as in `check_truth`.
    ids: [N], the example ids that an error names; None names the row.
    classes: number of classes; None: any.

  Raises:
    ValueError: it names the entry and the first example whose boxes do not fit.
  """
  arrays = {name: np.asarray(values) for name, values in arrays.items()}
  check_truth(arrays)
  (name, boxes), (label_name, label), *crowds = arrays.items()
  boxes = boxes.astype(np.float64)
  is_label = label >= 0
  is_invalid = is_label & ~np.isfinite(boxes).all(-1)
  hint = "write the label -1 where no box is"
  check_each(name, "finite numbers", boxes, is_invalid, ids, hint)
  is_invalid = is_label & (boxes[..., :2] > boxes[..., 2:]).any(-1)
  hint = 'convert them, such as boxes.convert(x, "xywh", "xyxy")'
  check_each(name, "left <= right and top <= bottom", boxes, is_invalid, ids, hint)
  last = np.inf if classes is None else classes - 1
  hint = "add its name to class_names, or write -1 where no box is"
  check_each(label_name, f"a class 0 to {last}", label, label > last, ids, hint)
  exists = is_label & np.asarray(has_area(boxes))
  crowd = crowds[0][1].astype(bool) if crowds else np.zeros(label.shape, bool)
  return Truth(boxes, label, crowd, exists)


def found_of(predictions: Mapping[str, Any], classes: int | None) -> Found:
  """Returns the detections of all examples; those without a finite box that has an area are none.

  Args:
    predictions: 'boxes', 'score', 'class' and, if there are some, 'id' of `tasks.detection`.
    classes: number of classes; None: any.

  Raises:
    ValueError: a class is none of them, or a score is not from 0 to 1.
  """
  boxes = np.asarray(predictions["boxes"], np.float64)
  scores, numbers = (np.asarray(predictions[name]) for name in ("score", "class"))
  last = np.inf if classes is None else classes - 1
  hint = "leave the background out, write -1 where no box is, or add a name to class_names"
  ids = predictions.get("id")
  check_each("decode", f"a class 0 to {last}", numbers, numbers > last, ids, hint)
  is_outside = (numbers >= 0) & (np.abs(scores - 0.5) > 0.5 + SCORE_TOLERANCE)
  hint = "write jax.nn.sigmoid(x), or jax.nn.softmax(x), if these are logits"
  check_each("decode", "a score 0 to 1", scores, is_outside, ids, hint)
  is_finite = np.isfinite(boxes).all(-1)
  scores = np.where((numbers >= 0) & ~is_finite, np.nan, scores)
  is_found = np.asarray(has_area(boxes)) & np.isfinite(scores)
  return Found(boxes, scores, np.where(is_found, numbers, -1))
