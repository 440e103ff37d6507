"""Joins four examples with boxes to one, on the host."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from distill_jax.data.checks import check_seed
from distill_jax.data.entry_crops import check_scale, check_sides
from distill_jax.data.label_checks import UNLABELED
from distill_jax.data.moved_boxes import MIN_VISIBLE, check_min_visible
from distill_jax.data.source import Source
from distill_jax.errors import check_integer

FILL = 114 / 255
"""The gray of pixels without an image, as in YOLOv5."""
CENTER = (0.25, 0.75)
"""The range of the point where four images meet, over the sides, as in YOLOv5."""
_PER_BOX = ("boxes", "label", "crowd")
_LAYOUTS = {
  "image": (np.floating, "floats [N, H, W, channels]"),
  "boxes": (np.floating, "floats [N, M, 4]"),
  "label": (np.integer, "class numbers [N, M]"),
}


def mosaic(
  source: Source,
  count: int,
  *,
  size: int | Sequence[int],
  seed: int,
  scale: tuple[float, float] = (0.5, 1.5),
  max_boxes: int | None = None,
  min_visible: float = MIN_VISIBLE,
) -> Source:
  """Returns new examples that join four random ones around a random center.

  The center is uniform in the middle half of both sides. Each image is resized by a random factor
  of its own. Of one that is larger than its quadrant a random part is taken; a smaller one touches
  the center, next to gray. Boxes are moved, clipped and dropped with the pixels. An example is a
  function of (seed, id) and of the source, so that teachers and caches see what the student does.

  Bochkovskiy et al. 2020, section 3.4 (YOLOv4); the ranges are those of YOLOv5.

  Args:
    source: examples with 'image', floats [N, H, W, channels], 'boxes' [N, M, 4] (left, top, right,
      bottom) in pixels, class numbers 'label' [N, M], and maybe 'crowd' [N, M]. Other entries are
      left out.
    count: number of new examples; their ids are 0 to count - 1.
    size: side of the new images in pixels, or (height, width), at least 4.
    seed: from 0 to 2^32 - 1.
    scale: smallest and largest factor; it is uniform between them.
    max_boxes: number of boxes per example; where there are more, the largest stay. None: 4 M.
    min_visible: boxes of which less than this part of the area is left are dropped; with 0, those
      without any area.

  Raises:
    ValueError: an argument is out of its range, or the source lacks an entry or has one of another
      shape.

  >>> import numpy as np
  >>> from distill_jax import data
  >>> boxes = np.tile(np.float32([[[0, 0, 8, 8], [0, 0, 0, 0]]]), (5, 1, 1))
  >>> arrays = {"image": np.ones((5, 8, 8, 3), np.float32), "boxes": boxes}
  >>> source = data.Source(arrays | {"label": np.tile([3, -1], (5, 1))}, 10, ignore_label=-1)
  >>> train = data.mosaic(source, 20, size=16, seed=0)
  >>> train.arrays["image"].shape, train.arrays["boxes"].shape
  ((20, 16, 16, 3), (20, 8, 4))
  """
  _check_source(source)
  check_integer("count", count, 1)
  sides = check_sides(size)
  if len(sides) != 2 or min(sides) < 4:
    raise ValueError(f"size: expected a side, or (height, width), of 4 pixels or more, got {size}")
  check_seed(seed)
  check_scale(scale)
  check_min_visible(min_visible)
  rows = 4 * source.arrays["boxes"].shape[1]
  if max_boxes is not None:
    rows = check_integer("max_boxes", max_boxes, 1)
  names = [name for name in _PER_BOX if name in source.arrays]
  shapes = {name: (count, rows, *source.arrays[name].shape[2:]) for name in names}
  arrays = {name: np.zeros(shapes[name], source.arrays[name].dtype) for name in names}
  arrays["label"][:] = UNLABELED
  arrays["image"] = np.zeros((count, *sides, source.arrays["image"].shape[-1]), np.float32)
  for row in range(count):
    rng = np.random.default_rng([seed, row])
    entries = _join(rng, source.arrays, arrays["image"][row], scale, min_visible)
    order = _largest(entries["boxes"], rows)
    for name in names:
      arrays[name][row, : len(order)] = entries[name][order]
  return dataclasses.replace(
    source,
    arrays=arrays,
    name=f"{source.name}_mosaic_{seed}",
    ignore_label=None if source.classes is None else UNLABELED,
    groups="",
  )


class _Span(NamedTuple):
  """The part of an image that fills a quadrant, along one axis.

  Attributes:
    first, last: the quadrant, in pixels of the mosaic.
    start: position of its first pixel in the resized image; negative ones are outside.
    source: length of the image.
    target: length of the resized image.
  """

  first: int
  last: int
  start: int
  source: int
  target: int

  def inside(self) -> slice:
    """Returns the pixels of the quadrant that show the image."""
    length = self.last - self.first
    return slice(max(-self.start, 0), min(self.target - self.start, length))

  def edges(self) -> tuple[float, float]:
    """Returns where these pixels begin and end in the image."""
    factor = self.source / self.target
    first = (self.start + self.inside().start) * factor
    return first, min((self.start + self.inside().stop) * factor, self.source)


def _join(
  rng: np.random.Generator,
  arrays: Mapping[str, np.ndarray],
  image: np.ndarray,
  scale: tuple[float, float],
  min_visible: float,
) -> dict[str, np.ndarray]:
  """Paints four examples into `image`; returns the boxes that are visible, and their entries."""
  center = [
    int(rng.integers(round(CENTER[0] * side), round(CENTER[1] * side) + 1))
    for side in image.shape[:2]
  ]
  parts = []
  for quadrant in range(4):
    row = int(rng.integers(len(arrays["image"])))
    factor = rng.uniform(*scale)
    values = arrays["image"][row]
    is_last = (quadrant >= 2, quadrant % 2 == 1)
    rows, columns = (
      _span(rng, values.shape[axis], factor, center[axis], image.shape[axis], is_last[axis])
      for axis in range(2)
    )
    image[rows.first : rows.last, columns.first : columns.last] = _resize(values, rows, columns)
    boxes, is_visible = _move(arrays["boxes"][row], rows, columns, min_visible)
    part = {name: arrays[name][row][is_visible] for name in _PER_BOX if name in arrays}
    parts.append(part | {"boxes": boxes[is_visible]})
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _span(
  rng: np.random.Generator, source: int, factor: float, center: int, side: int, is_last: bool
) -> _Span:
  """Returns a random part of an axis, or where it is smaller, all of it next to the center."""
  first, last = (center, side) if is_last else (0, center)
  target = max(1, round(factor * source))
  room = target - (last - first)
  start = int(rng.integers(room + 1)) if room > 0 else 0 if is_last else room
  return _Span(first, last, start, source, target)


def _resize(image: np.ndarray, rows: _Span, columns: _Span) -> np.ndarray:
  """Returns the part of an image by antialiased bilinear interpolation, gray outside of it."""
  shape = (rows.last - rows.first, columns.last - columns.first, image.shape[-1])
  result = np.full(shape, FILL, np.float32)
  part = result[rows.inside(), columns.inside()]
  top, bottom = rows.edges()
  left, right = columns.edges()
  box = (left, top, right, bottom)
  for channel in range(image.shape[-1]):
    # The filter takes pixels beyond the box too: this is a part of the resized image.
    picture = PIL.Image.fromarray(np.ascontiguousarray(image[..., channel], np.float32))
    resized = picture.resize(part.shape[1::-1], PIL.Image.Resampling.BILINEAR, box=box)
    part[..., channel] = np.asarray(resized)
  return result


def _move(
  boxes: np.ndarray, rows: _Span, columns: _Span, min_visible: float
) -> tuple[np.ndarray, np.ndarray]:
  """Returns boxes [M, 4] in the mosaic, and which are visible, bool [M]."""
  spans = (columns, rows, columns, rows)
  factor = np.array([span.target / span.source for span in spans], np.float32)
  offset = np.array([span.first - span.start for span in spans], np.float32)
  moved = boxes * factor + offset
  clipped = moved.clip([span.first for span in spans], [span.last for span in spans])
  area = _area(clipped)
  return clipped, (area > 0) & (area >= min_visible * _area(moved))


def _largest(boxes: np.ndarray, count: int) -> np.ndarray:
  """Returns the positions of the largest boxes, in their order."""
  order = np.argsort(-_area(boxes), kind="stable")[:count]
  return np.sort(order)


def _area(boxes: np.ndarray) -> np.ndarray:
  return np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(-1)


def _check_source(source: Any) -> None:
  if not isinstance(source, Source):
    raise ValueError(
      f"source: expected a Source, got {type(source).__name__}: write data.Source(arrays, ...)"
    )
  for name, (kind, layout) in _LAYOUTS.items():
    values = source.arrays.get(name)
    axes = layout.count(",") + 1
    if values is None or values.ndim != axes or not np.issubdtype(values.dtype, kind):
      got = sorted(source.arrays) if values is None else f"{values.dtype} {list(values.shape)}"
      raise ValueError(f"source: expected {name!r}, {layout}, in {source.name}, got {got}")
  shapes = {name: source.arrays[name].shape for name in ("boxes", "label")}
  if shapes["boxes"] != (*shapes["label"], 4):
    raise ValueError(f"source: expected 'boxes' [N, M, 4] and 'label' [N, M], got {shapes}")
