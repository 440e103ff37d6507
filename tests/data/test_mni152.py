"""Tests the MNI152 template's slabs on a small copy of nilearn's files, and its NIfTI reader."""

import gzip
import importlib

import numpy as np
import pytest
from brain_files import install, nifti

from distill_jax.data.sets import mni152


@pytest.fixture
def package(tmp_path, monkeypatch):
  return install(tmp_path, monkeypatch)


def test_slabs_alternate_with_gaps(package):
  sets = mni152.load()
  assert {name: len(source) for name, source in sets.items()} == {
    "train": 100,
    "validation": 16,
    "test": 24,
  }
  held_out = np.concatenate([sets["validation"].ids, sets["test"].ids])
  assert len(set(held_out)) == 40
  distances = np.abs(held_out[:, None] - sets["train"].ids)
  assert distances.min() == mni152.GAP + 1
  between = np.abs(sets["validation"].ids[:, None] - sets["test"].ids)
  assert between.min() > mni152.TRAINING
  # The position in the brain is the image's value, and both numbers of a slice lead to it.
  for source in sets.values():
    assert source.groups == "slab"
    np.testing.assert_allclose(source.arrays["image"][:, 5, 7, 0] * 255, source.ids, rtol=1e-6)
    slabs = source.arrays["slab"]
    start = 28 + slabs // 2 * 36 + 24 * (slabs % 2)
    np.testing.assert_array_equal(start + source.arrays["slice"], source.ids)


def test_classes_are_the_most_probable_ones_with_the_head_upright(package):
  label = mni152.load()["test"].arrays["label"]
  assert label.shape == (24, 160, 144)
  expected = np.zeros((160, 144), int)
  left = 98 - mni152.COLUMNS.start
  expected[160 - 80 :, :left] = 1
  expected[160 - 150 : 160 - 79, :left] = 2
  np.testing.assert_array_equal(label[0], expected)


def test_missing_package_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ImportError, match="pip install --no-deps nilearn"):
    mni152.load()


VOLUME = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def test_nifti_volume_is_read_in_its_axis_order(tmp_path):
  for path, content in (
    (tmp_path / "a.nii", nifti(VOLUME)),
    (tmp_path / "a.nii.gz", gzip.compress(nifti(VOLUME))),
  ):
    path.write_bytes(content)
    np.testing.assert_array_equal(mni152.read_nifti(path), VOLUME)


@pytest.mark.parametrize(
  "content, words",
  [
    (b"", "a.nii: expected a NIfTI-1 file"),
    (nifti(VOLUME, magic=b"ni1\0"), "a.nii: expected a NIfTI-1 file"),
    (nifti(VOLUME, datatype=16), "a.nii: .*type 16"),
    (nifti(VOLUME[0]), "a.nii: .* on 2"),
    (nifti(VOLUME)[:-1], "a.nii is corrupt: .*24 voxels.* 23"),
    (gzip.compress(nifti(VOLUME), mtime=0)[:-9], "a.nii is corrupt"),
  ],
)
def test_other_files_raise(content, words, tmp_path):
  (tmp_path / "a.nii").write_bytes(content)
  with pytest.raises(ValueError, match=f"^{words}"):
    mni152.read_nifti(tmp_path / "a.nii")


def test_volume_of_another_shape_raises(package):
  (package / mni152._FILE.format("gm")).write_bytes(nifti(VOLUME))
  with pytest.raises(ValueError, match=r"_gm_.*\(197, 233, 189\), got \(2, 3, 4\)"):
    mni152.load()
