import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from distill_jax.data.sets import digits


def test_splits_are_the_full_set_and_ids_its_rows():
  splits, original = digits.load(), load_digits()
  assert {name: len(part) for name, part in splits.items()} == {"train": 1438, "test": 359}
  ids = np.concatenate([part.arrays["id"] for part in splits.values()])
  np.testing.assert_array_equal(np.sort(ids), np.arange(1797))
  for part in splits.values():
    arrays = part.arrays
    assert arrays["image"].dtype == np.float32 and arrays["image"].shape[1:] == (8, 8, 1)
    np.testing.assert_array_equal(arrays["image"][..., 0] * 16, original.images[arrays["id"]])
    np.testing.assert_array_equal(arrays["label"], original.target[arrays["id"]])


def test_test_split_is_stratified():
  splits = digits.load()
  counts = {name: np.bincount(part.arrays["label"]) for name, part in splits.items()}
  fraction = counts["test"] / (counts["test"] + counts["train"])
  np.testing.assert_allclose(fraction, 0.2, atol=0.003)


def test_missing_scikit_learn_raises(monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
  with pytest.raises(ImportError, match="'train'"):
    digits.load()
