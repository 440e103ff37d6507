"""Says which entries of a batch an augmentation changes, and what each holds."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from distill_jax.types import Batch

KINDS = ("image", "label_map", "boxes")


@dataclasses.dataclass(frozen=True)
class Entries:
  """The entries that an augmentation changes.

  Attributes:
    kinds: name -> 'image' [B, H, W, channels] or [B, H, W]; 'label_map' integers [B, H, W] or [B,
      H, W, 1]; 'boxes' [B, N, 4] of left, top, right, bottom in pixels of the first entry. Next to
      volumes or clips [B, D, H, W, channels] label maps are [B, D, H, W].
    is_default: whether the caller named none: then other images, label maps, boxes and points in
      the batch raise.
  """

  kinds: Mapping[str, str]
  is_default: bool

  def check(
    self,
    batch: Batch,
    *,
    any_shape: bool = False,
    volumes: bool = False,
    allowed: Sequence[str] = KINDS,
  ) -> None:
    """Checks the entries of a batch.

    Args:
      batch: the batch.
      any_shape: whether an 'image' may have any shape, as where rows are only blended.
      volumes: whether volumes and clips [B, D, H, W, channels] are allowed.
      allowed: the kinds that the function can change.

    Raises:
      ValueError: an entry is missing or of another shape or type, or an entry that the caller did
        not name and that depends on the image would stay as it is.
    """
    for name in self.kinds:
      if name not in batch:
        raise ValueError(f"{name}: expected an entry of the batch, got only {sorted(batch)}")
    axes = self._axes(batch) if volumes else 2
    for name, kind in self.kinds.items():
      if kind == "image":
        self._check_no_label_map(name, batch)
      if not any_shape or jnp.ndim(batch[name]) == 4:
        _check_shape(name, kind, batch[name], axes)
    others = self._dependent_entries(batch) if self.is_default else {}
    if others:
      first = next(iter(others))
      raise ValueError(
        f"entries: expected the names of all that is augmented, got a batch with {first!r} "
        f"{list(batch[first].shape)} next to 'image': {self._suggestion(others, allowed)}"
      )

  @property
  def maps(self) -> list[str]:
    """Names of the images and label maps."""
    return [name for name, kind in self.kinds.items() if kind != "boxes"]

  def size(self, batch: Batch) -> tuple[int, ...]:
    """Returns height and width, of volumes depth too, of the first entry that is no boxes."""
    return tuple(batch[self.maps[0]].shape[1 : 1 + self._axes(batch)])

  def _axes(self, batch: Batch) -> int:
    """Returns 3 for a batch of volumes or clips, else 2: the number of axes of a position."""
    shapes = {name: jnp.shape(batch[name]) for name in self.maps}
    images = [len(shape) == 5 for name, shape in shapes.items() if self.kinds[name] == "image"]
    is_volume = any(images or [len(x) == 4 and x[3] != 1 for x in shapes.values()])
    return 3 if is_volume else 2

  def _check_no_label_map(self, name: str, batch: Batch) -> None:
    """Checks that an 'image' holds no integers that are class numbers."""
    dtype = batch[name].dtype
    if jnp.issubdtype(dtype, jnp.floating):
      return
    others = [batch[other].dtype for other, kind in self.kinds.items() if kind == "image"]
    is_label = any(word in name.lower() for word in ("label", "mask", "segment"))
    is_next_to_floats = any(jnp.issubdtype(other, jnp.floating) for other in others)
    if is_label or is_next_to_floats or dtype != jnp.uint8:
      raise ValueError(
        f"{name}: expected pixels, floats or uint8 as all other images, got {dtype} "
        f'{list(batch[name].shape)} of kind "image": scale pixels to floats, '
        f"({name} / 255).astype('float32'); class numbers [B, H, W] are of kind \"label_map\""
      )

  def _dependent_entries(self, batch: Batch) -> dict[str, str]:
    """Returns the other entries that seem to depend on the image, and the kind of each.

    The kind 'points' is none of `KINDS`.
    """
    if any(jnp.ndim(batch[name]) < 3 for name in self.kinds):
      return {}  # Vectors have no size that others could share.
    size = self.size(batch)
    names = sorted(n for n in batch if n not in self.kinds and not n.startswith("teacher/"))
    kinds = {name: _guess_kind(name, batch[name], size) for name in names}
    return {name: kind for name, kind in kinds.items() if kind}

  def _suggestion(self, others: Mapping[str, str], allowed: Sequence[str]) -> str:
    """Returns what to write for a batch with other entries that depend on the image."""
    only = 'entries=("image",) to change the image only'
    points = [name for name, kind in others.items() if kind == "points"]
    if points and "boxes" in allowed:
      return (
        f"write points as boxes (x, y, x + 1, y + 1), float32 [B, N, 4], and entries={{..., "
        f'"{points[0]}": "boxes"}}, or {only}'
      )
    fixed = [name for name, kind in others.items() if kind not in allowed]
    if fixed:
      return f"it can change {list(allowed)} only: leave {fixed[0]!r} out, or write {only}"
    kinds = {**self.kinds, **others}
    entries = tuple(kinds) if set(kinds.values()) == {"image"} else kinds
    return f"write entries={entries} to change all alike, or {only}"


def make_entries(entries: Sequence[str] | Mapping[str, str] | None) -> Entries:
  """Returns checked `Entries`: names are those of images, and None is 'image' only.

  Raises:
    ValueError: an unknown kind, or no image or label map.
  """
  if entries is None:
    return Entries({"image": "image"}, is_default=True)
  if isinstance(entries, str):
    raise ValueError(f'entries: expected a tuple of names, got {entries!r}: write ("{entries}",)')
  kinds = dict(entries) if isinstance(entries, Mapping) else dict.fromkeys(entries, "image")
  unknown = sorted(set(map(str, kinds.values())) - set(KINDS))
  if unknown:
    raise ValueError(f"entries: expected kinds among {KINDS}, got {unknown[0]!r}")
  if not set(kinds.values()) - {"boxes"}:
    raise ValueError(f"entries: expected an image or a label map at least, got {kinds}")
  return Entries(kinds, is_default=False)


def _guess_kind(name: str, values: jax.Array, size: tuple[int, ...]) -> str:
  """Returns the kind of an entry by name and shape; "" where it does not depend on the image."""
  shape = jnp.shape(values)
  axes = len(size)
  height, width = size[-2:]
  is_integer = not jnp.issubdtype(values.dtype, jnp.floating)
  has_ratio = len(shape) == axes + 1 and shape[-2] * width == shape[-1] * height
  is_map = has_ratio and shape[-2] >= 4 and shape[1:-2] == size[:-2]
  if is_map or len(shape) == axes + 2:
    has_one_channel = is_map or shape[-1] == 1
    is_label_map = is_integer and has_one_channel and name not in ("image", "pixels")
    return "label_map" if is_label_map else "image"
  # Boxes, with a class or score at the end; points [x, y], with a visibility.
  if len(shape) == 3 and 2 <= shape[2] <= 5:
    return "points" if shape[2] < 4 else "boxes"
  is_named = any(word in name.lower() for word in ("box", "point", "landmark"))
  if not is_named or len(shape) < 2:
    return ""
  return "boxes" if "box" in name.lower() else "points"


def _check_shape(name: str, kind: str, values: jax.Array, axes: int) -> None:
  shape, dtype = list(values.shape), values.dtype
  if kind == "boxes":
    if axes != 2:
      raise ValueError(
        f"{name}: expected no boxes next to volumes [B, D, H, W, channels], got {dtype} {shape}: "
        "leave it out of entries"
      )
    if len(shape) != 3 or shape[2] != 4 or not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f"{name}: expected boxes, floats [B, N, 4], got {dtype} {shape}: write "
        f"{name}.astype('float32') of left, top, right, bottom, and one box as [B, 1, 4]"
      )
    return
  layout = "B, D, H, W" if axes == 3 else "B, H, W"
  is_map = len(shape) == axes + 1
  has_channels = len(shape) == axes + 2
  if kind == "label_map":
    is_map |= has_channels and shape[-1] == 1
    is_integer = jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_
    if not is_map or not is_integer:
      raise ValueError(f"{name}: expected a label map, integers [{layout}], got {dtype} {shape}")
    return
  # A volume without channels would look like an image with W of them.
  if not has_channels and not (is_map and axes == 2):
    or_flat = " or [B, H, W]" if axes == 2 else " next to other volumes"
    raise ValueError(
      f"{name}: expected images [{layout}, channels]{or_flat}, got {shape}: reshape them"
    )
  if has_channels and shape[1] in (1, 3) and shape[-1] > 4:
    raise ValueError(
      f"{name}: expected channels last, [{layout}, channels], got {shape}: write "
      f"np.moveaxis({name}, 1, -1)"
    )
