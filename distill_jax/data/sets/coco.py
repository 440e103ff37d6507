"""Reads images and boxes in COCO's format (`instances.json`), and writes detections in it.

Lin et al. 2014, "Microsoft COCO". Files for training and validation have the same categories, or
`class_names` says which ones are the classes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.boxes import Detections
from distill_jax.data.label_checks import UNLABELED
from distill_jax.data.sets import coco_annotations, image_files
from distill_jax.data.source import Source
from distill_jax.errors import check_integer, join_first, suggest
from distill_jax.storage import files, folders


def load(
  annotations: str | Path,
  images: str | Path,
  *,
  class_names: Sequence[str] = (),
  max_boxes: int | None = None,
  pad_to: tuple[int, int] | None = None,
  channels: int = 3,
  max_pixels: int = 50_000_000,
) -> Source:
  """Returns images, float32 in 0..1, with their boxes; all are held in memory.

  Entries: 'image' [N, H, W, channels]; 'boxes' float32 [N, M, 4] (left, top, right, bottom) in
  pixels, 'label' [N, M] and 'crowd' bool [N, M], with zeros, `UNLABELED` and False as padding. Ids
  are the image ids of the file, in its order. Images without a box stay. Boxes without an area are
  left out and those partly outside of their image clipped, with a warning.

  Args:
    annotations: the JSON file with 'images', 'annotations' and 'categories'.
    images: the folder of the images, which their 'file_name' is below.
    class_names: names of the categories that are classes, in the order of the class numbers; boxes
      of others are left out, as background. (): all of the file, in the order of their ids.
    max_boxes: M; None: the largest number of boxes of an image.
    pad_to: (height, width), no smaller than any image: images are padded with zeros at the bottom
      and on the right, and their boxes stay. None: the images have one size.
    channels: 3 (RGB) or 1 (gray).
    max_pixels: largest height times width of an image.

  Raises:
    FileNotFoundError: there is no such file or folder.
    ValueError: the file is none of this format; an id is unknown or repeats; a box is none, or
      outside of its image; an image has more than `max_boxes`, cannot be decoded, or has another
      size than the file says. The error names the annotation or the image.
  """
  path = folders.resolve(annotations, "annotations")
  folder = folders.resolve(images, "images")
  categories, records = coco_annotations.read(path)
  numbers = {id: c for c, id in enumerate(_category_ids(categories, class_names))}
  arrays = _objects(records, numbers, max_boxes)
  arrays["id"] = np.array([record.id for record in records])
  arrays["image"] = _images(records, folder, pad_to, channels, max_pixels)
  names = tuple(categories[id] for id in numbers)
  return Source(arrays, len(names), names, path.stem, UNLABELED)


def category_ids(annotations: str | Path, class_names: Sequence[str] = ()) -> tuple[int, ...]:
  """Returns the category id of each class, for `write_results`.

  Args:
    annotations: the JSON file with 'categories'.
    class_names: as of `load`.

  Raises:
    FileNotFoundError, ValueError: as `load`, of the annotations only.
  """
  path = folders.resolve(annotations, "annotations")
  return _category_ids(coco_annotations.read(path)[0], class_names)


def write_results(
  path: str | Path, detections: Detections, image_ids: Any, category_ids: Sequence[int]
) -> None:
  """Writes detections as COCO's results, which `COCO.loadRes` of pycocotools reads.

  It fails to read the file of no detection at all, an empty list.

  Args:
    path: the JSON file; it is replaced if it exists.
    detections: of N images, [N, K, ...]; rows of padding are left out.
    image_ids: [N], such as the ids of the source.
    category_ids: category id of each class, from the function of this name.

  Raises:
    ValueError: shapes that do not fit together, a class without a category id, or a number that is
      not finite.

  >>> import pathlib, tempfile
  >>> file = pathlib.Path(tempfile.mkdtemp()) / "results.json"
  >>> boxes, scores = np.array([[[1.0, 2, 5, 8]]]), np.array([[0.5]])
  >>> write_results(file, Detections(boxes, scores, np.array([[0]])), [7], category_ids=[18])
  >>> file.read_text()
  '[{"image_id": 7, "category_id": 18, "bbox": [1.0, 2.0, 4.0, 6.0], "score": 0.5}]'
  """
  boxes, scores, classes = (np.asarray(x) for x in detections)
  ids = np.asarray(image_ids)
  if boxes.shape != (*classes.shape, 4) or scores.shape != classes.shape or classes.ndim != 2:
    raise ValueError(
      f"detections: expected boxes [N, K, 4], scores and classes [N, K], got {list(boxes.shape)}, "
      f"{list(scores.shape)} and {list(classes.shape)}"
    )
  if ids.shape != classes.shape[:1]:
    raise ValueError(
      f"image_ids: expected one for each of {len(classes)} images, got {list(ids.shape)}"
    )
  if classes.max(initial=-1) >= len(category_ids):
    raise ValueError(
      f"category_ids: expected one for each class, got {len(category_ids)} for class "
      f"{classes.max()}: write coco.category_ids(annotations)"
    )
  is_finite = np.isfinite(boxes).all(-1) & np.isfinite(scores)
  results = []
  for row, column in np.argwhere(classes >= 0):
    if not is_finite[row, column]:
      raise ValueError(f"detections: expected finite numbers, got others in image {ids[row]}")
    left, top, right, bottom = boxes[row, column].tolist()
    results.append(
      {
        "image_id": ids[row].item(),
        "category_id": int(category_ids[classes[row, column]]),
        "bbox": [left, top, right - left, bottom - top],
        "score": scores[row, column].item(),
      }
    )
  files.write(folders.resolve(path, "path"), json.dumps(results))


def _category_ids(categories: Mapping[int, str], class_names: Sequence[str]) -> tuple[int, ...]:
  numbers = {name: id for id, name in categories.items()}
  for name in class_names:
    if name not in numbers:
      raise ValueError(
        f"class_names: expected categories of the file, got {name!r}{suggest(name, numbers)}"
      )
  if len(set(class_names)) < len(class_names):
    raise ValueError(f"class_names: expected different names, got {join_first(class_names)}")
  return tuple(numbers[name] for name in class_names) or tuple(categories)


def _objects(
  records: Sequence[coco_annotations.Image], numbers: Mapping[int, int], max_boxes: int | None
) -> dict[str, np.ndarray]:
  """Returns padded boxes, labels and crowd of the categories that are classes."""
  kept = [[i for i, id in enumerate(x.categories) if id in numbers] for x in records]
  most = max(1, *map(len, kept)) if max_boxes is None else check_integer("max_boxes", max_boxes, 1)
  boxes = np.zeros((len(records), most, 4), np.float32)
  label = np.full((len(records), most), UNLABELED, np.int32)
  crowd = np.zeros((len(records), most), bool)
  for row, (record, positions) in enumerate(zip(records, kept)):
    if len(positions) > most:
      raise ValueError(
        f"max_boxes: expected at least the number of boxes of every image, got {most}, less than "
        f"{len(positions)} of {record.file}: write a larger one"
      )
    for column, i in enumerate(positions):
      boxes[row, column] = record.boxes[i]
      label[row, column] = numbers[record.categories[i]]
      crowd[row, column] = record.crowd[i]
  return {"boxes": boxes, "label": label, "crowd": crowd}


def _images(
  records: Sequence[coco_annotations.Image],
  folder: Path,
  pad_to: tuple[int, int] | None,
  channels: int,
  max_pixels: int,
) -> np.ndarray:
  images: list[np.ndarray] = []
  for record in records:
    file = folder / record.file
    image = image_files.read(file, channels, max_pixels, "boxes")
    if image.shape[:2] != (record.height, record.width):
      raise ValueError(
        f"{file}: expected {record.height} x {record.width} pixels as the annotations say, got "
        f"{image_files.size_of(image)}: resize its boxes too, and change the size in the file"
      )
    if pad_to is not None:
      image = image_files.pad(image, pad_to, 0, file)
    elif images:
      image_files.check_same_size(image, images[0], file)
    images.append(image)
  return np.stack(images)
