"""Reads sound files of all formats of libsndfile, such as WAV, FLAC, OGG and MP3.

The packages `soundfile` and `soxr` are the extra `audio`.
"""

import os
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from distill_jax.errors import check_integer, naming_extras
from distill_jax.storage import folders

_STREAM = 0x7F000000
"""A program that writes to a pipe does not know the size, and writes one from here on."""
_LAST_BYTES = 2**17
"""More than a page of OGG has, and what may stand behind the last one."""
_UNKNOWN = 2**63 - 1
"""SF_COUNT_MAX, libsndfile's number of samples of FLAC that does not know it."""


class Audio(NamedTuple):
  """One channel of sound.

  Example in `read`.

  Attributes:
    samples: float32 [N], in -1..1 where the file holds integers; N > 0.
    rate: number of samples per second.
  """

  samples: np.ndarray
  rate: int


def read(path: str | os.PathLike, *, rate: int | None = None, average: bool = False) -> Audio:
  """Reads a file as one channel of float32.

  Integers of b bits are divided by 2^(b-1). Silence is read like any other sound.

  Truncated files raise where they tell their size: WAV, AIFF, AU, W64, RF64, FLAC, OGG, and MP3
  with a Xing or Info header, as LAME and ffmpeg write it. Of other files what is left is read. An
  MP3 without that header does not tell its length, either: libsndfile computes it from the first
  frame, and may leave out the end of a variable bit rate.

  Args:
    path: the file.
    rate: samples per second to resample to (`resample`); None: those of the file, as they are.
    average: whether several channels are averaged; they raise otherwise.

  Raises:
    ModuleNotFoundError: `soundfile` is not installed, or `soxr` where it is needed.
    FileNotFoundError: there is no such file.
    ValueError: the file is no sound, is empty or ends too early, does not tell its length (FLAC
      that was written to a pipe), has several channels, or a number that is not finite. The error
      names the file.

  >>> import pathlib, tempfile
  >>> import soundfile
  >>> path = pathlib.Path(tempfile.mkdtemp(), "silence.wav")
  >>> soundfile.write(path, np.zeros(80), 8000, subtype="PCM_24")
  >>> audio = read(path)
  >>> audio.samples.shape, audio.samples.dtype, audio.rate
  ((80,), dtype('float32'), 8000)
  """
  with naming_extras():
    import soundfile

  path = folders.resolve(path, "path")
  if not path.is_file():
    raise FileNotFoundError(f"path: expected a sound file, got none at {path}")
  _check_size(path)
  try:
    with soundfile.SoundFile(path) as file:
      if file.frames == _UNKNOWN:
        raise ValueError(
          f"path: expected a file that tells its length, got {path}, which a program wrote to a "
          "pipe: convert it to WAV"
        )
      samples = file.read(dtype="float32", always_2d=True)
      file_rate = file.samplerate
  except soundfile.LibsndfileError as error:
    raise ValueError(
      f"path: expected a whole sound file, got {path}, which cannot be read: {error.error_string}"
    ) from error
  samples = _one_channel(samples, path, average)
  if rate is not None:
    check_integer("rate", rate, 1)
    try:
      samples = resample(samples, file_rate, rate)
    except ValueError as error:
      raise ValueError(f"path: {path}: {error}") from error
  return Audio(samples, file_rate if rate is None else rate)


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
  """Resamples by soxr in its quality 'HQ', which leaves out what the new rate cannot hold.

  Args:
    samples: floats [N], N > 0.
    rate: samples per second.
    new_rate: samples per second of the result; an equal one returns the samples as they are.

  Returns:
    float32 [N * new_rate / rate], rounded.

  Raises:
    ModuleNotFoundError: `soxr` is not installed.
    ValueError: a rate is none; samples are no floats [N], not finite, or so few that none is left.

  >>> resample(np.zeros(160, np.float32), 16000, 8000).shape
  (80,)
  """
  check_integer("rate", rate, 1)
  check_integer("new_rate", new_rate, 1)
  samples = check_samples(samples).astype(np.float32, copy=False)
  if rate == new_rate:
    return samples
  with naming_extras():
    import soxr

  resampled = soxr.resample(samples, rate, new_rate)
  if not len(resampled):
    raise ValueError(
      f"samples: expected enough for one at {new_rate} Hz, got {len(samples)} at {rate} Hz: leave "
      "this clip out"
    )
  return resampled


