"""Checks which shards are open: read on demand and a view ahead, within bounds."""

import os
import threading

import numpy as np
import pytest
import sweeps

from distill_jax.cache import open_cache
from distill_jax.cache.store import shard_pool, shards
from distill_jax.cache.store.backend import Store
from distill_jax.cache.store.records import CorruptCache
from distill_jax.cache.store.row_reader import RowReader
from distill_jax.cache.store.shards import Incomplete

EXAMPLES, PER_SHARD, PER_VIEW = 40, 10, 4


@pytest.fixture
def reads(monkeypatch):
  """Numbers of shards in the order in which their reads begin."""
  begun, begin = [], Store.begin_read

  def watched(self, key):
    if key.startswith("shard-"):
      begun.append(int(key.removeprefix("shard-")))
    return begin(self, key)

  monkeypatch.setattr(Store, "begin_read", watched)
  return begun


def write(url, num_views=3):
  return sweeps.make(url, examples=EXAMPLES, num_views=num_views, per_shard=PER_SHARD)


def table_of(store, plan, max_shards):
  return RowReader(store, plan, memory=max_shards * plan.header(0).size)


def check_rows(table, plan, rows):
  """Reads rows by their numbers and compares them."""
  ids, views = plan.rows.ids[rows % EXAMPLES], rows // EXAMPLES
  records = table.read(ids, views)
  for name, wanted in sweeps.values(rows, plan.columns).items():
    assert records[name].tobytes() == wanted.tobytes()


def test_shards_are_read_on_demand(tmp_path, reads):
  store, plan = write(f"memory://{tmp_path}")
  reads.clear()
  table = table_of(store, plan, 100)
  assert reads == []
  check_rows(table, plan, np.array([3, 17, 5]))
  assert reads[:2] == [0, 1] and len(reads) <= 3


def test_the_next_view_is_read_ahead(tmp_path, reads, rng):
  store, plan = write(f"memory://{tmp_path}")
  table = table_of(store, plan, 2 * PER_VIEW)
  reads.clear()
  for view in range(3):
    for step in range(12):
      if step == 1:  # what this view still lacked was read with its first batch
        assert set(range(view * PER_VIEW, (view + 1) * PER_VIEW)) <= set(reads)
      check_rows(table, plan, view * EXAMPLES + rng.permutation(EXAMPLES))
      assert len(table._pool._shards) + len(table._pool._reads) <= 2 * PER_VIEW
    assert set(range((view + 1) * PER_VIEW, min(view + 2, 3) * PER_VIEW)) <= set(reads)
  assert sorted(set(reads)) == list(range(3 * PER_VIEW))
  assert len(reads) == 3 * PER_VIEW + PER_VIEW  # and the first view again, for the next epoch


def test_with_room_for_all_each_shard_is_read_once(tmp_path, reads, rng):
  store, plan = write(f"memory://{tmp_path}")
  table = table_of(store, plan, 100)
  reads.clear()
  for epoch in range(7):
    check_rows(table, plan, epoch % 3 * EXAMPLES + rng.permutation(EXAMPLES))
  assert sorted(reads) == list(range(3 * PER_VIEW))


def test_too_little_memory_warns_once(tmp_path, reads, rng):
  store, plan = write(f"memory://{tmp_path}")
  table = table_of(store, plan, 2)
  with pytest.warns(UserWarning, match="memory: .*4 shards.*for 2") as caught:
    for epoch in range(3):
      check_rows(table, plan, epoch * EXAMPLES + rng.permutation(EXAMPLES))
  assert len(caught) == 1 and len(table._pool._shards) <= 2


def test_changed_and_missing_shards_are_rejected_when_read(tmp_path):
  store, plan = write(f"memory://{tmp_path}")
  table = table_of(store, plan, 100)
  keys = [plan.plan.key(number) for number in (2, 3)]
  before = store.read(keys[0])
  store.put(keys[0], before[:-8])
  with pytest.raises(CorruptCache, match=keys[0]):
    check_rows(table, plan, np.array([25]))
  store.put(keys[0], before)
  check_rows(table, plan, np.array([25]))
  table = table_of(store, plan, 1)  # nothing is read ahead
  store.kv.write(keys[1], None).result()
  with pytest.raises(Incomplete, match="shard 3"):
    check_rows(table, plan, np.array([35]))


def test_open_cache_passes_the_bound(tmp_path):
  url = f"memory://{tmp_path}"
  store, plan = sweeps.make(
    url,
    examples=EXAMPLES,
    per_shard=PER_SHARD,
    outputs={},
    augmentation={"name": "none"},
    data={},
    teacher={},
  )
  assert open_cache(url, memory=3 * plan.header(0).size).row_reader._pool._max_shards == 3


def test_more_local_shards_than_open_files(tmp_path, monkeypatch, rng):
  monkeypatch.setattr(shard_pool, "MAX_MAPPED", 5)
  store, plan = write(tmp_path)
  before = len(os.listdir("/proc/self/fd"))
  table = RowReader(store, plan)
  for _ in range(5):
    check_rows(table, plan, rng.permutation(3 * EXAMPLES)[:30])
    assert len(os.listdir("/proc/self/fd")) <= before + 5


def test_threads_share_what_is_read(tmp_path, reads):
  store, plan = write(f"memory://{tmp_path}")
  table, failures = table_of(store, plan, 6), []

  def run(seed):
    rng = np.random.default_rng(seed)
    try:
      for _ in range(30):
        check_rows(table, plan, rng.integers(0, 3) * EXAMPLES + rng.permutation(EXAMPLES)[:8])
    except BaseException as error:
      failures.append(error)

  threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not failures


def test_a_complete_cache_is_read_back_shard_by_shard(tmp_path, reads):
  store, plan = write(f"memory://{tmp_path}")
  reads.clear()
  shards.complete(store, plan)
  assert reads == list(range(3 * PER_VIEW))
