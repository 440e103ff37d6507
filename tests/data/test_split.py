import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from distill_jax import data
from distill_jax.data.sets import digits
from distill_jax.data.split import hash_ids


def source(ids, classes=4):
  ids = np.asarray(ids)
  return data.Source({"id": ids, "label": ids * 7 % classes}, classes=classes)


def ids_of(part):
  return set(part.arrays["id"].tolist())


@settings(max_examples=30, deadline=None)
@given(st.integers(60, 90), st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_split_is_a_partition_by_id(n, seed, random):
  ids = sorted(random.sample(range(2**31), n))
  rest, held_out = data.split(source(ids), 0.4, seed)
  assert ids_of(rest) | ids_of(held_out) == set(ids) and not ids_of(rest) & ids_of(held_out)
  shuffled = random.sample(ids, len(ids))
  assert ids_of(data.split(source(shuffled), 0.4, seed)[1]) == ids_of(held_out)
  some = set(shuffled[:50])
  assert ids_of(data.split(source(sorted(some)), 0.4, seed)[1]) == ids_of(held_out) & some


def test_split_follows_fraction_and_seed():
  many = source(np.arange(10_000))
  first, second = (ids_of(data.split(many, 0.1, seed)[1]) for seed in (0, 1))
  assert abs(len(first) - 1000) < 120 and abs(len(second) - 1000) < 120
  assert 60 < len(first & second) < 150  # about a tenth of a tenth: independent
  assert first < ids_of(data.split(many, 0.2, 0)[1])


def test_hashes_are_uniform_and_independent():
  a, b = (hash_ids(np.arange(20_000), 0, purpose) for purpose in ("a", "b"))
  counts = np.histogram(a, 20, (0, 1))[0]
  assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-square, 19 degrees of freedom: p > 0.0007
  assert abs(np.corrcoef(a, b)[0, 1]) < 0.03 and abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.03


def test_split_matches_golden_ids():
  """Another split would put validation examples of old runs into the training set."""
  assert sorted(ids_of(data.split(source(np.arange(60)), 0.1)[1])) == [29, 33, 57]
  test = digits.load()["test"].arrays["id"]
  assert test[:8].tolist() == [7, 8, 10, 12, 24, 29, 42, 44]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_fraction_out_of_range_raises(fraction):
  with pytest.raises(ValueError, match=r"^fraction:"):
    data.split(source(range(50)), fraction)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, True, None])
def test_seed_that_is_no_32_bit_integer_raises(seed):
  with pytest.raises(ValueError, match=r"^seed:"):
    data.split(source(range(50)), 0.1, seed)


def test_empty_part_raises():
  with pytest.raises(ValueError, match=r"^fraction: .*got 0 of the 3"):
    data.split(source(range(3)), 0.001)


@pytest.mark.parametrize(("fraction", "each"), [(0.01, 1), (0.1, 3), (0.5, 13), (1, 26)])
def test_label_fraction_is_stratified(fraction, each):
  full = source(range(104))
  few = data.label_fraction(full, fraction, seed=3)
  label = few.arrays["label"]
  labeled = label != data.UNLABELED
  assert np.bincount(label[labeled]).tolist() == [each] * 4
  np.testing.assert_array_equal(label[labeled], full.arrays["label"][labeled])
  np.testing.assert_array_equal(few.arrays["id"], full.arrays["id"])
  assert few.ignore_label == data.UNLABELED


def test_label_fractions_nest_and_seeds_differ():
  full = source(range(104))
  masks = [data.label_fraction(full, f, seed=3).arrays["label"] >= 0 for f in (0.1, 0.3, 0.8)]
  assert (masks[0] <= masks[1]).all() and (masks[1] <= masks[2]).all()
  assert (data.label_fraction(full, 0.3, seed=4).arrays["label"] >= 0).tolist() != masks[1].tolist()


def test_label_fraction_is_independent_of_order(rng):
  order = rng.permutation(104)
  one, other = (data.label_fraction(source(ids), 0.2) for ids in (np.arange(104), order))
  labeled = [s.arrays["id"][s.arrays["label"] >= 0] for s in (one, other)]
  assert set(labeled[0]) == set(labeled[1])


