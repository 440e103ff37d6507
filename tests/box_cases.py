"""Random true boxes and detections, for tests of detection."""

import jax.numpy as jnp
import numpy as np

from distill_jax.boxes import Detections
from distill_jax.models import from_apply

FOUND = ("found_boxes", "found_scores", "found_classes")


def make_boxes(rng, shape, size=200):
  """Returns boxes [..., 4] whose areas are small, medium and large."""
  sides = np.exp(rng.uniform(np.log(8), np.log(size * 0.8), (*shape, 2)))
  corners = rng.uniform(-5, size - 20, (*shape, 2))
  return np.concatenate([corners, corners + sides], -1).astype(np.float32)


def make_batch(rng, *, images=12, boxes=6, found=10, classes=4, skill=0.7, crowds=True):
  """Returns a batch with true boxes, and with detections of which a part fits them.

  Image 0 has no true box, image 1 no detection, and image 2 neither.
  """
  truth = make_boxes(rng, (images, boxes))
  label = rng.integers(0, classes, (images, boxes)).astype(np.int32)
  label[:, -1] = -1
  truth[:, -1] = 0
  label[[0, 2]] = -1
  found_boxes = make_boxes(rng, (images, found))
  near = rng.integers(0, boxes, (images, found))
  shift = rng.normal(0, 4, (images, found, 4))
  is_near = (rng.random((images, found)) < skill) & (np.take_along_axis(label, near, 1) >= 0)
  copies = np.take_along_axis(truth, near[..., None], 1) + shift
  found_boxes = np.where(is_near[..., None], copies, found_boxes).astype(np.float32)
  is_right = is_near & (rng.random((images, found)) < 0.8)
  found_classes = rng.integers(0, classes, (images, found))
  found_classes = np.where(is_right, np.take_along_axis(label, near, 1), found_classes)
  found_classes[[1, 2]] = -1
  found_classes[:, -1] = -1
  scores = (1 + rng.permutation(images * found).reshape(images, found)) / (1 + images * found)
  batch = {
    "boxes": truth,
    "label": label,
    "found_boxes": found_boxes,
    "found_scores": np.where(found_classes < 0, 0, scores).astype(np.float32),
    "found_classes": found_classes.astype(np.int32),
  }
  if crowds:
    batch["crowd"] = rng.random((images, boxes)) < 0.2
  return batch


def detector():
  """Returns a network whose detections are entries of the batch, and its `decode`."""

  def apply(w, *found):
    return dict(zip(FOUND, (found[0], w * found[1], found[2])))

  return from_apply(None, apply, variables=jnp.ones(()), inputs=FOUND)


def decode(outputs):
  return Detections(*(outputs[name] for name in FOUND))
