import os

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import pytest
from pictures import encoded, noise, png_of_16_bits, write_classes

from distill_jax import data
from distill_jax.data.images import BadImageError
from distill_jax.data.sets import folder


def test_class_per_folder_and_ids_in_path_order(tmp_path):
  pixels = write_classes(tmp_path / "set", {"dog": 2, "cat": 3})
  source = folder.load(tmp_path / "set")
  assert source.class_names == ("cat", "dog") and source.name == "set"
  assert source.arrays["id"].tolist() == [0, 1, 2, 3, 4]
  assert source.arrays["label"].tolist() == [0, 0, 0, 1, 1]
  expected = np.stack([pixels[path] for path in sorted(pixels)]) / 255
  np.testing.assert_allclose(source.arrays["image"], expected, rtol=1e-6)
  assert source.arrays["image"].dtype == np.float32


def test_hidden_and_other_files_are_ignored(tmp_path):
  write_classes(tmp_path, {"a": 1, "b": 1, ".git": 1, "b/.cache": 2})
  (tmp_path / "a" / "Thumbs.db").write_bytes(b"x")
  (tmp_path / "a" / "._0.png").write_bytes(b"x")
  (tmp_path / "readme.png").write_bytes(b"x")
  source = folder.load(tmp_path)
  assert source.class_names == ("a", "b") and len(source) == 2


def test_images_at_any_depth(tmp_path):
  write_classes(tmp_path, {"a": 1, "b/x/y": 2})
  assert folder.load(tmp_path).arrays["label"].tolist() == [0, 1, 1]


def test_class_names_order_the_classes(tmp_path):
  write_classes(tmp_path, {"a": 1, "b": 1})
  source = folder.load(tmp_path, class_names=("b", "a"))
  assert source.class_names == ("b", "a") and source.arrays["label"].tolist() == [1, 0]
  with pytest.raises(ValueError, match=r"^class_names: .*'c'.*'b'"):
    folder.load(tmp_path, class_names=("a", "c"))


def test_missing_folders_and_images_raise(tmp_path):
  (tmp_path / "pictures").mkdir()
  with pytest.raises(FileNotFoundError, match=r"^path: .*pictures"):
    folder.load(tmp_path / "picture")
  with pytest.raises(ValueError, match=r"^path:"):
    folder.load(tmp_path / "pictures")
  write_classes(tmp_path / "pictures", {"full": 1})
  (tmp_path / "pictures" / "empty").mkdir()
  with pytest.raises(ValueError, match=r"^path: .*empty"):
    folder.load(tmp_path / "pictures")


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    (encoded(noise(0, 64, 64, 3))[:2000], "truncated"),
    (encoded(noise(0, 64, 64, 3), "JPEG")[:1000], "truncated"),
    (b"", "cannot identify"),
    # Pillow would hand it to Ghostscript.
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
    (encoded(noise(0, 65, 64, 3)), "max_pixels"),
    (encoded(noise(0, 8, 8).astype(np.uint16)), "8 bits"),
    (png_of_16_bits(color_type=2, channels=3), "8 bits"),
    (png_of_16_bits(color_type=4, channels=2), "8 bits"),
    (png_of_16_bits(color_type=6, channels=4), "8 bits"),
    (b"P6 2 2 65535\n" + b"\x12\x34" * 12, "8 bits"),
    (b"P3 2 2 1000\n" + b"900 " * 12, "8 bits"),
  ],
)
def test_bad_files_are_left_out_below_the_limit(tmp_path, content, reason):
  write_classes(tmp_path, {"a": 5, "b": 5})
  (tmp_path / "a" / "2.png").write_bytes(content)
  with pytest.warns(UserWarning, match=f"1 of 10 .* id 2: .*{reason}"):
    source = folder.load(tmp_path, max_bad=0.1, max_pixels=4096)
  assert source.arrays["id"].tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]
  with pytest.raises(BadImageError, match=f"1 of 10 .*{reason}.*max_bad"):
    folder.load(tmp_path, max_bad=0.09, max_pixels=4096)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", [0, *range(1, 9), 77])
def test_images_are_turned_upright(tmp_path, format, orientation):
  image = PIL.Image.fromarray(np.kron(noise(0, 2, 3, 3), np.ones((8, 8, 1), np.uint8)))
  exif = PIL.Image.Exif()
  exif[PIL.ExifTags.Base.Orientation] = orientation
  (tmp_path / "a").mkdir()
  file = tmp_path / "a" / f"0.{format.lower()}"
  image.save(file, exif=exif)
  with PIL.Image.open(file) as stored:
    expected = np.asarray(PIL.ImageOps.exif_transpose(stored).convert("RGB"))
  assert expected.shape[0] == (24 if orientation in (5, 6, 7, 8) else 16)
  found = folder.load(tmp_path).arrays["image"][0]
  np.testing.assert_allclose(found, expected / 255, atol=1e-6)


def test_what_is_no_file_is_rejected_before_it_is_opened(tmp_path):
  write_classes(tmp_path, {"a": 1})
  pipe = tmp_path / "a" / "x.jpg"
  os.mkfifo(pipe)
  with pytest.raises(ValueError, match=r"^path: .*x\.jpg"):
    folder.load(tmp_path)
  pipe.unlink()
  pipe.symlink_to(tmp_path / "absent.jpg")
  with pytest.raises(ValueError, match=r"^path: .*x\.jpg"):
    folder.load(tmp_path)


