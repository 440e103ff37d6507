"""Checks that sources are combined by stable ids, and rejected where they differ."""

import dataclasses

import numpy as np
import pytest

from distill_jax import data


def source(ids, value, **changes):
  ids = np.asarray(ids)
  arrays = {"id": ids, "x": np.full((len(ids), 2), value), "label": ids % 3}
  return data.Source(arrays, **(dict(classes=3, name="toy") | changes))


def test_concatenated_ids_do_not_depend_on_the_other_rows():
  ids = np.random.default_rng(0).permutation(100)[:30]
  real, pseudo = source(ids, 0.0), source(ids[::2], 1.0)
  both = data.concatenate([real, pseudo, pseudo.take([3])], name="three")
  assert len(both) == 46 and both.name == "three" and both.classes == 3
  by_id = dict(zip(both.ids.tolist(), both.arrays["x"][:, 0].tolist()))
  assert by_id[3 * ids[4]] == 0 and by_id[3 * ids[4] + 1] == 1 and by_id[3 * ids[6] + 2] == 1
  np.testing.assert_array_equal(both.arrays["label"], both.ids // 3 % 3)
  part = data.concatenate([real.take(slice(5)), pseudo.take(slice(5)), pseudo.take([3])])
  assert set(part.ids.tolist()) <= set(both.ids.tolist())
  with pytest.raises(ValueError, match="id"):
    data.concatenate([real, source([2**30], 0.0)])


def test_mixed_rows_follow_the_ids_and_the_fraction():
  ids = np.random.default_rng(0).permutation(3000)[:2000]
  real, pseudo = source(ids, 0.0), source(ids[::-1][:1500], 1.0)
  few, many = (data.mix_labels(real, pseudo, fraction, seed=4) for fraction in (0.2, 0.6))
  replaced = [set(mix.ids[mix.arrays["x"][:, 1] == 1].tolist()) for mix in (few, many)]
  assert replaced[0] < replaced[1] <= set(pseudo.ids.tolist())
  assert abs(len(replaced[0]) - 300) < 60 and abs(len(replaced[1]) - 900) < 80
  np.testing.assert_array_equal(few.ids, real.ids)
  np.testing.assert_array_equal(few.arrays["label"], real.arrays["label"])
  shuffled = data.mix_labels(real.take(slice(None, None, -1)), pseudo.take(slice(9, 1500)), 0.2, 4)
  some = set(shuffled.ids[shuffled.arrays["x"][:, 1] == 1].tolist())
  assert some == replaced[0] & set(pseudo.ids[9:].tolist())
  assert data.mix_labels(real, pseudo, 0.0).digest == real.digest
  full = data.mix_labels(real, source(ids, 1.0), 1.0)
  assert (full.arrays["x"] == 1).all() and (real.arrays["x"] == 0).all()
  assert data.mix_labels(real, pseudo, 0.2, seed=5).digest != few.digest


def test_marks_of_unlabeled_rows_are_kept():
  marked = source([0, 1], 1.0, ignore_label=data.UNLABELED)
  for combined in (
    data.mix_labels(source([0, 1], 0.0), marked, 1.0),
    data.concatenate([source([0, 1], 0.0), marked]),
  ):
    assert combined.ignore_label == data.UNLABELED


@pytest.mark.parametrize(
  ("field", "other"),
  [
    ("classes", source([0, 1], 1.0, classes=4)),
    ("class_names", source([0, 1], 1.0, class_names=("a", "b", "c"))),
    ("vocabulary", source([0, 1], 1.0, vocabulary="another")),
    ("x", data.Source({"x": np.ones((2, 3)), "label": np.arange(2)}, 3)),
    ("x", data.Source({"x": np.ones((2, 2), int), "label": np.arange(2)}, 3)),
    ("y", data.Source({"x": np.ones((2, 2)), "y": np.ones(2), "label": np.arange(2)}, 3)),
    ("x", data.Source({"label": np.arange(2)}, 3)),
  ],
)
def test_sources_that_differ_raise(field, other):
  first = source([0, 1], 0.0)
  with pytest.raises(ValueError, match=rf"\b{field}\b"):
    data.mix_labels(first, other, 0.5)
  with pytest.raises(ValueError, match=rf"\b{field}\b"):
    data.concatenate([first, first, other])


def test_wrong_arguments_raise():
  first = source([0, 1], 0.0)
  for fraction in (-0.1, 1.1, float("nan")):
    with pytest.raises(ValueError, match="^fraction"):
      data.mix_labels(first, first, fraction)
  with pytest.raises(ValueError, match="pseudo.* 7"):
    data.mix_labels(first, source([1, 7], 1.0), 0.5)
  with pytest.raises(ValueError, match="seed"):
    data.mix_labels(first, first, 0.5, seed=-1)
  for sources in ([first], first, []):
    with pytest.raises(ValueError, match="^sources"):
      data.concatenate(sources)
  grouped = dataclasses.replace(first, groups="label")
  with pytest.raises(ValueError, match="groups"):
    data.concatenate([first, grouped])
