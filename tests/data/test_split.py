import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax import data
from distill_jax.data.sets import digits
from distill_jax.data.split import uniform


def source(ids, classes=4):
  ids = np.asarray(ids)
  return data.Source({"id": ids, "label": ids * 7 % classes}, classes=classes)


def ids_of(part):
  return set(part.arrays["id"].tolist())


@settings(max_examples=30, deadline=None)
@given(st.integers(60, 90), st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_a_split_is_a_partition_that_ignores_order_and_company(n, seed, random):
  ids = sorted(random.sample(range(2**31), n))
  rest, held_out = data.split(source(ids), 0.4, seed)
  assert ids_of(rest) | ids_of(held_out) == set(ids) and not ids_of(rest) & ids_of(held_out)
  shuffled = random.sample(ids, len(ids))
  assert ids_of(data.split(source(shuffled), 0.4, seed)[1]) == ids_of(held_out)
  some = set(shuffled[:50])
  assert ids_of(data.split(source(sorted(some)), 0.4, seed)[1]) == ids_of(held_out) & some


def test_a_split_has_about_its_fraction_depends_on_the_seed_and_nests():
  many = source(np.arange(10_000))
  first, second = (ids_of(data.split(many, 0.1, seed)[1]) for seed in (0, 1))
  assert abs(len(first) - 1000) < 120 and abs(len(second) - 1000) < 120
  assert 60 < len(first & second) < 150  # about a tenth of a tenth: independent
  assert first < ids_of(data.split(many, 0.2, 0)[1])


def test_the_hash_is_uniform_and_each_purpose_has_its_own():
  a, b = (uniform(np.arange(20_000), 0, purpose) for purpose in ("a", "b"))
  counts = np.histogram(a, 20, (0, 1))[0]
  assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-square, 19 degrees of freedom: p > 0.0007
  assert abs(np.corrcoef(a, b)[0, 1]) < 0.03 and abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.03


def test_a_split_never_changes():
  """Golden ids: another split would put validation examples of old runs into the training set."""
  assert sorted(ids_of(data.split(source(np.arange(60)), 0.1)[1])) == [29, 33, 57]
  test = digits.load()["test"].arrays["id"]
  assert test[:8].tolist() == [7, 8, 10, 12, 24, 29, 42, 44]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_fractions_outside_their_range_are_refused(fraction):
  with pytest.raises(ValueError, match="fraction must be more than 0"):
    data.split(source(range(50)), fraction)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, True, None])
def test_seeds_that_are_not_32_bit_numbers_are_refused(seed):
  with pytest.raises(ValueError, match="seed must be a whole number from 0"):
    data.split(source(range(50)), 0.1, seed)


def test_a_split_with_an_empty_part_is_refused():
  with pytest.raises(
    ValueError, match=r"0.001 of 3 examples of custom leaves one part empty \(0 held out\)"
  ):
    data.split(source(range(3)), 0.001)


@pytest.mark.parametrize(("fraction", "each"), [(0.01, 1), (0.1, 3), (0.5, 13), (1, 26)])
def test_a_fraction_of_the_labels_is_kept_in_each_class(fraction, each):
  full = source(range(104))
  few = data.label_fraction(full, fraction, seed=3)
  label = few.arrays["label"]
  kept = label != data.UNLABELED
  assert np.bincount(label[kept]).tolist() == [each] * 4
  np.testing.assert_array_equal(label[kept], full.arrays["label"][kept])
  np.testing.assert_array_equal(few.arrays["id"], full.arrays["id"])
  assert few.ignore_label == data.UNLABELED


def test_more_labels_include_the_fewer_and_seeds_differ():
  full = source(range(104))
  kept = [data.label_fraction(full, f, seed=3).arrays["label"] >= 0 for f in (0.1, 0.3, 0.8)]
  assert (kept[0] <= kept[1]).all() and (kept[1] <= kept[2]).all()
  assert (data.label_fraction(full, 0.3, seed=4).arrays["label"] >= 0).tolist() != kept[1].tolist()


def test_labels_kept_do_not_depend_on_order(rng):
  order = rng.permutation(104)
  one, other = (data.label_fraction(source(ids), 0.2) for ids in (np.arange(104), order))
  labeled = [s.arrays["id"][s.arrays["label"] >= 0] for s in (one, other)]
  assert set(labeled[0]) == set(labeled[1])


@pytest.mark.parametrize("fraction", [0, -1, 1.01])
def test_label_fractions_outside_their_range_are_refused(fraction):
  with pytest.raises(ValueError, match="at most 1, got"):
    data.label_fraction(source(range(9)), fraction)


def test_unlabeled_examples_stay_unlabeled():
  none = data.unlabeled(source(range(9)))
  assert (none.arrays["label"] == data.UNLABELED).all() and len(none) == 9
  assert (data.label_fraction(none, 0.5).arrays["label"] == data.UNLABELED).all()


def test_classes_left_out_are_not_seen_and_the_others_are_whole():
  full = source(range(40))
  part = data.leave_out_classes(full, (1, 3))
  assert set(part.arrays["label"].tolist()) == {0, 2} and len(part) == 20 and part.classes == 4
  assert len(data.leave_out_classes(full, ())) == 40


def test_classes_that_cannot_be_left_out_are_refused():
  full = source(range(40))
  with pytest.raises(ValueError, match="class 4 does not exist: custom has 0 to 3"):
    data.leave_out_classes(full, [0, 4])
  with pytest.raises(ValueError, match="class -1 does not exist"):
    data.leave_out_classes(full, [-1])
  with pytest.raises(ValueError, match="leaves no example"):
    data.leave_out_classes(full, range(4))


def test_an_unlabeled_example_might_be_of_the_class_left_out():
  few = data.label_fraction(source(range(40)), 0.5)
  with pytest.raises(ValueError, match="20 examples of custom have no label"):
    data.leave_out_classes(few, [1])
  data.label_fraction(data.leave_out_classes(source(range(40)), [1]), 0.5)
