"""Formats and overlaps of boxes against float64 formulas and torchvision."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from box_references import overlap, random_boxes
from jax.test_util import check_grads

from distill_jax import boxes

GOLDEN = json.loads(pathlib.Path(__file__).with_name("golden_boxes.json").read_text())
KINDS = ("iou", "giou", "diou", "ciou")
WITHOUT_AREA = [[0, 0, 0, 0], [4, 1, 2, 5], [1, 4, 5, 2], [3, 1, 3, 5], [np.nan, 1, 3, 4]]
BOX = {
  "xyxy": [1.0, 2.0, 7.0, 6.0],
  "xywh": [1.0, 2.0, 6.0, 4.0],
  "cxcywh": [4.0, 4.0, 6.0, 4.0],
  "yxyx": [2.0, 1.0, 6.0, 7.0],
}


@pytest.mark.parametrize(("source", "target"), [*itertools.product(boxes.FORMATS, repeat=2)])
def test_convert_between_all_formats(source, target):
  converted = boxes.convert([BOX[source]] * 2, source, target)
  np.testing.assert_array_equal(converted, [BOX[target]] * 2)


def test_formats_and_shapes_are_checked():
  with pytest.raises(ValueError, match="^source: "):
    boxes.convert(BOX["xyxy"], "ltrb", "xyxy")
  with pytest.raises(ValueError, match="^target: "):
    boxes.convert(BOX["xyxy"], "xyxy", "XYWH")
  with pytest.raises(ValueError, match="^x: "):
    boxes.convert(jnp.zeros((4, 3)), "xyxy", "xywh")
  with pytest.raises(ValueError, match="^a: "):
    boxes.iou(jnp.zeros((4, 5)), jnp.zeros((4, 4)))


def test_area_and_clipping():
  x = jnp.array([[-4.0, 1.0, 3.0, 9.0], [12.0, 1.0, 14.0, 2.0], [1.0, 1.0, 3.0, 2.0]])
  clipped = boxes.clip(x, 8, jnp.array(10))
  np.testing.assert_array_equal(clipped, [[0, 1, 3, 8], [10, 1, 10, 2], [1, 1, 3, 2]])
  np.testing.assert_array_equal(boxes.area(clipped), [21, 0, 2])
  np.testing.assert_array_equal(boxes.has_area(clipped), [True, False, True])
  np.testing.assert_array_equal(boxes.area(jnp.array(WITHOUT_AREA)), 0)
  np.testing.assert_array_equal(boxes.area(jnp.array([[1, 2, 5, 4]])), 8)
  assert not boxes.has_area(jnp.array([0, 0, jnp.inf, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_reference_and_torchvision(kind):
  compare = jax.jit(lambda a, b: getattr(boxes, kind)(a[:, None], b[None]))
  a = np.array(GOLDEN["a"])
  b = np.array(GOLDEN["b"])
  expected = [[overlap(kind, one, other) for other in b] for one in a]
  with jax.enable_x64(True):
    values = compare(a, b)
  np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-12)
  # torchvision adds 1e-7 to denominators.
  np.testing.assert_allclose(values, GOLDEN["overlaps"][kind], atol=1e-7)
  low = compare(jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.float32))
  assert low.dtype == jnp.float32


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
  rng = np.random.default_rng(1)
  with jax.enable_x64(True):
    a, b = jnp.asarray(random_boxes(rng, 2, 3))
    f = jax.jit(getattr(boxes, kind))
    if kind == "ciou":
      # Its alpha is a constant for the gradient.
      difference = jax.grad(lambda x: (f(x, b) - boxes.diou(x, b)).sum())(a)
      v = jax.grad(lambda x: _aspect(x, b).sum())(a)
      alpha = _aspect(a, b) / (1 - boxes.iou(a, b) + _aspect(a, b))
      np.testing.assert_allclose(difference, -alpha[:, None] * v, rtol=1e-9)
    else:
      check_grads(f, (a, b), order=1, modes=["rev"], rtol=1e-5)


def _aspect(a, b):
  first, second = [jnp.arctan((x[..., 2] - x[..., 0]) / (x[..., 3] - x[..., 1])) for x in (a, b)]
  return 4 / jnp.pi**2 * (first - second) ** 2


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_without_area_are_unlike_all(kind):
  bad = jnp.array(WITHOUT_AREA)
  good = jnp.broadcast_to(jnp.array([1.0, 1.0, 4.0, 5.0]), bad.shape)
  f = jax.jit(jax.value_and_grad(lambda a, b: getattr(boxes, kind)(a, b).sum(), (0, 1)))
  for pair in ((bad, good), (good, bad), (bad, bad)):
    value, gradients = f(*pair)
    assert value == 0
    np.testing.assert_array_equal(gradients, np.zeros((2, len(bad), 4)))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_boxes_have_similarity_one(kind):
  box = jnp.array(BOX["xyxy"])
  value, gradient = jax.jit(jax.value_and_grad(getattr(boxes, kind)))(box, box)
  assert value == 1
  assert jnp.isfinite(gradient).all()
