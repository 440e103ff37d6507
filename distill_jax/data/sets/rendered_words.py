"""Renders words as pictures of lines, in the DejaVu fonts that come with matplotlib.

    words = rendered_words.load("words.npz", rendered_words.words_of(text))  # split -> pictures

Words and faces of the test split are new to a network. Each picture has its own size of the font,
place, angle, blur, noise and gray values, drawn from (seed, number of the word).
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill_jax.data.checks import check_seed
from distill_jax.data.sets.voice_prompts import by_split, check_names
from distill_jax.errors import check_integer, naming_extras
from distill_jax.storage import folders
from distill_jax.storage.array_files import read_arrays, write_arrays

FACES = {
  "train": (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Italic",
  ),
  "validation": ("DejaVuSansMono-Oblique", "DejaVuSerif-Bold"),
  "test": ("DejaVuSans-BoldOblique", "DejaVuSansMono-BoldOblique", "DejaVuSerif-BoldItalic"),
}
"""Faces of each split: names of files in matplotlib's folder of fonts, without '.ttf'."""


class Picture(NamedTuple):
  """A rendered word. Example in `render`.

  Attributes:
    text: the word.
    face: name of its font's file.
    image: uint8 [height, width], dark on bright.
  """

  text: str
  face: str
  image: np.ndarray


def load(
  path: str | os.PathLike,
  words: Iterable[str],
  *,
  faces: Mapping[str, Sequence[str]] | None = None,
  height: int = 32,
  copies: int = 1,
  seed: int = 0,
  held_out: int = 10,
) -> dict[str, list[Picture]]:
  """Returns the pictures of each split from a file, which is written where it is missing.

  Args:
    path: a file that this function writes, in NumPy's format npz.
    words: such as of `words_of`; a word is in one split, whatever its case.
    faces: names of fonts of 'train', 'validation' and 'test'; None: `FACES`.
    height: pixels; the width is as the word needs it.
    copies: pictures of each word in 'train', each of another face while there are others; the
      other splits have one.
    seed: from 0 to 2^32 - 1.
    held_out: number of words of which one is for validation, and another one for the test.

  Returns:
    The pictures of 'train', 'validation' and 'test', in the order of the words.

  Raises:
    ModuleNotFoundError: matplotlib or Pillow is not installed.
    ValueError: a face stands in two splits or does not exist, a number is out of its range, or the
      file was written for other words or arguments.
  """
  faces = FACES if faces is None else faces
  check_names("faces", faces)
  check_seed(seed)
  check_integer("copies", copies, 1)
  plan = [
    (split, word, face)
    for number, word in enumerate(dict.fromkeys(words))
    for split in [split_of(word, held_out)]
    for face in _choose(faces[split], copies if split == "train" else 1, (seed, number))
  ]
  path = folders.resolve(path, "path")
  key = hashlib.blake2b(repr((plan, height, seed)).encode(), digest_size=16).hexdigest()
  if not path.exists():
    pictures = [
      render(word, face, height=height, seed=(seed, number))
      for number, (_, word, face) in enumerate(plan)
    ]
    _save(path, pictures, key)
  images = _load(path, key)
  return by_split(
    (split, Picture(word, face, image)) for (split, word, face), image in zip(plan, images)
  )


def words_of(text: str, *, longest: int = 24) -> list[str]:
  """Returns the distinct words of letters a-z and A-Z of a text, sorted.

  >>> words_of("In the beginning, in the end")
  ['In', 'beginning', 'end', 'in', 'the']
  """
  check_integer("longest", longest, 1)
  return sorted(word for word in set(re.findall("[A-Za-z]+", text)) if len(word) <= longest)


def split_of(word: str, held_out: int = 10) -> str:
  """Returns the split of a word by a hash, whatever its case: 'train', 'validation' or 'test'.

  >>> split_of("Lord") == split_of("LORD")
  True
  """
  check_integer("held_out", held_out, 3)
  digest = hashlib.blake2b(word.casefold().encode(), digest_size=8).digest()
  return {0: "validation", 1: "test"}.get(int.from_bytes(digest, "little") % held_out, "train")


def render(word: str, face: str, *, height: int = 32, seed: int | Sequence[int] = 0) -> Picture:
  """Renders one word.

  Args:
    word: what is written.
    face: name of a file in matplotlib's folder of fonts, without '.ttf'.
    height: pixels, at least 16.
    seed: of the size, 0.5 to 0.7 of the height; the place; the angle, up to 2 degrees; the blur, up
      to 0.8 pixels; the noise, of up to 12 gray values; and the gray values of ink and paper.

  Raises:
    ModuleNotFoundError: matplotlib or Pillow is not installed.
    ValueError: there is no such face, no word, or a number is out of its range.

  >>> picture = render("beginning", "DejaVuSerif", seed=1)
  >>> picture.image.shape[0], picture.image.dtype
  (32, dtype('uint8'))
  """
  with naming_extras():
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

  check_integer("height", height, 16)
  if not word.strip():
    raise ValueError(f"word: expected a word, got {word!r}")
  rng = np.random.default_rng(seed)
  font = ImageFont.truetype(str(_font(face)), round(height * rng.uniform(0.5, 0.7)))
  left, top, right, bottom = font.getbbox(word)
  margins = rng.integers(2, 7, 2)
  free = max(0, height - (bottom - top))
  paper, ink = rng.uniform(190, 255), rng.uniform(0, 90)
  width = int(np.ceil(right - left)) + int(margins.sum())
  image = Image.new("L", (width, height), round(paper))
  place = (margins[0] - left, rng.uniform(0.2, 0.8) * free - top)
  ImageDraw.Draw(image).text(place, word, fill=round(ink), font=font)
  angle, radius = rng.uniform(-2, 2), rng.uniform(0, 0.8)
  image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=round(paper))
  image = image.filter(ImageFilter.GaussianBlur(radius))
  noise = rng.normal(0, rng.uniform(0, 12), (height, width))
  pixels = np.clip(np.round(np.asarray(image) + noise), 0, 255).astype(np.uint8)
  return Picture(word, face, pixels)


def _choose(faces: Sequence[str], count: int, seed: tuple[int, int]) -> list[str]:
  order = np.random.default_rng(seed).permutation(len(faces))
  return [faces[order[i % len(faces)]] for i in range(count)]


def _font(face: str) -> Path:
  with naming_extras():
    import matplotlib

  folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
  path = folder / f"{face}.ttf"
  if not path.is_file():
    names = sorted(x.stem for x in folder.glob("DejaVu*.ttf"))
    raise ValueError(f"face: expected one of {names}, got {face!r}")
  return path


def _save(path: Path, pictures: Sequence[Picture], key: str) -> None:
  arrays = {
    "pixels": np.concatenate([picture.image for picture in pictures], axis=1),
    "widths": np.array([picture.image.shape[1] for picture in pictures]),
    "key": np.array(key),
  }
  write_arrays(path, arrays)


def _load(path: Path, key: str) -> list[np.ndarray]:
  arrays = read_arrays(path, ("pixels", "widths", "key"))
  if str(arrays["key"]) != key:
    raise ValueError(
      f"path: expected pictures of these words and arguments, got others in {path}: delete this "
      "file, or name another"
    )
  return np.split(arrays["pixels"], np.cumsum(arrays["widths"])[:-1], axis=1)
