"""Lets the program espeak-ng speak sentences in several voices: synthetic speech, not recordings.

    apt-get install espeak-ng
    pip install --no-deps espeakng-loader  # without root, for folder=None

A folder of unpacked packages needs all that espeak-ng depends on, too: some 30 with libpulse0's.

Figures on these clips measure how a network reads one synthesizer (eSpeak NG, GPL-3; its sound is
not covered by it): report them as synthetic. 100 clips take a second.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from distill_jax.data.audio.clips import Clip, load_clips, save_clips
from distill_jax.data.audio.files import read, resample
from distill_jax.data.sets import espeak_library
from distill_jax.data.sets.voice_prompts import SPLITS, by_split, check_names, spell_out, split_of
from distill_jax.storage import folders

VOICES = {
  "train": ("en-us", "en-gb", "en-gb-scotland+m3", "en-us+f2", "en-gb-x-rp+f4", "en-029+m7"),
  "validation": ("en-us-nyc+f5",),
  "test": ("en-gb-x-gbcwmd+m1", "en-us+f3"),
}
"""Voices of each split: an accent, and maybe a variant of espeak-ng, of which f are high."""
_PROGRAM = "usr/bin/espeak-ng"
_PACKAGES = "espeak-ng and espeak-ng-data"
_REMEDY = (
  f"apt-get install them, or write folder=None and pip install --no-deps {espeak_library.PACKAGE}"
)


def load(
  path: str | os.PathLike,
  texts: Iterable[str],
  folder: str | os.PathLike | None = "/",
  *,
  rate: int = 8000,
  voices: Mapping[str, Sequence[str]] | None = None,
  held_out: int = 10,
) -> dict[str, list[Clip]]:
  """Returns the clips of each split from a file, which is written where it is missing.

  A sentence is spoken by all voices of its split, and by no other: a test clip has neither a
  sentence nor a voice of the training clips. The split of a sentence is that of `voice_prompts`.

  Args:
    path: a file of `audio.save_clips`.
    texts: sentences; each is spoken once by a voice, as `voice_prompts.spell_out` writes it.
    folder: the root of the packages' files: "/" where they are installed; None: the library of
      PyPI's espeakng-loader. Not read where the file exists.
    rate: samples per second; espeak-ng's 22,050 are resampled to it (`audio.resample`).
    voices: names of 'train', 'validation' and 'test' for espeak-ng's option -v; None: `VOICES`.
    held_out: as of `voice_prompts.split`.

  Returns:
    The clips of 'train', 'validation' and 'test'; a clip's name is 'split/voice/number'.

  Raises:
    ModuleNotFoundError: the extra `audio`, or espeakng-loader, is not installed.
    FileNotFoundError: the folder has not the program.
    ValueError: a voice stands in two splits or does not exist, the program fails or does not start,
      or the file holds other sentences, voices or another rate.
  """
  voices = VOICES if voices is None else voices
  check_names("voices", voices)
  plan = _plan(texts, voices, held_out)
  path = folders.resolve(path, "path")
  if not path.exists():
    if folder is None:
      espeak_library.check(name for names in voices.values() for name in names)
      clips = [_spoken(*item, rate) for item in plan]
    else:
      clips = _speak(plan, voices, folders.resolve(folder, "folder"), rate)
    save_clips(path, clips)
  clips = load_clips(path, rate)
  stored = [(clip.name, clip.text, clip.voice) for clip in clips]
  if stored != plan:
    raise ValueError(
      f"texts: expected those of {path}, of {len(stored)} clips, got others or other voices, of "
      f"{len(plan)}: delete this file, or name another"
    )
  return by_split((clip.name.partition("/")[0], clip) for clip in clips)


def _plan(texts: Iterable[str], voices, held_out: int) -> list[tuple[str, str, str]]:
  """Returns the name, text and voice of each clip."""
  distinct = list(dict.fromkeys(texts))
  return [
    (f"{name}/{voice}/{number}", text, voice)
    for number, text in enumerate(distinct)
    for name in [split_of(text, held_out)]
    for voice in voices[name]
  ]


def _spoken(name: str, text: str, voice: str, rate: int) -> Clip:
  """Returns a clip of PyPI's espeakng-loader."""
  samples = resample(*espeak_library.speak(spell_out(text), voice), rate)
  return Clip(name, text, voice, samples, rate)


def _speak(plan, voices: Mapping[str, Sequence[str]], root: Path, rate: int) -> list[Clip]:
  program = root / _PROGRAM
  data = next(root.glob("usr/lib/*/espeak-ng-data"), None) or root / "usr/share/espeak-ng-data"
  if not program.is_file() or not data.is_dir():
    missing = program if not program.is_file() else data
    raise FileNotFoundError(
      f"folder: expected the files of {_PACKAGES}, got none at {missing}: {_REMEDY}"
    )
  # Of unpacked packages neither the libraries nor the data are where the program looks for them.
  environment = {**os.environ, "ESPEAK_DATA_PATH": str(data.parent)}
  if root != Path("/"):
    libraries = data.parent, data.parent / "pulseaudio", root / "lib" / data.parent.name
    environment["LD_LIBRARY_PATH"] = ":".join(map(str, libraries))
  names = [voice for split in SPLITS for voice in voices[split]]
  _check_known(names, data, program, environment)
  clips = []
  with tempfile.TemporaryDirectory() as temporary:
    sound = Path(temporary, "clip.wav")
    for name, text, voice in plan:
      sound.unlink(missing_ok=True)
      command = [str(program), "-v", voice, "-w", str(sound), "--", spell_out(text)]
      done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
      if done.returncode or not sound.exists():
        raise ValueError(f"texts: espeak-ng failed on {text!r} in voice {voice!r}: {done.stderr}")
      clips.append(Clip(name, text, voice, *read(sound, rate=rate)))
  return clips


def _check_known(voices: Iterable[str], data: Path, program: Path, environment) -> None:
  """Raises for a voice that espeak-ng would replace by another one without a word."""
  command = [str(program), "--voices"]
  table = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  if table.returncode:
    raise ValueError(
      f"folder: expected {_PACKAGES} with all that they depend on, got exit status "
      f"{table.returncode} of {program}, {table.stderr.strip()!r}: {_REMEDY}"
    )
  accents = {line.split()[1] for line in table.stdout.splitlines() if line.split()[1:]}
  variants = {path.name for path in data.glob("voices/!v/*")}
  for voice in dict.fromkeys(voices):
    espeak_library.check_voice(voice, accents, variants)
