"""Reads and checks the annotations of detection in COCO's format."""

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_jax.data.box_checks import TOLERANCE
from distill_jax.errors import check_integer, join_first
from distill_jax.storage import files

_MAX_ID = 2**31 - 1
_KEYS = ("images", "annotations", "categories")


@dataclasses.dataclass(frozen=True)
class Image:
  """An image and its objects.

  Attributes:
    id: the number of the image.
    file: its path below the folder of images.
    height, width: its size in pixels.
    boxes: (left, top, right, bottom) in pixels, clipped to the image.
    categories: category ids of the boxes.
    crowd: whether a box holds several objects.
  """

  id: int
  file: str
  height: int
  width: int
  boxes: list[tuple[float, float, float, float]] = dataclasses.field(default_factory=list)
  categories: list[int] = dataclasses.field(default_factory=list)
  crowd: list[bool] = dataclasses.field(default_factory=list)


def read(path: Path) -> tuple[dict[int, str], list[Image]]:
  """Returns {category id: name} in the order of the ids, and the images in the order of the file.

  Boxes without an area are left out with a warning, and those that are partly outside of their
  image are clipped, with a warning if it is by more than a pixel.

  Raises:
    ValueError: it is no such file, an id is missing or repeats, or a box is none, or outside of its
      image. The error names the annotation and the image.
  """
  document = _read_json(path)
  categories = _read_categories(document["categories"], path)
  images = _read_images(document["images"], path)
  without_area: list[str] = []
  clipped: list[str] = []
  for annotation in document["annotations"]:
    name = f"{path.name}: annotation {annotation.get('id', '')}"
    image = _look_up(images, annotation, "image_id", name)
    _look_up(categories, annotation, "category_id", name)
    box = _read_box(annotation.get("bbox"), f"{name} of {image.file}")
    if box[2] == box[0] or box[3] == box[1]:
      without_area.append(image.file)
      continue
    inside = _clip(box, image, name)
    if any(abs(a - b) > TOLERANCE for a, b in zip(box, inside)):
      clipped.append(image.file)
    image.boxes.append(inside)
    image.categories.append(annotation["category_id"])
    image.crowd.append(bool(annotation.get("iscrowd", 0)))
  _warn(path, "boxes with an area", "without, which are left out", without_area)
  _warn(
    path,
    "boxes (x, y, width, height) inside of the images",
    "partly outside, which are clipped",
    clipped,
  )
  return categories, list(images.values())


def _read_json(path: Path) -> Mapping[str, Any]:
  try:
    document = json.loads(files.read(path))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path}: expected a JSON file, got another one: {error}") from error
  got = sorted(document) if isinstance(document, Mapping) else f"a {type(document).__name__}"
  if not isinstance(document, Mapping) or any(key not in document for key in _KEYS):
    raise ValueError(
      f"{path}: expected COCO's instances, an object with {', '.join(_KEYS)}, got {got}: pass the "
      "file with the annotations, not one with results"
    )
  return document


def _read_categories(items: list, path: Path) -> dict[int, str]:
  names: dict[int, str] = {}
  for item in items:
    number = check_integer(f"{path.name}: category id", item.get("id"), 0)
    if number in names or not isinstance(item.get("name"), str):
      raise ValueError(f"{path.name}: expected categories of one id and one name, got {item}")
    names[number] = item["name"]
  if not names or len(set(names.values())) < len(names):
    raise ValueError(
      f"{path.name}: expected categories of different names, got {join_first(names.values())}"
    )
  return dict(sorted(names.items()))


def _read_images(items: list, path: Path) -> dict[int, Image]:
  images: dict[int, Image] = {}
  for item in items:
    missing = [key for key in ("file_name", "height", "width") if key not in item]
    if missing:
      raise ValueError(f"{path.name}: expected {missing[0]!r} of every image, got {item}")
    number = check_integer(f"{path.name}: id of {item['file_name']}", item.get("id"), 0, _MAX_ID)
    if number in images:
      raise ValueError(
        f"{path.name}: expected one image of id {number}, got {images[number].file} and "
        f"{item['file_name']}"
      )
    height, width = (
      check_integer(f"{path.name}: {key} of {item['file_name']}", item[key], 1)
      for key in ("height", "width")
    )
    images[number] = Image(number, item["file_name"], height, width)
  if not images:
    raise ValueError(f"{path.name}: expected images, got none")
  return images


def _look_up(items: Mapping[int, Any], annotation: Mapping[str, Any], key: str, name: str) -> Any:
  number = annotation.get(key)
  if not isinstance(number, int) or number not in items:
    raise ValueError(
      f"{name}: expected {key!r} to be one of the file, {join_first(items)}, got {number!r}"
    )
  return items[number]


def _read_box(box: Any, name: str) -> tuple[float, float, float, float]:
  """Returns (left, top, right, bottom) of (x, y, width, height)."""
  is_box = isinstance(box, list) and len(box) == 4
  if not is_box or not all(isinstance(x, int | float) and math.isfinite(x) for x in box):
    raise ValueError(f"{name}: expected 'bbox', 4 finite numbers, got {box}")
  x, y, width, height = box
  if width < 0 or height < 0:
    raise ValueError(
      f"{name}: expected 'bbox' as (x, y, width, height), got {box}: write sizes, not a corner"
    )
  return x, y, x + width, y + height


def _clip(
  box: tuple[float, float, float, float], image: Image, name: str
) -> tuple[float, float, float, float]:
  left, top = max(box[0], 0), max(box[1], 0)
  right, bottom = min(box[2], image.width), min(box[3], image.height)
  if left >= right or top >= bottom:
    raise ValueError(
      f"{name} of {image.file}: expected a box inside the image of {image.height} x {image.width} "
      f"pixels, got left, top, right, bottom {box}: scale boxes with their images"
    )
  return left, top, right, bottom


def _warn(path: Path, expected: str, got: str, images: list[str]) -> None:
  if images:
    warnings.warn(
      f"{path.name}: expected {expected}, got {len(images)} {got}, the first in {images[0]}",
      stacklevel=4,
    )
