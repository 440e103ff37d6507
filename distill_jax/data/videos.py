"""Holds videos, or series of measurements, of different lengths: clips are cut while training."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from distill_jax.data.checks import check_values
from distill_jax.data.crops import Crop
from distill_jax.data.images import Images
from distill_jax.data.source import Source


@dataclasses.dataclass(frozen=True, eq=False)
class Videos:
  """Videos in memory with stable ids and labels, for `data.split`, `stream.Stream` and caches.

  Attributes:
    frames: one array per video, [frames, height, width, channels], uint8 of 0 to 255 or floats of
      about 0 to 1; or series of measurements, floats [steps, channels]. Lengths may differ, and
      heights and widths where the crop has a size.
    examples: a `Source` of the same rows without images: ids, labels, and what `data.split` groups
      by, such as the number of a person.
    content: a hash of all frames of the full set; computed, and kept by a subset.
    shape: largest size of the full set along each axis; computed, and kept by a subset.

  Raises:
    ValueError: there are fewer or more videos than examples, one is no array of these kinds or has
      no frame, another number of axes or channels than the first or a number that is not finite.

  >>> frames = [np.zeros((length, 8, 8, 1), np.uint8) for length in (9, 12)]
  >>> videos = Videos(frames, Source({"label": np.array([0, 1])}, classes=2, name="motion"))
  >>> len(videos), videos.shape
  (2, (12, 8, 8, 1))
  """

  frames: Sequence[np.ndarray] = dataclasses.field(repr=False)
  examples: Source
  content: str = ""
  shape: tuple[int, ...] = ()

  def __post_init__(self):
    if len(self.frames) != len(self.examples):
      raise ValueError(
        f"frames: expected a video for each of the {len(self.examples)} examples, got "
        f"{len(self.frames)}"
      )
    if self.content:
      return  # Of a checked set.
    frames = [np.asarray(video) for video in self.frames]
    digest = hashlib.blake2b(digest_size=16)
    for row, video in enumerate(frames):
      _check_video(video, frames[0], self.ids, row)
      digest.update(f"{video.shape} {video.dtype}\n".encode())
      digest.update(np.ascontiguousarray(video).reshape(-1).view(np.uint8).data)
    self._set("frames", frames)
    self._set("content", digest.hexdigest())
    self._set("shape", tuple(np.max([video.shape for video in frames], axis=0).tolist()))

  def __len__(self) -> int:
    return len(self.examples)

  @property
  def ids(self) -> np.ndarray:
    """The examples' ids, int32 [N]."""
    return self.examples.ids

  @property
  def classes(self) -> int | None:
    """The number of classes; None: the labels are no class numbers."""
    return self.examples.classes

  @property
  def class_names(self) -> tuple[str, ...]:
    """One name per class."""
    return self.examples.class_names

  @property
  def name(self) -> str:
    """What the ids index."""
    return self.examples.name

  @property
  def digest(self) -> str:
    """A value that is equal for the same videos and labels only."""
    return f"{self.content}:{self.examples.digest}"

  @property
  def bad(self) -> dict[int, str]:
    """Empty: all videos are decoded; see `Images.bad`."""
    return {}

  def take(self, rows: Any) -> "Videos":
    """Returns the videos at these rows (indices, a mask or a slice) with their ids."""
    numbers = np.arange(len(self))[rows]
    frames = [self.frames[number] for number in numbers]
    return dataclasses.replace(self, frames=frames, examples=self.examples.take(rows))

  def integers(self, argument: str, name: str) -> np.ndarray:
    """Returns an entry of integers [N] of the examples; see `Source.integers`."""
    return self.examples.integers(argument, name)

  def decode(self, ids: Sequence[int]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Iterates over (video, its other entries) of these ids, all of the set."""
    arrays = {name: values for name, values in self.examples.arrays.items() if name != "id"}
    for id in ids:
      row = self._rows[int(id)]
      yield self.frames[row], {name: values[row] for name, values in arrays.items()}

  def check_crop(self, crop: Crop) -> None:
    """Checks that a crop takes the shortest, lowest and narrowest video, before training.

    Raises:
      ValueError: it does not; the crops of `clips` name the example.
    """
    sizes = np.array([video.shape[:-1] for video in self.frames])
    for row in set(sizes.argmin(axis=0).tolist()):
      crop(self.frames[row], int(self.ids[row]), 0)

  @functools.cached_property
  def _rows(self) -> dict[int, int]:
    """The row of each id."""
    return {id: row for row, id in enumerate(self.ids.tolist())}

  def _set(self, field: str, value: Any) -> None:
    # The class is frozen for all other callers.
    object.__setattr__(self, field, value)


Streamed = Images | Videos
"""Examples that a `stream.Stream` crops while training."""


def _check_video(video: np.ndarray, first: np.ndarray, ids: np.ndarray, row: int) -> None:
  is_series = video.ndim == 2 and np.issubdtype(video.dtype, np.floating)
  is_video = video.ndim == 4 and (
    video.dtype == np.uint8 or np.issubdtype(video.dtype, np.floating)
  )
  if not (is_series or is_video) or 0 in video.shape:
    raise ValueError(
      "frames: expected videos, uint8 or floats [frames, height, width, channels], or series, "
      f"floats [steps, channels], got {video.dtype} {list(video.shape)} in example id {ids[row]}"
    )
  if video.ndim != first.ndim or video.shape[-1] != first.shape[-1]:
    raise ValueError(
      f"frames: expected {first.ndim} axes and {first.shape[-1]} channels last, as in example id "
      f"{ids[0]}, got {list(video.shape)} in example id {ids[row]}"
    )
  check_values("frames", video[None], ids[row : row + 1])
