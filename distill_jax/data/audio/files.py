"""Reads sound files of all formats of libsndfile, such as WAV, FLAC, OGG and MP3.

The packages `soundfile` and `soxr` are the extra `audio`.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill_jax.errors import check_integer, naming_extras
from distill_jax.storage import folders

_STREAM = 0x7FFF0000
"""A program that writes to a pipe does not know the size, and writes one from here on."""


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

  Args:
    path: the file.
    rate: samples per second to resample to (`resample`); None: those of the file, as they are.
    average: whether several channels are averaged; they raise otherwise.

  Raises:
    ModuleNotFoundError: `soundfile` is not installed, or `soxr` where it is needed.
    FileNotFoundError: there is no such file.
    ValueError: the file is no sound, is empty or ends too early, has several channels, or a number
      that is not finite. The error names the file.

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
    samples, file_rate = soundfile.read(path, dtype="float32", always_2d=True)
  except soundfile.LibsndfileError as error:
    raise ValueError(
      f"path: expected a whole sound file, got {path}, which cannot be read: {error.error_string}"
    ) from error
  samples = _one_channel(samples, path, average)
  if rate is not None:
    samples = resample(samples, file_rate, rate)
  return Audio(samples, file_rate if rate is None else rate)


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
  """Resamples by soxr in its quality 'HQ', which leaves out what the new rate cannot hold.

  Args:
    samples: floats [N].
    rate: samples per second.
    new_rate: samples per second of the result; an equal one returns the samples as they are.

  Returns:
    float32 [N * new_rate / rate], rounded.

  Raises:
    ModuleNotFoundError: `soxr` is not installed.
    ValueError: a rate is none.

  >>> resample(np.zeros(160, np.float32), 16000, 8000).shape
  (80,)
  """
  check_integer("rate", rate, 1)
  check_integer("new_rate", new_rate, 1)
  samples = np.asarray(samples, np.float32)
  if rate == new_rate:
    return samples
  with naming_extras():
    import soxr

  return soxr.resample(samples, rate, new_rate)


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
  """Raises where a WAV file is shorter than it says: libsndfile reads what is left of it."""
  with path.open("rb") as file:
    header = file.read(12)
  if header[:4] != b"RIFF" or header[8:] != b"WAVE":
    return
  expected = int.from_bytes(header[4:8], "little") + 8
  size = path.stat().st_size
  if size < expected < _STREAM:
    raise ValueError(
      f"path: expected {expected} bytes, got {size} in {path}, which is truncated: copy it again, "
      "or leave it out"
    )
