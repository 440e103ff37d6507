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
def test_label_that_is_no_class_raises(value):
  with pytest.raises(ValueError, match=f"^label: .*0 to 2, got {value} .*id 14"):
    source(label=labels_with(value))


def test_unsigned_labels_beyond_int64_do_not_wrap():
  with pytest.raises(ValueError, match=f"^label: .*got {2**64 - 1} .*id 14"):
    source(label=labels_with(2**64 - 1, dtype=np.uint64))


@pytest.mark.parametrize("ignored", [-1, -100, 255])
def test_only_the_ignore_label_becomes_unlabeled(ignored):
  masked = source(label=labels_with(ignored), ignore_label=ignored)
  assert masked.arrays["label"].tolist() == [0, 0, 0, 0, data.UNLABELED, 0]
  assert masked.ignore_label == data.UNLABELED
  with pytest.raises(ValueError, match=r"^label: .*got -7 .*id 14"):
    source(label=labels_with(-7), ignore_label=ignored)


def test_class_as_ignore_label_raises():
  with pytest.raises(ValueError, match=r"^ignore_label:"):
    source(ignore_label=2)


def test_unsigned_ignore_label_becomes_unlabeled():
  masked = source(label=labels_with(255, dtype=np.uint8), ignore_label=255)
  assert masked.arrays["label"].dtype == np.int32 and masked.arrays["label"][4] == data.UNLABELED


@pytest.mark.parametrize("label", [np.zeros(6), np.full(6, np.nan), np.array(["a"] * 6)])
def test_labels_that_are_no_integers_raise(label):
  with pytest.raises(ValueError, match=r"^label:"):
    source(label=label)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_numbers_that_are_not_finite_raise(value, dtype):
  image = np.zeros((6, 2, 2, 1), dtype)
  image[3, 1, 0, 0] = value
  with pytest.raises(ValueError, match=r"^image: .*id 13"):
    source(image=image)


def test_number_that_only_float64_holds_raises():
  image = np.zeros((6, 2))
  image[2, 1] = 1e300
  with pytest.raises(ValueError, match=r"^image: .*got inf .*id 12"):
    source(image=image)


def test_integer_that_would_wrap_raises():
  with pytest.raises(ValueError, match=f"^tokens: .*got {2**31} .*id 10"):
    source(tokens=np.full((6, 3), 2**31))


@pytest.mark.parametrize("field", [np.array(["x"] * 6), np.array([object()] * 6)])
def test_inputs_that_are_no_numbers_raise(field):
  with pytest.raises(ValueError, match=r"^text:"):
    source(text=field)


def test_no_rows_and_different_lengths_raise():
  with pytest.raises(ValueError, match=r"^id, label, image: .*got 0"):
    source(0)
  with pytest.raises(ValueError, match=r"^arrays: .*'image': 5"):
    source(image=np.zeros((5, 2, 2, 1)))
  with pytest.raises(ValueError, match=r"^scale:"):
    source(scale=1.0)


def test_classes_without_labels_raise():
  arrays = examples()
  del arrays["label"]
  with pytest.raises(ValueError, match=r"^label:"):
    data.Source(arrays, classes=3)


@pytest.mark.parametrize(
  ("label", "dtype"),
  [
    (np.linspace(-3, 1e6, 6), "float32"),
    (np.zeros((6, 2, 5), np.float16), "float16"),
    (np.eye(6, dtype=np.int64), "int32"),
    (np.full(6, -7), "int32"),
    (np.eye(6, dtype=bool), "bool"),
  ],
)
def test_labels_without_classes_are_any_finite_numbers(label, dtype):
  targets = source(classes=None, label=label)
  assert targets.arrays["label"].dtype == dtype and targets.class_names == ()
  np.testing.assert_array_equal(targets.arrays["label"], label.astype(dtype))
  np.testing.assert_array_equal(targets.take([4]).arrays["label"], label[[4]].astype(dtype))


@pytest.mark.parametrize("label", [np.full(6, np.nan), np.full(6, 1e300), np.array(["a"] * 6)])
def test_labels_without_classes_that_are_not_finite_raise(label):
  with pytest.raises(ValueError, match=r"^label:"):
    source(classes=None, label=label)


def test_examples_without_labels_need_no_classes():
  arrays = examples()
  del arrays["label"]
  without = data.Source(arrays)
  assert set(without.arrays) == {"id", "image"} and without.classes is None
  for field, value in {"class_names": ("a", "b"), "ignore_label": -1}.items():
    with pytest.raises(ValueError, match=f"^{field}:"):
      data.Source(arrays, **{field: value})


def test_ids_default_to_rows_and_subsets_keep_them():
  arrays = examples()
  del arrays["id"]
  full = data.Source(arrays, classes=3)
  assert full.arrays["id"].tolist() == [0, 1, 2, 3, 4, 5] and full.arrays["id"].dtype == np.int32
  assert full.take([4, 1]).arrays["id"].tolist() == [4, 1]
  with pytest.raises(ValueError, match=r"^label: .*got 7 .*id 4"):
    data.Source(arrays | {"label": labels_with(7)}, classes=3)


@pytest.mark.parametrize("name", ["view", "where"])
def test_entries_of_batches_in_a_source_raise(name):
  with pytest.raises(ValueError, match=f"^{name}:"):
    source(**{name: np.zeros(6, np.int32)})


