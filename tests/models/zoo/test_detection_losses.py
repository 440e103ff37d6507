"""Losses of the heads against float64 references, and what must not reach them."""

import functools

import detection_references as references
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from box_references import random_boxes

from distill_jax.models.zoo.anchors import positions, pyramid_levels
from distill_jax.models.zoo.retinanet import RetinaNet, focal_loss
from distill_jax.models.zoo.ssd import SSD
from distill_jax.models.zoo.yolo import YOLO, predicted_boxes

SIZE = 32
IMAGES = 4
HEADS = {
  "ssd": SSD(3),
  "retinanet": RetinaNet(3, anchor_size=2.0, octave_scales=(1.0, 1.5)),
  "yolo": YOLO(3, bins=8, positions_per_box=4),
}
NAMES = tuple(HEADS)


@functools.cache
def loss_and_gradient(name):
  def function(outputs, batch):
    values = HEADS[name].loss(outputs, batch)
    return values.sum(), values

  return jax.jit(jax.value_and_grad(function, has_aux=True))


def random_outputs(name, rng):
  head = HEADS[name]
  maps = {f"p{k}": np.zeros((IMAGES, SIZE >> k, SIZE >> k, 1)) for k in (2, 3)}
  count = head.anchors_per_position * sum(x.shape[1] * x.shape[2] for x in maps.values())
  shapes = head.output_shapes.items()
  return maps | {name: rng.normal(size=(IMAGES, count, *shape)) for name, shape in shapes}


def random_batch(rng):
  """Returns boxes of which the first counts in all images but the last, the others in some."""
  boxes = random_boxes(rng, IMAGES, 5, size=SIZE)
  label = rng.integers(0, 3, (IMAGES, 5)).astype(np.int32)
  crowd = np.zeros((IMAGES, 5), bool)
  label[3] = -1
  label[0, 2:] = -1
  boxes[0, 2:] = np.nan
  crowd[1, 1] = True
  boxes[1, 2] = [40.0, 2.0, 50.0, 9.0]  # Outside of the image.
  boxes[1, 3] = [4.0, 9.0, 12.0, 2.0]  # The bottom is above the top.
  boxes[2, 1, 2] = 40.0  # Clipped to the image.
  return {"boxes": boxes, "label": label, "crowd": crowd}


def truths(batch):
  """Returns the boxes that count of each image, as the references take them."""
  clipped = batch["boxes"].clip(0, SIZE)
  chosen = [[0, 1], [0, 4], [0, 1, 2, 3, 4], []]
  return [
    [(clipped[image, row], batch["label"][image, row]) for row in rows]
    for image, rows in enumerate(chosen)
  ]


def expected_losses(name, outputs, batch):
  head = HEADS[name]
  levels = pyramid_levels(outputs)
  values = []
  for image, truth in enumerate(truths(batch)):
    arrays = [outputs[output][image] for output in head.output_shapes]
    if name == "yolo":
      values.append(references.yolo(head, *arrays, *positions(levels), truth))
    else:
      reference = getattr(references, name)
      values.append(reference(head, *arrays, head.anchors(levels), truth))
  return values


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_equals_reference(name, seed):
  rng = np.random.default_rng(seed)
  outputs = random_outputs(name, rng)
  batch = random_batch(rng)
  with jax.enable_x64(True):
    (_, values), gradient = loss_and_gradient(name)(outputs, batch)
  expected = expected_losses(name, outputs, batch)
  assert min(expected[:3]) > 0
  np.testing.assert_allclose(values, expected, rtol=1e-9)
  assert all(np.isfinite(x).all() for x in gradient.values())


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_count_changes_nothing(name):
  rng = np.random.default_rng(5)
  outputs = random_outputs(name, rng)
  batch = random_batch(rng)
  other = {key: x.copy() for key, x in batch.items()}
  other["boxes"][0, 2:] = 3.0
  other["boxes"][1, 1:4] = 0
  other["boxes"][3] = rng.uniform(size=(5, 4))
  with jax.enable_x64(True):
    (_, values), gradient = loss_and_gradient(name)(outputs, batch)
    (_, same), same_gradient = loss_and_gradient(name)(outputs, other)
  np.testing.assert_array_equal(values, same)
  jax.tree.map(np.testing.assert_array_equal, gradient, same_gradient)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_of_boxes_equal_an_image_without_boxes(name):
  outputs = random_outputs(name, np.random.default_rng(6))
  none = {"boxes": np.zeros((IMAGES, 0, 4)), "label": np.zeros((IMAGES, 0), np.int32)}
  padding = {"boxes": np.zeros((IMAGES, 5, 4)), "label": np.full((IMAGES, 5), -1, np.int32)}
  with jax.enable_x64(True):
    values = jax.jit(HEADS[name].loss)(outputs, none)
    (_, expected), _ = loss_and_gradient(name)(outputs, padding | {"crowd": np.zeros((4, 5), bool)})
  np.testing.assert_allclose(values, expected, rtol=1e-12)
  assert np.all(np.asarray(values) == 0) == (name == "ssd")


