"""Reads and decodes encoded images on demand: images of many sizes, or more than memory holds."""

import dataclasses
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageFile

from distill_jax.data.crops import center_crop, pixels
from distill_jax.data.label_checks import check_labels
from distill_jax.data.source import Source
from distill_jax.errors import check_integer

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "La", "RGBa"}
CHUNK = 64
# The EXIF entry for the orientation -> what makes the image upright.
_TURNS = {
  2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
  3: PIL.Image.Transpose.ROTATE_180,
  4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
  5: PIL.Image.Transpose.TRANSPOSE,
  6: PIL.Image.Transpose.ROTATE_270,
  7: PIL.Image.Transpose.TRANSVERSE,
  8: PIL.Image.Transpose.ROTATE_90,
}


class BadImageError(ValueError):
  """Raised where more images of a set cannot be decoded than `Images.max_bad` allows."""


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
  """Encoded images with stable ids and class numbers, for `data.split` and `stream.Stream`.

  An image is bad if it is truncated, corrupt, of a format other than `FORMATS`, with more than 8
  bits per channel or larger than `max_pixels`. Bad images are counted in `bad` and left out, up to
  a limit.

  Attributes:
    read: `ids -> [(encoded image, label), ...]`; called from several threads. A label is a class
      number; a number or an array, with `classes` None; or a mapping of several entries,
      `{'label': 1, 'depth': 0.5}`, of which `classes` are those of 'label'.
    ids: int32 [N], rows in the full named set, unique; a subset keeps them.
    classes: number of classes of 'label'; None: it is no class number.
    class_names: one name per class, by default '0', '1', ...
    name: what the ids index.
    content: a value that differs between two sets of the same name, e.g. a hash of the files.
    channels: 3 (RGB) or 1 (gray); every image is converted.
    max_pixels: largest height times width; protects against small files that decode to gigabytes.
    max_bad: largest fraction of bad images, from 0 to less than 1.
    bad: id -> reason, for the bad images read so far.

  Raises:
    ValueError: a field is out of its range; ids or class names are not as in `Source`.
  """

  read: Callable[[Sequence[int]], Sequence[tuple[bytes, Any]]] = dataclasses.field(repr=False)
  ids: np.ndarray = dataclasses.field(repr=False)
  classes: int | None
  class_names: tuple[str, ...] = dataclasses.field(default=(), repr=False)
  name: str = "custom"
  content: str = ""
  channels: int = 3
  max_pixels: int = 50_000_000
  max_bad: float = 0.01
  bad: dict[int, str] = dataclasses.field(default_factory=dict, repr=False)

  def __post_init__(self):
    if self.channels not in (1, 3):
      raise ValueError(f"channels: expected 3 (RGB) or 1 (gray), got {self.channels}")
    if not 0 <= self.max_bad < 1:
      raise ValueError(f"max_bad: expected a fraction in [0, 1), got {self.max_bad}")
    if self.classes is not None:
      check_integer("classes", self.classes, 1)
    # A Source checks ids and class names.
    source = Source(
      {"id": self.ids, "label": np.zeros(len(self.ids), int)},
      self.classes,
      self.class_names,
      self.name,
    )
    object.__setattr__(self, "ids", source.arrays["id"])
    object.__setattr__(self, "class_names", source.class_names)

  def __len__(self) -> int:
    return len(self.ids)

  @property
  def digest(self) -> str:
    """A value that is equal for the same images of a set of this name."""
    ids = hashlib.blake2b(self.ids.tobytes(), digest_size=8).hexdigest()
    return f"{self.content}:{ids}"

  def take(self, rows: Any) -> "Images":
    """Returns the images at these rows (indices, a mask or a slice) with their ids."""
    return dataclasses.replace(self, ids=self.ids[rows], bad={})

  def decode(
    self, ids: Sequence[int]
  ) -> Iterator[tuple[PIL.Image.Image | None, dict[str, np.ndarray]]]:
    """Iterates over (image, labels by entry) of these ids; the image is None if it is bad.

    Raises:
      BadImageError: more images are bad than `max_bad` allows.
      ValueError: a label is not a class.
    """
    read = zip(ids, self.read(ids), strict=True)
    examples = [(encoded, self._labels(id, label)) for id, (encoded, label) in read]
    for id, (encoded, labels) in zip(ids, examples, strict=True):
      try:
        yield decode_image(encoded, self.channels, self.max_pixels), labels
      # Pillow's decoders raise nearly any exception on corrupt files.
      except Exception as error:
        self._count_bad(int(id), error)
        yield None, labels

  def _labels(self, id: int, label: Any) -> dict[str, np.ndarray]:
    """Returns an example's labels by entry, int32 or float32, checked."""
    entries = label if isinstance(label, Mapping) else {"label": label}
    taken = sorted(entries.keys() & {"id", "image", "view", "where"})
    if taken:
      raise ValueError(f"read: expected labels under other names, got {taken[0]!r}: rename it")
    labels = {name: np.asarray(values) for name, values in entries.items()}
    if self.classes is not None and "label" in labels:
      check_labels(labels["label"][None], self.classes, [id])
    return {
      name: x.astype(np.float32 if np.issubdtype(x.dtype, np.floating) else np.int32)
      for name, x in labels.items()
    }

  def load(self, size: int | None = None) -> Source:
    """Returns the good images in a `Source`, float32 [N, height, width, channels] in 0..1.

    Args:
      size: side in pixels to which each central square is resized; None: the images have one size.

    Raises:
      BadImageError: more images are bad than `max_bad` allows, or all are.
      ValueError: images differ in size, or do not fit in memory.
    """
    ids: list[int] = []
    labels: list[dict[str, np.ndarray]] = []
    images: np.ndarray | None = None
    for id, entries, image in self._pixels(size):
      if images is None:
        images = self._allocate(image.shape)
      elif image.shape != images.shape[1:]:
        raise ValueError(
          f"size: expected images of one size in {self.name}, got {_size(image)} for id {id} and "
          f"{_size(images[0])} for id {ids[0]}: give size=, e.g. 64, or train on a "
          "data.stream.Stream of random crops"
        )
      images[len(ids)] = image
      ids.append(id)
      labels.append(entries)
    # If all were bad, max_bad < 1 has raised.
    assert images is not None
    if self.bad:
      warnings.warn(self.summary(), stacklevel=2)
    arrays = {"id": np.array(ids), "image": images[: len(ids)]}
    for name in labels[0]:
      arrays[name] = np.stack([entries[name] for entries in labels])
    return Source(arrays, self.classes, self.class_names, self.name)

  def summary(self) -> str:
    """Returns how many images were bad, and why the first one was."""
    first = ""
    if self.bad:
      id, reason = min(self.bad.items())
      first = f"; id {id}: {reason}"
    return f"{self.name}: {len(self.bad)} of {len(self)} images cannot be used{first}"

  def _pixels(self, size: int | None) -> Iterator[tuple[int, dict[str, np.ndarray], np.ndarray]]:
    """Iterates over (id, labels, float32 image) in order, decoded on all cores."""
    crop = None if size is None else center_crop(size, fraction=1.0)

    def decode_chunk(ids: list[int]) -> list[tuple[int, dict[str, np.ndarray], np.ndarray]]:
      decoded = zip(ids, self.decode(ids))
      good = ((id, image, label) for id, (image, label) in decoded if image is not None)
      return [
        (id, label, pixels(image) if crop is None else crop(image, id, 0))
        for id, image, label in good
      ]

    chunks = (self.ids[i : i + CHUNK].tolist() for i in range(0, len(self), CHUNK))
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
      for examples in pool.map(decode_chunk, chunks):
        yield from examples
    finally:
      pool.shutdown(cancel_futures=True)

  def _allocate(self, shape: tuple[int, ...]) -> np.ndarray:
    try:
      return np.empty((len(self), *shape), np.float32)
    except MemoryError as error:
      gib = len(self) * np.prod(shape) * 4 / 2**30
      raise ValueError(
        f"size: expected images that fit in memory, got {len(self)} of {shape[0]} x {shape[1]} in "
        f"{self.name}, {gib:.0f} GiB: give a smaller size, or train on a data.stream.Stream"
      ) from error

  def _count_bad(self, id: int, error: Exception) -> None:
    self.bad[id] = f"{error}" or type(error).__name__
    if len(self.bad) > self.max_bad * len(self):
      raise BadImageError(
        f"{self.summary()}. That is more than max_bad={self.max_bad:g} allows"
      ) from error


