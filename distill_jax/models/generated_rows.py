"""Chooses rows of a batch by key and id, and replaces them by rows that a network generates."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from distill_jax.types import Batch


def check_fraction(fraction: float) -> None:
  """Raises ValueError for a fraction of rows outside of [0, 1]."""
  if not 0 <= fraction <= 1:
    nearest = min(max(fraction, 0), 1)
    raise ValueError(f"fraction: expected a number in [0, 1], got {fraction}; nearest is {nearest}")


def check_entries(batch: Batch, names: tuple[str, ...]) -> None:
  """Checks that a batch has 'id', and entries of tokens of one shape [rows, length].

  Args:
    batch: its arrays.
    names: entries of tokens; all but 'tokens' and 'label' are optional.

  Raises:
    ValueError: an entry is missing, or shapes differ.
  """
  for name in ("id", "tokens", "label"):
    if name not in batch:
      raise ValueError(
        f"batch: expected an entry {name!r}, which on_policy reads, got {sorted(batch)}"
      )
  shapes = {name: batch[name].shape for name in names if name in batch}
  if len(shapes["tokens"]) != 2 or len(set(shapes.values())) > 1:
    raise ValueError(f"batch: expected entries of one shape [rows, length], got {shapes}")


def row_keys(key: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns a key for each id [B]."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, ids)


def rank_rows(key: jax.Array, ids: jax.Array, fraction: float) -> tuple[jax.Array, int]:
  """Returns random ranks [groups, rows of a group], and how many rows of a group to replace.

  There are as many groups as divide the replaced rows evenly, so that no row moves between devices
  that hold whole groups.
  """
  rows = len(ids)
  total = round(fraction * rows)
  if fraction and not total:
    raise ValueError(
      f"fraction: expected at least one of {rows} rows, got {fraction}; nearest is {1 / rows:.3g}"
    )
  groups = math.gcd(total, rows)
  numbers = jax.vmap(jax.random.uniform)(row_keys(jax.random.fold_in(key, 0), ids))
  return numbers.reshape(groups, -1).argsort(1).argsort(1), total // groups


def first_rows(x: jax.Array, ranks: jax.Array, count: int) -> jax.Array:
  """Returns the rows of [B, ...] with the first ranks of their groups, in the order of ranks."""
  return _take(x.reshape(*ranks.shape, *x.shape[1:]), ranks.argsort(1)[:, :count])


def _take(grouped: jax.Array, indices: jax.Array) -> jax.Array:
  indices = indices.reshape(*indices.shape, *(1,) * (grouped.ndim - 2))
  rows = jnp.take_along_axis(grouped, indices, 1)
  return rows.reshape(-1, *rows.shape[2:])


def replace_rows(
  batch: Batch, new: Mapping[str, jax.Array], ranks: jax.Array, count: int
) -> dict[str, jax.Array]:
  """Returns the batch's entries with the new rows at the positions of the selected ones."""
  old = {name: batch[name] for name in new if name in batch}
  old["generated"] = jnp.zeros(ranks.size, bool)
  indices = jnp.minimum(ranks, count - 1)
  spread = {}
  for name in old:
    grouped = new[name].reshape(-1, count, *new[name].shape[1:])
    spread[name] = _take(grouped, indices).astype(old[name].dtype)
  replace = (ranks < count).reshape(-1) & spread["generated"]
  masks = {name: replace.reshape(-1, *(1,) * (x.ndim - 1)) for name, x in spread.items()}
  return {name: jnp.where(masks[name], spread[name], old[name]) for name in old}
