import numpy as np
import PIL.Image
import pytest

from distill_jax import data
from distill_jax.data.mosaic import FILL, _resize, _Span

ROWS, BOXES, SIDES = 6, 3, (12, 8)


def a_source(rng, **options):
  """Each box has a class, and a channel of the images that is 1 in it."""
  low = 2 * rng.integers(0, 3, (ROWS, BOXES, 2))
  boxes = np.concatenate([low, low + 2 * rng.integers(1, 3, (ROWS, BOXES, 2))], -1)
  boxes = np.minimum(boxes, [8, 12, 8, 12]).astype(np.float32)
  label = np.arange(ROWS * BOXES).reshape(ROWS, BOXES)
  image = np.zeros((ROWS, *SIDES, ROWS * BOXES), np.float32)
  for row, column in np.ndindex(ROWS, BOXES):
    left, top, right, bottom = boxes[row, column].astype(int)
    image[row, top:bottom, left:right, label[row, column]] = 1
  boxes[0, 2], label[0, 2], image[0, ..., 2] = 0, -1, 0
  arrays = {"image": image, "boxes": boxes, "label": label} | options
  return data.Source(arrays, classes=ROWS * BOXES, ignore_label=-1)


@pytest.mark.parametrize("factor, min_visible", [(1, 0), (1, 0.5), (2, 0.3), (0.5, 0)])
def test_boxes_match_their_joined_masks(rng, factor, min_visible):
  source = a_source(rng)
  every, joined = (
    data.mosaic(source, 30, size=(16, 20), seed=0, scale=(factor, factor), min_visible=least)
    for least in (0, min_visible)
  )
  areas = source.arrays["image"].sum((0, 1, 2)) * factor**2
  compared = 0
  for row, image in enumerate(joined.arrays["image"]):
    visible = every.arrays["label"][row]
    if np.bincount(visible[visible >= 0], minlength=1).max() > 1:
      continue  # One image is there twice.
    found = dict(zip(joined.arrays["label"][row].tolist(), joined.arrays["boxes"][row]))
    is_mask = image > 0.5
    for c in range(ROWS * BOXES):
      rows, columns = np.nonzero(is_mask[..., c])
      if len(rows) == 0 or len(rows) < min_visible * areas[c]:
        assert c not in found
        continue
      extent = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
      np.testing.assert_array_equal(found[c], extent)
      compared += 1
  assert compared > 30


@pytest.mark.parametrize("target", [5, 9])
def test_parts_of_resized_images_match_the_whole(rng, target):
  image = rng.random((7, 7, 2), np.float32)
  whole = np.stack(
    [
      PIL.Image.fromarray(x).resize((target, target), PIL.Image.Resampling.BILINEAR)
      for x in np.ascontiguousarray(image.transpose(2, 0, 1))
    ],
    -1,
  )
  result = _resize(image, _Span(3, 7, 1, 7, target), _Span(0, target + 2, -1, 7, target))
  np.testing.assert_allclose(result[:, 1:-1], whole[1:5], atol=1e-6)
  np.testing.assert_allclose(result[:, [0, -1]], FILL, atol=1e-6)


def test_largest_boxes_stay(rng):
  source = a_source(rng, crowd=rng.random((ROWS, BOXES)) < 0.5)
  every = data.mosaic(source, 20, size=16, seed=0).arrays
  few = data.mosaic(source, 20, size=16, seed=0, max_boxes=4).arrays
  assert every["boxes"].shape == (20, 12, 4) and few["boxes"].shape == (20, 4, 4)
  crowd = np.take(source.arrays["crowd"], every["label"].clip(0)) & (every["label"] >= 0)
  np.testing.assert_array_equal(every["crowd"], crowd)
  for row in range(20):
    sizes = (every["boxes"][row, :, 2:] - every["boxes"][row, :, :2]).prod(-1)
    count = (every["label"][row] >= 0).sum()
    order = np.sort(np.argsort(-sizes, kind="stable")[: min(4, count)])
    for name in ("boxes", "label", "crowd"):
      np.testing.assert_array_equal(few[name][row, : len(order)], every[name][row][order])
    assert (few["label"][row, len(order) :] == -1).all()


def test_mosaics_are_functions_of_seed_and_id(rng):
  source = a_source(rng)
  one, more, other = (
    data.mosaic(source, count, size=16, seed=seed) for count, seed in ((3, 0), (5, 0), (3, 1))
  )
  for name, values in one.arrays.items():
    np.testing.assert_array_equal(values, more.arrays[name][:3])
  assert (one.arrays["image"] != other.arrays["image"]).any((1, 2, 3)).all()
  assert one.ids.tolist() == [0, 1, 2] and one.classes == source.classes
  assert one.name != other.name != source.name


@pytest.mark.parametrize(
  "arguments, field",
  [
    ({"count": 0}, "count"),
    ({"size": 3}, "size"),
    ({"size": (2, 8, 8)}, "size"),
    ({"seed": -1}, "seed"),
    ({"scale": (2, 1)}, "scale"),
    ({"max_boxes": 0}, "max_boxes"),
    ({"min_visible": 2}, "min_visible"),
  ],
)
def test_arguments_are_checked(rng, arguments, field):
  with pytest.raises(ValueError, match=rf"^{field}: expected"):
    data.mosaic(**({"source": a_source(rng), "count": 2, "size": 8, "seed": 0} | arguments))


def test_joined_boxes_of_unpadded_sources_are_padded(rng):
  arrays = {name: values[1:] for name, values in a_source(rng).arrays.items()}
  for classes in (ROWS * BOXES, None):
    joined = data.mosaic(data.Source(arrays, classes), 4, size=8, seed=0)
    assert joined.classes == classes and (joined.arrays["label"] == -1).any()


def test_sources_without_boxes_raise(rng):
  arrays = dict(a_source(rng).arrays)
  for wrong in (
    {"image": (arrays["image"] * 255).astype(np.uint8)},
    {"image": arrays["image"][..., 0]},
    {"label": arrays["label"][:, 0]},
    {"label": arrays["label"][:, :2]},
  ):
    source = data.Source(arrays | wrong, ROWS * BOXES, ignore_label=-1)
    with pytest.raises(ValueError, match=r"^source: expected"):
      data.mosaic(source, 2, size=8, seed=0)
  with pytest.raises(ValueError, match=r"^source: expected"):
    data.mosaic(arrays, 2, size=8, seed=0)
