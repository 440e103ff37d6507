import numpy as np
import pytest

from distill_jax import data


def arrays_with(box=(1, 2, 5, 6), factor=1, **entries):
  """The second example, of id 20, has a box and padding; the others are alike."""
  boxes = np.zeros((3, 2, 4), np.float32)
  boxes[:, 0] = 1, 2, 5, 6
  boxes[1, 0] = box
  boxes[1, 1] = 9, 9, -9, -9
  return {
    "id": np.array([10, 20, 30]),
    "image": np.zeros((3, 8, 12, 3), np.float32),
    "boxes": boxes * np.float32(factor),
    "label": np.array([[0, -1]] * 3),
  } | entries


def check_source(arrays):
  data.Source(arrays, classes=3, ignore_label=-1)


def check_source_without_classes(arrays):
  data.Source(arrays)


def check_batch(arrays):
  data.check_batch(arrays, 3, -1)


CHECKS = [check_source, check_source_without_classes, check_batch]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
  "options, message",
  [
    ({"box": (5, 6, 2, 1)}, r"^boxes: .*id 20, box 0.*xywh"),
    ({"box": (1, 2, 1, 1)}, r"^boxes: .*id 20"),
    ({"box": (-2, 2, 5, 6)}, r"^boxes: .*id 20.*clip"),
    ({"box": (1, 2, 14, 6)}, r"^boxes: .*id 20"),
    ({"box": (1, 2, 5, 10)}, r"^boxes: .*id 20"),
    ({"box": (1, np.nan, 5, 6)}, r"^boxes: .*id 20"),
    ({"factor": 1 / 8}, r"^boxes: .*normalized"),
    ({"crowd": np.zeros((3, 2), np.int32)}, r"^crowd: .*bool"),
    ({"crowd": np.zeros(3, bool)}, r"^crowd: .*bool"),
  ],
)
def test_boxes_that_cannot_be_meant_raise(check, options, message):
  with pytest.raises(ValueError, match=message):
    check(arrays_with(**options))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
  "options",
  [
    {"crowd": np.zeros((3, 2), bool)},
    {"box": (3, 3, 3, 3)},
    {"box": (-0.5, 0, 12.5, 8.5)},
    {"label": np.full((3, 2), -1), "box": (5, 6, 2, 1)},
    {"label": np.zeros(3, int), "box": (5, 6, 2, 1)},
    {"image": np.zeros((3, 7), np.float32), "box": (1, 2, 20, 30)},
  ],
)
def test_padding_and_other_entries_of_these_names_pass(check, options):
  check(arrays_with(**options))


def test_labels_of_boxes_are_not_removed():
  """An image without the labels of its boxes would be trained on as one without objects."""
  source = data.Source(arrays_with(), classes=3, ignore_label=-1)
  for remove in (lambda x: data.label_fraction(x, 0.5), data.unlabeled):
    with pytest.raises(ValueError, match=r"^boxes: expected"):
      remove(source)
