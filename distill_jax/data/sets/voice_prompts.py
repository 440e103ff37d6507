"""Reads the recorded prompts of Asterisk and their transcripts from Debian's packages.

One voice (Allison Smith) speaks short English sentences for telephones, 8,000 samples per second
(Digium, CC-BY-SA-3.0). The packages are installed, or unpacked without what they depend on:

    apt-get install asterisk-core-sounds-en asterisk-core-sounds-en-wav

    apt-get download asterisk-core-sounds-en asterisk-core-sounds-en-wav
    for package in asterisk-*.deb; do dpkg-deb -x $package runs/debian; done

Of 568 recordings 540 have a transcript that is speech, 500 distinct ones: 24 minutes. As the voice
is one, they say nothing about other voices: `synthetic_voices` speaks the same sentences.
"""

import gzip
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from distill_jax.data.audio.clips import Clip, load_clips, save_clips
from distill_jax.data.audio.files import read
from distill_jax.errors import check_integer, suggest
from distill_jax.storage import files, folders

CHARACTERS = " 'abcdefghijklmnopqrstuvwxyz"
"""What `plain_text` leaves."""
SPLITS = ("train", "validation", "test")
VOICE = "Allison"
_SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
_TRANSCRIPTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
_SPOKEN = dict(zip("0123456789", "zero one two three four five six seven eight nine".split()))
_SPOKEN |= {"#": "pound", "*": "star"}
_Item = TypeVar("_Item")


def load(
  path: str | os.PathLike, folder: str | os.PathLike = "/", *, rate: int = 8000
) -> list[Clip]:
  """Returns the prompts of a file, which is written from the packages where it is missing.

  Args:
    path: a file of `audio.save_clips`.
    folder: as of `prompts`; not read where the file exists.
    rate: samples per second; other rates than 8,000 are resampled (`audio.resample`).

  Raises:
    ModuleNotFoundError, FileNotFoundError: as `prompts`.
    ValueError: the file is another one, or of another rate.

  >>> import pathlib, tempfile
  >>> import numpy as np
  >>> path = pathlib.Path(tempfile.mkdtemp(), "prompts.npz")
  >>> save_clips(path, [Clip("added", "Added.", VOICE, np.zeros(80, np.float32), 8000)])
  >>> [(clip.name, clip.text) for clip in load(path)]
  [('added', 'Added.')]
  """
  path = folders.resolve(path, "path")
  if not path.exists():
    save_clips(path, prompts(folder, rate=rate))
  return load_clips(path, rate)


def prompts(folder: str | os.PathLike = "/", *, rate: int = 8000) -> list[Clip]:
  """Returns the prompts that have a transcript of speech, in the order of the transcripts.

  Left out are those whose transcript has brackets, which are tones, signs and silence.

  Args:
    folder: the root of the packages' files: "/" where they are installed.
    rate: as of `load`.

  Raises:
    ModuleNotFoundError: the extra `audio` is not installed.
    FileNotFoundError: the folder has not the files of both packages.
    ValueError: a recording is corrupt.
  """
  root = folders.resolve(folder, "folder")
  for needed in (_TRANSCRIPTS, _SOUNDS):
    if not (root / needed).exists():
      raise FileNotFoundError(
        "folder: expected the files of asterisk-core-sounds-en and asterisk-core-sounds-en-wav, "
        f"got none at {root / needed}: apt-get install them, or name a folder into which they are "
        "unpacked by dpkg-deb -x"
      )
  clips = []
  for name, text in _transcripts(root / _TRANSCRIPTS).items():
    sound = root / _SOUNDS / f"{name}.wav"
    if sound.exists() and not re.search(r"[\[(<]", text):
      clips.append(Clip(name, text, VOICE, *read(sound, rate=rate)))
  return clips


