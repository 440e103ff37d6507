"""Lets the library of espeak-ng that PyPI's espeakng-loader carries speak, in this process."""

import ctypes
import functools
import importlib.util
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.errors import suggest

PACKAGE = "espeakng-loader"
_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS of speak_lib.h
_RETURN_ERRORS = 0x8000  # espeakINITIALIZE_DONT_EXIT
_UTF8 = 1  # espeakCHARS_UTF8
_CALLBACK = ctypes.CFUNCTYPE(
  ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def speak(text: str, voice: str) -> tuple[np.ndarray, int]:
  """Returns what a voice says, float32 [N] in -1..1, and the samples per second.

  Two calls may differ in some samples: the breath of a voice is random.

  Args:
    text: a sentence.
    voice: an accent, and maybe a variant, such as 'en-us+f2'.

  Raises:
    ModuleNotFoundError: espeakng-loader is not installed.
    ValueError: there is no such voice, or the library fails.
  """
  library, rate, heard, _ = _library()
  if library.espeak_SetVoiceByName(_known(voice).encode()):
    raise ValueError(f"voices: espeak-ng does not start {voice!r}")
  heard.clear()
  encoded = text.encode()
  if library.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, _UTF8, None, None) or not heard:
    raise ValueError(f"texts: espeak-ng failed on {text!r} in voice {voice!r}")
  return np.concatenate(heard).astype(np.float32) / 2**15, rate


def check(voices: Iterable[str]) -> None:
  """Raises as `speak` for a voice that does not exist."""
  for voice in voices:
    _known(voice)


def _known(voice: str) -> str:
  """Returns the name that the library has for a voice.

  Raises:
    ValueError: there is no such voice; the library would take another one.
  """
  accents, variants = _voices()
  check_voice(voice, accents, variants)
  accent, plus, variant = voice.partition("+")
  return accents[accent] + plus + variant


def check_voice(voice: str, accents: Collection[str], variants: Collection[str]) -> None:
  """Checks a voice, for which espeak-ng would take another one without a word.

  Raises:
    ValueError: there is no such accent or variant.
  """
  accent, _, variant = voice.partition("+")
  if accent not in accents:
    raise ValueError(f"voices: expected one of espeak-ng, got {voice!r}{suggest(accent, accents)}")
  if variant and variant not in variants:
    raise ValueError(
      f"voices: expected a variant of espeak-ng, got {variant!r} in {voice!r}"
      f"{suggest(variant, variants)}"
    )


@functools.lru_cache
def _voices() -> tuple[dict[str, str], set[str]]:
  """Returns the file of each accent, and the variants."""
  data = _folder() / "espeak-ng-data"
  accents: dict[str, str] = {}
  for path in sorted(data.glob("lang/**/*")):
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    words = [line.split() for line in lines]
    accents |= {line[1]: path.name for line in words if line[:1] == ["language"] and line[1:]}
    accents[path.name] = path.name
  return accents, {path.name for path in data.glob("voices/!v/*")}


@functools.lru_cache
def _library() -> tuple[Any, int, list[np.ndarray], Any]:
  """Returns the library, its rate, the list that gets the samples, and the function that does."""
  library = ctypes.CDLL(str(_folder() / "libespeak-ng.so"))
  rate = library.espeak_Initialize(_SYNCHRONOUS, 0, str(_folder()).encode(), _RETURN_ERRORS)
  if rate <= 0:
    raise ValueError(f"folder: {PACKAGE} in {_folder()} does not start: install it again")
  heard: list[np.ndarray] = []

  def collect(samples, count, events):
    del events
    if samples and count:
      heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
    return 0

  callback = _CALLBACK(collect)
  library.espeak_SetSynthCallback(callback)
  return library, rate, heard, callback


def _folder() -> Path:
  spec = importlib.util.find_spec("espeakng_loader")
  if spec is None or not spec.submodule_search_locations:
    raise ModuleNotFoundError(
      f"folder: expected the package {PACKAGE}, got none: pip install --no-deps {PACKAGE}"
    )
  return Path(spec.submodule_search_locations[0])