def test_links_to_folders_in_a_class_are_rejected(tmp_path):
  write_classes(tmp_path, {"a": 1, "b": 1})
  link = tmp_path / "a" / "again"
  link.symlink_to(tmp_path / "b")
  with pytest.raises(ValueError, match="^path: .*a/again"):
    folder.images(tmp_path)
  link.unlink()
  assert len(folder.images(tmp_path)) == 2
  (tmp_path / "loop").symlink_to(tmp_path)
  with pytest.raises(ValueError, match="^path: .*loop"):
    folder.images(tmp_path)


def test_names_that_are_no_utf8_belong_to_the_identity(tmp_path):
  write_classes(tmp_path, {"a": 1})
  file = next((tmp_path / "a").iterdir())
  file.rename(os.fsdecode(os.fsencode(file.parent) + b"/\xff.png"))
  one = folder.images(tmp_path).digest
  next((tmp_path / "a").iterdir()).rename(os.fsdecode(os.fsencode(file.parent) + b"/\xfe.png"))
  assert folder.images(tmp_path).digest != one


def test_flipped_bit_in_a_png_is_bad(tmp_path):
  write_classes(tmp_path, {"a": 4})
  file = tmp_path / "a" / "1.png"
  content = bytearray(file.read_bytes())
  content[60] ^= 4
  file.write_bytes(content)
  with pytest.warns(UserWarning, match="1 of 4 .* id 1"):
    assert len(folder.load(tmp_path, max_bad=0.5)) == 3


def test_decompression_bomb_is_not_decoded(tmp_path):
  write_classes(tmp_path, {"a": 1})
  bomb = encoded(np.zeros((9000, 9000), bool))
  assert len(bomb) < 100_000
  (tmp_path / "a" / "0.png").write_bytes(bomb)
  with pytest.raises(BadImageError, match="max_pixels"):
    folder.load(tmp_path)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_8_bit_modes_become_rgb_or_gray(tmp_path, mode):
  (tmp_path / "a").mkdir()
  image = PIL.Image.fromarray(noise(0, 6, 8, 3)).convert(mode)
  image.save(tmp_path / "a" / "0.tiff")
  rgb, gray = (folder.load(tmp_path, channels=channels).arrays["image"][0] for channels in (3, 1))
  np.testing.assert_allclose(rgb, np.asarray(image.convert("RGB")) / 255, atol=1e-6)
  np.testing.assert_allclose(gray[..., 0], np.asarray(image.convert("L")) / 255, atol=1e-6)


def test_images_of_many_sizes_need_a_size(tmp_path):
  write_classes(tmp_path, {"a": 1})
  wide = np.zeros((8, 16, 3), np.uint8)
  wide[:, 4:12] = 200  # the central square
  (tmp_path / "a" / "1.png").write_bytes(encoded(wide))
  with pytest.raises(ValueError, match=r"^size: .*8 x 16 .*id 1 .*6 x 8 .*id 0"):
    folder.load(tmp_path)
  image = folder.load(tmp_path, size=4).arrays["image"]
  assert image.shape == (2, 4, 4, 3)
  np.testing.assert_allclose(image[1, 1:3, 1:3], 200 / 255, rtol=1e-6)


def test_arguments_out_of_range_raise(tmp_path):
  write_classes(tmp_path, {"a": 1})
  with pytest.raises(ValueError, match=r"^channels:"):
    folder.load(tmp_path, channels=4)
  with pytest.raises(ValueError, match=r"^max_bad:"):
    folder.load(tmp_path, max_bad=1)


def test_split_of_encoded_images_matches_decoded_ones(tmp_path):
  write_classes(tmp_path, {"a": 20, "b": 20})
  parts = data.split(folder.images(tmp_path), 0.3), data.split(folder.load(tmp_path), 0.3)
  for undecoded, decoded in zip(*parts):
    np.testing.assert_array_equal(undecoded.ids, decoded.ids)
    np.testing.assert_array_equal(undecoded.load().arrays["image"], decoded.arrays["image"])


def test_bad_images_are_counted_for_each_subset(tmp_path):
  write_classes(tmp_path, {"a": 4})
  (tmp_path / "a" / "0.png").write_bytes(b"")
  full = folder.images(tmp_path, max_bad=0.5)
  assert [image is None for image, _ in full.decode(full.ids)] == [True, False, False, False]
  assert list(full.bad) == [0] and full.take([0, 1]).bad == {}


def test_content_differs_between_folders(tmp_path):
  write_classes(tmp_path, {"a": 2, "b": 1})
  contents = [folder.images(tmp_path).content, folder.images(tmp_path).content]
  contents.append(folder.images(tmp_path, class_names=("b", "a")).content)
  (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "2.png")
  contents.append(folder.images(tmp_path).content)
  (tmp_path / "a" / "2.png").write_bytes(encoded(noise(9, 5, 5, 3)))
  contents.append(folder.images(tmp_path).content)
  assert contents[0] == contents[1] and len(set(contents)) == 4
