"""Computes positions and anchors of a feature pyramid, and boxes relative to anchors."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.types import Outputs

# Sides grow by at most this factor, so that an untrained network's boxes stay finite.
MAX_LOG_SCALE = math.log(1000 / 16)


class Level(NamedTuple):
  """A map of the pyramid: pixels of the image per position, and its numbers of positions."""

  stride: int
  height: int
  width: int


def pyramid_levels(outputs: Outputs) -> tuple[Level, ...]:
  """Returns the levels of the maps 'p{k}' [B, H, W, C] with stride 2^k, finest first.

  Raises:
    ValueError: there is no such map.

  >>> pyramid_levels({"p3": np.zeros((1, 4, 6, 8)), "p2": np.zeros((1, 8, 12, 8))})
  (Level(stride=4, height=8, width=12), Level(stride=8, height=4, width=6))
  """
  exponents = sorted(int(name[1:]) for name in outputs if re.fullmatch(r"p\d+", name))
  if not exponents:
    raise ValueError(
      f"outputs: expected maps of a pyramid named p2, p3, ... (stride 2^k), got "
      f"{sorted(outputs)}: return the neck's maps by these names"
    )
  return tuple(Level(2**k, *outputs[f"p{k}"].shape[1:3]) for k in exponents)


def image_size(levels: Sequence[Level]) -> tuple[int, int]:
  """Returns height and width of the image in pixels."""
  return levels[0].height * levels[0].stride, levels[0].width * levels[0].stride


def positions(levels: Sequence[Level]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the centers (x, y) [P, 2] in pixels and the strides [P] of all positions.

  The order is that of a detector's outputs: levels, rows, columns.

  >>> positions([Level(4, 1, 2)])[0].tolist()
  [[2.0, 2.0], [6.0, 2.0]]
  """
  centers = []
  for stride, height, width in levels:
    y, x = np.mgrid[:height, :width]
    centers.append((np.stack([x, y], -1).reshape(-1, 2) + 0.5) * stride)
  strides = np.repeat([level.stride for level in levels], [len(c) for c in centers])
  return np.concatenate(centers).astype(np.float32), strides.astype(np.float32)


def anchor_boxes(levels: Sequence[Level], sides: Sequence[np.ndarray]) -> np.ndarray:
  """Returns the anchors [A, 4] (xyxy), float64, in pixels: at each position, one of each size.

  Args:
    levels: levels of the pyramid.
    sides: widths and heights [R, 2] in pixels for each level.

  >>> anchor_boxes([Level(4, 1, 1)], [np.array([[4, 2], [2, 4]])]).tolist()
  [[0.0, 1.0, 4.0, 3.0], [1.0, 0.0, 3.0, 4.0]]
  """
  boxes = []
  for level, its_sides in zip(levels, sides, strict=True):
    centers = positions([level])[0][:, None]
    boxes.append(np.concatenate([centers - its_sides / 2, centers + its_sides / 2], -1))
  return np.concatenate([b.reshape(-1, 4) for b in boxes])


def encode(boxes: jax.Array, anchors: jax.Array, variances: tuple[float, float]) -> jax.Array:
  """Returns the offsets [..., 4] of boxes from anchors (both [..., 4], xyxy, with an area).

  ((x - x_a) / w_a / v_0, (y - y_a) / h_a / v_0, log(w / w_a) / v_1, log(h / h_a) / v_1) for centers
  x, y and variances v.
  """
  centers, sides = _centers_and_sides(boxes)
  anchor_centers, anchor_sides = _centers_and_sides(anchors)
  offsets = (centers - anchor_centers) / anchor_sides / variances[0]
  return jnp.concatenate([offsets, jnp.log(sides / anchor_sides) / variances[1]], -1)


def decode(deltas: jax.Array, anchors: jax.Array, variances: tuple[float, float]) -> jax.Array:
  """Returns the boxes [..., 4] (xyxy) of which `encode` returns the offsets."""
  anchor_centers, anchor_sides = _centers_and_sides(anchors)
  centers = deltas[..., :2] * variances[0] * anchor_sides + anchor_centers
  scales = jnp.exp(jnp.minimum(deltas[..., 2:] * variances[1], MAX_LOG_SCALE))
  sides = scales * anchor_sides
  return jnp.concatenate([centers - sides / 2, centers + sides / 2], -1)


def _centers_and_sides(boxes):
  first = boxes[..., :2]
  second = boxes[..., 2:]
  return (first + second) / 2, second - first
