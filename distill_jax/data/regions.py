"""Splits the tiles of one large image by region, so that no two parts touch."""

from typing import Any

import numpy as np

from distill_jax.data.checks import check_fraction
from distill_jax.data.groups import near
from distill_jax.data.source import Source
from distill_jax.data.split import hash_ids
from distill_jax.errors import check_integer


def split_regions(
  source: Source, fraction: float = 0.1, seed: int = 0, *, region: int, gap: int = 1
) -> tuple[Source, Source]:
  """Holds square regions of a large image out, with all tiles in them.

  Neighboring tiles look alike, so that tiles that are split one by one tell nothing about another
  place. Which regions are held out depends on their position, `fraction` and `seed` only. A tile
  belongs to the region of its center. Tiles of the other regions that are nearer than `gap` to a
  held-out tile are left out of both parts.

  Args:
    source: examples whose `groups` are rectangles [N, 4], (left, top, right, bottom) in pixels of
      the large image.
    fraction: the expected fraction of held-out regions, in (0, 1).
    seed: from 0 to 2^32 - 1.
    region: side of a region in pixels.
    gap: least number of pixels between tiles of the two parts; 1: they do not touch.

  Returns:
    `(rest, held_out)`, each in the source's order.

  Raises:
    ValueError: an argument is out of its range, the groups are no rectangles, or one part would be
      empty.

  >>> import numpy as np
  >>> from distill_jax import data
  >>> left, top = np.meshgrid(np.arange(0, 64, 8), np.arange(0, 64, 8))
  >>> tiles = np.stack([left, top, left + 8, top + 8], -1).reshape(-1, 4)
  >>> source = data.Source({"image": np.zeros((64, 8, 8, 1)), "tile": tiles}, groups="tile")
  >>> train, test = data.split_regions(source, 0.25, region=16, seed=1)
  >>> len(train), len(test)  # The others touch both.
  (20, 16)
  """
  rectangles = _rectangles(source)
  check_fraction(fraction)
  check_integer("region", region, 1)
  check_integer("gap", gap, 0)
  columns, rows = np.floor((rectangles[:, :2] + rectangles[:, 2:]) / (2 * region)).astype(int).T
  numbers = (rows << 32) + columns
  held_out = hash_ids(numbers, seed, "split_regions") < fraction
  rest = ~held_out
  rest[rest] = ~near(rectangles[rest], rectangles[held_out], gap)
  if not held_out.any() or not rest.any():
    raise ValueError(
      f"fraction: expected two parts that hold examples, got {held_out.sum()} held out and "
      f"{rest.sum()} that are {gap} pixels or more away in {source.name}: choose a smaller region "
      "or gap, a fraction nearer 0.5, or another seed"
    )
  return source.take(rest), source.take(held_out)


def _rectangles(source: Any) -> np.ndarray:
  if not isinstance(source, Source):
    raise ValueError(
      f"source: expected a Source, got {type(source).__name__}: write data.Source(arrays, ..., "
      'groups="tile")'
    )
  values = source.arrays.get(source.groups) if source.groups else None
  if values is None or values.ndim != 2:
    raise ValueError(
      f"groups: expected rectangles [N, 4] in {source.name}, got {source.groups or 'none'!r}: name "
      'their entry in data.Source(arrays, ..., groups="tile"), or use data.split for numbers'
    )
  return values
