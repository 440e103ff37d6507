"""A float64 reference of bilinear interpolation, for losses, terms and networks of maps."""

import numpy as np


def interpolate(x, size):
  """Returns maps [B, ..., C] at a size: each axis by the two nearest centers of pixels.

  Centers are at (i + 1/2), and beyond the edges the values are those of the edges.
  """
  x = np.asarray(x, np.float64)
  for axis, new in enumerate(size, start=1):
    old = x.shape[axis]
    center = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.floor(center).astype(int)
    high = np.minimum(low + 1, old - 1)
    weight = (center - low).reshape(-1, *[1] * (x.ndim - 1 - axis))
    x = (1 - weight) * x.take(low, axis) + weight * x.take(high, axis)
  return x
