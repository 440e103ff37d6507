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


def test_large_floats_warn():
  image = np.linspace(0, 255, 2 * 8 * 8, dtype=np.float32).reshape(2, 8, 8, 1)
  with pytest.warns(UserWarning, match=r"image: .*got 0 to 255: write image / 255"):
    check(image)
  # Standardized pixels, and the model's own features.
  check((image - 128) / 64)
  check(image.reshape(2, -1), read=("features",), name="features")


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_first_warn(channels):
  image = np.zeros((2, channels, 8, 8), np.float32)
  with pytest.warns(UserWarning, match=r"channels last.*np.moveaxis\(image, 1, -1\)"):
    check(image)
  check(np.moveaxis(image, 1, -1))
  check(np.zeros((2, 3, 3, 3), np.float32))