def test_label_maps_are_kept_or_removed_whole():
  maps = np.arange(12)[:, None, None] % np.array([[2, 3], [3, 2]])
  full = data.Source({"x": np.zeros((12, 1)), "label": maps}, classes=3)
  few = data.label_fraction(full, 0.25).arrays["label"]
  labeled = (few >= 0).any((1, 2))
  assert labeled.sum() == 3 and (few[~labeled] == data.UNLABELED).all()
  np.testing.assert_array_equal(few[labeled], maps[labeled])
  with pytest.raises(ValueError, match=r"^label: .*\[12, 2, 2\]"):
    data.leave_out_classes(full, [1])


@pytest.mark.parametrize("fraction", [0, -1, 1.01])
def test_label_fraction_out_of_range_raises(fraction):
  with pytest.raises(ValueError, match=r"^fraction:"):
    data.label_fraction(source(range(9)), fraction)


def test_unlabeled_examples_stay_unlabeled():
  none = data.unlabeled(source(range(9)))
  assert (none.arrays["label"] == data.UNLABELED).all() and len(none) == 9
  assert (data.label_fraction(none, 0.5).arrays["label"] == data.UNLABELED).all()


def test_split_without_classes_follows_the_ids():
  ids = np.arange(50)
  targets = data.Source({"id": ids, "label": ids / 7})
  parts = data.split(targets, 0.3)
  assert [ids_of(part) for part in parts] == [ids_of(p) for p in data.split(source(ids), 0.3)]
  np.testing.assert_allclose(parts[1].arrays["label"], parts[1].ids / 7, rtol=1e-6)
  without = data.unlabeled(targets)
  assert "label" not in without.arrays and data.unlabeled(without).arrays.keys() == {"id"}
  assert ids_of(data.split(without, 0.3)[1]) == ids_of(parts[1])


@pytest.mark.parametrize(
  "function", [lambda s: data.label_fraction(s, 0.5), lambda s: data.leave_out_classes(s, [1])]
)
def test_functions_of_classes_raise_without_classes(function):
  with pytest.raises(ValueError, match=r"^classes:"):
    function(data.Source({"label": np.linspace(0, 1, 9)}))


def test_leave_out_classes_keeps_all_others():
  full = source(range(40))
  part = data.leave_out_classes(full, (1, 3))
  assert set(part.arrays["label"].tolist()) == {0, 2} and len(part) == 20 and part.classes == 4
  assert len(data.leave_out_classes(full, ())) == 40


def test_invalid_classes_to_leave_out_raise():
  full = source(range(40))
  with pytest.raises(ValueError, match=r"^classes: .*got 4"):
    data.leave_out_classes(full, [0, 4])
  with pytest.raises(ValueError, match=r"^classes: .*got -1"):
    data.leave_out_classes(full, [-1])
  with pytest.raises(ValueError, match=r"^classes:"):
    data.leave_out_classes(full, range(4))


def test_leave_out_classes_with_unlabeled_examples_raises():
  few = data.label_fraction(source(range(40)), 0.5)
  with pytest.raises(ValueError, match=r"^label: .*got 20"):
    data.leave_out_classes(few, [1])
  data.label_fraction(data.leave_out_classes(source(range(40)), [1]), 0.5)


def test_stratified_split_holds_out_the_fraction_of_each_class():
  label = np.repeat([0, 1, 2], [900, 90, 10])
  examples = data.Source({"x": np.arange(1000.0), "label": label}, classes=3)
  rest, held_out = data.split(examples, 0.2, stratify="label")
  assert np.bincount(held_out.arrays["label"]).tolist() == [180, 18, 2]
  assert sorted([*rest.ids, *held_out.ids]) == list(range(1000))


def test_grouped_split_keeps_groups_together():
  patient = np.arange(1000) // 5
  rest, held_out = data.split(data.Source({"patient": patient}), 0.2, groups="patient")
  assert not set(rest.arrays["patient"]) & set(held_out.arrays["patient"])
  # Binomial(200, 0.2): five standard deviations.
  assert abs(len(held_out) / 5 - 40) < 28


