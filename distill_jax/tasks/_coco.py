"""Computes COCO's average precision with faster-coco-eval."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jax.errors import naming_extras
from distill_jax.tasks._boxes import Found, Truth

IOU_50, IOU_75 = 0, 5
"""Rows of the IoU thresholds 0.5 and 0.75, of those from 0.5 to 0.95."""
_LARGEST = 1e10  # square pixels, as in COCO


def coco_precision(
  found: Found,
  truth: Truth,
  classes: int,
  areas: Sequence[float],
  max_detections: int,
) -> np.ndarray:
  """Returns COCO's interpolated precision, NaN for a class without a box of that size.

  Args:
    found: detections of all images; classes of -1 are none.
    truth: boxes of all images.
    classes: number of classes.
    areas: square pixels up to which a box is small, and up to which it is medium.
    max_detections: of each image and class, those with the highest scores.

  Returns:
    float64 [10, 101, classes, 4]: IoU thresholds from 0.5 to 0.95, recalls from 0 to 1, and sizes:
    all, small, medium, large.
  """
  with naming_extras():
    from faster_coco_eval import COCO, COCOeval_faster  # an extra, which detection alone needs
  small, medium = areas
  is_found = found.classes >= 0
  sides = [
    _dataset(
      COCO(), truth.boxes, truth.label, truth.exists, classes, {"iscrowd": truth.crowd.astype(int)}
    ),
    _dataset(
      COCO(),
      found.boxes,
      found.classes,
      is_found,
      classes,
      {"iscrowd": 0 * found.classes, "score": found.scores},
    ),
  ]
  evaluation = COCOeval_faster(*sides, "bbox", print_function=_print_nothing)
  parameters = evaluation.params
  parameters.maxDets = [max_detections]
  parameters.areaRng = [[0, _LARGEST], [0, small], [small, medium], [medium, _LARGEST]]
  parameters.areaRngLbl = ["all", "small", "medium", "large"]
  evaluation.evaluate()
  evaluation.accumulate()
  precision = np.asarray(evaluation.eval["precision"], np.float64)[..., 0]
  return np.where(precision < 0, np.nan, precision)


def _dataset(
  coco: Any,
  boxes: np.ndarray,
  numbers: np.ndarray,
  exists: np.ndarray,
  classes: int,
  more: dict[str, np.ndarray],
) -> Any:
  """Returns boxes [N, M, 4] as a data set of COCO, filled in place.

  Args:
    coco: an empty data set.
    boxes: (left, top, right, bottom).
    numbers: classes [N, M].
    exists: bool [N, M].
    classes: number of classes.
    more: further values [N, M] of each box.
  """
  corners = boxes[exists]
  sides = corners[:, 2:] - corners[:, :2]
  columns = {
    "image_id": np.nonzero(exists)[0],
    "category_id": numbers[exists],
    "bbox": np.concatenate([corners[:, :2], sides], 1),
    "area": sides.prod(1),
    **{name: values[exists] for name, values in more.items()},
  }
  rows = zip(*(column.tolist() for column in columns.values()))
  # 0 would mean that a box is not matched.
  annotations = [{"id": number, **dict(zip(columns, row))} for number, row in enumerate(rows, 1)]
  coco.dataset = {
    "images": [{"id": row} for row in range(len(boxes))],
    "categories": [{"id": number, "name": str(number)} for number in range(classes)],
    "annotations": annotations,
  }
  coco.createIndex()
  return coco


def _print_nothing(*_: Any) -> None:
  pass
