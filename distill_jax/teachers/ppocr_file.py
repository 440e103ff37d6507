"""Makes a teacher of a released PP-OCR recognizer of text lines, in an ONNX file."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.errors import check_integer
from distill_jax.storage import files
from distill_jax.teachers.host_function import host
from distill_jax.teachers.host_outputs import Arrays
from distill_jax.teachers.onnx_file import open_session, run_session
from distill_jax.types import Model

_HEIGHT = 48  # rows of a picture
_STRIDE = 8  # columns of a frame
_LEAST = 1e-30  # stands for a probability of 0, whose logarithm is -inf


def ppocr(
  path: str | os.PathLike[str],
  characters: Sequence[str],
  *,
  blank: int = 0,
  width: int | None = None,
  widths: str | None = "widths",
  session_options: Any = None,
  providers: Sequence[str] = ("CPUExecutionProvider",),
) -> Model:
  """Returns a teacher of a PP-OCR recognizer, with CTC frames over the student's alphabet.

  It reads the files of rapidocr (`ch_PP-OCRv4_rec_infer.onnx` in `rapidocr-onnxruntime`), whose
  metadata name the characters: 6,623, the blank and the space. It is a `host` teacher:
  `cache.write_cache` is its place. A picture of 320 columns takes 33 ms on one core.

  The batch's 'image' is [B, H, W, 1] or [B, H, W, 3] (RGB), uint8, or floats from 0 to 1. It is
  resized to 48 rows; columns behind 'widths' become gray, as in PP-OCR's own batches.

  The outputs are 'logits' float32 [B, T, V], log-probabilities, and 'lengths' int32 [B], numbers of
  frames. Probabilities of characters that the student does not have are added to the blank's: such
  a character is not read, and no other one in its place.

  Args:
    path: the .onnx file.
    characters: for each class of the student but the blank, in order, the characters of the
      teacher that it stands for: "abc" or ["aA", "bB", "cC"].
    blank: the student's class of no character; the others keep their order around it.
    width: columns that pictures are resized to, a multiple of 8; a frame has 8 of them, so that a
      student with T frames is compared frame by frame at 8 T. None: those that keep the shape of
      characters, 48 W / H, rounded up.
    widths: entry int [B] with the number of valid columns, left aligned; None: all are.
    session_options, providers: as for `onnx`.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: no recognizer of this form, characters that it does not know, a blank or a width out
      of range; when it is called, other images.

  >>> import inspect
  >>> from distill_jax import teachers
  >>> list(inspect.signature(teachers.ppocr).parameters)[:2]
  ['path', 'characters']
  """
  path = Path(path)
  if width is not None and check_integer("width", width, _STRIDE) % _STRIDE:
    raise ValueError(f"width: expected a multiple of {_STRIDE}, got {width}: a frame has as many")
  check_integer("blank", blank, 0, len(characters))
  if not path.is_file():
    raise FileNotFoundError(f"path: expected an ONNX file, got {path}, which is none")
  session = open_session(path, session_options, providers)
  numbers = _teacher_classes(characters, _teacher_characters(session, path))
  (network_input,) = session.get_inputs()
  (network_output,) = session.get_outputs()

  def predict(batch: Arrays) -> Arrays:
    image = batch["image"]
    valid = np.full(len(image), image.shape[2]) if widths is None else batch[widths]
    pixels, resized_widths = _resize(image, valid, width)
    feeds = {network_input.name: pixels}
    inputs = {network_input.name: network_input}
    (probabilities,) = run_session(session, [network_output.name], feeds, inputs)
    lengths = np.minimum(-(-resized_widths // _STRIDE), probabilities.shape[1])
    logits = _log_probs(probabilities, numbers, blank)
    return {"logits": logits, "lengths": lengths.astype(np.int32)}

  identity = f"PP-OCR {files.digest(path)} {list(characters)} blank {blank} width {width}"
  return host(predict, identity=identity, inputs=["image", *([widths] if widths else [])])


def _teacher_characters(session: Any, path: Path) -> dict[str, int]:
  """Returns the class of each character that the network reads; class 0 is its blank."""
  text = session.get_modelmeta().custom_metadata_map.get("character", "")
  characters = [*text.splitlines(), " "]
  shape = session.get_outputs()[0].shape
  if not text or len(shape) != 3 or shape[2] != len(characters) + 1:
    raise ValueError(
      f"path: expected a PP-OCR recognizer with its characters in the metadata, got {path} with "
      f"outputs {shape} and {len(characters) - 1} characters: use teachers.onnx for other networks"
    )
  return {character: number for number, character in enumerate(characters, 1)}


def _teacher_classes(characters: Sequence[str], classes: dict[str, int]) -> list[list[int]]:
  """Returns the teacher's classes of each of the student's.

  Raises:
    ValueError: a class of none, or a character that the teacher lacks, or that two classes name.
  """
  names = "".join(characters)
  unknown = sorted(
    {x for x in names if x not in classes} | {x for x in names if names.count(x) > 1}
  )
  if unknown or not all(characters):
    raise ValueError(
      "characters: expected characters that the recognizer reads, once each, got "
      f"{unknown or list(characters)}: leave out what it cannot read, in the student, too"
    )
  return [[classes[x] for x in group] for group in characters]


def _resize(
  image: np.ndarray, widths: np.ndarray, width: int | None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns pictures float32 [B, 3, 48, W'], from -1 to 1, and their numbers of valid columns."""
  from PIL import Image  # an extra, which pictures alone need

  if image.ndim != 4 or image.shape[3] not in (1, 3) or 0 in image.shape:
    raise ValueError(f"image: expected [B, H, W, 1] or [B, H, W, 3], got {list(image.shape)}")
  if image.dtype == np.uint8:
    image = image / np.float32(255)
  elif not (0 <= image.min() and image.max() <= 1):
    raise ValueError(
      f"image: expected uint8, or floats from 0 to 1, got {image.dtype} from {image.min():.3g} to "
      f"{image.max():.3g}: normalize inside of the student instead"
    )
  rows, columns = image.shape[1:3]
  if width is None:
    width = _STRIDE * -(-_HEIGHT * columns // (rows * _STRIDE))
  planes = np.moveaxis(image.astype(np.float32), 3, 1)[:, ::-1]  # The network's order is BGR.
  resized = [
    [np.asarray(Image.fromarray(x).resize((width, _HEIGHT), Image.Resampling.BILINEAR)) for x in y]
    for y in planes
  ]
  pixels = np.broadcast_to(2 * np.array(resized) - 1, (len(image), 3, _HEIGHT, width))
  # Small integers would overflow.
  valid = np.clip(-(-widths.astype(np.int64) * width // columns), 0, width)
  inside = np.arange(width) < valid[:, None]
  return np.where(inside[:, None, None], pixels, 0).astype(np.float32), valid


def _log_probs(probabilities: np.ndarray, numbers: list[list[int]], blank: int) -> np.ndarray:
  """Returns log-probabilities [B, T, V] of the student's classes."""
  selected = np.stack([probabilities[..., group].sum(-1) for group in numbers], -1)
  rest = 1 - selected.sum(-1)
  values = np.insert(selected, blank, rest, axis=-1)
  return np.log(np.maximum(values, _LEAST)).astype(np.float32)
