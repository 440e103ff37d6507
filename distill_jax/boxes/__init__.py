"""Arithmetic of bounding boxes: formats, overlaps, and detections without duplicates.

A box is four numbers in pixels, (left, top, right, bottom): "xyxy". Other formats are converted,
and the caller says which one it is:

>>> convert([10.0, 20.0, 4.0, 6.0], "xywh", "xyxy")
Array([10., 20., 14., 26.], dtype=float32)

Overlaps broadcast, so that `iou(a[:, None], b[None])` compares all pairs. They are similarities: a
loss of predicted and true boxes is `1 - giou(predicted, true)`.
"""

from distill_jax.boxes.detection import Detections, detect
from distill_jax.boxes.formats import FORMATS, area, clip, convert, has_area
from distill_jax.boxes.overlaps import ciou, diou, giou, iou

__all__ = [
  "FORMATS",
  "Detections",
  "area",
  "ciou",
  "clip",
  "convert",
  "detect",
  "diou",
  "giou",
  "has_area",
  "iou",
]
