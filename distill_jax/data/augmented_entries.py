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
      H, W, 1]; 'boxes' [B, N, 4] of left, top, right, bottom in pixels of the first entry.
    is_default: whether the caller named none: then other images in the batch raise.
  """

  kinds: Mapping[str, str]
  is_default: bool

  def check(self, batch: Batch, *, any_shape: bool = False) -> None:
    """Checks the entries of a batch.

    Args:
      batch: the batch.
      any_shape: whether an 'image' may have any shape, as where rows are only blended.

    Raises:
      ValueError: an entry is missing or of another shape, or an image that the caller did not name
        would stay as it is.
    """
    for name, kind in self.kinds.items():
      if name not in batch:
        raise ValueError(f"{name}: expected an entry of the batch, got only {sorted(batch)}")
      if not any_shape or jnp.ndim(batch[name]) == 4:
        _check_shape(name, kind, batch[name])
    others = self._other_images(batch) if self.is_default else []
    if others:
      names = (*self.kinds, *others)
      raise ValueError(
        f"entries: expected the names of all that is augmented, got a batch with {others[0]!r} "
        f"{list(batch[others[0]].shape)} next to 'image': write entries={names} to change all "
        'alike (a mapping such as {"image": "image", "label": "label_map", "boxes": "boxes"} for '
        'others than images), or entries=("image",) to change the image only'
      )

  def size(self, batch: Batch) -> tuple[int, int]:
    """Returns height and width of the first entry that is no boxes."""
    first = next(name for name, kind in self.kinds.items() if kind != "boxes")
    height, width = batch[first].shape[1:3]
    return height, width

  def _other_images(self, batch: Batch) -> list[str]:
    """Returns the names of other entries that seem to be images, label maps or boxes."""
    if any(jnp.ndim(batch[name]) < 3 for name in self.kinds):
      return []  # Vectors have no size that others could share.
    height, width = self.size(batch)

    def is_image(name: str) -> bool:
      shape = jnp.shape(batch[name])
      is_map = len(shape) == 3 and shape[1] >= 4 and shape[1] * width == shape[2] * height
      is_float = jnp.issubdtype(batch[name].dtype, jnp.floating)
      is_boxes = len(shape) == 3 and shape[2] == 4 and is_float
      return len(shape) == 4 or is_map or is_boxes

    return sorted(
      name
      for name in batch
      if name not in self.kinds and not name.startswith("teacher/") and is_image(name)
    )


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


def _check_shape(name: str, kind: str, values: jax.Array) -> None:
  shape, dtype = list(values.shape), values.dtype
  if kind == "boxes":
    if len(shape) != 3 or shape[2] != 4 or not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(f"{name}: expected boxes, floats [B, N, 4], got {dtype} {shape}")
    return
  if kind == "label_map":
    is_map = len(shape) == 3 or (len(shape) == 4 and shape[3] == 1)
    is_integer = jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_
    if not is_map or not is_integer:
      raise ValueError(f"{name}: expected a label map, integers [B, H, W], got {dtype} {shape}")
    return
  if len(shape) not in (3, 4):
    raise ValueError(
      f"{name}: expected images [B, H, W, channels] or [B, H, W], got {shape}: reshape them"
    )
  if len(shape) == 4 and shape[1] in (1, 3) and shape[3] > 4:
    raise ValueError(
      f"{name}: expected channels last, [B, H, W, channels], got {shape}: write "
      f"np.moveaxis({name}, 1, -1)"
    )
