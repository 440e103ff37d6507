"""Detections against a greedy loop in NumPy and torchvision."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from box_references import greedy, random_boxes

from distill_jax import boxes

GOLDEN = json.loads(pathlib.Path(__file__).with_name("golden_boxes.json").read_text())
OPTIONS = {"iou_threshold": 0.3, "score_threshold": 0.2, "candidates": 30, "max_detections": 12}


@functools.cache
def compiled(**options):
  return jax.jit(functools.partial(boxes.detect, **options))


def detect(image_boxes, scores, **options):
  options = OPTIONS | options
  image_boxes = np.asarray(image_boxes, np.float32)
  scores = np.asarray(scores, np.float32)
  detections = compiled(**options)(image_boxes, scores)
  for image, (one, its_scores) in enumerate(zip(image_boxes, scores)):
    expected = greedy(one, its_scores, *options.values())
    for value, array in zip(detections, expected, strict=True):
      np.testing.assert_array_equal(value[image], array.astype(value.dtype))
  return detections


def random_case(rng, classes=3):
  scores = rng.uniform(0, 1, (4, 20, classes))
  return random_boxes(rng, 4, 20), scores


@pytest.mark.parametrize("seed", range(5))
def test_equals_greedy_loop(seed):
  image_boxes, scores = random_case(np.random.default_rng(seed))
  if seed > 2:
    scores = scores.round(1)  # Ties.
  detect(image_boxes, scores)


def test_equals_greedy_loop_with_few_candidates_and_many_detections():
  image_boxes, scores = random_case(np.random.default_rng(7))
  detect(image_boxes, scores.round(1), candidates=7)
  detections = detect(image_boxes, scores, candidates=500, max_detections=70)
  assert detections.scores.shape == (4, 70)
  assert not detections.scores[:, -1].any()


def test_chain_of_overlaps():
  """Each box overlaps with its neighbors only: every second one is suppressed."""
  left = 4.0 * np.arange(20)
  chain = np.stack([left, left * 0, left + 9, left * 0 + 9], -1)
  scores = np.linspace(0.9, 0.5, 20)[:, None] * np.array([1, 0, 0])
  detections = detect([chain] * 4, [scores] * 4)
  np.testing.assert_array_equal(detections.boxes[0, :10, 0], left[::2])


def test_no_candidates_padding_and_bad_numbers():
  image_boxes, scores = random_case(np.random.default_rng(8))
  scores[0] = 0.2  # At the threshold.
  image_boxes[1] = [3.0, 3.0, 9.0, 9.0]
  scores[2, ::2] = np.nan
  image_boxes[3, :8] = 0
  image_boxes[3, 8:10, 2] = np.nan
  detections = detect(image_boxes, scores)
  assert (detections.classes[0] == -1).all() and not detections.boxes[0].any()
  assert (detections.classes[1] >= 0).sum() == 3
  assert detections.classes.dtype == jnp.int32


@pytest.mark.parametrize("threshold", GOLDEN["rows"])
def test_equals_torchvision(threshold):
  image_boxes = np.array([GOLDEN["boxes"]])
  one_hot = np.eye(3)[GOLDEN["classes"]] * np.array(GOLDEN["scores"])[:, None]
  options = {"iou_threshold": float(threshold), "score_threshold": 0.0}
  detections = detect(image_boxes, one_hot[None], **options, candidates=120, max_detections=40)
  rows = GOLDEN["rows"][threshold]
  np.testing.assert_allclose(detections.boxes[0, : len(rows)], image_boxes[0, rows], rtol=1e-6)
  assert (detections.classes[0, len(rows) :] == -1).all()


def test_one_compilation():
  f = jax.jit(functools.partial(boxes.detect, **OPTIONS))
  for seed in range(2):
    f(*random_case(np.random.default_rng(seed)))
  assert f._cache_size() == 1


@pytest.mark.parametrize(
  ("field", "options"),
  [
    ("iou_threshold", {"iou_threshold": 1.5}),
    ("score_threshold", {"score_threshold": -0.1}),
    ("candidates", {"candidates": 0}),
    ("max_detections", {"max_detections": 2.5}),
  ],
)
def test_bad_options(field, options):
  with pytest.raises(ValueError, match=f"^{field}: "):
    boxes.detect(jnp.zeros((1, 3, 4)), jnp.zeros((1, 3, 2)), **options)


def test_shapes_that_do_not_fit():
  with pytest.raises(ValueError, match="^scores: "):
    boxes.detect(jnp.zeros((1, 3, 4)), jnp.zeros((1, 4, 2)))
