"""Small image files and source files for the tests of data that is read from disk."""

import gzip
import io
import struct
import zlib

import numpy as np
import PIL.Image


def encoded(pixels, format="PNG", **options):
  file = io.BytesIO()
  PIL.Image.fromarray(pixels).save(file, format, **options)
  return file.getvalue()


def png_of_16_bits(color_type, channels):
  """Returns a PNG of 2 x 2 pixels, which Pillow reads but does not write."""

  def chunk(name, content):
    size, checksum = struct.pack(">I", len(content)), zlib.crc32(name + content)
    return size + name + content + struct.pack(">I", checksum)

  header = struct.pack(">IIBBBBB", 2, 2, 16, color_type, 0, 0, 0)
  rows = zlib.compress((b"\0" + b"\x12\x34" * 2 * channels) * 2)
  chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + chunks


def noise(seed, *shape):
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def idx(array):
  """Returns an array in MNIST's format: magic number, dtype, rank, shape, values."""
  return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, train=12, test=5):
  """Writes two gzipped files per split; returns {split: (images, labels)}."""
  folder.mkdir(exist_ok=True)
  arrays = {}
  for split, prefix, n in (("train", "train", train), ("test", "t10k", test)):
    images, labels = noise(n, n, 28, 28), (np.arange(n) % 10).astype(np.uint8)
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    arrays[split] = images, labels
  return arrays


def write_classes(root, counts, size=(6, 8)):
  """Writes a subfolder of PNG files per class; returns {relative path: pixels}."""
  pixels = {}
  for name, count in counts.items():
    (root / name).mkdir(parents=True)
    for i in range(count):
      pixels[f"{name}/{i}.png"] = noise(len(pixels), *size, 3)
      (root / name / f"{i}.png").write_bytes(encoded(pixels[f"{name}/{i}.png"]))
  return pixels
