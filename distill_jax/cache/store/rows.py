"""Maps examples and views to row numbers, and row numbers to shards."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

# Ids with no larger gaps than this on average are looked up in a table, in a tenth of the time of
# a search.
_MAX_AVERAGE_GAP = 8


class RowIndex:
  """The rows of a cache: view by view, and within a view the examples in their order.

  One epoch reads one view, so its rows are stored together. Row number = view x N + position of
  the example's id.

  Args:
    ids: unique integers [N], of the examples in the order of their rows.
    num_views: number of views of each example, at least 1.

  Attributes:
    ids: int64 [N].
    num_views: as given.

  Raises:
    ValueError: `ids` are no integers, none, or repeat, or `num_views` is out of range.
  """

  def __init__(self, ids: Any, num_views: int = 1):
    ids = np.asarray(ids)
    if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
      raise ValueError(
        f"ids: expected integers [N], at least one; got {ids.dtype} {list(ids.shape)}"
      )
    if not 1 <= num_views <= np.iinfo(np.int32).max:
      raise ValueError(f"num_views: expected at least 1, got {num_views}")
    self.ids = ids.astype(np.int64)
    self.num_views = int(num_views)
    self._order = np.argsort(self.ids, kind="stable")
    self._sorted_ids = self.ids[self._order]
    _check_unique(self._sorted_ids)
    self._position_of_id = self._lookup_table()

  def __len__(self) -> int:
    return len(self.ids) * self.num_views

  def ids_and_views(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids (int64) and views (int32) of rows `first` to `last` - 1."""
    view, position = np.divmod(np.arange(first, last), len(self.ids))
    return self.ids[position], view.astype(np.int32)

  def numbers(self, ids: np.ndarray, views: np.ndarray) -> np.ndarray:
    """Returns the row numbers, int64 [B], of ids [B] and views [B].

    Raises:
      ValueError: an id or a view is not in the cache; the message names it.
    """
    ids = np.asarray(ids)
    views = np.asarray(views)
    numbers = self.nearest_numbers(ids, views)
    stored_views, positions = np.divmod(numbers, len(self.ids))
    self._check_found("example id", self.ids[positions], ids)
    self._check_found("view", stored_views, views)
    return numbers

  def nearest_numbers(self, ids: np.ndarray, views: np.ndarray) -> np.ndarray:
    """Returns what `numbers` does, unchecked: any row for an id or a view that is not stored."""
    if self._position_of_id is not None:
      position = self._position_of_id.take(ids, mode="clip")
    else:
      position = self._order.take(self._sorted_ids.searchsorted(ids), mode="clip")
    if self.num_views == 1:
      return position
    view = np.minimum(views.astype(np.uint32), self.num_views - 1)
    return view * np.int64(len(self.ids)) + position

  def _lookup_table(self) -> np.ndarray | None:
    smallest, largest = self._sorted_ids[[0, -1]]
    if smallest < 0 or largest >= _MAX_AVERAGE_GAP * len(self.ids):
      return None
    table = np.zeros(largest + 1, np.int64)
    table[self.ids] = np.arange(len(self.ids))
    return table

  def _check_found(self, kind: str, stored: np.ndarray, requested: np.ndarray) -> None:
    equal = stored == requested
    if equal.all():
      return
    value = requested[np.argmin(equal)]
    hint = "; a row that only pads its batch must be False in 'where'" if value < 0 else ""
    raise ValueError(
      f"{kind} {value} is not in the cache: expected one of {len(self.ids)} ids from"
      f" {self._sorted_ids[0]} to {self._sorted_ids[-1]} and views 0 to {self.num_views - 1}{hint}"
    )


def _check_unique(sorted_ids: np.ndarray) -> None:
  repeated = sorted_ids[1:][sorted_ids[1:] == sorted_ids[:-1]]
  if repeated.size:
    raise ValueError(
      f"ids: expected unique ids, got {repeated.size} repeats; the first is {repeated[0]}"
    )


@dataclasses.dataclass(frozen=True)
class ShardPlan:
  """The division of rows into shards of equal size; the last one may be smaller.

  Attributes:
    num_rows: number of rows of the full cache.
    rows_per_shard: at least 1.

  Raises:
    ValueError: `rows_per_shard` is less than 1.
  """

  num_rows: int
  rows_per_shard: int

  def __post_init__(self):
    if self.rows_per_shard < 1:
      raise ValueError(f"rows_per_shard: expected at least 1, got {self.rows_per_shard}")

  def __len__(self) -> int:
    return -(-self.num_rows // self.rows_per_shard)

  def span(self, shard: int) -> tuple[int, int]:
    """Returns the first row of a shard and the one after its last."""
    first = shard * self.rows_per_shard
    return first, min(first + self.rows_per_shard, self.num_rows)

  @staticmethod
  def key(shard: int) -> str:
    """Returns a shard's name in the store."""
    return f"shard-{shard:08d}"

  def shard_numbers(self, keys: Iterable[str]) -> Iterator[int]:
    """Yields the numbers of the plan's shards among keys of a store."""
    for key in keys:
      match = re.fullmatch(r"shard-(\d{8,})", key)
      if match and int(match[1]) < len(self) and self.key(int(match[1])) == key:
        yield int(match[1])


def shards_of_process(missing: Iterable[int], index: int, count: int) -> list[int]:
  """Returns which of the missing shards process `index` of `count` writes.

  A shard always belongs to the same process, whatever is missing when each process looks, so that
  together they leave nothing out.
  """
  return [shard for shard in missing if shard % count == index]