@pytest.mark.parametrize(
  ("ids", "message"),
  [
    ([1, 2, 3, 2, 5, 1], "got 2 .*first is 1"),
    ([0, 1, 2, 3, 4, 2**31], f"got 0 to {2**31}"),
    ([0, 1, 2, 3, 4, -1], "got -1 to 4"),
    ([0.0, 1, 2, 3, 4, 5], "got float64"),
    ([[i] for i in range(6)], r"got int64 \[6, 1\]"),
  ],
)
def test_ids_that_do_not_identify_raise(ids, message):
  with pytest.raises(ValueError, match=f"^id: .*{message}"):
    source(id=np.array(ids))


def test_class_names_match_the_classes():
  assert source().class_names == ("0", "1", "2")
  with pytest.raises(ValueError, match=r"^class_names:"):
    data.Source(examples(), classes=3, class_names=("cat", "dog"))
  with pytest.raises(ValueError, match=r"^classes:"):
    data.Source(examples(), classes=0)


def test_64_bit_numbers_become_32_bit_ones():
  arrays = source(x=np.zeros(6), mask=np.ones(6, bool), pixels=np.zeros((6, 2), np.uint8)).arrays
  dtypes = {name: str(values.dtype) for name, values in arrays.items()}
  assert [dtypes[name] for name in ("id", "label", "image", "x")] == [
    "int32",
    "int32",
    "float32",
    "float32",
  ]
  assert dtypes["mask"] == "bool" and dtypes["pixels"] == "uint8"


def test_source_is_read_only():
  frozen = source()
  with pytest.raises(ValueError, match="read-only"):
    frozen.arrays["image"][0] = 1
  with pytest.raises(TypeError, match="item assignment"):
    frozen.arrays["image"] = np.zeros(6)
  with pytest.raises(dataclasses.FrozenInstanceError):
    frozen.classes = 4


def test_input_arrays_stay_writeable():
  arrays = examples()
  data.Source(arrays, classes=3)
  arrays["image"][0] = 1


@pytest.mark.parametrize("rows", [[4, 0], np.array([4, 0]), slice(4, None, -4)])
def test_subset_keeps_ids_and_order(rows):
  part = source().take(rows)
  assert (
    len(part) == 2
    and part.arrays["id"].tolist() == [14, 10]
    and part.arrays["label"].tolist() == [2, 1]
  )
  assert part.take(np.array([True, False])).arrays["id"].tolist() == [14]


def test_invalid_subsets_raise():
  with pytest.raises(ValueError, match=r"^id:"):
    source().take([0, 0])
  with pytest.raises(IndexError):
    source().take([6])
  with pytest.raises(ValueError, match=r"got 0"):
    source().take([])


def test_labeled_marks_examples_with_a_label():
  image = np.zeros((3, 2), np.float32)
  assert data.Source({"image": image}).labeled.tolist() == [False] * 3
  numbers = data.Source({"image": image, "label": np.array([0.5, -1.0, 2.0])})
  assert numbers.labeled.all()
  tokens = np.array([[0, -1], [-1, -1], [1, 1]])
  text = data.Source({"image": image, "label": tokens}, classes=2, ignore_label=-1)
  assert text.labeled.tolist() == [True, False, True]


def test_digest_covers_names_order_shapes_and_dtypes():
  """The set was sent to the device to be fingerprinted at every fit."""
  values = np.arange(6, dtype=np.float32)
  first = data.Source({"x": values, "y": values.astype(np.int32)})
  assert data.Source({"y": values.astype(np.int32), "x": values}).digest == first.digest
  others = [
    {"x": values[::-1], "y": values.astype(np.int32)},
    {"x": values, "y": values},
    {"z": values, "y": values.astype(np.int32)},
    {"x": values[:, None], "y": values.astype(np.int32)},
    {"x": np.where(values, values, -0.0), "y": values.astype(np.int32)},
  ]
  assert len({data.Source(arrays).digest for arrays in others} | {first.digest}) == 6
  bfloat16 = data.Source({"x": values.astype(ml_dtypes.bfloat16)})
  assert len(bfloat16.digest) == 32


def test_labels_of_classes_may_be_probabilities():
  """They raised "expected integers"."""
  rows = np.array([[0.25, 0.75, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
  examples = data.Source({"x": np.ones((3, 2)), "label": rows}, classes=3)
  assert examples.arrays["label"].dtype == np.float32 and len(examples.class_names) == 3
  np.testing.assert_array_equal(examples.labeled, [True, False, True])
  np.testing.assert_array_equal(examples.take([2]).arrays["label"], rows[2:])
  positive = data.Source({"label": np.array([0.1, 1.0])}, classes=2)
  assert positive.labeled.all() and positive.arrays["label"].dtype == np.float32


@pytest.mark.parametrize(
  "label, classes",
  [
    (np.array([[0.5, 0.6]]), 2),
    (np.array([[0.5, 0.5]]), 3),
    (np.array([[1.5, -0.5]]), 2),
    (np.array([1.5]), 2),
    (np.array([0.5]), 3),
    (np.array([[np.nan, 1.0]]), 2),
  ],
)
def test_labels_that_are_no_probabilities_raise(label, classes):
  with pytest.raises(ValueError, match="^label: expected"):
    data.Source({"label": label}, classes=classes)


def test_functions_of_class_numbers_reject_probabilities():
  examples = data.Source({"label": np.full((4, 2), 0.5)}, classes=2)
  for function in (
    lambda: data.label_fraction(examples, 0.5),
    lambda: data.leave_out_classes(examples, [0]),
    lambda: data.unlabeled(examples),
    lambda: data.split(examples, 0.5, stratify="label"),
    lambda: data.batches(examples, 2, seed=0, balance="label"),
  ):
    with pytest.raises(ValueError, match=r"^(label|stratify|balance): expected"):
      function()
