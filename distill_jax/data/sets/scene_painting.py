"""Paints digits and pieces of digits on a background, with their boxes, for `digit_scenes`."""

from typing import NamedTuple

import numpy as np
import PIL.Image

SMALLEST, SCALES = 5 / 32, 4.0
"""The longer side of the smallest digit over the scene's, and that of the largest over it."""
INK = 64
"""The smallest value of a pixel that is ink."""
CONTRAST = (0.2, 0.5)
"""The difference of the brightness of a digit and of what is below it, smallest and largest."""
MAX_PIECES = 4
"""The largest number of pieces of digits, which are no digits."""
MAX_SHARED = 0.5
"""The part of the smaller of two boxes that they may share."""
MIN_VISIBLE = 0.5
"""The part of a digit's ink that stays visible."""
EMPTY = 0.05
"""The fraction of scenes without a digit."""
TINT = 0.2
"""The largest difference of a color channel from the gray of a digit, before they are centered."""
_TRIES = 10
Box = tuple[int, int, int, int]


class Digits(NamedTuple):
  """Digits: gray images that are cut to their ink, and class numbers [N]."""

  images: list[PIL.Image.Image]
  label: np.ndarray


class Scene(NamedTuple):
  """A scene that is being painted, with lists of one item per digit.

  Attributes:
    image: float32 [size, size, 3] in 0..1.
    owner: int [size, size], 1 + the position of the digit whose ink is visible; 0: none.
    boxes: (left, top, right, bottom) in pixels.
    label: class numbers.
    areas: numbers of pixels of ink, visible or not.
    visible: numbers of pixels of visible ink.
  """

  image: np.ndarray
  owner: np.ndarray
  boxes: list[Box]
  label: list[int]
  areas: list[int]
  visible: list[int]


def crop(rng: np.random.Generator, picture: np.ndarray, size: int) -> np.ndarray:
  """Returns the most varied of four random squares, since most of the Earth is plain sea."""
  corners = rng.integers(0, np.array(picture.shape[:2]) - size + 1, (4, 2)).tolist()
  squares = [picture[top : top + size, left : left + size] for top, left in corners]
  square = max(squares, key=lambda x: np.ptp(x[::8, ::8, 1]))
  return square / np.float32(255)


def paint(
  rng: np.random.Generator, background: np.ndarray, digits: Digits, max_boxes: int
) -> Scene:
  """Returns a scene of digits and pieces of digits in random order, later ones on top.

  Args:
    rng: the source of all that is random.
    background: float32 [size, size, 3] in 0..1, which is painted on.
    digits: the digits to choose from.
    max_boxes: largest number of digits.
  """
  scene = Scene(background, np.zeros(background.shape[:2], np.int32), [], [], [], [])
  wanted = 0 if rng.random() < EMPTY else int(rng.integers(1, max_boxes + 1))
  pieces = int(rng.integers(0, MAX_PIECES + 1))
  for is_digit in rng.permutation([True] * wanted + [False] * pieces).tolist():
    number = int(rng.integers(len(digits.images)))
    digit = digits.images[number]
    side = SMALLEST * len(background) * SCALES ** rng.random()
    part = (0, 0, *digit.size) if is_digit else _piece(rng, digit)
    ink = _resize(digit, part, side)
    is_ink = ink >= INK / 255
    box = _place(rng, scene, is_ink, is_digit)
    if box is None:
      continue
    _blend(rng, scene.image, ink, box)
    _cover(scene, is_ink, box, len(scene.boxes) + 1 if is_digit else 0)
    if is_digit:
      scene.boxes.append(box)
      scene.label.append(int(digits.label[number]))
      scene.areas.append(int(np.count_nonzero(is_ink)))
      scene.visible.append(scene.areas[-1])
  return scene


def _piece(rng: np.random.Generator, digit: PIL.Image.Image) -> Box:
  """Returns a part of a digit that is too small for a loop, 2/5 as high and as wide."""
  width, height = ((2 * side + 4) // 5 for side in digit.size)
  left = int(rng.integers(digit.width - width + 1))
  top = int(rng.integers(digit.height - height + 1))
  return left, top, left + width, top + height


def _resize(digit: PIL.Image.Image, part: Box, side: float) -> np.ndarray:
  """Returns the ink in 0..1 of a part of a digit whose longer side becomes `side` pixels."""
  factor = side / max(digit.size)
  width = max(1, round(factor * (part[2] - part[0])))
  height = max(1, round(factor * (part[3] - part[1])))
  image = digit.resize((width, height), PIL.Image.Resampling.BILINEAR, box=part)
  return np.asarray(image, np.float32) / 255


def _place(
  rng: np.random.Generator, scene: Scene, is_ink: np.ndarray, is_digit: bool
) -> Box | None:
  """Returns a random box that leaves the earlier digits visible; None after some tries."""
  height, width = is_ink.shape
  rows, columns = scene.owner.shape
  for _ in range(_TRIES):
    top = int(rng.integers(rows - height + 1))
    left = int(rng.integers(columns - width + 1))
    box = (left, top, left + width, top + height)
    shares_most = is_digit and any(_shares_most(box, other) for other in scene.boxes)
    if not shares_most and _stay_visible(scene, is_ink, box):
      return box
  return None


def _shares_most(box: Box, other: Box) -> bool:
  """Returns whether two boxes share more than half of the smaller one."""
  width = min(box[2], other[2]) - max(box[0], other[0])
  height = min(box[3], other[3]) - max(box[1], other[1])
  areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
  return max(width, 0) * max(height, 0) > MAX_SHARED * min(areas)


def _covered(scene: Scene, is_ink: np.ndarray, box: Box) -> list[int]:
  """Returns how many visible pixels of each digit would be covered."""
  left, top, right, bottom = box
  owners = scene.owner[top:bottom, left:right][is_ink]
  return np.bincount(owners, minlength=len(scene.areas) + 1)[1:].tolist()


def _stay_visible(scene: Scene, is_ink: np.ndarray, box: Box) -> bool:
  digits = zip(scene.visible, _covered(scene, is_ink, box), scene.areas)
  return all(visible - covered >= MIN_VISIBLE * area for visible, covered, area in digits)


def _cover(scene: Scene, is_ink: np.ndarray, box: Box, owner: int) -> None:
  for i, covered in enumerate(_covered(scene, is_ink, box)):
    scene.visible[i] -= covered
  left, top, right, bottom = box
  scene.owner[top:bottom, left:right][is_ink] = owner


def _blend(rng: np.random.Generator, image: np.ndarray, ink: np.ndarray, box: Box) -> None:
  """Paints ink in a random tint that differs from the brightness below."""
  left, top, right, bottom = box
  below = image[top:bottom, left:right]
  brightness = float(below.mean())
  contrast = rng.uniform(*CONTRAST)
  can_be_darker = brightness - contrast >= 0
  can_be_brighter = brightness + contrast <= 1
  is_brighter = can_be_brighter and (not can_be_darker or rng.random() < 0.5)
  tint = rng.uniform(-TINT, TINT, 3)
  gray = brightness + (contrast if is_brighter else -contrast)
  color = (gray + tint - tint.mean()).astype(np.float32)
  below += ink[..., None] * (color.clip(0, 1) - below)
