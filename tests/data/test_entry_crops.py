import itertools

import jax
import numpy as np
import PIL.Image
import pytest

from distill_jax import data
from distill_jax.data import UNLABELED

KINDS = {"image": "image", "label": "label_map"}
ROWS = 12


def augment(batch, *transforms, seed=0, entries=KINDS):
  return jax.jit(data.augmentation(*transforms, seed=seed, entries=entries))(batch)


def a_batch(rng, *sides, channels=2, dtype=np.int32):
  return {
    "image": rng.random((ROWS, *sides, channels), np.float32),
    "label": rng.integers(3, 7, (ROWS, *sides)).astype(dtype),
    "id": np.arange(ROWS),
    "view": np.zeros(ROWS, np.int32),
  }


def window(values, start, sides, fill):
  """Pads by slices: the part of `values` at `start`, which may be negative, and `fill` around."""
  result = np.full((*sides, *values.shape[len(sides) :]), fill, values.dtype)
  ranges = [
    (max(0, first), min(length, first + side))
    for first, side, length in zip(start, sides, values.shape)
  ]
  source = tuple(slice(low, high) for low, high in ranges)
  target = tuple(slice(low - first, high - first) for (low, high), first in zip(ranges, start))
  result[target] = values[source]
  return result


def matching_starts(image, label, crop, sides, fill, void, atol=0.0):
  """Returns where the crop, (image, label), may start in an image and its label map."""
  rooms = [length - side for length, side in zip(label.shape, sides)]
  starts = itertools.product(*(range(min(0, room), max(0, room) + 1) for room in rooms))
  return [
    start
    for start in starts
    if np.array_equal(crop[1], window(label, start, sides, void))
    and np.allclose(crop[0], window(image, start, sides, fill), rtol=0, atol=atol)
  ]


@pytest.mark.parametrize(
  "sides, source",
  [
    ((4, 8), (5, 6)),
    ((2, 4, 6), (3, 5, 4)),
  ],
)
def test_random_crop_matches_slices(rng, sides, source):
  batch = a_batch(rng, *source)
  view = augment(batch, data.random_crop(sides, fill=0.5))
  assert view["label"].dtype == np.int32
  found = set()
  for image, label, *crop in zip(batch["image"], batch["label"], view["image"], view["label"]):
    (start,) = matching_starts(image, label, crop, sides, 0.5, UNLABELED)
    found.add(start)
  assert len(found) > 3


def test_resized_crops_match_pillow(rng):
  """Pillow's BILINEAR filter has antialiasing too; a label map takes its nearest pixel.

  Odd sides: the center of a new pixel is never on the border of two old ones.
  """
  batch = a_batch(rng, 7, 5, dtype=np.uint8)
  size = (4, 9)
  view = augment(batch, data.random_crop(size, scale=(0.5, 1.5), fill=0.25))
  factors = np.linspace(0.5, 1.5, 101)
  sources = sorted({(round(f * 7), round(f * 5)) for f in factors})
  found = []
  for row in range(ROWS):
    for source in sources:
      image = resize_by_pillow(batch["image"][row], source)
      label = resize_by_pillow(batch["label"][row], source)
      crop = (view["image"][row], view["label"][row])
      starts = matching_starts(image, label, crop, size, 0.25, 255, atol=1e-6)
      found += [(row, source) for _ in starts]
  # Each row is a window of one of these sizes, at one place.
  assert [row for row, _ in found] == list(range(ROWS))
  assert len({source for _, source in found}) > 3


def resize_by_pillow(values, size):
  if values.ndim == 3:
    return np.stack([resize_by_pillow(x, size) for x in np.moveaxis(values, -1, 0)], -1)
  is_label = values.dtype == np.uint8
  method = PIL.Image.NEAREST if is_label else PIL.Image.BILINEAR
  return np.asarray(PIL.Image.fromarray(values).resize(size[::-1], method))


def test_factors_are_uniform_in_their_range():
  batch = {"image": np.ones((400, 20, 20), np.float32), "id": np.arange(400)}
  crop = data.random_crop(40, scale=(0.5, 2.0))
  view = augment(batch | {"view": np.zeros(400, int)}, crop, entries=None)["image"]
  sides = np.sqrt(np.asarray(view).sum((1, 2)))
  assert sides.min() < 11 and sides.max() > 39
  assert abs(sides.mean() - 25) < 2 and abs(np.std(sides) - 30 / 12**0.5) < 1


