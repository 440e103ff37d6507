"""Loads a folder of images and the masks with their classes, files of the same name."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from distill_jax.data.label_checks import UNLABELED
from distill_jax.data.sets import image_files
from distill_jax.data.sets.folder import SUFFIXES
from distill_jax.data.source import Source
from distill_jax.storage import folders

Color = int | tuple[int, int, int]
_MASK_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
_INDEX_MODES = ("1", "L", "P", "I", "I;16")
_COLOR_MODES = ("RGB", "RGBA")
_MAX_COLORS = 8


@dataclasses.dataclass(frozen=True)
class _Masks:
  """What the pixels of masks mean."""

  classes: int | None
  colors: Mapping[Color, int] | None
  ignore_label: int | None


def load(
  path: str | Path,
  *,
  classes: int | None = None,
  class_names: Sequence[str] = (),
  colors: Mapping[Color, int] | None = None,
  ignore_label: int | None = 255,
  pad_to: tuple[int, int] | None = None,
  channels: int = 3,
  max_pixels: int = 50_000_000,
) -> Source:
  """Returns the images of `path`/images, float32 in 0..1, and the classes of `path`/masks.

  An image and its mask have one name, but for the suffix: images/a/3.jpg, masks/a/3.png. A mask
  holds class numbers: gray values, or indices of a palette, whatever its colors. Ids number the
  images in the order of their paths. All are held in memory.

  Args:
    path: the folder.
    classes: number of classes; by default that of `class_names`, else one more than the largest
      class number in the masks.
    class_names: one name per class.
    colors: class number of each color (red, green, blue), or of each gray value or index, e.g. `{0:
      0, 255: 1}` for black and white masks; the ignore label is a class number here too.
    ignore_label: class number of pixels that do not count; None: all count.
    pad_to: (height, width), no smaller than any image: images are padded with zeros and masks with
      the ignore label at the bottom and on the right. None: the images have one size.
    channels: 3 (RGB) or 1 (gray).
    max_pixels: largest height times width of an image.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: a file without the other one; an image of another size than its mask, or than the
      first image; a file that cannot be decoded, or a mask of another kind or with another class.
      The error names the file.
  """
  root = folders.resolve(path, "path")
  pairs = _pairs(root)
  masks = _Masks(classes or len(class_names) or None, colors, ignore_label)
  images: list[np.ndarray] = []
  labels: list[np.ndarray] = []
  for image_file, mask_file in pairs:
    image = image_files.read(image_file, channels, max_pixels, "mask")
    label = _read_mask(mask_file, masks)
    if image.shape[:2] != label.shape:
      raise ValueError(
        f"{mask_file}: expected a mask of {image_files.size_of(image)} pixels as {image_file}, got "
        f"{image_files.size_of(label)}: resize the mask by its nearest pixel"
      )
    if pad_to is not None:
      image = image_files.pad(image, pad_to, 0, image_file)
      label = image_files.pad(label, pad_to, UNLABELED, image_file)
    elif images:
      image_files.check_same_size(image, images[0], image_file)
    images.append(image)
    labels.append(label)
  label = np.stack(labels)
  _check_not_black_and_white(label, masks, pairs)
  count = masks.classes or int(label.max()) + 1
  arrays = {"image": np.stack(images), "label": label}
  return Source(arrays, count, tuple(class_names), root.resolve().name, UNLABELED)


def _pairs(root: Path) -> list[tuple[Path, Path]]:
  """Returns images and masks of the same name, in the order of their paths."""
  images = _files(root, "images")
  masks = _files(root, "masks")
  for folder, ours, theirs in (("masks", images, masks), ("images", masks, images)):
    missing = sorted(ours.keys() - theirs.keys())
    if missing:
      raise ValueError(
        f"{ours[missing[0]]}: expected a file of this name in {root / folder}, got none for "
        f"{len(missing)} of {len(ours)}: add or remove them"
      )
  return [(images[name], masks[name]) for name in sorted(images)]


def _files(root: Path, folder: str) -> dict[tuple[str, ...], Path]:
  """Returns {parts of the path without suffix: file} of the images in a folder."""
  parent = root / folder
  if not parent.is_dir():
    raise FileNotFoundError(
      f"path: expected the folders images and masks in {root}, got no {folder}: name them so"
    )
  files: dict[tuple[str, ...], Path] = {}
  for file in sorted(parent.rglob("*")):
    name = file.relative_to(parent).with_suffix("").parts
    is_hidden = any(part.startswith(".") for part in file.relative_to(parent).parts)
    if is_hidden or file.suffix.lower() not in SUFFIXES:
      continue
    if name in files:
      raise ValueError(f"{file}: expected one file of this name, got {files[name].name} too")
    files[name] = file
  if not files:
    raise ValueError(f"path: expected images in {parent}, got none")
  return files


def _read_mask(file: Path, masks: _Masks) -> np.ndarray:
  """Returns the class numbers of a mask, int32 [height, width], with `UNLABELED` for ignored."""
  if file.suffix.lower() not in _MASK_SUFFIXES:
    raise ValueError(
      f"{file}: expected a mask without loss, such as a PNG, got {file.suffix}, which changes "
      "class numbers: export the masks again"
    )
  try:
    with PIL.Image.open(file) as image:
      mode = image.mode
      values = np.asarray(image.convert("RGB") if mode == "RGBA" else image)
  except Exception as error:
    raise ValueError(f"{file}: expected a mask, got a file that cannot be read: {error}") from error
  if mode not in _INDEX_MODES + _COLOR_MODES or (mode in _COLOR_MODES and masks.colors is None):
    raise ValueError(_mode_message(file, mode, values))
  label = values.astype(np.int32)
  if masks.colors is not None:
    label = _classes_of_colors(file, label, masks.colors)
  is_ignored = np.zeros(label.shape, bool)
  if masks.ignore_label is not None:
    is_ignored = label == masks.ignore_label
  outside = ~is_ignored & ((label < 0) | (label >= (masks.classes or np.inf)))
  if outside.any():
    raise ValueError(
      f"{file}: expected classes 0 to {(masks.classes or 0) - 1}, got {label[outside][0]}: give "
      "more classes, or ignore_label= if it marks pixels that do not count"
    )
  return np.where(is_ignored, UNLABELED, label)


def _classes_of_colors(file: Path, values: np.ndarray, colors: Mapping[Color, int]) -> np.ndarray:
  """Returns the class numbers of colors [height, width, 3], or of gray values or indices."""
  packed = _pack(values) if values.ndim == 3 else values
  label = np.full(packed.shape, np.iinfo(np.int32).min, np.int32)
  for color, number in colors.items():
    if np.size(color) == (3 if values.ndim == 3 else 1):
      label[packed == (_pack(np.array(color)) if np.size(color) == 3 else color)] = number
  unknown = label == np.iinfo(np.int32).min
  if unknown.any():
    raise ValueError(
      f"{file}: expected the colors {list(colors)}, got {values[unknown][0].tolist()} in "
      f"{unknown.sum()} pixels: add it to colors"
    )
  return label


def _pack(colors: np.ndarray) -> np.ndarray:
  return (colors * [1 << 16, 1 << 8, 1]).sum(-1)


def _mode_message(file: Path, mode: str, values: np.ndarray) -> str:
  if mode not in _COLOR_MODES:
    return (
      f"{file}: expected class numbers (modes {', '.join(_INDEX_MODES)}), got mode {mode}: save "
      "integers, PIL.Image.fromarray(label.astype('uint8'))"
    )
  found = [
    tuple(color) for color in np.unique(values.reshape(-1, 3), axis=0)[:_MAX_COLORS].tolist()
  ]
  table = {color: number for number, color in enumerate(found)}
  return (
    f"{file}: expected class numbers, got colors (mode {mode}): give the class of each, such as "
    f"colors={table}"
  )


def _check_not_black_and_white(label: np.ndarray, masks: _Masks, pairs: Sequence) -> None:
  """Checks that 255 is not the only class next to 0, which `ignore_label=255` would hide."""
  if masks.ignore_label != 255 or masks.colors is not None:
    return
  values = np.unique(label)
  if values.tolist() in ([UNLABELED], [UNLABELED, 0]):
    raise ValueError(
      f"{pairs[0][1]}: expected class numbers, got only 0 and 255 in all masks, of which 255 is "
      "the ignore label: write colors={0: 0, 255: 1} for black and white masks"
    )
