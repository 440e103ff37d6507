import numpy as np
import PIL.Image
import pytest

from distill_jax.data import UNLABELED
from distill_jax.data.sets import segmentation_folder

COLORS = np.array([[0, 0, 0], [200, 10, 10], [10, 200, 10], [255, 255, 255]], np.uint8)
CLASSES = {tuple(color): i for i, color in enumerate(COLORS[:3].tolist())} | {(255, 255, 255): 255}


def write(root, labels, images=None, mode="L", suffix=".png"):
  """Writes masks of class numbers and images; returns the images, uint8."""
  for folder in ("images/a", "masks/a"):
    (root / folder).mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  images = images or [rng.integers(0, 255, (*x.shape, 3), np.uint8) for x in labels]
  for i, (image, label) in enumerate(zip(images, labels)):
    PIL.Image.fromarray(image).save(root / f"images/a/{i}.png")
    mask = PIL.Image.fromarray(label)
    if mode == "P":
      mask.putpalette(np.resize(COLORS[::-1], (256, 3)).tobytes())
    elif mode == "RGB":
      mask = PIL.Image.fromarray(COLORS[np.where(label == 255, 3, label)])
    elif mode == "I;16":
      mask = PIL.Image.fromarray(label.astype(np.uint16))
    mask.save(root / f"masks/a/{i}{suffix}")
  return images


def some_labels(shape=(5, 6), count=3):
  rng = np.random.default_rng(1)
  return [rng.choice(np.array([0, 1, 2, 255], np.uint8), shape) for _ in range(count)]


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "I;16"])
def test_masks_of_each_mode_hold_the_same_classes(tmp_path, mode):
  labels = some_labels()
  images = write(tmp_path, labels, mode=mode)
  colors = CLASSES if mode == "RGB" else None
  source = segmentation_folder.load(tmp_path, class_names=["a", "b", "c"], colors=colors)
  assert source.classes == 3 and source.ignore_label == UNLABELED
  np.testing.assert_array_equal(source.arrays["image"], np.stack(images).astype(np.float32) / 255)
  expected = np.where(np.stack(labels) == 255, UNLABELED, np.stack(labels).astype(int))
  np.testing.assert_array_equal(source.arrays["label"], expected)
  assert segmentation_folder.load(tmp_path, colors=colors).class_names == ("0", "1", "2")


def test_smaller_images_are_padded_with_the_ignore_label(tmp_path):
  labels = [*some_labels((5, 6), 1), *some_labels((4, 8), 1)]
  write(tmp_path, labels)
  with pytest.raises(ValueError, match=r"1\.png: expected images of one size.*pad_to=\(5, 8\)"):
    segmentation_folder.load(tmp_path)
  with pytest.raises(ValueError, match=r"^pad_to: .*1\.png"):
    segmentation_folder.load(tmp_path, pad_to=(5, 7))
  arrays = segmentation_folder.load(tmp_path, pad_to=(5, 8)).arrays
  assert arrays["image"].shape == (2, 5, 8, 3)
  assert (arrays["label"][1, 4] == UNLABELED).all() and (arrays["image"][1, 4] == 0).all()
  assert (arrays["label"][0, :, 6:] == UNLABELED).all() and (arrays["image"][0, :, 6:] == 0).all()
  np.testing.assert_array_equal(arrays["label"][1, :4] == 1, labels[1] == 1)


def test_black_and_white_masks_raise_until_their_classes_are_given(tmp_path):
  labels = [np.where(label == 1, 255, 0).astype(np.uint8) for label in some_labels()]
  write(tmp_path, labels)
  with pytest.raises(ValueError, match=r"colors=\{0: 0, 255: 1\}"):
    segmentation_folder.load(tmp_path, classes=2)
  source = segmentation_folder.load(tmp_path, classes=2, colors={0: 0, 255: 1})
  np.testing.assert_array_equal(source.arrays["label"], np.stack(labels) // 255)


@pytest.mark.parametrize(
  "case, message",
  [
    ("colors", r"masks/a/0\.png: .*colors=\{\(0, 0, 0\): 0"),
    ("unknown color", r"masks/a/0\.png: expected the colors .*10, 200, 10"),
    ("float", r"masks/a/1\.tif: .*mode F"),
    ("jpeg", r"masks/a/1\.jpg: .*without loss"),
    ("class", r"masks/a/0\.png: expected classes 0 to 1, got 2"),
    ("size", r"masks/a/1\.png: expected a mask of 5 x 6 .*got 5 x 5"),
    ("no mask", r"images/a/1\.png: expected a file of this name in .*masks"),
    ("no image", r"masks/a/9\.png: expected a file of this name in .*images"),
    ("two masks", r"masks/a/1\.png: expected one file of this name, got 1\.bmp"),
    ("corrupt image", r"images/a/1\.png: expected an image"),
    ("corrupt mask", r"masks/a/1\.png: expected a mask"),
    ("turned", r"images/a/1\.jpg: .*EXIF orientation 6"),
    ("no folder", r"path: expected the folders images and masks"),
  ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, case, message):
  mode = "RGB" if "color" in case else "L"
  write(tmp_path, some_labels(), mode=mode)
  image, mask = tmp_path / "images/a/1.png", tmp_path / "masks/a/1.png"
  options = {}
  if case == "unknown color":
    options["colors"] = {color: i for color, i in CLASSES.items() if i != 2}
  elif case == "float":
    mask.unlink()
    PIL.Image.fromarray(np.zeros((5, 6), np.float32)).save(mask.with_suffix(".tif"))
  elif case == "jpeg":
    mask.rename(mask.with_suffix(".jpg"))
  elif case == "class":
    options["classes"] = 2
  elif case == "size":
    PIL.Image.fromarray(np.zeros((5, 5), np.uint8)).save(mask)
  elif case == "no mask":
    mask.unlink()
  elif case == "no image":
    mask.with_name("9.png").write_bytes(mask.read_bytes())
  elif case == "two masks":
    PIL.Image.fromarray(np.zeros((5, 6), np.uint8)).save(mask.with_suffix(".bmp"))
  elif case.startswith("corrupt"):
    (image if case.endswith("image") else mask).write_bytes(b"no image")
  elif case == "turned":
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.open(image).save(image.with_suffix(".jpg"), exif=exif)
    image.unlink()
  elif case == "no folder":
    (tmp_path / "masks").rename(tmp_path / "labels")
  error = FileNotFoundError if case == "no folder" else ValueError
  with pytest.raises(error, match=message):
    segmentation_folder.load(tmp_path, **options)
