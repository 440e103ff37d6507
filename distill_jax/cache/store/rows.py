"""Which row holds which view of which example, and which shard holds which rows."""

import dataclasses
import re
from collections.abc import Iterable, Iterator

import numpy as np

_SPREAD = (
  8  # ids that leave no larger gaps on average are looked up in a table: a tenth of a search's time
)


class Rows:
  """The rows of a cache: view by view, and within each the examples in their order.

  One epoch reads one view, so its rows lie together. Row number = view x N + position of the example's id.

  Attributes:
    ids: of the N examples, int64.
    num_views: how many of each are kept.

  Raises:
    ValueError: ids are not integers, there are none, or some repeat; `num_views` is not at least 1.
  """

  def __init__(self, ids, num_views: int = 1):
    given = np.asarray(ids)
    if given.ndim != 1 or given.size == 0 or not np.issubdtype(given.dtype, np.integer):
      raise ValueError(
        f"ids: expected integers [N], at least one; got {given.dtype} {list(given.shape)}"
      )
    if not 1 <= num_views <= np.iinfo(np.int32).max:
      raise ValueError(f"num_views: expected at least 1, got {num_views}")
    self.ids, self.num_views = given.astype(np.int64), int(num_views)
    order = np.argsort(self.ids, kind="stable")
    ordered = self.ids[order]
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.size:
      raise ValueError(
        f"ids: expected each once, {repeated.size} repeat; the first is {repeated[0]}"
      )
    self._order, self._ordered, self._place = order, ordered, None
    if ordered[0] >= 0 and ordered[-1] < _SPREAD * len(ordered):
      self._place = np.zeros(ordered[-1] + 1, np.int64)
      self._place[self.ids] = np.arange(len(self.ids))

  def __len__(self) -> int:
    return len(self.ids) * self.num_views

  def at(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids (int64) and views (int32) of rows `first` to `last` - 1."""
    view, position = np.divmod(np.arange(first, last), len(self.ids))
    return self.ids[position], view.astype(np.int32)

  def numbers(self, ids, views) -> np.ndarray:
    """The row numbers, int64 [B], of ids [B] and views [B].

    Raises:
      ValueError: an id or a view is not in the cache; it is named.
    """
    ids, views = np.asarray(ids), np.asarray(views)
    numbers = self.nearest(ids, views)
    view, position = np.divmod(numbers, len(self.ids))
    for what, held, wanted in (("example id", self.ids[position], ids), ("view", view, views)):
      if not (held == wanted).all():
        wrong = wanted[np.argmin(held == wanted)]
        padding = (
          "; a row that only fills up its batch must be False in 'where'" if wrong < 0 else ""
        )
        raise ValueError(
          f"{what} {wrong} is not in the cache: it holds {len(self.ids)} ids from {self._ordered[0]} to"
          f" {self._ordered[-1]}, and views 0 to {self.num_views - 1} of each{padding}"
        )
    return numbers

  def nearest(self, ids: np.ndarray, views: np.ndarray) -> np.ndarray:
    """As `numbers`, without its checks: some row or other where an id or a view is not in the cache."""
    if self._place is not None:
      place = self._place.take(ids, mode="clip")
    else:
      place = self._order.take(self._ordered.searchsorted(ids), mode="clip")
    if self.num_views == 1:
      return place
    return np.minimum(views.astype(np.uint32), self.num_views - 1) * np.int64(len(self.ids)) + place


@dataclasses.dataclass(frozen=True)
class Plan:
  """How rows are divided into shards: as many in each, but for the last.

  Attributes:
    rows: of the whole cache.
    rows_per_shard: at least 1.

  Raises:
    ValueError: `rows_per_shard` is less than 1.
  """

  rows: int
  rows_per_shard: int

  def __post_init__(self):
    if self.rows_per_shard < 1:
      raise ValueError(f"rows_per_shard: expected at least 1, got {self.rows_per_shard}")

  def __len__(self) -> int:
    return -(-self.rows // self.rows_per_shard)

  def span(self, shard: int) -> tuple[int, int]:
    """First row of a shard, and the one behind its last."""
    first = shard * self.rows_per_shard
    return first, min(first + self.rows_per_shard, self.rows)

  @staticmethod
  def key(shard: int) -> str:
    """A shard's name in the store."""
    return f"shard-{shard:08d}"

  def planned(self, keys: Iterable[str]) -> Iterator[int]:
    """The numbers of the plan's shards among keys of a store."""
    for key in keys:
      number = re.fullmatch(r"shard-(\d{8,})", key)
      if number and int(number[1]) < len(self) and self.key(int(number[1])) == key:
        yield int(number[1])


def share(missing: Iterable[int], index: int, count: int) -> list[int]:
  """What process `index` of `count` is to write of the missing shards.

  A shard is always the same process's, whatever is missing when each of them looks: together they leave nothing out.
  """
  return [shard for shard in missing if shard % count == index]
