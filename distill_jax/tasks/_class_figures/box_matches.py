"""Matches detections with true boxes at an IoU of 0.5, image by image, as COCO does."""

from typing import NamedTuple

import numpy as np

from distill_jax.tasks._boxes import Found, Truth

IOU = 0.5


class Matches(NamedTuple):
  """The detections of one network next to the true boxes.

  Attributes:
    found: detections [N, K]; classes of -1 are none.
    truth: true boxes [N, M].
    match: int [N, K], the true box that a detection finds; -1: none.
    counted: bool [N, K]: there is a detection, and it is not in a crowd.
    same: float [N, K], the largest IoU with a true box of the detection's class, crowds apart.
    same_box: int [N, K], this box.
    other: float [N, K], the largest IoU with a true box of another class.
    other_box: int [N, K], this box.
  """

  found: Found
  truth: Truth
  match: np.ndarray
  counted: np.ndarray
  same: np.ndarray
  same_box: np.ndarray
  other: np.ndarray
  other_box: np.ndarray

  @property
  def is_correct(self) -> np.ndarray:
    """Returns which detections find a true box, bool [N, K]."""
    return self.match >= 0

  def best_threshold(self) -> float:
    """Returns the score from which on detections have the highest F1 over all images; infinity
    where none is correct.
    """
    scores = self.found.scores[self.counted]
    order = np.argsort(-scores, kind="stable")
    correct = np.cumsum(self.is_correct[self.counted][order])
    f1 = 2 * correct / (np.arange(1, len(order) + 1) + self.truth.counted.sum())
    # Equal scores are shown together.
    f1[:-1][scores[order][:-1] == scores[order][1:]] = 0
    return float(scores[order][f1.argmax()]) if correct.size and correct[-1] else np.inf

  def image_f1(self, threshold: float) -> np.ndarray:
    """Returns F1 of each image [N], of detections from a score on; 1 where nothing is to be found
    and nothing is.
    """
    shown = self.counted & (self.found.scores >= threshold)
    correct = (shown & self.is_correct).sum(1)
    total = shown.sum(1) + self.truth.counted.sum(1)
    return np.where(total == 0, 1, 2 * correct / np.maximum(total, 1))


def match_boxes(found: Found, truth: Truth) -> Matches:
  """Returns the matches of all images; the detection with the highest score chooses first."""
  rows = [_match_image(*(x[row] for x in (*found, *truth))) for row in range(len(found.scores))]
  return Matches(found, truth, *(np.stack(column) for column in zip(*rows)))


def _match_image(
  boxes: np.ndarray,
  scores: np.ndarray,
  classes: np.ndarray,
  true_boxes: np.ndarray,
  label: np.ndarray,
  crowd: np.ndarray,
  exists: np.ndarray,
) -> tuple[np.ndarray, ...]:
  """Returns the fields of `Matches` of one image."""
  is_found = classes >= 0
  overlaps = np.where(is_found[:, None] & exists, _overlaps(boxes, true_boxes, crowd), 0)
  is_same = classes[:, None] == label
  same = np.where(is_same & ~crowd, overlaps, 0)
  other = np.where(~is_same & ~crowd, overlaps, 0)
  in_crowd = (np.where(is_same & crowd, overlaps, 0) >= IOU).any(1)
  match = np.full(len(boxes), -1)
  free = same.copy()
  near = np.flatnonzero((same >= IOU).any(1))
  for row in near[np.argsort(-scores[near], kind="stable")]:
    best = int(free[row].argmax())
    if free[row, best] >= IOU:
      match[row] = best
      free[:, best] = 0
  counted = is_found & ((match >= 0) | ~in_crowd)
  return match, counted, same.max(1), same.argmax(1), other.max(1), other.argmax(1)


def _overlaps(boxes: np.ndarray, true_boxes: np.ndarray, crowd: np.ndarray) -> np.ndarray:
  """Returns IoU [K, M]; with a crowd, the part of the detection that is in it."""
  low = np.maximum(boxes[:, None, :2], true_boxes[:, :2])
  high = np.minimum(boxes[:, None, 2:], true_boxes[:, 2:])
  shared = np.maximum(high - low, 0).prod(-1)
  areas, true_areas = (np.maximum(x[:, 2:] - x[:, :2], 0).prod(-1) for x in (boxes, true_boxes))
  union = areas[:, None] + np.where(crowd, 0, true_areas - shared)
  return shared / np.where(union > 0, union, np.inf)