def test_center_crop_matches_slices(rng):
  """The odd pixel is cut, or added, at the end."""
  batch = a_batch(rng, 7, 1)
  view = augment(batch, data.center_crop((4, 4)))
  for row in range(ROWS):
    for name, fill in (("image", 0), ("label", UNLABELED)):
      expected = window(batch[name][row], (1, -1), (4, 4), fill)
      np.testing.assert_array_equal(view[name][row], expected)


def test_maps_of_another_size_and_boxes_move_alike():
  """A label map has no class that lies between two others."""
  image = np.zeros((ROWS, 6, 6), np.float32)
  image[:, 2:5, 1:4] = 1
  boxes = np.array([[1, 2, 4, 5], [0, 0, 0, 0]], np.float32)
  batch = {
    "image": image,
    "label": np.kron(np.where(image, 9, 2), np.ones((2, 2))).astype(np.uint8),
    "boxes": np.repeat(boxes[None], ROWS, 0),
    "id": np.arange(ROWS),
    "view": np.zeros(ROWS, int),
  }
  kinds = KINDS | {"boxes": "boxes"}
  view = augment(batch, data.random_crop(5, scale=(0.5, 1.5)), entries=kinds)
  assert view["image"].shape == (ROWS, 5, 5) and view["label"].shape == (ROWS, 10, 10)
  assert set(np.unique(view["label"])) == {2, 9, 255}
  np.testing.assert_array_equal(view["boxes"][:, 1], 0)
  for label, box in zip(np.asarray(view["label"]), np.asarray(view["boxes"])[:, 0]):
    left, top, right, bottom = 2 * box
    rows, columns = np.nonzero(label == 9)
    if len(rows):
      edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
      np.testing.assert_allclose(edges, (left, top, right, bottom), atol=0.5 + 1e-5)
    else:
      assert (right - left) * (bottom - top) < 1


@pytest.mark.parametrize(
  "transform, factor, least",
  [
    (data.flip(), 1, 0),
    (data.rotate90(), 1, 0),
    (data.shift_crop(5, min_visible=0.4), 1, 0.4),
    (data.center_crop(4, min_visible=0), 1, 0),
    (data.random_crop(3, scale=(0.5, 0.5), min_visible=0.4), 0.5, 0.4),
    (data.random_crop(13, scale=(2, 2), min_visible=1), 2, 1),
  ],
)
def test_boxes_match_their_moved_masks(rng, transform, factor, least):
  """A box is the extent of its mask after the change, or zeros where too little is visible."""
  low = 2 * rng.integers(0, 3, (ROWS, 5, 2))
  high = low + 2 * rng.integers(1, 3, (ROWS, 5, 2))
  boxes = np.minimum(np.concatenate([low, high], -1), 8).astype(np.float32)
  boxes[:, 0] = 0
  masks = np.zeros((ROWS, 8, 8, 5), np.float32)
  for row, column in itertools.product(range(ROWS), range(1, 5)):
    left, top, right, bottom = boxes[row, column].astype(int)
    masks[row, top:bottom, left:right, column] = 1
  batch = {"image": masks, "boxes": boxes, "id": np.arange(ROWS), "view": np.ones(ROWS, int)}
  kinds = {"image": "image", "boxes": "boxes"}
  function = jax.jit(data.augmentation(transform, seed=0, entries=kinds))
  view = jax.device_get(function(batch))
  expected = np.zeros_like(boxes)
  for row, column in itertools.product(range(ROWS), range(1, 5)):
    rows, columns = np.nonzero(view["image"][row, :, :, column] > 0.5)
    if len(rows) and len(rows) >= least * factor**2 * masks[row, :, :, column].sum():
      extent = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
      expected[row, column] = extent
  np.testing.assert_array_equal(view["boxes"], expected)
  # A view does not depend on the other rows of its batch, as of a cache.
  reversed_view = function({name: values[::-1] for name, values in batch.items()})
  np.testing.assert_array_equal(reversed_view["boxes"][::-1], expected)


