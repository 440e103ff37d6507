"""Tests the reader and the writer of COCO's format on a generated set, against pycocotools."""

import copy

import coco_files
import numpy as np
import PIL.Image
import pytest
from coco_files import an_annotation

from distill_jax.boxes import Detections
from distill_jax.data import UNLABELED
from distill_jax.data.sets import coco


def read_with_pycocotools(file):
  tools = pytest.importorskip("pycocotools.coco")
  return tools.COCO(str(file))


def test_entries_match_pycocotools(tmp_path):
  file, images = coco_files.write(tmp_path, coco_files.document())
  source = coco.load(file, images)
  arrays = source.arrays
  reference = read_with_pycocotools(file)
  ids = coco.category_ids(file)
  assert source.class_names == ("dog", "cat", "bird") and ids == (3, 7, 90)
  assert source.ids.tolist() == [42, 139, 5] and arrays["boxes"].shape == (3, 3, 4)
  for row, id in enumerate(source.ids.tolist()):
    objects = reference.loadAnns(reference.getAnnIds([id]))
    count = len(objects)
    assert [ids[c] for c in arrays["label"][row, :count]] == [x["category_id"] for x in objects]
    assert arrays["crowd"][row, :count].tolist() == [bool(x["iscrowd"]) for x in objects]
    for box, item in zip(arrays["boxes"][row], objects):
      left, top, right, bottom = box.tolist()
      assert [left, top, right - left, bottom - top] == item["bbox"]
    assert (arrays["label"][row, count:] == UNLABELED).all()
    assert not arrays["boxes"][row, count:].any() and not arrays["crowd"][row, count:].any()
    pixels = np.asarray(PIL.Image.open(images / f"a/{id}.png"))
    np.testing.assert_array_equal(arrays["image"][row], pixels / np.float32(255))


def test_results_are_read_by_pycocotools(tmp_path):
  """All boxes with a score each, and padding: the average precision is 1."""
  file, images = coco_files.write(tmp_path, coco_files.document())
  arrays = coco.load(file, images).arrays
  scores = np.where(arrays["label"] >= 0, [0.9, 0.8, 0.7], 0)
  detections = Detections(arrays["boxes"], scores, arrays["label"])
  path = tmp_path / "results.json"
  coco.write_results(path, detections, arrays["id"], coco.category_ids(file))
  reference = read_with_pycocotools(file)
  results = reference.loadRes(str(path))
  for item in reference.dataset["annotations"]:
    found = results.loadAnns(results.getAnnIds([item["image_id"]], [item["category_id"]]))
    assert item["bbox"] in [x["bbox"] for x in found]
  evaluation = pytest.importorskip("pycocotools.cocoeval").COCOeval(reference, results, "bbox")
  evaluation.evaluate()
  evaluation.accumulate()
  evaluation.summarize()
  np.testing.assert_allclose(evaluation.stats[0], 1)
  assert {x["score"] for x in results.dataset["annotations"]} == {0.9, 0.8, 0.7}


def test_named_categories_are_the_classes(tmp_path):
  file, images = coco_files.write(tmp_path, coco_files.document())
  source = coco.load(file, images, class_names=("cat", "dog"), max_boxes=2)
  assert source.arrays["label"].tolist() == [[1, -1], [0, 0], [-1, -1]]
  assert source.arrays["crowd"].tolist() == [[False, False], [True, False], [False, False]]
  assert coco.category_ids(file, ("cat", "dog")) == (7, 3)


def test_smaller_images_are_padded(tmp_path):
  document = coco_files.document()
  document["images"][1]["height"] = 14
  file, images = coco_files.write(tmp_path, document)
  with pytest.raises(ValueError, match=r"139\.png: expected images of one size.*pad_to=\(14, 16\)"):
    coco.load(file, images)
  with pytest.raises(ValueError, match=r"^pad_to: .*42\.png"):
    coco.load(file, images, pad_to=(12, 15))
  arrays = coco.load(file, images, pad_to=(14, 20)).arrays
  assert arrays["image"].shape == (3, 14, 20, 3)
  assert not arrays["image"][0, 12:].any() and not arrays["image"][0, :, 16:].any()
  assert arrays["boxes"][0, 0].tolist() == [0, 0, 16, 12]


