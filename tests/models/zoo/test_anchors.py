"""Positions, anchors, offsets from anchors, and the boxes that anchors and positions have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from box_references import overlap, random_boxes

from distill_jax.models.zoo import anchors
from distill_jax.models.zoo.retinanet import RetinaNet
from distill_jax.models.zoo.ssd import SSD
from distill_jax.models.zoo.task_alignment import align
from distill_jax.models.zoo.true_boxes import TrueBoxes, match

LEVELS = (anchors.Level(4, 6, 8), anchors.Level(8, 3, 4))


def test_positions_are_ordered_by_level_row_and_column():
  centers, strides = anchors.positions(LEVELS)
  expected = [[4 * x + 2, 4 * y + 2] for y in range(6) for x in range(8)]
  expected += [[8 * x + 4, 8 * y + 4] for y in range(3) for x in range(4)]
  np.testing.assert_array_equal(centers, expected)
  np.testing.assert_array_equal(strides, [4] * 48 + [8] * 12)
  assert anchors.image_size(LEVELS) == (24, 32)


def test_default_boxes_of_ssd():
  """Equation 4 and section 2.2, for the first position of each level."""
  boxes = SSD(2, ratios=(1.0, 2.0), scale_range=(0.2, 0.6)).anchors(LEVELS)
  sides = boxes[:, 2:] - boxes[:, :2]
  root = 2**0.5
  for row, scale, following in ((0, 0.2, 0.6), (48 * 3, 0.6, 1.0)):
    extra = (scale * following) ** 0.5
    expected = [[scale, scale], [scale * root, scale / root], [extra, extra]]
    np.testing.assert_allclose(sides[row : row + 3], 24 * np.array(expected))
  np.testing.assert_allclose((boxes[:3, :2] + boxes[:3, 2:]) / 2, 2)


def test_anchors_of_retinanet():
  boxes = RetinaNet(2).anchors(LEVELS)
  assert boxes.shape == (60 * 9, 4)
  sides = boxes[:, 2:] - boxes[:, :2]
  areas = np.array([16.0, 16 * 2 ** (1 / 3), 16 * 2 ** (2 / 3)]) ** 2
  np.testing.assert_allclose(sides[:9].prod(-1), np.repeat(areas, 3))
  np.testing.assert_allclose(sides[:3, 1] / sides[:3, 0], [0.5, 1, 2])
  np.testing.assert_allclose(sides[48 * 9 :], 2 * np.tile(sides[:9], (12, 1)))


def test_decoding_inverts_encoding():
  rng = np.random.default_rng(0)
  boxes, others = jnp.asarray(random_boxes(rng, 2, 50), jnp.float32)
  for variances in ((1.0, 1.0), (0.1, 0.2)):
    offsets = anchors.encode(boxes, others, variances)
    np.testing.assert_allclose(anchors.decode(offsets, others, variances), boxes, atol=1e-4)
  assert jnp.isfinite(anchors.decode(jnp.full((1, 4), 1e6), others[:1], (0.1, 0.2))).all()


def test_each_box_has_its_best_anchor():
  rng = np.random.default_rng(1)
  truth_boxes = random_boxes(rng, 3, 4, size=24)
  truth_boxes[1, 1] = truth_boxes[1, 0] + [0, 0, 0.1, 0.1]  # The same best anchor.
  counts = np.ones((3, 4), bool)
  counts[2] = False
  truth_boxes[2] = 0
  boxes = SSD(2).anchors(LEVELS)
  truth = TrueBoxes(jnp.asarray(truth_boxes, jnp.float32), jnp.zeros((3, 4), int), counts)
  rows, overlaps, is_best = jax.jit(match)(jnp.asarray(boxes, jnp.float32), truth)
  assert not overlaps[2].any() and not is_best[2].any()
  for image in range(2):
    table = np.array([[overlap("iou", b, a) for a in boxes] for b in truth_boxes[image]])
    best = table.argmax(1)
    np.testing.assert_array_equal(np.flatnonzero(is_best[image]), np.unique(best))
    for row, anchor in enumerate(best):
      rivals = np.flatnonzero(best == anchor)
      assert rows[image, anchor] == rivals[table[rivals, anchor].argmax()], row
    others = ~np.asarray(is_best[image])
    np.testing.assert_array_equal(rows[image, others], table.argmax(0)[others])
    its_overlaps = table[rows[image], np.arange(len(boxes))]
    np.testing.assert_allclose(overlaps[image], its_overlaps, atol=1e-5)
  assert len(np.flatnonzero(is_best[1])) < 4


def test_alignment():
  """A box has the best aligned positions inside of it, and its best score is its best overlap."""
  rng = np.random.default_rng(2)
  centers, _ = anchors.positions(LEVELS)
  truth_boxes = np.array([[[2, 2, 18, 18], [20, 3, 30, 21], [0, 0, 0, 0]]], np.float32)
  truth = TrueBoxes(
    jnp.asarray(truth_boxes), jnp.array([[0, 1, 0]]), jnp.array([[True, True, False]])
  )
  predicted = np.concatenate([centers - 5, centers + 6], -1)[None]
  probabilities = rng.uniform(0.1, 0.9, (1, 60, 2)).astype(np.float32)
  rows, scores = jax.jit(lambda *arrays: align(*arrays, truth, count=3, alpha=0.5, beta=6.0))(
    probabilities, predicted, centers
  )
  for row in range(2):
    positive = np.flatnonzero((scores[0] > 0) & (rows[0] == row))
    assert len(positive) == 3
    overlaps = [overlap("ciou", truth_boxes[0, row], predicted[0, p]) for p in positive]
    np.testing.assert_allclose(scores[0, positive].max(), max(overlaps), rtol=1e-5)
    assert (centers[positive] > truth_boxes[0, row, :2]).all()
    assert (centers[positive] < truth_boxes[0, row, 2:]).all()
  assert (scores[0] > 0).sum() == 6


@pytest.mark.parametrize("outputs", [{}, {"p": 0, "pyramid2": 0}])
def test_pyramid_without_levels(outputs):
  with pytest.raises(ValueError, match="^outputs: "):
    anchors.pyramid_levels(outputs)
