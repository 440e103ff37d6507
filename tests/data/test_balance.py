"""Sampling with `balance=`: frequencies, views, order and resumption."""

import itertools

import numpy as np
import pytest

from distill_jax import data
from distill_jax.train import RunOptions
from distill_jax.train.batch_checks import Checks
from distill_jax.train.inputs import batches_of


def source(sizes=(50, 7, 3), **arrays):
  label = np.repeat(np.arange(len(sizes)), sizes)
  return data.Source({"label": label, **arrays}, classes=len(sizes))


def epochs(examples, number, batch_size=10, **options):
  """Returns the batches of some epochs as one dict of arrays [epochs, rows]."""
  batches = data.batches(examples, batch_size, seed=0, balance="label", **options)
  count = number * (len(examples) // batch_size)
  parts = list(itertools.islice(batches, count))
  return {name: np.concatenate([b[name] for b in parts]).reshape(number, -1) for name in parts[0]}


@pytest.mark.parametrize("sizes", [(50, 7, 3), (1, 59), (20, 20, 20), (60,), (1, 1, 58)])
def test_classes_are_equally_frequent_in_each_epoch(sizes):
  labels = epochs(source(sizes), 3)["label"]
  counts = np.array([np.bincount(epoch, minlength=len(sizes)) for epoch in labels])
  assert counts.sum() == 180 and np.ptp(counts) <= 1


def test_rows_of_a_class_are_equally_frequent_and_each_time_another_view():
  batch = epochs(source(), 3)
  for epoch in range(3):
    ids, counts = np.unique(batch["id"][epoch], return_counts=True)
    rare = counts[ids >= 50]
    assert np.ptp(counts[ids < 50]) == 0 and np.ptp(rare[:7]) <= 1 and np.ptp(rare[7:]) <= 1
  pairs = set(zip(batch["id"].ravel().tolist(), batch["view"].ravel().tolist(), strict=True))
  assert len(pairs) == 180
  # Of the 50 rows of the first class 20 come in an epoch; in each others.
  first = [set(ids[ids < 50].tolist()) for ids in batch["id"]]
  assert len(first[0]) == 20 and len(set.union(*first)) > 30
  assert set(epochs(source(), 3, num_views=2)["view"].ravel().tolist()) == {0, 1}


def test_batches_of_any_start_and_process_match():
  examples = source()
  make = lambda **kw: data.batches(examples, 8, seed=3, balance="label", **kw)  # noqa: E731
  expected = list(itertools.islice(make(), 20))
  resumed = list(itertools.islice(make(start=13), 7))
  part = list(itertools.islice(make(rows=np.array([1, 5])), 20))
  for name in expected[0]:
    for batch, other in zip(expected[13:], resumed, strict=True):
      np.testing.assert_array_equal(batch[name], other[name])
    for batch, other in zip(expected, part, strict=True):
      np.testing.assert_array_equal(batch[name][[1, 5]], other[name])
  assert any((a["id"] != b["id"]).any() for a, b in zip(expected[:7], expected[7:14]))


@pytest.mark.parametrize("entry", ["kind", "x", "label"])
def test_entries_that_cannot_be_balanced_raise(entry):
  examples = source(x=np.ones(60))
  examples = data.unlabeled(examples) if entry == "label" else examples
  with pytest.raises(ValueError, match=r"^balance: expected"):
    data.batches(examples, 8, seed=0, balance=entry)


@pytest.mark.parametrize("entry", ["label", "type"])
@pytest.mark.parametrize(("run", "checks"), [(-100, {}), (None, {"label": -100, "type": -100})])
def test_ignored_rows_cannot_be_balanced(entry, run, checks):
  """They were balanced as a class."""
  examples = data.Source({entry: np.array([0, 0, 1, -100])})
  options = RunOptions(balance=entry, ignore_label=run)
  checks = Checks({}, checks)
  with pytest.raises(ValueError, match=r"^balance: .*got 1 without.*!= -100"):
    batches_of(examples, 2, 0, options, checks=checks)
  batches_of(examples.take(slice(3)), 2, 0, options, checks=checks)
