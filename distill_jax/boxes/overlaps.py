"""Similarities of boxes: IoU and those that tell apart boxes without overlap.

All take boxes (xyxy) that broadcast, compute in float32 or wider, and are 0 with a gradient of 0
where one of the two boxes has no area, as padding has none. In the formulas A and B are the boxes,
and C is the smallest box around both.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.boxes.formats import common_boxes, has_area


def iou(a: ArrayLike, b: ArrayLike) -> jax.Array:
  """|A and B| / |A or B|, from 0 to 1.

  Args:
    a: boxes [..., 4] (xyxy), any dtype.
    b: boxes of a shape that broadcasts with that of `a`.

  Returns:
    Similarities [...]: 1 for equal boxes, 0 without overlap and for boxes without area.

  Raises:
    ValueError: a last axis that is not 4.

  >>> a = jnp.array([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
  >>> iou(a[:, None], jnp.array([[0.0, 0.0, 2.0, 1.0], [4.0, 0.0, 5.0, 1.0]]))
  Array([[0.5, 0. ],
         [0. , 0. ]], dtype=float32)
  """
  pair = _pair(a, b)
  return _valid(pair, _iou(pair))


def giou(a: ArrayLike, b: ArrayLike) -> jax.Array:
  """IoU - |C without A and B| / |C|, from -1 to 1.

  Arguments, shapes and errors are those of `iou`.

  Source: Rezatofighi et al. 2019, algorithm 1, arXiv:1902.09630

  >>> giou(jnp.array([0.0, 0.0, 1.0, 1.0]), jnp.array([3.0, 0.0, 4.0, 1.0]))
  Array(-0.5, dtype=float32)
  """
  pair = _pair(a, b)
  hull = _hull(pair)
  hull_area = hull[..., 0] * hull[..., 1]
  return _valid(pair, _iou(pair) - (hull_area - _union(pair)) / hull_area)


def diou(a: ArrayLike, b: ArrayLike) -> jax.Array:
  """IoU - d^2 / c^2, from -1 to 1: d is the distance of the centers, c the diagonal of C.

  Arguments, shapes and errors are those of `iou`.

  Source: Zheng et al. 2020, equations 6 and 7, arXiv:1911.08287

  >>> diou(jnp.array([0.0, 0.0, 1.0, 1.0]), jnp.array([2.0, 0.0, 3.0, 1.0]))
  Array(-0.4, dtype=float32)
  """
  pair = _pair(a, b)
  return _valid(pair, _diou(pair))


def ciou(a: ArrayLike, b: ArrayLike) -> jax.Array:
  """DIoU - alpha v, with v = 4 / pi^2 (arctan(w_B / h_B) - arctan(w_A / h_A))^2 and
  alpha = v / (1 - IoU + v), which is a constant for the gradient, as in published code.

  Arguments, shapes and errors are those of `iou`.

  Source: Zheng et al. 2020, equations 8 to 11, arXiv:1911.08287

  >>> ciou(jnp.array([0.0, 0.0, 2.0, 2.0]), jnp.array([0.0, 0.0, 2.0, 2.0]))
  Array(1., dtype=float32)
  """
  pair = _pair(a, b)
  angles = [jnp.arctan2(sides[..., 0], sides[..., 1]) for sides in (_sides(pair.a), _sides(pair.b))]
  v = 4 / math.pi**2 * (angles[1] - angles[0]) ** 2
  denominator = 1 - _iou(pair) + v
  alpha = jnp.where(denominator > 0, v / jnp.where(denominator > 0, denominator, 1), 0)
  return _valid(pair, _diou(pair) - jax.lax.stop_gradient(alpha) * v)


class _Pair(NamedTuple):
  """Boxes that broadcast, those of a pair without area replaced, and where both have one."""

  a: jax.Array
  b: jax.Array
  is_valid: jax.Array


def _pair(a: ArrayLike, b: ArrayLike) -> _Pair:
  a, b = common_boxes(a, b)
  is_valid = has_area(a) & has_area(b)
  # Any box with an area keeps a masked NaN out of the gradient.
  unit = jnp.array([0, 0, 1, 1], a.dtype)
  a = jnp.where(has_area(a)[..., None], a, unit)
  b = jnp.where(has_area(b)[..., None], b, unit)
  return _Pair(a, b, is_valid)


def _valid(pair: _Pair, values: jax.Array) -> jax.Array:
  return jnp.where(pair.is_valid, values, 0)


def _sides(box: jax.Array) -> jax.Array:
  return box[..., 2:] - box[..., :2]


def _intersection(pair: _Pair) -> jax.Array:
  first = jnp.maximum(pair.a[..., :2], pair.b[..., :2])
  second = jnp.minimum(pair.a[..., 2:], pair.b[..., 2:])
  sides = jnp.maximum(second - first, 0)
  return sides[..., 0] * sides[..., 1]


def _union(pair: _Pair) -> jax.Array:
  return _sides(pair.a).prod(-1) + _sides(pair.b).prod(-1) - _intersection(pair)


def _iou(pair: _Pair) -> jax.Array:
  return _intersection(pair) / _union(pair)


def _hull(pair: _Pair) -> jax.Array:
  """Returns width and height [..., 2] of the smallest box around both."""
  first = jnp.minimum(pair.a[..., :2], pair.b[..., :2])
  return jnp.maximum(pair.a[..., 2:], pair.b[..., 2:]) - first


def _diou(pair: _Pair) -> jax.Array:
  offset = (pair.a[..., :2] + pair.a[..., 2:] - pair.b[..., :2] - pair.b[..., 2:]) / 2
  return _iou(pair) - (offset**2).sum(-1) / (_hull(pair) ** 2).sum(-1)
