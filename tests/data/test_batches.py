import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes, load_digits

from distill_jax import data


def source(n=23):
  ids = np.arange(n) * 3 + 100
  return data.Source({"id": ids, "label": ids % 5, "image": ids[:, None, None] / 1000}, classes=5)


def first(iterator, n):
  return list(itertools.islice(iterator, n))


def assert_same(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for name in batch:
      assert batch[name].dtype == other[name].dtype
      np.testing.assert_array_equal(batch[name], other[name])


def test_batch_has_device_dtypes():
  batch = next(data.batches(source(), 5, seed=0))
  assert {name: (str(v.dtype), v.shape) for name, v in batch.items()} == {
    "id": ("int32", (5,)),
    "label": ("int32", (5,)),
    "image": ("float32", (5, 1, 1)),
    "view": ("int32", (5,)),
  }
  np.testing.assert_array_equal(batch["label"], batch["id"] % 5)
  np.testing.assert_array_equal(batch["image"][:, 0, 0], (batch["id"] / 1000).astype(np.float32))


def test_epoch_is_a_permutation_of_full_batches():
  epochs = np.array([b["id"] for b in first(data.batches(source(), 5, seed=0), 12)]).reshape(3, 20)
  assert all(len(set(epoch.tolist())) == 20 for epoch in epochs)
  assert len({tuple(sorted(epoch)) for epoch in epochs}) > 1  # each leaves out other rows
  assert len({tuple(epoch) for epoch in epochs}) == 3


@settings(max_examples=40, deadline=None)
@given(
  st.integers(1, 30), st.data(), st.integers(0, 2**32 - 1), st.integers(0, 60), st.integers(0, 4)
)
def test_any_start_matches_an_uninterrupted_run(n, draw, seed, start, num_views):
  size = draw.draw(st.integers(1, n))
  expected = first(data.batches(source(n), size, seed=seed, num_views=num_views), start + 3)
  assert_same(
    first(data.batches(source(n), size, seed=seed, start=start, num_views=num_views), 3),
    expected[start:],
  )


def test_distant_start_is_immediate():
  step = 10**12
  batch = next(data.batches(source(), 5, seed=0, start=step, num_views=3))
  assert batch["view"][0] == step // 4 % 3


def test_order_depends_on_the_seed_only():
  np.random.seed(1)
  one = first(data.batches(source(), 5, seed=0), 8)
  np.random.seed(2)
  assert_same(one, first(data.batches(source(), 5, seed=0), 8))
  other = first(data.batches(source(), 5, seed=1), 8)
  assert any((a["id"] != b["id"]).any() for a, b in zip(one, other, strict=True))


def test_epochs_of_neighboring_seeds_differ():
  """seed + epoch would make run 1's first epoch run 0's second."""
  second = first(data.batches(source(20), 20, seed=0), 2)[1]
  assert (second["id"] != next(data.batches(source(20), 20, seed=1))["id"]).any()


def test_iterators_are_independent():
  expected = first(data.batches(source(), 5, seed=0), 8)
  a, b = data.batches(source(), 5, seed=0), data.batches(source(), 4, seed=7)
  assert_same([next(a) if next(b) else None for _ in range(8)], expected)


def test_writing_to_a_batch_leaves_the_source():
  full = source()
  before = full.arrays["image"].copy()
  for batch in first(data.batches(full, 5, seed=0), 4) + list(data.eval_batches(full, 5)):
    batch["image"][:] = -1
  np.testing.assert_array_equal(full.arrays["image"], before)


@pytest.mark.parametrize(
  ("num_views", "expected"), [(0, [0, 1, 2, 3, 4]), (1, [0] * 5), (3, [0, 1, 2, 0, 1])]
)
def test_view_is_the_epoch_modulo_num_views(num_views, expected):
  batches = first(data.batches(source(), 12, seed=0, num_views=num_views), 5)
  assert [set(b["view"].tolist()) for b in batches] == [{v} for v in expected]


def test_batches_match_golden_ids():
  """With other ids a resumed run would see other data than it was started with."""
  assert next(data.batches(source(), 6, seed=0))["id"].tolist() == [160, 151, 142, 136, 127, 106]
  assert next(data.batches(source(), 6, seed=5, start=9))["id"].tolist() == [
    148,
    151,
    127,
    136,
    166,
    103,
  ]


def test_batch_larger_than_the_source_raises():
  with pytest.raises(ValueError, match=r"^batch_size:"):
    data.batches(source(), 24, seed=0)
  assert len(next(data.batches(source(), 23, seed=0))["id"]) == 23


@pytest.mark.parametrize(
  "arguments",
  [
    {"batch_size": 0},
    {"batch_size": -4},
    {"batch_size": 2.0},
    {"seed": -1},
    {"seed": 2**32},
    {"seed": 1.5},
    {"start": -1},
    {"num_views": -1},
    {"num_views": True},
  ],
)
def test_arguments_out_of_range_raise(arguments):
  with pytest.raises(ValueError, match=f"^{next(iter(arguments))}:"):
    data.batches(source(), **({"batch_size": 4, "seed": 0} | arguments))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40))
def test_evaluation_reads_every_example_once_in_order(n, size):
  full = source(n)
  batches = list(data.eval_batches(full, size))
  assert all(len(values) == size for batch in batches for values in batch.values())
  where = np.concatenate([b["where"] for b in batches])
  assert where.dtype == bool and len(batches) == -(-n // size)
  for name in full.arrays:
    rows = np.concatenate([b[name] for b in batches])
    np.testing.assert_array_equal(rows[where], full.arrays[name])
    assert (rows[n:] == full.arrays[name][-1]).all()
  assert all((b["view"] == 0).all() for b in batches)


def test_evaluation_batch_size_out_of_range_raises():
  with pytest.raises(ValueError, match=r"^batch_size:"):
    data.eval_batches(source(), 0)


@pytest.mark.parametrize("rows", [[0, 1], [4], [1, 3, 4]])
def test_process_reads_its_rows_of_each_batch(rows):
  rows = np.array(rows)
  for iterate in (
    lambda **k: data.batches(source(), 5, seed=3, start=2, num_views=2, **k),
    eval_all,
  ):
    full, local = first(iterate(), 5), first(iterate(rows=rows), 5)
    assert_same([{name: values[rows] for name, values in batch.items()} for batch in full], local)


@pytest.mark.parametrize("labels", ["regression", "multi-hot", "none"])
def test_batches_without_classes(labels):
  if labels == "regression":
    inputs, label = load_diabetes(return_X_y=True)
  else:
    inputs, digit = load_digits(return_X_y=True)
    label = digit[:, None] == np.arange(10)
  label = label.astype(np.float32 if labels == "regression" else np.int32)
  arrays = {"x": inputs} | ({} if labels == "none" else {"label": label})
  train, held_out = data.split(data.Source(arrays), 0.2)
  evaluation = list(data.eval_batches(held_out, 64))
  for batch in [*first(data.batches(train, 32, seed=0), 3), *evaluation]:
    data.check_batch(batch)
    np.testing.assert_array_equal(batch["x"], inputs[batch["id"]].astype(np.float32))
    assert ("label" in batch) == (labels != "none")
    if labels != "none":
      assert batch["label"].dtype == label.dtype
      np.testing.assert_array_equal(batch["label"], label[batch["id"]])
  assert sum(batch["where"].sum() for batch in evaluation) == len(held_out)


def eval_all(**kwargs):
  return data.eval_batches(source(), 5, **kwargs)
