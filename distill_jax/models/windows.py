"""Applies a network to images and volumes that are larger than its input, window by window."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import reduce
from distill_jax.errors import check_integer
from distill_jax.losses import resize_logits
from distill_jax.models.adapters.kinds import check_model
from distill_jax.types import Batch, Model, Outputs

WEIGHTS = ("gaussian", "constant")


def sliding_window(
  model: Model,
  window: Sequence[int],
  *,
  overlap: float = 0.5,
  weights: str = "gaussian",
  entry: str = "image",
  outputs: Sequence[str] = ("logits",),
) -> Model:
  """Returns the model with outputs that are blended from overlapping windows of each image.

      student = sliding_window(student, (64, 64))
      fit(student, ...)  # trains on crops, evaluates on full images
      predict(student, volumes, ...)

  With `train=True`, and for images of exactly the window's size, the model is applied as it is, and
  gives all its outputs. Otherwise each output is the mean of those of the windows that cover a
  pixel, weighted by the distance to the window's center. Windows start at 0 and after every (1 -
  overlap) window; the last one is shifted inward to end with the image. An image that is smaller
  than the window is padded with zeros on both sides. MONAI's `sliding_window_inference` does the
  same.

  The network is compiled for one shape, [B, *window, ...], and runs once per window, so that memory
  holds the activations of one window per image.

  Args:
    model: a network whose outputs are on the grid of its input, or on a lower one: those are
      resized to the window (`losses.resize_logits`). Its variables stay as they are.
    window: sides of a window, [H, W] or [D, H, W].
    overlap: fraction of a window that the next one covers again, in [0, 1). With 0.5 each pixel is
      computed 4 times in an image and 8 times in a volume, away from the borders.
    weights: 'gaussian' with a standard deviation of 1/8 of each side (nnU-Net, Isensee et al.
      2021), which leaves a window's borders to its neighbors; 'constant' for equal weights.
    entry: name of the batch's entry that is cut into windows, [B, *sides, C] or [B, *sides].
    outputs: names of the outputs to blend, [B, *window, ...] or [B, *grid, C] each.

  Raises:
    ValueError: a window, overlap or weights other than these; in apply, a batch without the entry,
      an entry of other dimensions, or an output that is missing or no map of the window.

  >>> import jax.numpy as jnp
  >>> from distill_jax import models
  >>> model = models.from_apply(None, lambda w, x: w * x, variables=jnp.array(2.0))
  >>> large = models.sliding_window(model, (4, 4))
  >>> image = jnp.ones((1, 9, 6, 3))
  >>> result, _ = large.apply(*large.variables, {"image": image}, train=False, key=None)
  >>> result["logits"].shape, float(result["logits"].max())
  ((1, 9, 6, 3), 2.0)
  """
  check_model("model", model)
  window = _check(window, overlap, weights, outputs)

  def init(key, batch):
    if entry not in batch:
      return model.init(key, batch)
    x, _ = _pad(batch[entry], window)
    return model.init(key, {**batch, entry: _crop(x, (0,) * len(window), window)})

  def apply(params, state, batch, *, train, key) -> tuple[Outputs, Any]:
    sides = _sides(batch, entry, window)
    if train or sides == window:
      return model.apply(params, state, batch, train=train, key=key)
    x, before = _pad(batch[entry], window)
    positions = _positions(x.shape[1 : len(window) + 1], window, overlap, weights)

    def run(start: jax.Array) -> dict[str, jax.Array]:
      crop = {**batch, entry: _crop(x, start, window)}
      result, _ = model.apply(params, state, crop, train=False, key=key)
      return {name: _on_grid(result, name, window) for name in outputs}

    def add(sums, position: _Position):
      values = run(position.start)
      mask = functools.reduce(lambda a, b: a[..., None] * b, position.weights)
      return {name: _add(sums[name], x, mask, position.start) for name, x in values.items()}, None

    shapes = jax.eval_shape(run, positions.start[0])
    zeros = {name: _zeros(shape, x.shape, len(window)) for name, shape in shapes.items()}
    sums, _ = jax.lax.scan(add, zeros, positions)
    return {
      name: _crop(total, before, sides).astype(shapes[name].dtype) for name, total in sums.items()
    }, state

  return model._replace(init=init, apply=apply)


class _Position(NamedTuple):
  """A window's first pixel, and its weights along each axis; with a leading axis, all windows'."""

  start: Any
  weights: tuple[Any, ...]


def _positions(
  sides: Sequence[int], window: Sequence[int], overlap: float, weights: str
) -> _Position:
  """Returns the windows that cover an image; their weights at each pixel add up to 1."""
  starts = [_starts(side, size, overlap) for side, size in zip(sides, window)]
  fractions = [
    _fractions(axis_starts, side, size, weights)
    for axis_starts, side, size in zip(starts, sides, window)
  ]
  indices = np.array(list(itertools.product(*(range(len(axis)) for axis in starts))))
  return _Position(
    np.stack([axis[index] for axis, index in zip(starts, indices.T)], 1).astype(np.int32),
    tuple(axis[index].astype(np.float32) for axis, index in zip(fractions, indices.T)),
  )


def _starts(side: int, size: int, overlap: float) -> np.ndarray:
  interval = max(int(size * (1 - overlap) + 1e-6), 1)  # 10 * (1 - 0.8) is below 2.
  count = math.ceil((side - size) / interval) + 1
  return np.minimum(np.arange(count) * interval, side - size)


def _fractions(starts: np.ndarray, side: int, size: int, weights: str) -> np.ndarray:
  """Returns the weights [windows, size] along an axis, divided by their sum at each pixel.

  A window's weights are products over the axes and windows form a grid, so that the sum over all
  windows is the product of the sums along the axes.
  """
  distance = np.arange(size) - (size - 1) / 2
  curve = np.exp(-0.5 * (distance * 8 / size) ** 2) if weights == "gaussian" else np.ones(size)
  places = starts[:, None] + np.arange(size)
  sums = np.bincount(places.ravel(), np.tile(curve, len(starts)), side)
  return curve / sums[places]


def _pad(x: jax.Array, window: Sequence[int]) -> tuple[jax.Array, tuple[int, ...]]:
  """Returns an entry with sides of at least the window's, and the numbers of zeros before it."""
  missing = [max(size - side, 0) for side, size in zip(x.shape[1:], window)]
  before = tuple(count // 2 for count in missing)
  widths = [(first, count - first) for first, count in zip(before, missing)]
  others = x.ndim - 1 - len(window)
  return jnp.pad(x, [(0, 0), *widths, *[(0, 0)] * others]), before


def _crop(x: jax.Array, start: Sequence[int] | jax.Array, sides: Sequence[int]) -> jax.Array:
  rest = x.shape[len(sides) + 1 :]
  return jax.lax.dynamic_slice(x, (0, *start, *[0] * len(rest)), (x.shape[0], *sides, *rest))


def _add(total: jax.Array, x: jax.Array, mask: jax.Array, start: jax.Array) -> jax.Array:
  sides = mask.shape
  weighted = x.astype(total.dtype) * mask.reshape(*sides, *[1] * (x.ndim - 1 - len(sides)))
  updated = _crop(total, start, sides) + weighted
  return jax.lax.dynamic_update_slice(total, updated, (0, *start, *[0] * (x.ndim - 1 - len(sides))))


def _zeros(output: Any, entry: Sequence[int], dims: int) -> jax.Array:
  """Returns zeros of an output's shape, with the sides of the entry."""
  shape = (output.shape[0], *entry[1 : dims + 1], *output.shape[dims + 1 :])
  return jnp.zeros(shape, reduce.common_dtype(output.dtype, jnp.float32))


def _sides(batch: Batch, entry: str, window: Sequence[int]) -> tuple[int, ...]:
  if entry not in batch:
    raise ValueError(
      f"entry: expected an entry of the batch, got {entry!r}; it has {sorted(batch)}"
    )
  shape = batch[entry].shape
  if len(shape) - len(window) not in (1, 2):
    raise ValueError(
      f"window: expected as many sides as {entry!r} has between rows and channels, "
      f"{tuple(shape)}, got {tuple(window)}"
    )
  return tuple(shape[1 : len(window) + 1])


def _on_grid(outputs: Outputs, name: str, window: Sequence[int]) -> jax.Array:
  if name not in outputs:
    raise ValueError(
      f"outputs: expected names of outputs, got {name!r}; there are {sorted(outputs)}"
    )
  shape = outputs[name].shape
  if shape[1 : len(window) + 1] == tuple(window):
    return outputs[name]
  return resize_logits(outputs[name], window, name=f"outputs: {name!r}")


def _check(
  window: Sequence[int], overlap: float, weights: str, outputs: Sequence[str]
) -> tuple[int, ...]:
  if not isinstance(window, Sequence) or not window:
    raise ValueError(f"window: expected the sides in pixels, such as (64, 64), got {window!r}")
  sides = tuple(check_integer("window", side, least=1) for side in window)
  if not isinstance(overlap, int | float) or not 0 <= overlap < 1:
    raise ValueError(f"overlap: expected a fraction in [0, 1), got {overlap!r}: write 0.5")
  if weights not in WEIGHTS:
    raise ValueError(f"weights: expected one of {WEIGHTS}, got {weights!r}")
  if isinstance(outputs, str) or not outputs:
    raise ValueError(f"outputs: expected names of outputs, got {outputs!r}: write ('logits',)")
  return sides
