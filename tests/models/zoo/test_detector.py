"""The detector: its outputs, its training with each head, and its decoders."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from box_references import overlap
from flax import nnx

from distill_jax import boxes
from distill_jax.models import from_nnx
from distill_jax.models.zoo.detector import Detector
from distill_jax.models.zoo.retinanet import RetinaNet
from distill_jax.models.zoo.ssd import SSD
from distill_jax.models.zoo.yolo import YOLO

SIZE = 32
STEPS = 160
HEADS = {
  "ssd": SSD(2, scale_range=(0.3, 0.6)),
  "retinanet": RetinaNet(2, anchor_size=2.5, octave_scales=(1.0,)),
  "yolo": YOLO(2, bins=8),
}


def shapes(head, height=16, width=24, **options):
  def outputs(x):
    return Detector(2, (4, 6, 8), head, **options, rngs=nnx.Rngs(0))(x)

  return jax.eval_shape(outputs, jax.ShapeDtypeStruct((3, height, width, 2), jnp.float32))


def test_outputs_have_their_documented_names_and_shapes():
  maps = {
    "c1": (3, 8, 12, 4),
    "c2": (3, 4, 6, 6),
    "c3": (3, 2, 3, 8),
    "p2": (3, 4, 6, 10),
    "p3": (3, 2, 3, 10),
  }
  heads = {
    SSD(5): {"class_logits": (3, 120, 6), "box_deltas": (3, 120, 4)},
    RetinaNet(5): {"class_logits": (3, 270, 5), "box_deltas": (3, 270, 4)},
    YOLO(5, bins=7): {"class_logits": (3, 30, 5), "box_bins": (3, 30, 4, 7)},
  }
  for head, predictions in heads.items():
    outputs = shapes(head, neck_width=10, blocks=2, tower_depth=2)
    assert {name: x.shape for name, x in outputs.items()} == maps | predictions


def squares():
  """Returns images with a bright or a dark square, and a batch with an image without one."""
  rng = np.random.default_rng(0)
  images = np.full((4, SIZE, SIZE, 1), 0.5, np.float32)
  true = np.zeros((4, 2, 4), np.float32)
  label = np.full((4, 2), -1, np.int32)
  for image in range(3):
    x, y, side = rng.integers(2, 12), rng.integers(2, 12), rng.integers(9, 16)
    true[image, 0] = [x, y, x + side, y + side]
    label[image, 0] = image % 2
    images[image, y : y + side, x : x + side] = image % 2
  return jnp.asarray(images), {"boxes": jnp.asarray(true), "label": jnp.asarray(label)}


def train(head):
  """Returns the losses of a training, and the outputs of the trained network."""
  images, batch = squares()
  optimizer = optax.adam(1e-2)
  model = from_nnx(lambda rngs: Detector(1, (4, 8), head, neck_width=8, rngs=rngs))
  batch["image"] = images

  def loss(params, statistics):
    outputs, statistics = model.apply(params, statistics, batch, train=True, key=None)
    return head.loss(outputs, batch).mean(), (statistics, outputs)

  def step(carry, _):
    params, statistics, state = carry
    (value, (statistics, _)), gradient = jax.value_and_grad(loss, has_aux=True)(params, statistics)
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(params, updates), statistics, state), value

  @jax.jit
  def run(key):
    params, statistics = model.init(key, batch)
    start = params, statistics, optimizer.init(params)
    (params, statistics, _), losses = jax.lax.scan(step, start, length=STEPS)
    return losses, loss(params, statistics)[1][1]

  # Random bits of this kind compile faster.
  return run(jax.random.key(0, impl="rbg"))


@pytest.mark.parametrize(
  "name",
  [
    "yolo",
    pytest.param("ssd", marks=pytest.mark.slow),
    pytest.param("retinanet", marks=pytest.mark.slow),
  ],
)
def test_small_detector_learns_squares(name):
  head = HEADS[name]
  losses, outputs = train(head)
  assert jnp.isfinite(losses).all()
  assert losses[-1] < losses[0] / 4
  decode = jax.jit(head.decode)
  detections = decode(outputs)
  _, batch = squares()
  for image in range(3):
    assert detections.classes[image, 0] == batch["label"][image, 0]
    assert overlap("iou", detections.boxes[image, 0], batch["boxes"][image, 0]) > 0.5
  decode(jax.tree.map(lambda x: 2 * x, outputs))
  assert decode._cache_size() == 1


def test_classes_begin_with_their_prior_probability():
  @jax.jit
  def biases():
    network = Detector(1, (4, 6), RetinaNet(2, prior=0.05), rngs=nnx.Rngs(0))
    return [network.predictors[name].bias[...] for name in ("class_logits", "box_deltas")]

  classes, deltas = biases()
  np.testing.assert_allclose(jax.nn.sigmoid(classes), 0.05, rtol=1e-5)
  np.testing.assert_array_equal(deltas, 0)


def test_silent_tower_still_learns():
  @jax.jit
  def gradient(bias):
    tower = Detector(1, (4, 6), HEADS["yolo"], neck_width=8, rngs=nnx.Rngs(0)).towers["box_bins"]
    tower[0].norm.bias[...] = jnp.full(8, bias)
    inputs = jax.random.normal(jax.random.key(0), (1, 2, 2, 8))
    return jax.grad(lambda x: tower[0](x).sum())(inputs)

  # What the many negatives of the first steps may do to all channels.
  assert jnp.abs(gradient(-6.0)).max() > 1e-3


def test_detections_lie_inside_of_the_image():
  head = HEADS["yolo"]
  maps = {"p2": jnp.zeros((2, 4, 6, 1))}
  logits = jnp.linspace(-2, 2, 96).reshape(2, 24, 2)
  outputs = maps | {"class_logits": logits, "box_bins": jnp.zeros((2, 24, 4, 8))}
  detections = jax.jit(head.decode)(outputs)
  assert isinstance(detections, boxes.Detections)
  assert detections.boxes.shape == (2, 100, 4)
  np.testing.assert_array_equal(detections.boxes[..., :2].min((0, 1)), [0, 0])
  np.testing.assert_array_equal(detections.boxes[..., 2:].max((0, 1)), [24, 16])


@pytest.mark.parametrize(
  ("field", "options"),
  [
    ("widths", {"widths": (4,)}),
    ("widths", {"widths": (4, 0)}),
    ("neck_width", {"neck_width": 0}),
    ("blocks", {"blocks": 0}),
    ("tower_depth", {"tower_depth": 1.5}),
  ],
)
def test_bad_sizes(field, options):
  options = {"widths": (4, 6)} | options
  with pytest.raises(ValueError, match=f"^{field}: "):
    Detector(1, head=YOLO(2), **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("height", "width"), [(16, 20), (4, 24)])
def test_images_that_the_pyramid_does_not_fit(height, width):
  with pytest.raises(ValueError, match="^images: "):
    shapes(YOLO(2), height, width)
