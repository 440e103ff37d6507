import itertools

import numpy as np
import PIL.Image
import pytest
from scipy import stats

from distill_jax.data.crops import center_crop, crop_box, random_resized_crop


def boxes(height, width, n=2000, **ranges):
  rng = np.random.default_rng(0)
  return np.array([crop_box(height, width, rng, **ranges) for _ in range(n)]).T


def ramp(height, width):
  """Returns an image whose red is the column and whose green is the row."""
  rows, columns = np.mgrid[:height, :width]
  return PIL.Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 2), (37, 100), (200, 150)])
def test_boxes_are_inside_the_image_and_not_empty(size):
  left, top, right, bottom = boxes(*size, n=300)
  assert (
    (left >= 0).all()
    and (top >= 0).all()
    and (right <= size[1]).all()
    and (bottom <= size[0]).all()
  )
  assert (right > left).all() and (bottom > top).all()


def test_area_and_ratio_are_uniform():
  left, top, right, bottom = boxes(2000, 2000, area=(0.08, 0.5))
  width, height = right - left, bottom - top
  area = width * height / 2000**2
  assert stats.kstest(area, stats.uniform(0.08, 0.42).cdf).pvalue > 0.01
  low, high = np.log([3 / 4, 4 / 3])
  assert stats.kstest(np.log(width / height), stats.uniform(low, high - low).cdf).pvalue > 0.01
  assert abs(np.corrcoef(area, width / height)[0, 1]) < 0.06


def test_ratio_is_width_over_height():
  left, top, right, bottom = boxes(2000, 2000, n=50, area=(0.1, 0.1), ratio=(2, 2))
  assert (right - left == round(np.sqrt(0.2) * 2000)).all() and (
    bottom - top == round(np.sqrt(0.05) * 2000)
  ).all()


def test_position_is_uniform():
  left, top, right, bottom = boxes(2000, 2000, area=(0.1, 0.1), ratio=(1, 1))
  side = round(np.sqrt(0.1) * 2000)
  assert ((right - left) == side).all() and ((bottom - top) == side).all()
  for start in (left, top):
    assert stats.kstest(start, stats.uniform(0, 2000 - side).cdf).pvalue > 0.01
  tiny = boxes(3, 3, area=(1 / 9, 1 / 9), ratio=(1, 1))
  # Borders are among the positions.
  assert {(x, y) for x, y in tiny[:2].T} == set(itertools.product(range(3), repeat=2))


@pytest.mark.parametrize(
  ("size", "box"),
  [
    ((30, 300), (130, 0, 170, 30)),  # too wide: 4/3 of the height
    ((300, 30), (0, 130, 30, 170)),  # too high
  ],
)
def test_without_a_fitting_box_the_largest_central_one_is_taken(size, box):
  assert (boxes(*size, n=50, area=(0.9, 1.0)).T == box).all()


def test_view_is_a_function_of_seed_id_and_view():
  image, crop = ramp(90, 120), random_resized_crop(16, seed=3)
  np.testing.assert_array_equal(crop(image, 5, 1), random_resized_crop(16, seed=3)(image, 5, 1))
  others = [crop(image, 5, 1), crop(image, 1, 5), crop(image, 6, 1), crop(image, 5, 2)]
  others += [random_resized_crop(16, seed=4)(image, 5, 1)]
  assert all((a != b).any() for a, b in itertools.combinations(others, 2))


def test_crop_is_resized_from_its_box():
  crop = random_resized_crop(32, seed=0, area=(0.25, 0.25), ratio=(1, 1))(ramp(100, 100), 0, 0)
  assert crop.shape == (32, 32, 3) and crop.dtype == np.float32
  columns, rows = crop[16, :, 0] * 255, crop[:, 16, 1] * 255
  for values in (columns, rows):  # a ramp stays a ramp, 50 pixels in 32
    np.testing.assert_allclose(np.diff(values)[1:-1], 50 / 32, atol=0.75)


def test_center_crop_is_resize_to_256_crop_224():
  image = ramp(120, 200)
  crop = center_crop(224)(image, 0, 0)
  resized = image.resize((round(200 * 256 / 120), 256), PIL.Image.Resampling.BILINEAR)
  left, top = (resized.width - 224) // 2, 16
  expected = np.asarray(resized.crop((left, top, left + 224, top + 224))) / 255
  np.testing.assert_allclose(crop, expected, atol=2 / 255)


def test_gray_images_have_one_channel():
  image = ramp(10, 12).convert("L")
  assert (
    center_crop(8)(image, 0, 0).shape
    == random_resized_crop(8, seed=0)(image, 0, 0).shape
    == (8, 8, 1)
  )


@pytest.mark.parametrize(
  ("call", "field"),
  [
    (lambda: center_crop(0), "size"),
    (lambda: center_crop(8, fraction=0), "fraction"),
    (lambda: random_resized_crop(8.5, seed=0), "size"),
    (lambda: random_resized_crop(8, seed=-1), "seed"),
    (lambda: random_resized_crop(8, seed=0, area=(0.5, 1.5)), "area"),
    (lambda: random_resized_crop(8, seed=0, ratio=(2, 1)), "ratio"),
    (lambda: random_resized_crop(8, seed=0, ratio=(0, 1)), "ratio"),
  ],
)
def test_arguments_out_of_range_raise(call, field):
  with pytest.raises(ValueError, match=f"^{field}:"):
    call()
