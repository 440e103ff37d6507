"""Encoded images that are read and decoded when they are needed: of many sizes, or more than memory holds."""

import dataclasses
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image

from distill_jax.data.checks import check_labels
from distill_jax.data.crops import center_crop, pixels
from distill_jax.data.source import Source

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "La", "RGBa"}
CHUNK = 64


class BadImageError(ValueError):
  """More images of a set cannot be decoded than its limit allows."""


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
  """Encoded images with stable ids; `data.split` splits them, `data.Stream` makes batches of them.

  An image that is truncated, damaged, of a format other than `FORMATS`, with more than 8 bits per channel or
  larger than `max_pixels` is bad: counted in `bad` and left out, up to a limit.

  Attributes:
    read: `ids -> [(encoded image, label), ...]`; called from several threads.
    ids: int [N], rows in the full named set, unique; a subset keeps them.
    classes: number of classes.
    class_names: one name per class; '0', '1', ... if not given.
    name: what the ids index.
    content: what tells this set from another of the same name, e.g. a hash of its files.
    channels: 3 (RGB) or 1 (gray); every image is converted.
    max_pixels: height times width at most; protects against small files that decode to gigabytes.
    max_bad: the share of the images that may be bad.
    bad: id -> what is wrong with it, for those met so far.
  """

  read: Callable[[Sequence[int]], Sequence[tuple[bytes, int]]] = dataclasses.field(repr=False)
  ids: np.ndarray = dataclasses.field(repr=False)
  classes: int
  class_names: tuple[str, ...] = dataclasses.field(default=(), repr=False)
  name: str = "custom"
  content: str = ""
  channels: int = 3
  max_pixels: int = 50_000_000
  max_bad: float = 0.01
  bad: dict[int, str] = dataclasses.field(default_factory=dict, repr=False)

  def __post_init__(self):
    if self.channels not in (1, 3):
      raise ValueError(f"{self.name}: channels must be 3 (RGB) or 1 (gray), got {self.channels}")
    if not 0 <= self.max_bad < 1:
      raise ValueError(
        f"{self.name}: max_bad must be a share from 0 to less than 1, got {self.max_bad}"
      )
    # A Source knows what ids, classes and their names must be.
    checked = Source(
      {"id": self.ids, "label": np.zeros(len(self.ids), int)},
      self.classes,
      self.class_names,
      self.name,
    )
    object.__setattr__(self, "ids", checked.arrays["id"])
    object.__setattr__(self, "class_names", checked.class_names)

  def __len__(self) -> int:
    return len(self.ids)

  def take(self, rows) -> "Images":
    """The images at these rows (numbers, a mask or a slice), with the ids they have here."""
    return dataclasses.replace(self, ids=self.ids[rows], bad={})

  def decoded(self, ids: Sequence[int]) -> Iterator[tuple[PIL.Image.Image | None, int]]:
    """Images and labels; None for an image that is bad.

    Raises:
      BadImageError: more images are bad than `max_bad` allows.
      ValueError: a label is not a class.
    """
    examples = self.read(ids)
    check_labels(np.array([label for _, label in examples]), self.classes, ids)
    for id, (encoded, label) in zip(ids, examples, strict=True):
      try:
        yield decode(encoded, self.channels, self.max_pixels), label
      except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        self._count(int(id), error)
        yield None, label

  def load(self, size: int | None = None) -> Source:
    """All images in memory, float32 [N, height, width, channels] in 0..1; bad ones are left out.

    Args:
      size: None: the images have one size. Otherwise each one's central square is resized to this side.

    Raises:
      BadImageError: more images are bad than `max_bad` allows, or all are.
      ValueError: images differ in size, or do not fit in memory.
    """
    ids: list[int] = []
    labels: list[int] = []
    images: np.ndarray | None = None
    for id, label, image in self._pixels(size):
      if images is None:
        images = self._room(image.shape)
      elif image.shape != images.shape[1:]:
        raise ValueError(
          f"{self.name}: image {id} is {_size(image)} and image {ids[0]} is {_size(images[0])}: to load them into "
          "one array choose a size, e.g. size=64, or train on a data.Stream of random crops"
        )
      images[len(ids)] = image
      ids.append(id)
      labels.append(label)
    assert images is not None  # if all were bad, max_bad < 1 has raised
    if self.bad:
      warnings.warn(self.summary(), stacklevel=2)
    arrays = {"id": np.array(ids), "image": images[: len(ids)], "label": np.array(labels)}
    return Source(arrays, self.classes, self.class_names, self.name)

  def _pixels(self, size: int | None) -> Iterator[tuple[int, int, np.ndarray]]:
    """(id, label, float32 image) in order, decoded by all cores."""
    crop = None if size is None else center_crop(size, share=1.0)

    def some(ids):
      decoded = zip(ids, self.decoded(ids))
      good = ((id, image, label) for id, (image, label) in decoded if image is not None)
      return [
        (id, label, pixels(image) if crop is None else crop(image, id, 0))
        for id, image, label in good
      ]

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
      for examples in pool.map(
        some, (self.ids[i : i + CHUNK].tolist() for i in range(0, len(self), CHUNK))
      ):
        yield from examples
    finally:
      pool.shutdown(cancel_futures=True)

  def _room(self, shape) -> np.ndarray:
    try:
      return np.empty((len(self), *shape), np.float32)
    except MemoryError as error:
      size = len(self) * np.prod(shape) * 4 / 2**30
      raise ValueError(
        f"{self.name}: {len(self)} images of {shape[0]} x {shape[1]} take {size:.0f} GiB, more than there is: train "
        "on a data.Stream"
      ) from error

  def summary(self) -> str:
    """How many images were bad, and what is wrong with the first."""
    id, reason = next(iter(sorted(self.bad.items())), (None, ""))
    first = f"; id {id}: {reason}" if self.bad else ""
    return f"{self.name}: {len(self.bad)} of {len(self)} images cannot be used{first}"

  def _count(self, id: int, error: Exception) -> None:
    self.bad[id] = f"{error}" or type(error).__name__
    if len(self.bad) > self.max_bad * len(self):
      raise BadImageError(
        f"{self.summary()}. More than max_bad={self.max_bad:g} of them allows"
      ) from error


def decode(encoded: bytes, channels: int, max_pixels: int) -> PIL.Image.Image:
  """An RGB (3 channels) or gray (1) image; the first frame of an animation.

  Raises:
    ValueError: it is larger than `max_pixels`, or has more than 8 bits per channel.
    Exception: whatever Pillow raises where the bytes are no image, truncated or damaged.
  """
  with PIL.Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
    width, height = image.size
    if width * height > max_pixels:
      raise ValueError(f"{width} x {height} pixels are more than max_pixels {max_pixels}")
    if image.mode not in MODES:
      raise ValueError(f"Pillow mode {image.mode!r} has more than 8 bits per channel")
    return image.convert("RGB" if channels == 3 else "L")


def _size(image) -> str:
  return f"{image.shape[0]} x {image.shape[1]}"
