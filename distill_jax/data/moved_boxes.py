"""Moves boxes with the pixels of an augmentation, and drops those that are hidden."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.boxes import area, has_area

MIN_VISIBLE = 0.1
"""The part of a box's area that must stay visible, by default: the `area_thr` of YOLOv5 and later
Ultralytics. Albumentations keeps every box with an area, torchvision those of one pixel or more."""


class Window(NamedTuple):
  """A window in an image that was resized.

  Attributes:
    start: first position of the window per axis, traced integers; negative ones are outside.
    shape: size of the window per axis.
    source: size of the image per axis.
    target: size to which the image is resized before, per axis, traced integers; None: it stays.
  """

  start: Any
  shape: Sequence[int]
  source: Sequence[int]
  target: Any = None


def move_boxes(boxes: jax.Array, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """Returns moved boxes [N, 4]; those without an area only fill up the array, and stay."""
  return jnp.where(has_area(boxes)[:, None], function(boxes), boxes).astype(boxes.dtype)


def crop_boxes(boxes: jax.Array, window: Window, min_visible: float) -> jax.Array:
  """Returns the boxes [N, 4] in the window, and zeros for those that are hidden."""
  scale: Any = 1.0
  if window.target is not None:
    scale = jnp.asarray(window.target, jnp.float32) / jnp.asarray(window.source, jnp.float32)
    scale = jnp.tile(scale[::-1], (1, 2))
  offset = jnp.tile(jnp.asarray(window.start, jnp.float32)[::-1], (1, 2))
  limit = jnp.tile(jnp.asarray(window.shape, jnp.float32)[::-1], (1, 2))
  moved = scale * boxes - offset
  clipped = jnp.clip(moved, 0, limit)
  is_visible = has_area(clipped) & (area(clipped) >= min_visible * area(moved))
  return jnp.where(is_visible[:, None], clipped, 0)


def check_min_visible(fraction: Any) -> None:
  """Raises a ValueError unless a value is a part of an area, 0 to 1."""
  if not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
    raise ValueError(f"min_visible: expected a number in 0..1, got {fraction}: write 0.1")