def decode_image(encoded: bytes, channels: int, max_pixels: int) -> PIL.Image.Image:
  """Returns an RGB (3 channels) or gray (1) image; the first frame of an animation.

  It is turned upright as its EXIF entry asks.

  Raises:
    ValueError: the image is larger than `max_pixels`, or has more than 8 bits per channel.
    Exception: any that Pillow raises where the bytes are no image, truncated or corrupt.
  """
  with PIL.Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
    width, height = image.size
    if width * height > max_pixels:
      raise ValueError(f"max_pixels: expected at most {max_pixels}, got {width} x {height}")
    if image.mode not in MODES or _has_16_bits(image):
      raise ValueError(f"expected at most 8 bits per channel, got more in mode {image.mode!r}")
    converted = image.convert("RGB" if channels == 3 else "L")
    # Once it is decoded: a PNG's entries may follow its pixels, and a TIFF is upright by then.
    turn = _TURNS.get(_orientation(image))
    return converted if turn is None else converted.transpose(turn)


def _has_16_bits(image: PIL.ImageFile.ImageFile) -> bool:
  """Returns whether Pillow would cut the channels to 8 bits without a word."""
  # A PNG or TIFF names the layout of its pixels ("RGB;16B"), a PPM the largest value.
  if image.format not in ("PNG", "TIFF", "PPM"):
    return False
  # Not yet decoded: the tiles say how.
  layouts = [tile[3] if isinstance(tile[3], tuple) else (tile[3],) for tile in image.tile]
  values = [value for layout in layouts for value in layout]
  return any(";16" in value for value in values if isinstance(value, str)) or (
    image.format == "PPM" and any(value > 255 for value in values if isinstance(value, int))
  )


def orientation(encoded: bytes) -> int:
  """Returns the EXIF entry for the orientation; 1: the image is stored upright."""
  with PIL.Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
    return _orientation(image)


def _orientation(image: PIL.Image.Image) -> int:
  try:
    return image.getexif().get(PIL.ExifTags.Base.Orientation, 1)
  except Exception:  # Its pixels may be valid all the same.
    return 1


def _size(image: np.ndarray) -> str:
  return f"{image.shape[0]} x {image.shape[1]}"
