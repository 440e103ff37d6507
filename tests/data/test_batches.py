import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def test_rows_stay_together_and_have_the_types_of_the_device():
  batch = next(data.batches(source(), 5, seed=0))
  assert {name: (str(v.dtype), v.shape) for name, v in batch.items()} == {
    "id": ("int32", (5,)),
    "label": ("int32", (5,)),
    "image": ("float32", (5, 1, 1)),
    "view": ("int32", (5,)),
  }
  np.testing.assert_array_equal(batch["label"], batch["id"] % 5)
  np.testing.assert_array_equal(batch["image"][:, 0, 0], (batch["id"] / 1000).astype(np.float32))


def test_an_epoch_is_a_permutation_without_its_incomplete_rest():
  epochs = np.array([b["id"] for b in first(data.batches(source(), 5, seed=0), 12)]).reshape(3, 20)
  assert all(len(set(epoch.tolist())) == 20 for epoch in epochs)
  assert len({tuple(sorted(epoch)) for epoch in epochs}) > 1  # others are left out each time
  assert len({tuple(epoch) for epoch in epochs}) == 3


@settings(max_examples=40, deadline=None)
@given(
  st.integers(1, 30), st.data(), st.integers(0, 2**32 - 1), st.integers(0, 60), st.integers(0, 4)
)
def test_starting_anywhere_gives_what_an_undisturbed_run_gets(n, draw, seed, start, num_views):
  size = draw.draw(st.integers(1, n))
  whole = first(data.batches(source(n), size, seed=seed, num_views=num_views), start + 3)
  assert_same(
    first(data.batches(source(n), size, seed=seed, start=start, num_views=num_views), 3),
    whole[start:],
  )


def test_a_start_far_away_is_reached_at_once():
  step = 10**12
  batch = next(data.batches(source(), 5, seed=0, start=step, num_views=3))
  assert batch["view"][0] == step // 4 % 3


def test_seeds_differ_and_global_state_does_not_matter():
  np.random.seed(1)
  one = first(data.batches(source(), 5, seed=0), 8)
  np.random.seed(2)
  assert_same(one, first(data.batches(source(), 5, seed=0), 8))
  other = first(data.batches(source(), 5, seed=1), 8)
  assert any((a["id"] != b["id"]).any() for a, b in zip(one, other, strict=True))


def test_epochs_of_one_seed_are_not_those_of_the_next_seed():
  """seed + epoch would make run 1's first epoch run 0's second."""
  second = first(data.batches(source(20), 20, seed=0), 2)[1]
  assert (second["id"] != next(data.batches(source(20), 20, seed=1))["id"]).any()


def test_iterators_do_not_disturb_each_other():
  alone = first(data.batches(source(), 5, seed=0), 8)
  a, b = data.batches(source(), 5, seed=0), data.batches(source(), 4, seed=7)
  assert_same([next(a) if next(b) else None for _ in range(8)], alone)


def test_writing_to_a_batch_leaves_the_source_alone():
  full = source()
  before = full.arrays["image"].copy()
  for batch in first(data.batches(full, 5, seed=0), 4) + list(data.eval_batches(full, 5)):
    batch["image"][:] = -1
  np.testing.assert_array_equal(full.arrays["image"], before)


@pytest.mark.parametrize(
  ("num_views", "expected"), [(0, [0, 1, 2, 3, 4]), (1, [0] * 5), (3, [0, 1, 2, 0, 1])]
)
def test_the_view_is_the_epoch_modulo_num_views(num_views, expected):
  batches = first(data.batches(source(), 12, seed=0, num_views=num_views), 5)
  assert [set(b["view"].tolist()) for b in batches] == [{v} for v in expected]


def test_batches_never_change():
  """Golden ids: with other ones a resumed run would see other data than it was started with."""
  assert next(data.batches(source(), 6, seed=0))["id"].tolist() == [160, 151, 142, 136, 127, 106]
  assert next(data.batches(source(), 6, seed=5, start=9))["id"].tolist() == [
    148,
    151,
    127,
    136,
    166,
    103,
  ]


def test_a_batch_larger_than_the_source_is_refused_at_once():
  with pytest.raises(
    ValueError, match="batch_size 24 is more than the 23 examples of custom: at most 23"
  ):
    data.batches(source(), 24, seed=0)
  assert len(next(data.batches(source(), 23, seed=0))["id"]) == 23


@pytest.mark.parametrize(
  "wrong",
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
def test_numbers_outside_their_range_are_refused_at_once(wrong):
  with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a whole number"):
    data.batches(source(), **({"batch_size": 4, "seed": 0} | wrong))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40))
def test_evaluation_sees_every_example_once_in_order(n, size):
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


def test_an_evaluation_batch_size_outside_its_range_is_refused_at_once():
  with pytest.raises(ValueError, match="batch_size must be a whole number from 1, got 0"):
    data.eval_batches(source(), 0)


@pytest.mark.parametrize("rows", [[0, 1], [4], [1, 3, 4]])
def test_a_process_reads_its_rows_of_the_common_batches(rows):
  rows = np.array(rows)
  for iterate in (
    lambda **k: data.batches(source(), 5, seed=3, start=2, num_views=2, **k),
    eval_all,
  ):
    whole, own = first(iterate(), 5), first(iterate(rows=rows), 5)
    assert_same([{name: values[rows] for name, values in batch.items()} for batch in whole], own)


def eval_all(**kwargs):
  return data.eval_batches(source(), 5, **kwargs)
