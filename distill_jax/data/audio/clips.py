"""Keeps recordings with their transcripts in one file, of 16 bits a sample."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from distill_jax.errors import check_integer
from distill_jax.storage import folders
from distill_jax.storage.array_files import read_arrays, write_arrays

_SCALE = 2**15


class Clip(NamedTuple):
  """A recording and what is said in it.

  Example in `load_clips`.

  Attributes:
    name: unique in its set, such as that of its file.
    text: the transcript, as it is written.
    voice: who speaks.
    samples: float32 [N], in -1..1.
    rate: number of samples per second.
  """

  name: str
  text: str
  voice: str
  samples: np.ndarray
  rate: int


def save_clips(path: str | os.PathLike, clips: Sequence[Clip]) -> None:
  """Writes clips of one rate into a file for `load_clips`; a killed run leaves none.

  Args:
    path: the file; its folder is created.
    clips: samples outside of -1..1 are clipped, and all are rounded to 16 bits.

  Raises:
    ValueError: there are no clips, or their rates differ.

  >>> import pathlib, tempfile
  >>> path = pathlib.Path(tempfile.mkdtemp(), "clips.npz")
  >>> save_clips(path, [Clip("1", "one", "Allison", np.zeros(3, np.float32), 8000)])
  >>> path.exists()
  True
  """
  path = folders.resolve(path, "path")
  rates = {clip.rate for clip in clips}
  if len(rates) != 1:
    raise ValueError(f"clips: expected some of one rate, got rates {sorted(rates)}: resample them")
  samples = np.concatenate([clip.samples for clip in clips])
  arrays = {
    "samples": np.clip(np.round(samples * _SCALE), -_SCALE, _SCALE - 1).astype(np.int16),
    "lengths": np.array([len(clip.samples) for clip in clips]),
    "rate": np.array(rates.pop()),
    "names": np.array([clip.name for clip in clips]),
    "texts": np.array([clip.text for clip in clips]),
    "voices": np.array([clip.voice for clip in clips]),
  }
  write_arrays(path, arrays)


def load_clips(path: str | os.PathLike, rate: int | None = None) -> list[Clip]:
  """Returns the clips of a file of `save_clips`.

  Args:
    path: the file.
    rate: number of samples per second that they must have; None: it is not checked.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is another one, or its rate is another.

  >>> import pathlib, tempfile
  >>> path = pathlib.Path(tempfile.mkdtemp(), "clips.npz")
  >>> save_clips(path, [Clip("1", "one", "Allison", np.zeros(2, np.float32), 8000)])
  >>> load_clips(path)[0].text, load_clips(path)[0].samples
  ('one', array([0., 0.], dtype=float32))
  """
  path = folders.resolve(path, "path")
  if rate is not None:
    check_integer("rate", rate, 1)
  names = ("samples", "lengths", "rate", "names", "texts", "voices")
  arrays = read_arrays(path, names)
  file_rate = int(arrays["rate"])
  if rate not in (None, file_rate):
    raise ValueError(
      f"rate: expected that of {path}, {file_rate}, got {rate}: delete this file, or name another"
    )
  parts = np.split(arrays["samples"], np.cumsum(arrays["lengths"])[:-1])
  texts = zip(*(arrays[name].tolist() for name in ("names", "texts", "voices")))
  return [
    Clip(name, text, voice, part.astype(np.float32) / _SCALE, file_rate)
    for (name, text, voice), part in zip(texts, parts)
  ]
