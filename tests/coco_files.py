"""Writes images and annotations in COCO's format: a generated set, since no real one is small."""

import json

import numpy as np
import PIL.Image

CATEGORIES = {7: "cat", 3: "dog", 90: "bird"}


def an_annotation(id, image_id, category_id, bbox, **fields):
  """Returns an annotation; `bbox` is (x, y, width, height)."""
  numbers = {"id": id, "image_id": image_id, "category_id": category_id}
  return numbers | {"bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0} | fields


def document():
  """Returns three images of 12 x 16 pixels, of which the last one has no box."""
  images = [
    {"id": id, "file_name": f"a/{id}.png", "height": 12, "width": 16} for id in (42, 139, 5)
  ]
  annotations = [
    an_annotation(1, 139, 90, [1.5, 2, 6, 5.25]),
    an_annotation(2, 42, 3, [0, 0, 16, 12]),
    an_annotation(3, 139, 7, [4, 1, 8, 9], iscrowd=1),
    an_annotation(4, 139, 7, [10, 3, 2, 2]),
  ]
  categories = [{"id": id, "name": name} for id, name in CATEGORIES.items()]
  return {"images": images, "annotations": annotations, "categories": categories}


def write_annotations(file, document):
  file.write_text(json.dumps(document))


def write(folder, document):
  """Writes the annotations and their images; returns the file and the folder of the images."""
  file = folder / "instances.json"
  write_annotations(file, document)
  rng = np.random.default_rng(0)
  for image in document["images"]:
    path = folder / "images" / image["file_name"]
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (image["height"], image["width"], 3), np.uint8)
    PIL.Image.fromarray(pixels).save(path)
  return file, folder / "images"
