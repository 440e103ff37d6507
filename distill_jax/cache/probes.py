"""Builds artificial examples, and reduces what a function returns for them to a few numbers."""

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import PIL.Image

from distill_jax.data.videos import Streamed, Videos
from distill_jax.types import Batch, input_names

NUM_PROBES = 32


def probe_batch(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns random examples, a row for each probe, with the inputs of arrays [N, ...] and labels 0.

  Augmentation may move label maps.
  """
  numbers = np.arange(NUM_PROBES, dtype=np.int32)
  batch = {"id": numbers, "view": numbers}
  for name in sorted(input_names(arrays)):
    # By name, so that the values do not depend on the other entries.
    rng = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    shape = (NUM_PROBES, *arrays[name].shape[1:])
    dtype = arrays[name].dtype
    # uint8 is a pixel; other integers may be tokens of a vocabulary of any size.
    high = 256 if dtype == np.uint8 else 2
    is_floating = np.issubdtype(dtype, np.floating)
    values = rng.random(shape) if is_floating else rng.integers(0, high, shape)
    batch[name] = values.astype(dtype)
  label_shape = arrays["label"].shape[1:] if "label" in arrays else ()
  label_dtype = arrays["label"].dtype if "label" in arrays else np.int32
  return {**batch, "label": np.zeros((NUM_PROBES, *label_shape), label_dtype)}


def probe_of(source: Streamed) -> Any:
  """Returns an image, or a video of the set's largest size, of random pixels, for a crop to cut."""
  rng = np.random.Generator(np.random.Philox(1))
  if isinstance(source, Videos):
    return rng.random(source.shape, np.float32)
  pixels = rng.integers(0, 256, (48, 64, source.channels), np.uint8)
  return PIL.Image.fromarray(pixels if source.channels == 3 else pixels[..., 0])


def row_sums(batch: Batch, names: Iterable[str], rows: int) -> list[float]:
  """Returns one weighted sum per row of these entries, by their values and order."""
  sums = np.zeros(rows)
  for name in sorted(names):
    values = np.asarray(jax.device_get(batch[name]), np.float64).reshape(rows, -1)
    values = np.where(np.isfinite(values), values, 0)
    sums += values @ np.cos(np.arange(values.shape[1])) / np.sqrt(values.shape[1])
  return [round(float(x), 4) for x in sums]


def same_sums(a: list[float], b: list[float]) -> bool:
  """Returns whether sums are equal but for rounding, which differs from device to device."""
  return len(a) == len(b) and bool(np.allclose(a, b, rtol=1e-3, atol=1e-3))


def same_output_sums(a: list[float], b: list[float]) -> bool:
  """Returns whether sums of a network's outputs agree; low precision differs between devices."""
  atol = 0.03 * max(map(abs, a), default=0)
  return len(a) == len(b) and bool(np.allclose(a, b, rtol=0.03, atol=atol))