def split(clips: Iterable[Clip], *, held_out: int = 10) -> dict[str, list[Clip]]:
  """Splits clips by sentence: one in `held_out` is for validation and one for the test.

  Args:
    clips: as of `load`.
    held_out: number of sentences of which one is for validation, and another one for the test.

  Returns:
    The clips of 'train', 'validation' and 'test'.

  Raises:
    ValueError: held_out < 3, or a split has no clips.

  >>> import numpy as np
  >>> names = "one two three four five six seven eight nine ten one".split()
  >>> clips = [Clip(str(i), x, VOICE, np.zeros(1), 8000) for i, x in enumerate(names)]
  >>> {name: len(part) for name, part in split(clips, held_out=3).items()}
  {'train': 6, 'validation': 3, 'test': 2}
  """
  return _non_empty(by_split((split_of(clip.text, held_out), clip) for clip in clips))


def split_of(text: str, held_out: int = 10) -> str:
  """Returns the split of a sentence by a hash of its letters: 'train', 'validation' or 'test'.

  >>> split_of("Voice mail!") == split_of("voicemail")
  True
  """
  check_integer("held_out", held_out, 3)
  letters = plain_text(text).replace(" ", "")
  digest = hashlib.blake2b(letters.encode(), digest_size=8).digest()
  return {0: "validation", 1: "test"}.get(int.from_bytes(digest, "little") % held_out, "train")


def plain_text(text: str) -> str:
  """Returns what is said in lower case, of `CHARACTERS` only: `spell_out` without its signs.

  >>> plain_text("Press 1, or \\"don't\\" -- then #.")
  "press one or don't then pound"
  """
  words = re.sub("[^a-z']", " ", spell_out(text).casefold()).split()
  return " ".join(word.strip("'") for word in words if word.strip("'"))


def spell_out(text: str) -> str:
  """Returns a text with digits, '#' and '*' as words, one by one, and no sign that is spoken.

  >>> spell_out("Dial 42 & press #!")
  'Dial four two press pound!'
  """
  spoken = "".join(f" {_SPOKEN[x]} " if x in _SPOKEN else x for x in text.replace("’", "'"))
  plain = " ".join(re.sub(r"[^A-Za-z'.,;:!?\- ]", " ", spoken).split())
  return re.sub(r" ([.,;:!?])", r"\1", plain)


def by_split(items: Iterable[tuple[str, _Item]]) -> dict[str, list[_Item]]:
  """Returns the items of each split, in order, from pairs of a split's name and an item.

  >>> by_split([("test", 1), ("train", 2)])
  {'train': [2], 'validation': [], 'test': [1]}
  """
  splits: dict[str, list[_Item]] = {name: [] for name in SPLITS}
  for name, item in items:
    splits[name].append(item)
  return splits


def check_names(field: str, names: Mapping[str, Sequence[str]]) -> None:
  """Checks the names of each split, such as voices, that no other split may have.

  Raises:
    ValueError: a split has none, or a name stands twice.

  >>> check_names("voices", {"train": ("a", "b"), "validation": ("c",), "test": ("d",)})
  """
  for split in SPLITS:
    if not names.get(split):
      raise ValueError(f"{field}: expected some of {split!r}, got none{suggest(split, names)}")
  every = [name for split in SPLITS for name in names[split]]
  repeated = [name for name in every if every.count(name) > 1]
  if repeated:
    raise ValueError(f"{field}: expected each in one split, got {repeated[0]!r} in two")


def _transcripts(path: Path) -> dict[str, str]:
  """Returns the text of each recording; a comment begins with a semicolon."""
  lines = gzip.decompress(files.read(path)).decode("utf-8").splitlines()
  pairs = (line.partition(":") for line in lines if line.strip() and line[0] != ";")
  return {name.strip(): text.strip() for name, _, text in pairs}


def _non_empty(splits: Mapping[str, list[_Item]]) -> dict[str, list[_Item]]:
  for name, items in splits.items():
    if not items:
      raise ValueError(f"clips: expected some in each split, got none in {name}")
  return dict(splits)
