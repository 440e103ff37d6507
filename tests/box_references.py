"""Overlaps and suppression in float64 NumPy, one pair at a time, and the boxes of the tests."""

import math

import numpy as np


def random_boxes(rng, *shape, size=32.0):
  """Returns boxes [*shape, 4] (xyxy) inside of an image, with sides of at least half a pixel."""
  first = rng.uniform(0, 0.7 * size, (*shape, 2))
  return np.concatenate([first, first + rng.uniform(0.5, 0.5 * size, (*shape, 2))], -1)


def overlap(kind, a, b):
  """Returns one similarity of two boxes by the papers' equations."""
  a_width, a_height = a[2] - a[0], a[3] - a[1]
  b_width, b_height = b[2] - b[0], b[3] - b[1]
  if not (min(a_width, a_height, b_width, b_height) > 0):
    return 0.0
  width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
  height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
  union = a_width * a_height + b_width * b_height - width * height
  iou = width * height / union
  hull_width = max(a[2], b[2]) - min(a[0], b[0])
  hull_height = max(a[3], b[3]) - min(a[1], b[1])
  if kind == "iou":
    return iou
  if kind == "giou":
    return iou - (hull_width * hull_height - union) / (hull_width * hull_height)
  dx = (a[0] + a[2]) / 2 - (b[0] + b[2]) / 2
  dy = (a[1] + a[3]) / 2 - (b[1] + b[3]) / 2
  diou = iou - (dx**2 + dy**2) / (hull_width**2 + hull_height**2)
  if kind == "diou":
    return diou
  v = 4 / math.pi**2 * (math.atan(b_width / b_height) - math.atan(a_width / a_height)) ** 2
  return diou - v**2 / (1 - iou + v) if v else diou


def greedy(boxes, scores, iou_threshold, score_threshold, candidates, count):
  """Returns boxes, scores and classes of an image's detections: the greedy loop, and padding."""
  pairs = [
    (-scores[row, label], row, label)
    for row, box in enumerate(boxes)
    for label in range(scores.shape[1])
    if scores[row, label] > score_threshold and (box[2:] > box[:2]).all()
  ]
  chosen = []
  for score, row, label in sorted(pairs)[:candidates]:
    rivals = [other for _, other, its_label in chosen if its_label == label]
    if all(overlap("iou", boxes[row], boxes[other]) <= iou_threshold for other in rivals):
      chosen.append((score, row, label))
  chosen = chosen[:count]
  padding = count - len(chosen)
  return (
    np.array([boxes[row] for _, row, _ in chosen] + [np.zeros(4)] * padding).reshape(count, 4),
    np.array([-score for score, _, _ in chosen] + [0.0] * padding),
    np.array([label for _, _, label in chosen] + [-1] * padding, int),
  )
