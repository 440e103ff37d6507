"""Cuts clips of one length from videos: a clip is a function of (seed, example id, view).

The crops of `Videos`, for `stream.Stream` (training) and `stream.EvalStream` (evaluation). All
frames of a clip show the same part of their frames; uint8 becomes float32 in 0..1.
"""

from collections.abc import Sequence

import numpy as np

from distill_jax.data.checks import check_seed
from distill_jax.data.crops import Crop
from distill_jax.errors import check_integer

SHORT = ("error", "loop", "pad")


def random_clip(
  length: int,
  *,
  seed: int,
  strides: Sequence[int] = (1,),
  size: int | None = None,
  short: str = "error",
) -> Crop:
  """Returns a crop that samples a clip: first frame, stride and part of the frames are uniform.

  Args:
    length: number of frames of a clip.
    seed: from 0 to 2^32 - 1; the clip is sampled by (seed, example id, view).
    strides: distances between two frames of a clip to choose from; of a video that is too short
      for all of them, those that fit.
    size: side in pixels of the square that is cut; None: all of each frame.
    short: what happens to a video of fewer frames than `length`. 'error': it raises. 'loop': the
      frames are repeated from the first on. 'pad': zeros follow the last one, and the batch gets
      'image_valid', bool [B, length], for networks and terms that leave them out.

  Returns:
    `(video, example id, view) -> float32 [length, height, width, channels]`, or of a series
    [length, channels]; with 'pad' a mapping of the batch's entries.

  Raises:
    ValueError: an argument is out of its range; when called, a video that is too short or smaller
      than `size`, with its id.

  >>> video = np.arange(20, dtype=np.float32).reshape(20, 1)
  >>> crop = random_clip(4, seed=0, strides=(1, 2))
  >>> [crop(video, 7, view).ravel().astype(int).tolist() for view in range(2)]
  [[0, 2, 4, 6], [5, 7, 9, 11]]
  """
  check_seed(seed)
  _check_clip(length, strides, size, short)

  def crop(video, id, view):
    sequence = np.random.SeedSequence(seed, spawn_key=(id, view))
    rng = np.random.Generator(np.random.Philox(sequence))
    _check_length(video, length, min(strides), short, id)
    fitting = [stride for stride in strides if _span(length, stride) <= len(video)]
    stride = int(rng.choice(fitting or [min(strides)]))
    start = int(rng.integers(0, max(0, len(video) - _span(length, stride)) + 1))
    corner = (0, 0)
    if size is not None:
      _check_size(video, size, id)
      corner = tuple(rng.integers(0, np.array(video.shape[1:3]) - size + 1).tolist())
    return _cut(video, [(start, corner)], length, stride, size, short)

  return crop


def uniform_clips(
  length: int,
  *,
  clips: int = 5,
  crops: int = 1,
  stride: int = 1,
  size: int | None = None,
  short: str = "error",
) -> Crop:
  """Returns a crop of fixed views for evaluation: `clips` times `crops` of each video.

  Clips begin at equal distances, the first at the first frame and the last as late as it fits; a
  single one is the middle. The field's usual test of video networks has 3 crops of 5 or 10 clips;
  `models.average_views` averages the probabilities of the views.

  Args:
    length, short: as in `random_clip`.
    clips: number of clips along time.
    crops: 1, the central square of `size`; or 3, also those at both ends of the longer side.
    stride: distance between two frames of a clip.
    size: side in pixels of the square; None: all of each frame, for one crop.

  Returns:
    `(video, example id, view) -> float32 [clips * crops, length, height, width, channels]`; of one
    clip and crop without the first axis.

  Raises:
    ValueError: as in `random_clip`, and 3 crops without a size.

  >>> video = np.arange(20, dtype=np.float32).reshape(20, 1)
  >>> uniform_clips(4, clips=3)(video, 7, 0)[..., 0].astype(int).tolist()
  [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 19]]
  """
  _check_clip(length, (stride,), size, short)
  check_integer("clips", clips, 1)
  if crops not in (1, 3) or (crops == 3 and size is None):
    raise ValueError(
      f"crops: expected 1, or 3 with a size, got {crops} with size {size}: write size=, e.g. the "
      "shorter side of the frames"
    )

  def crop(video, id, view):
    _check_length(video, length, stride, short, id)
    last = max(0, len(video) - _span(length, stride))
    starts = [last // 2] if clips == 1 else np.linspace(0, last, clips).round().astype(int)
    corners = [(0, 0)]
    if size is not None:
      _check_size(video, size, id)
      corners = _corners(video.shape[1] - size, video.shape[2] - size, crops)
    views = [(int(start), corner) for start in starts for corner in corners]
    return _cut(video, views, length, stride, size, short)

  return crop


def _cut(
  video: np.ndarray,
  views: Sequence[tuple[int, tuple[int, int]]],
  length: int,
  stride: int,
  size: int | None,
  short: str,
):
  """Returns the clips at these (first frame, corner), or the one clip without an axis for it."""
  clips = []
  valid = []
  for start, (top, left) in views:
    numbers = start + stride * np.arange(length)
    valid.append(numbers < len(video))
    frames = video if size is None else video[:, top : top + size, left : left + size]
    clip = frames[numbers % len(video)]
    clip = clip.astype(np.float32) / (255 if clip.dtype == np.uint8 else 1)
    if short == "pad":
      clip[~valid[-1]] = 0
    clips.append(clip)
  image, image_valid = (x[0] if len(views) == 1 else np.stack(x) for x in (clips, valid))
  return {"image": image, "image_valid": image_valid} if short == "pad" else image


def _corners(free_rows: int, free_columns: int, crops: int) -> list[tuple[int, int]]:
  """Returns the corners of the central square, or of three along the longer side."""
  if crops == 1:
    return [(free_rows // 2, free_columns // 2)]
  if free_rows > free_columns:
    return [(row, free_columns // 2) for row in (0, free_rows // 2, free_rows)]
  return [(free_rows // 2, column) for column in (0, free_columns // 2, free_columns)]


def _span(length: int, stride: int) -> int:
  return stride * (length - 1) + 1


def _check_clip(length, strides, size, short) -> None:
  check_integer("length", length, 1)
  if not len(strides):
    raise ValueError("strides: expected at least one, got none: write strides=(1,)")
  for stride in strides:
    check_integer("strides", stride, 1)
  if size is not None:
    check_integer("size", size, 1)
  if short not in SHORT:
    raise ValueError(f"short: expected one of {SHORT}, got {short!r}")


def _check_length(video: np.ndarray, length: int, stride: int, short: str, id: int) -> None:
  least = _span(length, stride)
  if short == "error" and len(video) < least:
    raise ValueError(
      f"length: expected videos of at least {least} frames for {length} at stride {stride}, got "
      f"{len(video)} in example id {id}: leave it out, or write short='loop' or short='pad'"
    )


def _check_size(video: np.ndarray, size: int, id: int) -> None:
  if video.ndim != 4 or min(video.shape[1:3]) < size:
    raise ValueError(
      f"size: expected at most the sides of the frames, got {size} for {list(video.shape)} in "
      f"example id {id}: give a smaller size, or None for series"
    )