def check_samples(samples: np.ndarray) -> np.ndarray:
  """Returns samples as an array, floats [N].

  Raises:
    ValueError: they have another shape or dtype, are none, or not finite.
  """
  samples = np.asarray(samples)
  if samples.ndim != 1 or not samples.size or samples.dtype.kind != "f":
    raise ValueError(
      f"samples: expected floats [N] of one channel, N > 0, got {samples.dtype} "
      f"{list(samples.shape)}: read files by audio.read"
    )
  if not np.isfinite(samples).all():
    raise ValueError("samples: expected finite numbers, got others: leave this clip out")
  return samples


def _one_channel(samples: np.ndarray, path: Path, average: bool) -> np.ndarray:
  """Returns the checked samples of a file, [N], from [N, channels]."""
  count, channels = samples.shape
  if not count:
    raise ValueError(f"path: expected samples, got none in {path}: leave this file out")
  invalid = ~np.isfinite(samples).all(1)
  if invalid.any():
    first = int(invalid.argmax())
    raise ValueError(
      f"path: expected finite samples, got {samples[first].tolist()} at sample {first} of {path}: "
      "write the file again, or leave it out"
    )
  if channels > 1 and not average:
    raise ValueError(
      f"path: expected one channel, got {channels} in {path}: write average=True to average them"
    )
  return samples.mean(1, dtype=np.float32) if channels > 1 else samples[:, 0]


def _check_size(path: Path) -> None:
  """Raises for a truncated file, of which libsndfile reads what is left."""
  size = path.stat().st_size
  with path.open("rb") as file:
    start = _tag_size(file.read(10))
    file.seek(start)
    header = file.read(64)
    file.seek(max(size - _LAST_BYTES, 0))
    end = file.read() if header[:4] == b"OggS" else None
  expected = start + _expected_size(header)
  if size < expected:
    expectation = f"{expected} bytes, got {size}"
  elif end is not None and not _ends_stream(end):
    expectation = "the last page of OGG, got none"
  else:
    return
  raise ValueError(
    f"path: expected {expectation} in {path}, which is truncated: copy it again, or leave it out"
  )


def _tag_size(header: bytes) -> int:
  """Returns the size of the ID3v2 tag in front of a sound; 0 without one."""
  if header[:3] != b"ID3":
    return 0
  return 10 + sum(byte << 7 * i for i, byte in enumerate(reversed(header[6:10])))


def _expected_size(header: bytes) -> int:
  """Returns the size of a whole file by its first bytes; 0 where they do not tell it."""

  def number(start: int, length: int = 4, order: Literal["big", "little"] = "big") -> int:
    value = int.from_bytes(header[start : start + length], order)
    return value if value < (_STREAM if length == 4 else 2**63) else 0

  match header[:4]:
    case b"RIFF":
      return 8 + number(4, order="little")
    case b"RIFX" | b"FORM":
      return 8 + number(4)
    case b"RF64":  # In the chunk ds64, which is the first one.
      return 8 + number(20, 8, "little")
    case b"riff":  # W64
      return number(16, 8, "little")
    case b".snd":
      return number(4) + number(8)
    case b"dns.":  # AU of a little-endian machine
      return number(4, order="little") + number(8, order="little")
  # In MP3's first frame: flags, the number of frames if they have 1, and of bytes if they have 2.
  xing = max(header.find(b"Xing"), header.find(b"Info"))
  if header[:1] == b"\xff" and xing > 0:
    flags = number(xing + 4)
    return number(xing + (12 if flags & 1 else 8)) if flags & 2 else 0
  return 0


def _ends_stream(end: bytes) -> bool:
  """Returns whether the last bytes of an OGG file have a whole page that ends the stream."""
  page = end[end.rfind(b"OggS") :]
  if len(page) < 27 or not page[5] & 4:
    return False
  header_size = 27 + page[26]
  return len(page) >= header_size + sum(page[27:header_size])
