import hypothesis.extra.numpy as arrays_of
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax import data


@settings(max_examples=60, deadline=None)
@given(
  labels=arrays_of.arrays(arrays_of.integer_dtypes(), st.integers(1, 12)),
  classes=st.integers(1, 5),
  ignored=st.sampled_from([None, -1, -100]),
)
def test_labels_are_classes_or_the_ignore_label(labels, classes, ignored):
  valid = [0 <= int(v) < classes or int(v) == ignored for v in labels]
  ids = np.arange(len(labels)) + 50
  if all(valid):
    data.check_labels(labels, classes, ids, ignored)
  else:
    first = valid.index(False)
    with pytest.raises(ValueError, match=f"^label: .*got {int(labels[first])} .*id {first + 50}:"):
      data.check_labels(labels, classes, ids, ignored)


def test_labels_of_tokens_name_their_row():
  with pytest.raises(ValueError, match=r"^label: .*got 9 .*row 1:"):
    data.check_labels(np.array([[0, 1], [2, 9]]), 5)


def a_batch(**changes):
  return {"image": np.zeros((3, 2), np.float32), "label": np.array([0, 1, 2])} | changes


def test_a_good_batch_passes():
  data.check_batch(a_batch(), 3)
  data.check_batch(a_batch(), None)
  data.check_batch({"image": np.zeros((3, 2), np.float32)}, 3)
  data.check_batch(a_batch(label=np.array([0, -100, 2])), 3, ignore_label=-100)


@pytest.mark.parametrize(
  "batch", [{}, {"image": np.zeros((0, 2))}, {"image": np.zeros((0, 2)), "label": []}]
)
def test_empty_batch_raises(batch):
  with pytest.raises(ValueError, match=r"(arrays|image.*): expected at least"):
    data.check_batch(batch, 3)


def test_shorter_array_raises():
  with pytest.raises(ValueError, match=r"^arrays: .*'label': 3, 'teacher/logits': 1"):
    data.check_batch(a_batch(**{"teacher/logits": np.zeros((1, 3))}))


@pytest.mark.parametrize("value", [-1, 3, 2**32])
def test_labels_are_checked_with_or_without_ids(value):
  label = np.array([0, 1, value])
  with pytest.raises(ValueError, match=f"^label: .*got {value} .*row 2:"):
    data.check_batch(a_batch(label=label), 3)
  with pytest.raises(ValueError, match=f"^label: .*got {value} .*id 77:"):
    data.check_batch(a_batch(label=label, id=np.array([5, 6, 77])), 3)


def test_float_labels_with_classes_raise():
  with pytest.raises(ValueError, match=r"^label:"):
    data.check_batch(a_batch(label=np.zeros(3, np.float32)), 3)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 2)])
def test_float_labels_without_classes(shape):
  label = np.linspace(-2, 2, np.prod(shape), dtype=np.float32).reshape(shape)
  data.check_batch(a_batch(label=label))
  data.check_batch(a_batch(label=label > 0))
  label[1] = np.nan
  with pytest.raises(ValueError, match=r"^label: .*nan in row 1"):
    data.check_batch(a_batch(label=label))
  data.check_batch(a_batch(label=label, where=np.array([True, False, True])))


def test_integer_labels_without_classes_are_class_numbers():
  data.check_batch(a_batch(label=np.array([[0, 1], [1, 1], [0, 0]])))
  with pytest.raises(ValueError, match=r"^label: .*got -1 "):
    data.check_batch(a_batch(label=np.array([0, -1, 2])))


def test_rows_left_out_may_hold_anything():
  image = np.array([[0, 0], [0, 0], [np.nan, 0]], np.float32)
  batch = a_batch(image=image, label=np.array([0, 1, -9]))
  data.check_batch(batch | {"where": np.array([True, True, False])}, 3)
  data.check_batch(batch | {"where": np.zeros(3, bool)}, 3)
  with pytest.raises(ValueError, match=r"^image: .*row 2"):
    data.check_batch(batch | {"where": np.ones(3, bool)}, 3)


@pytest.mark.parametrize("where", [np.ones(3, np.int32), np.ones((3, 1), bool)])
def test_where_is_a_row_mask(where):
  with pytest.raises(ValueError, match=r"^where:"):
    data.check_batch(a_batch(where=where), 3)


def test_teacher_logits_may_be_minus_infinity_but_not_nan():
  logits = np.array([[0, -np.inf, 1]] * 3, np.float32)
  data.check_batch(a_batch(**{"teacher/logits": logits}), 3)
  for value in (np.nan, np.inf):
    logits[1, 1] = value
    with pytest.raises(ValueError, match=r"^teacher/logits: .*row 1"):
      data.check_batch(a_batch(**{"teacher/logits": logits}), 3)


def test_rows_of_probabilities():
  label = np.array([[0.2, 0.3, 0.5], [0, 0, 0], [0, 1, 0]], np.float32)
  data.check_batch(a_batch(label=label), 3)
  data.check_batch(a_batch(label=label.astype(ml_dtypes.bfloat16)), 3)
  with pytest.raises(ValueError, match=r"^label:"):
    data.check_batch(a_batch(label=label), 4)


@pytest.mark.parametrize("row", [[0.5, 0.5, 0.5], [1.5, -0.5, 0], [0.2, 0.2, 0.2], [-0.1, 0.1, 0]])
def test_rows_that_are_not_probabilities_raise(row):
  label = np.array([[1, 0, 0], row, [0, 1, 0]], np.float32)
  with pytest.raises(ValueError, match=r"^label: .*row 1"):
    data.check_batch(a_batch(label=label), 3)
