"""Losses of SSD, RetinaNet and YOLO in float64 NumPy, written from the papers one box at a time.

A truth is a list of (box, label) of those that count, for each image.
"""

import math

import numpy as np
from box_references import overlap


def softmax(x):
  exponentials = np.exp(x - x.max(-1, keepdims=True))
  return exponentials / exponentials.sum(-1, keepdims=True)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def smooth_l1(x, beta=1.0):
  x = abs(x)
  return 0.5 * x**2 / beta if x < beta else x - 0.5 * beta


def offsets(box, anchor, variances=(1.0, 1.0)):
  """Returns the four numbers of SSD's equation 2 over the variances."""
  width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
  return [
    ((box[0] + box[2]) / 2 - (anchor[0] + anchor[2]) / 2) / width / variances[0],
    ((box[1] + box[3]) / 2 - (anchor[1] + anchor[3]) / 2) / height / variances[0],
    math.log((box[2] - box[0]) / width) / variances[1],
    math.log((box[3] - box[1]) / height) / variances[1],
  ]


def matches(truth, anchors, is_match):
  """Returns {anchor: row of its box}, and the largest overlap of each anchor."""
  overlaps = np.array([[overlap("iou", box, a) for a in anchors] for box, _ in truth])
  overlaps = overlaps.reshape(len(truth), len(anchors))
  largest = overlaps.max(0, initial=0)
  rows = {a: overlaps[:, a].argmax() for a in range(len(anchors)) if is_match(largest[a])}
  best = [row.argmax() for row in overlaps]
  # The box that overlaps a shared best anchor most comes last.
  for row in sorted(range(len(truth)), key=lambda row: overlaps[row, best[row]]):
    rows[best[row]] = row
  return rows, largest


def ssd(head, logits, deltas, anchors, truth):
  rows, _ = matches(truth, anchors, lambda x: x > head.match_threshold)
  if not rows:
    return 0.0
  log_probabilities = np.log(softmax(logits))
  location = 0.0
  confidence = 0.0
  for a, row in rows.items():
    box, label = truth[row]
    targets = offsets(box, anchors[a], head.variances)
    location += sum(smooth_l1(x - y) for x, y in zip(deltas[a], targets))
    confidence -= log_probabilities[a, label]
  negatives = sorted(log_probabilities[a, -1] for a in range(len(anchors)) if a not in rows)
  confidence -= sum(negatives[: head.negatives_per_positive * len(rows)])
  return (confidence + location) / len(rows)


def focal(logit, is_class, alpha, gamma):
  p = sigmoid(logit)
  p_t = p if is_class else 1 - p
  return -(alpha if is_class else 1 - alpha) * (1 - p_t) ** gamma * math.log(p_t)


def retinanet(head, logits, deltas, anchors, truth):
  rows, largest = matches(truth, anchors, lambda x: x >= head.positive_threshold)
  total = 0.0
  for a in range(len(anchors)):
    if a not in rows and largest[a] >= head.negative_threshold:
      continue
    label = truth[rows[a]][1] if a in rows else None
    total += sum(focal(x, k == label, head.alpha, head.gamma) for k, x in enumerate(logits[a]))
    if a in rows:
      targets = offsets(truth[rows[a]][0], anchors[a])
      total += sum(smooth_l1(x - y, head.beta) for x, y in zip(deltas[a], targets))
  return total / max(len(rows), 1)


def alignment(head, probabilities, predicted, centers, truth):
  """Returns {position: (row of its box, target score)}."""
  u = {}
  t = {}
  for row, (box, label) in enumerate(truth):
    inside = [p for p, (x, y) in enumerate(centers) if box[0] < x < box[2] and box[1] < y < box[3]]
    for p in inside:
      u[row, p] = max(0.0, overlap("ciou", box, predicted[p]))
      t[row, p] = probabilities[p, label] ** head.alpha * u[row, p] ** head.beta
    inside = sorted(inside, key=lambda p, row=row: -t[row, p])
    for p in inside[head.positions_per_box :]:
      del u[row, p]
  owner = {p: max((u[r, q], r) for r, q in u if q == p)[1] for _, p in u}
  targets = {}
  for p, row in owner.items():
    positives = [q for q in owner if owner[q] == row]
    largest = max(t[row, q] for q in positives)
    scale = max(u[row, q] for q in positives) / largest if largest else 0.0
    targets[p] = row, t[row, p] * scale
  return targets


def yolo(head, logits, bins, centers, strides, truth):
  distances = (softmax(bins) * np.arange(head.bins)).sum(-1) * strides[:, None]
  predicted = np.concatenate([centers - distances[:, :2], centers + distances[:, 2:]], -1)
  targets = alignment(head, sigmoid(logits), predicted, centers, truth)
  scores = np.zeros(logits.shape)
  box_loss = 0.0
  bin_loss = 0.0
  for p, (row, score) in targets.items():
    box, label = truth[row]
    scores[p, label] = score
    box_loss += score * (1 - overlap("ciou", box, predicted[p]))
    edges = [centers[p, 0] - box[0], centers[p, 1] - box[1]]
    edges += [box[2] - centers[p, 0], box[3] - centers[p, 1]]
    for edge, its_bins in zip(edges, bins[p]):
      distance = min(edge / strides[p], head.bins - 1.01)
      low = math.floor(distance)
      log_p = np.log(softmax(its_bins))
      value = (low + 1 - distance) * log_p[low] + (distance - low) * log_p[low + 1]
      bin_loss -= score * value / 4
  q = sigmoid(logits)
  class_loss = -(scores * np.log(q) + (1 - scores) * np.log(1 - q)).sum()
  total = head.box_weight * box_loss + head.class_weight * class_loss + head.bins_weight * bin_loss
  return total / max(scores.sum(), 1)
