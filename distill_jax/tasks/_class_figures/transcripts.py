"""Shows transcripts: the sound or the picture, what it says, and what the networks read."""

import importlib
import io
import wave
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.report.document import Block, Code, Heading, Picture, Sound, Table, Text
from distill_jax.report.entries import Entry, Group
from distill_jax.report.variants import few
from distill_jax.tasks._class_figures.examples import TITLES, networks, rule, seeds_of
from distill_jax.tasks._class_figures.sequences import WORST, choose_sequences, shorten

_INCH = 50  # columns of a picture on an inch of the page, which has 10


def transcript_figures(
  entries: Sequence[Entry],
  references: Mapping[str, Any],
  *,
  true: Sequence[str],
  texts: Callable[[np.ndarray], list[str]],
  rates: Callable[[Sequence[str], Sequence[str]], np.ndarray],
  audio_rate: int | None,
) -> list[Block]:
  """Returns some test examples, with the differences between texts and references.

  Args:
    entries: networks whose `predictions` have 'tokens' int [N, L] and 'label' int [N, U], -1 where
      there is none.
    references: 'audio' [N, S], 'image' [N, H, W, 1 or 3], 'widths' [N] and 'id' [N] of the test
      split, if present.
    true: N references, normalized.
    texts: decodes rows of tokens to normalized texts.
    rates: `(texts, references) -> float [N, 2]`, error rates of words and of characters.
    audio_rate: samples a second of 'audio'; None: no sounds.
  """
  shown = networks(few(entries))
  written = {
    g: texts(np.asarray((entry.predictions or {})["tokens"])) for g, entry in shown.items()
  }
  labeled = np.any(np.asarray((entries[0].predictions or {})["label"]) >= 0, axis=1)
  values = {g: np.where(labeled[:, None], rates(x, true), np.nan) for g, x in written.items()}
  by_role = {group.role: -x[:, 1] for group, x in values.items()}
  rows = choose_sequences(by_role)
  if not rows:
    return []
  name = "distilled student" if "student" in by_role else next(iter(shown)).title.lower()
  blocks: list[Block] = [
    Heading("Examples"),
    Text(
      f"{rule(len(true), shown, 'character error rate')} Then the {WORST} others with the worst "
      f"one of the {name}. Texts are normalized. S: substituted, D: deleted, I: inserted. Seed "
      f"{seeds_of(shown.values())}."
    ),
  ]
  ids = references.get("id")
  for row, reason in rows.items():
    row_texts = {group: written[group][row] for group in shown}
    row_rates = {group: values[group][row] for group in shown}
    blocks.append(Text(f"id {ids[row] if ids is not None else row}: {reason}"))
    blocks += _source(references, row, audio_rate)
    blocks.append(_table(true[row], row_texts, row_rates))
    differences = _differences(true[row], row_texts)
    blocks += [Code(differences)] if differences else []
  return blocks


def _table(true: str, texts: Mapping[Group, str], rates: Mapping[Group, np.ndarray]) -> Table:
  lines = [["Reference", shorten(true), "", ""]]
  for group, text in texts.items():
    cells = ["" if np.isnan(rate) else format(rate, ".0%") for rate in rates[group]]
    lines.append([TITLES[group.role], shorten(text), *cells])
  return Table(["", "Text", "WER", "CER"], lines, numeric=False)


def _differences(true: str, texts: Mapping[Group, str]) -> str:
  """Returns jiwer's alignments of the texts that differ: of words, or of a word's characters."""
  jiwer = importlib.import_module("jiwer")
  process = jiwer.process_words if " " in true.strip() else jiwer.process_characters
  parts = []
  for group, text in texts.items():
    if text != true:
      alignment = jiwer.visualize_alignment(process(true, text), show_measures=False)
      lines = [line.rstrip() for line in alignment.splitlines()[1:] if line.strip()]
      parts.append("\n".join([TITLES[group.role], *lines]))
  return "\n\n".join(parts)


def _source(references: Mapping[str, Any], row: int, audio_rate: int | None) -> list[Block]:
  """Returns a player of the sound and the picture of the line, where there are any."""
  blocks: list[Block] = []
  audio, image = (references.get(name) for name in ("audio", "image"))
  if audio is not None and audio_rate is not None:
    samples = np.trim_zeros(np.asarray(audio[row], np.float32).ravel(), "b")
    blocks.append(Sound(f"sound_{row}.wav", "sound", to_wav(samples, audio_rate)))
  if image is not None and np.ndim(image) == 4 and image.shape[3] in (1, 3):
    widths = references.get("widths")
    pixels = np.asarray(image[row])
    pixels = pixels if widths is None else pixels[:, : max(1, int(widths[row]))]
    png = _to_png(pixels)
    inches = min(10, pixels.shape[1] / _INCH)
    blocks.append(Picture(f"line_{row}.png", "picture of the line", "", png, inches, png))
  return blocks


def to_wav(samples: np.ndarray, rate: int) -> bytes:
  """Returns samples [N] from -1 to 1 as a WAV file of 16 bits."""
  file = io.BytesIO()
  with wave.open(file, "wb") as writer:
    writer.setnchannels(1)
    writer.setsampwidth(2)
    writer.setframerate(rate)
    writer.writeframes(np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
  return file.getvalue()


def _to_png(pixels: np.ndarray) -> bytes:
  """Returns a picture [H, W, 1 or 3] as a PNG file; floats beyond 0 to 1 are scaled to it."""
  from PIL import Image  # an extra, which pictures alone need

  if pixels.dtype != np.uint8:
    low, high = min(0, pixels.min()), max(1, pixels.max())
    pixels = np.round(255 * (pixels - low) / (high - low)).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(np.repeat(pixels, 3 // pixels.shape[2], axis=2)).save(file, "PNG")
  return file.getvalue()