def test_boxes_without_area_and_partly_outside_warn(tmp_path):
  document = coco_files.document()
  document["annotations"] += [
    an_annotation(5, 5, 3, [3, 3, 0, 4]),
    an_annotation(6, 42, 3, [-3, 2, 10, 20]),
    an_annotation(7, 42, 3, [2, 2, 14.5, 4]),
  ]
  file, images = coco_files.write(tmp_path, document)
  with pytest.warns(UserWarning) as caught:
    arrays = coco.load(file, images).arrays
  messages = [str(x.message) for x in caught]
  assert len(messages) == 2
  assert "1 without" in messages[0] and "a/5.png" in messages[0]
  assert "1 partly outside" in messages[1] and "a/42.png" in messages[1]
  assert (arrays["label"][2] == UNLABELED).all()
  assert arrays["boxes"][0].tolist() == [[0, 0, 16, 12], [0, 2, 7, 12], [2, 2, 16, 6]]


def changed(change):
  document = copy.deepcopy(coco_files.document())
  change(document)
  return document


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda d: d["annotations"][0].update(bbox=[1, 2, -3, 4]),
      r"annotation 1 of a/139\.png: .*wid",
    ),
    (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), r"annotation 1 of a/139\.png: expected"),
    (lambda d: d["annotations"][0].update(bbox=[1, 2, 3, np.nan]), r"annotation 1 of a/139\.png"),
    (
      lambda d: d["annotations"][0].update(bbox=[20, 2, 3, 4]),
      r"annotation 1 of a/139\.png: .*ins",
    ),
    (lambda d: d["annotations"][1].update(category_id=4), r"annotation 2: expected 'category_id'"),
    (lambda d: d["annotations"][1].update(image_id="42"), r"annotation 2: expected 'image_id'"),
    (lambda d: d["annotations"][1].pop("bbox"), r"annotation 2 of a/42\.png: expected 'bbox'"),
    (lambda d: d["images"][0].update(id="first"), r"id of a/42\.png: expected an integer"),
    (lambda d: d["images"][0].update(id=139), r"expected one image of id 139"),
    (lambda d: d["images"][0].pop("height"), r"expected 'height'"),
    (lambda d: d["images"][0].update(height=13), r"42\.png: expected 13 x 16 pixels"),
    (lambda d: d["images"][2].update(file_name="b.png"), r"b\.png: expected an image"),
    (lambda d: d["categories"][0].update(id=3), r"expected categories of one id"),
    (lambda d: d["categories"][0].update(name="dog"), r"expected categories of different names"),
    (lambda d: d.pop("annotations"), r"instances\.json: expected COCO's instances"),
  ],
)
def test_annotations_that_cannot_be_used_are_named(tmp_path, change, message):
  file, images = coco_files.write(tmp_path, coco_files.document())
  coco_files.write_annotations(file, changed(change))
  with pytest.raises(ValueError, match=message):
    coco.load(file, images)


def test_files_and_arguments_are_checked(tmp_path):
  file, images = coco_files.write(tmp_path, coco_files.document())
  with pytest.raises(FileNotFoundError):
    coco.load(tmp_path / "missing.json", images)
  with pytest.raises(ValueError, match=r"^max_boxes: .*less than 3 of a/139\.png"):
    coco.load(file, images, max_boxes=2)
  for class_names in (["cat", "cow"], ["cat", "cat"]):
    with pytest.raises(ValueError, match=r"^class_names: expected"):
      coco.load(file, images, class_names=class_names)
  for content in ("[]", "{", "[1"):
    file.write_text(content)
    with pytest.raises(ValueError, match=r"instances\.json: expected"):
      coco.category_ids(file)


@pytest.mark.parametrize(
  "arguments, field",
  [
    ({"image_ids": [1, 2]}, "image_ids"),
    ({"category_ids": [18]}, "category_ids"),
    (
      {"detections": Detections(np.ones((1, 1, 4)), np.ones((1, 2)), np.ones((1, 1), int))},
      "detec",
    ),
    (
      {"detections": Detections(np.ones((1, 1, 4)), np.full((1, 1), np.nan), np.ones((1, 1), int))},
      "detec",
    ),
  ],
)
def test_arguments_of_results_are_checked(tmp_path, arguments, field):
  detections = Detections(np.ones((1, 1, 4)), np.ones((1, 1)), np.ones((1, 1), int))
  valid = {"detections": detections, "image_ids": [1], "category_ids": [18, 19]}
  with pytest.raises(ValueError, match=rf"^{field}"):
    coco.write_results(tmp_path / "results.json", **(valid | arguments))
