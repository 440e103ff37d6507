"""Converts, clips and measures boxes."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax import reduce

FORMATS = ("xyxy", "xywh", "cxcywh", "yxyx")
"""The formats of a box: (left, top, right, bottom); (left, top, width, height), that of COCO;
(center x, center y, width, height); (top, left, bottom, right), that of TensorFlow."""


def convert(x: ArrayLike, source: str, target: str) -> jax.Array:
  """Returns boxes in another format.

  Args:
    x: boxes [..., 4] in the format `source`; integers become float32.
    source: one of `FORMATS`.
    target: one of `FORMATS`.

  Returns:
    Boxes [..., 4] in the format `target`.

  Raises:
    ValueError: an unknown format, or a last axis that is not 4.

  >>> convert(jnp.array([[1, 2, 5, 4]]), "xyxy", "cxcywh")
  Array([[3., 3., 4., 2.]], dtype=float32)
  """
  for name, value in (("source", source), ("target", target)):
    if value not in FORMATS:
      raise ValueError(f"{name}: expected one of {FORMATS}, got {value!r}: name the boxes' format")
  return _from_xyxy(_to_xyxy(as_boxes("x", x), source), target)


def area(b: ArrayLike) -> jax.Array:
  """Returns the areas [...] of boxes [..., 4] (xyxy) in square pixels; 0 where there is none.

  Raises:
    ValueError: a last axis that is not 4.

  >>> area(jnp.array([[1.0, 2.0, 5.0, 4.0], [5.0, 2.0, 1.0, 4.0]]))
  Array([8., 0.], dtype=float32)
  """
  b = as_boxes("b", b)
  sides = jnp.where(has_area(b)[..., None], b[..., 2:] - b[..., :2], 0)
  return sides[..., 0] * sides[..., 1]


def has_area(b: ArrayLike) -> jax.Array:
  """Returns whether boxes [..., 4] (xyxy) are finite, left < right and top < bottom: bool [...].

  Padding has no area, and neither has a box with NaN.

  Raises:
    ValueError: a last axis that is not 4.

  >>> has_area(jnp.array([[1.0, 2.0, 5.0, 4.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, jnp.nan, 4.0]]))
  Array([ True, False, False], dtype=bool)
  """
  b = as_boxes("b", b)
  return (b[..., 2:] > b[..., :2]).all(-1) & jnp.isfinite(b).all(-1)


def clip(b: ArrayLike, height: ArrayLike, width: ArrayLike) -> jax.Array:
  """Returns boxes [..., 4] (xyxy) clipped to an image; a box outside of it loses its area.

  Args:
    b: boxes in pixels.
    height: the image's height in pixels, a number or an array that broadcasts with `b[..., 0]`.
    width: the image's width likewise.

  Raises:
    ValueError: a last axis that is not 4.

  >>> clip(jnp.array([-2.0, 3.0, 5.0, 9.0]), height=8, width=4)
  Array([0., 3., 4., 8.], dtype=float32)
  """
  b = as_boxes("b", b)
  height = jnp.asarray(height, b.dtype)
  width = jnp.asarray(width, b.dtype)
  x = jnp.clip(b[..., ::2], 0, width[..., None])
  y = jnp.clip(b[..., 1::2], 0, height[..., None])
  return jnp.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)


def as_boxes(name: str, x: ArrayLike) -> jax.Array:
  """Returns boxes [..., 4] in their float dtype, float32 where they are integers.

  Raises:
    ValueError: a last axis that is not 4; `name` begins the message.
  """
  x = jnp.asarray(x)
  if x.shape[-1:] != (4,):
    raise ValueError(f"{name}: expected boxes [..., 4], got {x.shape}: put four numbers a box last")
  return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)


def common_boxes(a: ArrayLike, b: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """Returns two arrays of boxes in one dtype, float32 or wider."""
  a = as_boxes("a", a)
  b = as_boxes("b", b)
  dtype = reduce.common_dtype(a.dtype, b.dtype, jnp.float32)
  return a.astype(dtype), b.astype(dtype)


def _to_xyxy(x: jax.Array, source: str) -> jax.Array:
  first = x[..., :2]
  second = x[..., 2:]
  if source == "yxyx":
    return x[..., jnp.array([1, 0, 3, 2])]
  if source == "xywh":
    return jnp.concatenate([first, first + second], -1)
  if source == "cxcywh":
    return jnp.concatenate([first - second / 2, first + second / 2], -1)
  return x


def _from_xyxy(x: jax.Array, target: str) -> jax.Array:
  first = x[..., :2]
  second = x[..., 2:]
  if target == "yxyx":
    return x[..., jnp.array([1, 0, 3, 2])]
  if target == "xywh":
    return jnp.concatenate([first, second - first], -1)
  if target == "cxcywh":
    return jnp.concatenate([(first + second) / 2, second - first], -1)
  return x
