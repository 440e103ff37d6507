import numpy as np
import pytest

from distill_jax.data.image_checks import check_images


def check(image, read=("image",), name="image"):
  check_images({name: image}, lambda: read)


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 8, 8), (2, 64)])
def test_uint8_images_raise(shape):
  """They trained at a loss of 49, without a word."""
  image = np.full(shape, 200, np.uint8)
  with pytest.raises(ValueError, match=r"^source: image: expected floats, got uint8"):
    check(image)
  check(image, read=("pixels",))
  check((image / 255).astype(np.float32))


@pytest.mark.parametrize(
  "name, shape, dtype",
  [
    ("image", (2, 8, 8, 3), np.int32),
    ("image", (2, 48), np.int64),
    ("x", (2, 8, 8), np.uint16),
    ("x", (2, 8, 8, 3), np.int16),
    ("pixels", (2, 48), np.uint8),
    ("video", (2, 3, 8, 8, 3), np.uint8),
  ],
)
def test_integer_pixels_raise(name, shape, dtype):
  """They trained at a loss of 5,000, without a word."""
  image = np.full(shape, 200, dtype)
  with pytest.raises(ValueError, match=rf"^source: {name}: expected floats, got .*/ 255"):
    check(image, (name,), name)
  check(image, ("tokens",), name)
  check((image / 255).astype(np.float32), (name,), name)


def test_flat_bytes_warn_unless_they_are_tokens():
  values = np.full((2, 48), 200, np.uint8)
  with pytest.warns(UserWarning, match=r"^source: x: expected floats"):
    check(values, ("x",), "x")
  check(values, ("byte_tokens",), "byte_tokens")
  check(values.astype(np.int32), ("input_ids",), "input_ids")
  check(np.full((2, 3, 48), 200, np.int32), ("choices",), "choices")
  check(np.full((2, 2), 336, np.int32), ("image_sizes",), "image_sizes")
  check(np.ones((2, 8, 8, 4), np.int32), ("board",), "board")


def test_large_floats_warn():
  image = np.linspace(0, 255, 2 * 8 * 8, dtype=np.float32).reshape(2, 8, 8, 1)
  with pytest.warns(UserWarning, match=r"image: .*got 0 to 255: write image / 255"):
    check(image)
  # Standardized pixels, and the model's own features.
  check((image - 128) / 64)
  check(image.reshape(2, -1), read=("features",), name="features")


@pytest.mark.parametrize(
  "shape, axis",
  [
    ((2, 1, 8, 8), 1),
    ((2, 3, 8, 8), 1),
    ((2, 1, 4, 8, 8), 1),  # A thin volume.
    ((2, 4, 3, 8, 8), 2),  # A clip.
  ],
)
def test_channels_first_warn(shape, axis):
  image = np.zeros(shape, np.float32)
  with pytest.warns(UserWarning, match=rf"channels last.*np.moveaxis\(image, {axis}, -1\)"):
    check(image)
  check(np.moveaxis(image, axis, -1))
  check(np.zeros((2, 3, 3, 3), np.float32))


@pytest.mark.parametrize("shape", [(2, 8, 6, 1), (2, 8, 6, 4, 1)])
def test_label_maps_of_other_axes_raise(shape):
  """A student at stride 4 was trained on them: its logits were resized to their grid."""
  image = np.zeros(shape, np.float32)
  label = np.zeros(shape[:-1], np.int32)

  def check_with(label, read=("image",)):
    check_images({"image": image, "label": label}, lambda: read)

  with pytest.raises(ValueError, match=r"^source: label: expected the axes of image, "):
    check_with(label.swapaxes(1, 2))
  check_with(label)
  check_with(label[:, ::2, ::2])
  check_with(label.swapaxes(1, 2), read=("other",))