def test_ties_keep_three_negatives_for_each_match():
  """All logits are equal, so that all negatives are equally hard: 3 count, not all."""
  outputs = random_outputs("ssd", np.random.default_rng(7))
  zeros = {key: np.zeros_like(x) for key, x in outputs.items()}
  batch = random_batch(np.random.default_rng(7))
  with jax.enable_x64(True):
    (_, values), _ = loss_and_gradient("ssd")(zeros, batch)
  np.testing.assert_allclose(values, expected_losses("ssd", zeros, batch), rtol=1e-9)


def test_nearly_correct_outputs_have_a_loss_near_zero():
  """One box on a center: the distances are whole bins, so that one bin has all probability."""
  head = HEADS["yolo"]
  outputs = {key: np.zeros_like(x) for key, x in random_outputs("yolo", np.random).items()}
  box = np.array([6.0, 10.0, 22.0, 18.0])
  centers, strides = positions(pyramid_levels(outputs))
  row = 8 * 3 + 3  # Its center is (14, 14).
  distances = (np.concatenate([centers - box[:2], box[2:] - centers], -1) / strides[:, None])[row]
  outputs["class_logits"] -= 20
  outputs["class_logits"][:, row, 1] = 40
  outputs["box_bins"][:, row] = -40 * np.abs(np.arange(8) - distances[:, None])
  batch = {"boxes": np.tile(box, (IMAGES, 1, 1)), "label": np.ones((IMAGES, 1), np.int32)}
  with jax.enable_x64(True):
    assert (jax.jit(head.loss)(outputs, batch) < 1e-6).all()
    predicted = predicted_boxes(jnp.asarray(outputs["box_bins"]), centers, strides)
  np.testing.assert_allclose(predicted[0, row], box)


def test_focal_loss_equals_optax():
  logits = jnp.linspace(-30, 30, 24).reshape(2, 12)
  target = jnp.array([[0.0], [1.0]])
  for alpha, gamma in ((0.25, 2.0), (0.6, 1.5)):
    values = focal_loss(logits, target, alpha, gamma)
    expected = optax.sigmoid_focal_loss(logits, target, alpha=alpha, gamma=gamma)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-7)


def test_wrong_shapes_are_named():
  batch = random_batch(np.random.default_rng(8))
  outputs = random_outputs("ssd", np.random.default_rng(8))
  with pytest.raises(ValueError, match="^class_logits: "):
    HEADS["retinanet"].loss(outputs, batch)
  with pytest.raises(ValueError, match="^outputs: "):
    HEADS["ssd"].loss({"class_logits": outputs["class_logits"]}, batch)
  with pytest.raises(ValueError, match="^label: "):
    HEADS["ssd"].loss(outputs, batch | {"label": batch["label"][:, :2]})
  with pytest.raises(ValueError, match="^classes: "):
    SSD(0)