def test_stratified_groups_stay_together_and_are_as_even_as_of_scikit_learn():
  errors = []
  for seed in range(5):
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(80) * 7, rng.integers(1, 30, 80))
    odds = rng.dirichlet([0.7, 0.5, 0.2], 560)
    label = np.array([rng.choice(3, p=odds[number]) for number in patient])
    examples = data.Source({"patient": patient, "label": label}, classes=3)
    rest, held_out = data.split(examples, 0.2, seed, stratify="label", groups="patient")
    assert not set(rest.arrays["patient"]) & set(held_out.arrays["patient"])
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(label, label, patient)
    sizes = [held_out.arrays["label"], label[next(folds)[1]]]
    fractions = [np.bincount(y, minlength=3) / np.bincount(label) for y in sizes]
    errors.append([abs(x - 0.2).max() for x in fractions])
  ours, peers = np.mean(errors, 0)
  assert ours <= 1.5 * peers < 0.02
  repeated, _ = data.split(examples, 0.2, seed, stratify="label", groups="patient")
  assert repeated.ids.tolist() == rest.ids.tolist()


def test_only_group_of_a_class_stays_in_training():
  arrays = {"patient": np.array([0, 0, 1, 2, 3, 4]), "label": np.array([1, 1, 0, 0, 0, 0])}
  rest, _ = data.split(arrays, 0.9, stratify="label", groups="patient")
  assert sorted(rest.arrays["label"].tolist()) == [0, 1, 1]


@pytest.mark.parametrize(
  "arguments, field",
  [
    (dict(stratify="kind"), "stratify"),
    (dict(stratify="x"), "stratify"),
    (dict(groups="patient"), "groups"),
    # Each class is one group.
    (dict(stratify="label", groups="label"), "fraction"),
  ],
)
def test_entries_that_cannot_guide_a_split_raise(arguments, field):
  examples = data.Source({"x": np.arange(8.0), "label": np.arange(8) % 2}, classes=2)
  with pytest.raises(ValueError, match=rf"^{field}: expected"):
    data.split(examples, 0.5, **arguments)


def test_only_example_of_a_class_stays_in_training():
  """It was held out, so that the class was not trained on."""
  label = np.repeat([0, 1, 2], [20, 1, 2])
  rest, held_out = data.split(data.Source({"label": label}, classes=3), 0.9, stratify="label")
  assert np.bincount(rest.arrays["label"]).tolist() == [2, 1, 1]
  assert np.bincount(held_out.arrays["label"]).tolist() == [18, 0, 1]


def test_split_takes_a_dict_of_arrays():
  arrays = {"x": np.arange(50.0), "label": np.arange(50) % 2}
  parts = data.split(arrays, 0.3)
  assert [ids_of(p) for p in parts] == [ids_of(p) for p in data.split(data.Source(arrays), 0.3)]
  assert "label" not in data.unlabeled(arrays).arrays


@pytest.mark.parametrize(
  "call, field",
  [
    (lambda s: data.split(s.arrays["label"], s.arrays["label"]), "source"),
    (lambda s: data.split([s], 0.1), "source"),
    (lambda s: data.split(data.from_iterable([{"x": np.ones(4)}]), 0.1), "source"),
    (lambda s: data.split(s, "0.1"), "fraction"),
    (lambda s: data.label_fraction(s, s.arrays["label"]), "fraction"),
    (lambda s: data.label_fraction(dict(s.arrays), 0.1), "classes"),
    (lambda s: data.unlabeled(s.arrays["label"]), "source"),
    (lambda s: data.leave_out_classes(s, 5), "classes"),
    (lambda s: data.leave_out_classes(s, "1"), "classes"),
    (lambda s: data.leave_out_classes(s, ["1"]), "classes"),
  ],
)
def test_arguments_of_another_type_raise(call, field):
  with pytest.raises(ValueError, match=rf"^{field}: expected"):
    call(source(range(40)))
