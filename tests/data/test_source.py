import dataclasses

import ml_dtypes
import numpy as np
import pytest

from distill_jax import data


def examples(n=6, **changes):
  """Ids 10, 11, ..., labels 0, 1, 2, 0, ... of 3 classes."""
  ids = np.arange(10, 10 + n)
  image = np.linspace(0, 1, n * 4, dtype=np.float32).reshape(n, 2, 2, 1)
  return {"id": ids, "label": ids % 3, "image": image} | changes


def source(n=6, *, classes=3, ignore_label=None, **changes):
  return data.Source(examples(n, **changes), classes=classes, ignore_label=ignore_label)


def labels_with(value, n=6, dtype=np.int64):
  label = np.zeros(n, dtype)
  label[4] = value
  return label


@pytest.mark.parametrize("value", [3, 7, -1, -100, -2, 2**31, 2**32, 2**32 + 1, -(2**63)])
def test_a_label_that_is_no_class_is_refused_with_id_value_and_range(value):
  with pytest.raises(ValueError, match=f"label {value} of example id 14 is not a class 0 to 2"):
    source(label=labels_with(value))


def test_unsigned_labels_beyond_int64_do_not_wrap():
  with pytest.raises(ValueError, match=f"label {2**64 - 1} of example id 14"):
    source(label=labels_with(2**64 - 1, dtype=np.uint64))


@pytest.mark.parametrize("ignored", [-1, -100, 255])
def test_a_declared_ignore_label_becomes_unlabeled_and_no_other_negative_passes(ignored):
  masked = source(label=labels_with(ignored), ignore_label=ignored)
  assert masked.arrays["label"].tolist() == [0, 0, 0, 0, data.UNLABELED, 0]
  assert masked.ignore_label == data.UNLABELED
  with pytest.raises(ValueError, match="label -7 of example id 14"):
    source(label=labels_with(-7), ignore_label=ignored)


def test_a_class_cannot_be_the_ignore_label():
  with pytest.raises(ValueError, match="ignore_label 2 is one of the classes 0 to 2"):
    source(ignore_label=2)


def test_small_unsigned_labels_can_be_ignored():
  masked = source(label=labels_with(255, dtype=np.uint8), ignore_label=255)
  assert masked.arrays["label"].dtype == np.int32 and masked.arrays["label"][4] == data.UNLABELED


@pytest.mark.parametrize(
  "label", [np.zeros(6), np.full(6, np.nan), np.zeros(6, bool), np.array(["a"] * 6)]
)
def test_labels_that_are_not_integers_are_refused(label):
  with pytest.raises(ValueError, match="label must be integers"):
    source(label=label)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_numbers_that_are_not_finite_are_refused_with_their_id(value, dtype):
  image = np.zeros((6, 2, 2, 1), dtype)
  image[3, 1, 0, 0] = value
  with pytest.raises(ValueError, match="'image' of example id 13 holds"):
    source(image=image)


def test_a_number_that_only_float64_holds_is_refused():
  image = np.zeros((6, 2))
  image[2, 1] = 1e300
  with pytest.raises(ValueError, match="'image' of example id 12 holds inf"):
    source(image=image)


def test_an_integer_input_that_would_wrap_is_refused():
  with pytest.raises(ValueError, match=f"'tokens' of example id 10 holds {2**31}"):
    source(tokens=np.full((6, 3), 2**31))


@pytest.mark.parametrize("field", [np.array(["x"] * 6), np.array([object()] * 6)])
def test_inputs_that_are_not_numbers_are_refused(field):
  with pytest.raises(ValueError, match="'text' must hold numbers"):
    source(text=field)


def test_no_examples_and_lengths_that_differ_are_refused():
  with pytest.raises(ValueError, match="0 rows"):
    source(0)
  with pytest.raises(ValueError, match="'image': 5"):
    source(image=np.zeros((5, 2, 2, 1)))
  with pytest.raises(ValueError, match="'scale' is a single value"):
    source(scale=1.0)


def test_labels_are_required():
  arrays = examples()
  del arrays["label"]
  with pytest.raises(ValueError, match="no array 'label'"):
    data.Source(arrays, classes=3)


def test_without_ids_the_rows_are_the_ids_and_subsets_keep_them():
  arrays = examples()
  del arrays["id"]
  whole = data.Source(arrays, classes=3)
  assert whole.arrays["id"].tolist() == [0, 1, 2, 3, 4, 5] and whole.arrays["id"].dtype == np.int32
  assert whole.take([4, 1]).arrays["id"].tolist() == [4, 1]
  with pytest.raises(ValueError, match="label 7 of example id 4"):
    data.Source(arrays | {"label": labels_with(7)}, classes=3)


@pytest.mark.parametrize("name", ["view", "where"])
def test_what_batches_add_is_refused_in_a_source(name):
  with pytest.raises(ValueError, match=f"'{name}' belongs to a batch"):
    source(**{name: np.zeros(6, np.int32)})


@pytest.mark.parametrize(
  ("ids", "message"),
  [
    ([1, 2, 3, 2, 5, 1], "2 repeat, the first is 1"),
    ([0, 1, 2, 3, 4, 2**31], f"got 0 to {2**31}"),
    ([0, 1, 2, 3, 4, -1], "got -1 to 4"),
    ([0.0, 1, 2, 3, 4, 5], "one integer per example, got float64"),
    ([[i] for i in range(6)], r"got int64 \[6, 1\]"),
  ],
)
def test_ids_that_do_not_identify_are_refused(ids, message):
  with pytest.raises(ValueError, match=message):
    source(id=np.array(ids))


def test_class_names_must_match_the_classes():
  assert source().class_names == ("0", "1", "2")
  with pytest.raises(ValueError, match="2 class_names for 3 classes"):
    data.Source(examples(), classes=3, class_names=("cat", "dog"))
  with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
    data.Source(examples(), classes=0)


def test_wide_numbers_become_those_of_the_device_and_others_stay():
  arrays = source(x=np.zeros(6), mask=np.ones(6, bool), pixels=np.zeros((6, 2), np.uint8)).arrays
  dtypes = {name: str(values.dtype) for name, values in arrays.items()}
  assert [dtypes[name] for name in ("id", "label", "image", "x")] == [
    "int32",
    "int32",
    "float32",
    "float32",
  ]
  assert dtypes["mask"] == "bool" and dtypes["pixels"] == "uint8"


def test_a_source_cannot_be_changed():
  frozen = source()
  with pytest.raises(ValueError, match="read-only"):
    frozen.arrays["image"][0] = 1
  with pytest.raises(TypeError, match="item assignment"):
    frozen.arrays["image"] = np.zeros(6)
  with pytest.raises(dataclasses.FrozenInstanceError):
    frozen.classes = 4


def test_the_arrays_handed_in_stay_writeable():
  arrays = examples()
  data.Source(arrays, classes=3)
  arrays["image"][0] = 1


@pytest.mark.parametrize("rows", [[4, 0], np.array([4, 0]), slice(4, None, -4)])
def test_a_subset_keeps_ids_and_order(rows):
  part = source().take(rows)
  assert (
    len(part) == 2
    and part.arrays["id"].tolist() == [14, 10]
    and part.arrays["label"].tolist() == [2, 1]
  )
  assert part.take(np.array([True, False])).arrays["id"].tolist() == [14]


def test_a_subset_cannot_repeat_exceed_or_lack_examples():
  with pytest.raises(ValueError, match="unique"):
    source().take([0, 0])
  with pytest.raises(IndexError):
    source().take([6])
  with pytest.raises(ValueError, match="no examples"):
    source().take([])