def test_views_of_crops_match_golden_values():
  """Other windows would pair cached teacher outputs with views that the student never sees."""
  image = np.arange(25, dtype=np.float32).reshape(1, 5, 5, 1)
  batch = {
    "image": np.repeat(image, 6, 0),
    "id": np.array([0, 1, 2, 0, 0, 9]),
    "view": np.array([0, 0, 0, 1, 2, 5]),
  }
  corners = augment(batch, data.random_crop(2), seed=3, entries=None)["image"][:, 0, 0, 0]
  assert corners.tolist() == [2.0, 6.0, 12.0, 13.0, 10.0, 5.0]


def test_slices_of_a_volume_change_like_images(rng):
  """Height and width change; the slices, or the frames of a clip, keep their order."""
  volume = a_batch(rng, 3, 4, 4)
  slices = {
    "image": volume["image"].transpose(0, 2, 3, 1, 4).reshape(ROWS, 4, 4, 6),
    "label": volume["label"][:, 1],
  }
  transforms = (data.flip(), data.flip(up_down=True), data.rotate90(), data.shift_crop(1))
  result = augment(volume, *transforms)
  expected = augment(volume | slices, *transforms)
  image = np.asarray(expected["image"]).reshape(ROWS, 4, 4, 3, 2).transpose(0, 3, 1, 2, 4)
  np.testing.assert_array_equal(result["image"], image)
  np.testing.assert_array_equal(result["label"][:, 1], expected["label"])
  assert (np.asarray(result["image"]) != volume["image"]).any()


@pytest.mark.parametrize(
  "kinds, changed, field",
  [
    (KINDS, {"label": np.zeros((ROWS, 4, 4), int)}, "label"),
    (KINDS | {"boxes": "boxes"}, {"boxes": np.zeros((ROWS, 1, 4), np.float32)}, "boxes"),
    (KINDS | {"depth": "image"}, {"depth": np.zeros((ROWS, 4, 4, 1), np.float32)}, "depth"),
    (None, {}, "entries"),
    (KINDS, {"label": np.zeros((ROWS, 6, 4, 4), int)}, "entries"),
  ],
)
def test_entries_next_to_volumes_are_checked(rng, kinds, changed, field):
  batch = a_batch(rng, 3, 4, 4) | changed
  with pytest.raises(ValueError, match=rf"^{field}: expected"):
    jax.eval_shape(data.augmentation(data.random_crop(2), seed=0, entries=kinds), batch)


def test_cutmix_of_volumes_raises(rng):
  batch = a_batch(rng, 3, 4, 4)
  with pytest.raises(ValueError, match=r"^image: expected"):
    data.cutmix(1.0, None, entries=KINDS)(None, batch)


@pytest.mark.parametrize(
  "arguments, field",
  [
    ({"size": 0}, "size"),
    ({"size": (4,)}, "size"),
    ({"size": 4.0}, "size"),
    ({"size": (4, 4.5)}, "size"),
    ({"size": 4, "scale": (2.0, 0.5)}, "scale"),
    ({"size": 4, "scale": (0.0, 1.0)}, "scale"),
    ({"size": 4, "scale": 0.5}, "scale"),
  ],
)
def test_arguments_of_random_crop_are_checked(arguments, field):
  with pytest.raises(ValueError, match=rf"^{field}: expected"):
    data.random_crop(**arguments)


@pytest.mark.parametrize("min_visible", [-0.1, 1.1, float("nan"), None])
@pytest.mark.parametrize("crop", [data.shift_crop, data.random_crop, data.center_crop])
def test_visible_part_is_checked(crop, min_visible):
  with pytest.raises(ValueError, match=r"^min_visible: expected"):
    crop(4, min_visible=min_visible)


def test_crops_that_do_not_fit_the_images_raise(rng):
  batch = a_batch(rng, 4, 4)
  for transform, field in (
    (data.random_crop((2, 4, 4)), "size"),
    (data.random_crop(2, scale=(0.5, 1.0)), "random_crop"),
  ):
    integers = batch | {"image": np.zeros((ROWS, 4, 4, 3), np.uint8)}
    with pytest.raises(ValueError, match=rf"^{field}: expected"):
      jax.eval_shape(data.augmentation(transform, seed=0, entries=KINDS), integers)


def test_own_crop_of_one_kind_raises(rng):
  def crop_image(key, values, kind, size):
    return values[:2, :2] if kind == "image" else values

  with pytest.raises(ValueError, match=r"^transforms: expected .*crop_image"):
    jax.eval_shape(data.augmentation(crop_image, seed=0, entries=KINDS), a_batch(rng, 4, 4))
