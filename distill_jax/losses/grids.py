"""Resizes maps of logits, so that networks of several strides and label maps share one grid."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks

_FAR = -1e30  # Stands for -inf, whose product with a weight of 0 is NaN.
_LEAST = -1e25  # Not 1e-5 of it: a weight of 0 may be rounded to 1e-7.


def resize_logits(logits: ArrayLike, size: Sequence[int], *, name: str = "logits") -> jax.Array:
  """Returns maps of logits on another grid, linearly interpolated along each axis of space.

  Pixels are areas (`align_corners=False` in PyTorch, `half_pixel_centers` in TensorFlow), and a
  smaller grid is sampled without antialiasing. A value between others, of which one is -inf (a
  class that does not exist), is -inf.

  Args:
    logits: [B, h, w, C], or with other axes of space, such as [B, d, h, w, C].
    size: the new (H, W) or (D, H, W), each at least 1: larger along some axes, or smaller along
      some, but not both.
    name: the argument's name, for messages.

  Returns:
    [B, *size, C] in float32 or wider; the logits as they are where they have this size.

  Raises:
    ValueError: another number of axes, or a size that is larger along one axis and smaller along
      another.

  >>> resize_logits(jnp.array([[[[0.], [4.]]]]), (1, 4)).ravel()
  Array([0., 1., 3., 4.], dtype=float32)
  """
  logits = jnp.asarray(logits)
  size = tuple(size)
  _check_grid(logits.shape, size, name=name)
  if logits.shape[1:-1] == size:
    return logits
  values = jnp.maximum(_checks.array(name, logits), _FAR)
  shape = (len(values), *size, values.shape[-1])
  values = jax.image.resize(values, shape, "linear", antialias=False)
  return jnp.where(values < _LEAST, -jnp.inf, values)


def _check_grid(shape: tuple[int, ...], size: tuple[int, ...], *, name: str = "logits") -> None:
  """Raises a ValueError where maps of a shape [B, ..., C] cannot be resized to a size."""
  grid = tuple(shape[1:-1])
  if len(grid) != len(size) or not grid:
    raise ValueError(
      f"{name}: expected maps [B, {', '.join(map(str, size))}, C], or on another grid of "
      f"{len(size)} axes, got {tuple(shape)}: add or drop axes of space"
    )
  if any(a < b for a, b in zip(grid, size)) and any(a > b for a, b in zip(grid, size)):
    swapped = ", or swap the axes of one of them" if sorted(grid) == sorted(size) else ""
    raise ValueError(
      f"{name}: expected a grid that is nowhere or everywhere larger than {size}, got "
      f"{grid}: crop or pad one of them{swapped}"
    )
