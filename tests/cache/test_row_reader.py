"""Checks random reads of rows from any number of shards."""

import threading

import numpy as np
import pytest
import sweeps

from distill_jax.cache.store import row_reader
from distill_jax.cache.store.records import CorruptCache
from distill_jax.cache.store.row_reader import RowReader


@pytest.mark.parametrize("batch", [8, 60])
@pytest.mark.parametrize("per_shard", [1, 7, 46, 100])
def test_random_rows_are_those_that_were_written(tmp_path, rng, per_shard, batch):
  store, plan = sweeps.make(tmp_path, per_shard=per_shard)
  table, expected = RowReader(store, plan), sweeps.values(np.arange(46))
  ids, views = plan.rows.ids_and_views(0, 46)
  for _ in range(5):
    rows = rng.integers(0, 46, batch)
    records = table.read(ids[rows].astype(np.int32), views[rows])
    for name, values in expected.items():
      assert records[name].tobytes() == values[rows].tobytes()
    np.testing.assert_array_equal(records["id"], ids[rows])
    np.testing.assert_array_equal(records["source_crc"], 7 * rows)
    assert not records.flags.writeable


@pytest.mark.parametrize("num_views", [1, 2])
def test_unknown_ids_and_views_are_named(tmp_path, num_views):
  store, plan = sweeps.make(tmp_path, num_views=num_views)
  table, known = RowReader(store, plan), plan.rows.ids[:3]
  unknown = np.setdiff1d(np.arange(100), plan.rows.ids)[[0, -1]]
  for wrong in (*unknown, -1, 2**31 - 1):
    with pytest.raises(ValueError, match=rf"example id {wrong}\b"):
      table.read(np.array([*known, wrong]), np.zeros(4, np.int32))
  for wrong in (-1, num_views, 2**31 - 1):
    with pytest.raises(ValueError, match=rf"view {wrong}\b"):
      table.read(known, np.array([0, wrong, 0], np.int32))
  table.read(known, np.zeros(3, np.int32))


def test_checksums_are_computed_until_each_row_was_read(tmp_path, monkeypatch):
  store, plan = sweeps.make(tmp_path)
  table, summed = RowReader(store, plan), []
  changed = row_reader.corrupt_rows
  monkeypatch.setattr(
    row_reader,
    "corrupt_rows",
    lambda raw, size: summed.append(len(raw) // size) or changed(raw, size),
  )
  ids, views = plan.rows.ids_and_views(0, 46)
  for rows in (
    np.arange(10),
    np.arange(5, 15),
    np.arange(15),
    np.arange(46),
    np.arange(46),
    np.arange(20, 40),
  ):
    table.read(ids[rows], views[rows])
  assert summed == [10, 10, 46]


def test_an_empty_batch_has_no_rows(tmp_path):
  store, plan = sweeps.make(tmp_path)
  assert RowReader(store, plan).read(np.zeros(0, int), np.zeros(0, int)).shape == (0,)


def test_corruption_in_a_later_shard_names_it(tmp_path):
  store, plan = sweeps.make(tmp_path)
  path = store.path(plan.plan.key(3))
  data = bytearray(path.read_bytes())
  data[-30] ^= 64  # its last row, number 39
  path.write_bytes(data)
  table = RowReader(store, plan)
  ids, views = plan.rows.ids_and_views(0, 46)
  table.read(ids[[3, 5]], views[[3, 5]])
  text = rf"shard-00000003 .*row 9 \(example id {ids[39]}, view 1\)"
  for _ in range(2):  # and again: it does not count as checked
    with pytest.raises(CorruptCache, match=text):
      table.read(ids[[3, 39, 5]], views[[3, 39, 5]])
  table.read(ids[[3, 38, 5]], views[[3, 38, 5]])


def test_ids_are_compared_at_every_read(tmp_path):
  """Two rows change places below a table that has checked them; their checksums are still right."""
  store, plan = sweeps.make(tmp_path, num_views=1)
  table = RowReader(store, plan)
  ids, views = plan.rows.ids_and_views(0, 23)
  table.read(ids, views)
  size = plan.header(0).record_dtype.itemsize
  with open(store.path(plan.plan.key(0)), "r+b") as file:
    start = len(plan.header(0).data)
    file.seek(start)
    first, second = file.read(size), file.read(size)
    file.seek(start)
    file.write(second + first)
  text = rf"shard-00000000 .*row 1 \(example id {ids[1]}, view 0\)"
  with pytest.raises(CorruptCache, match=text):
    table.read(ids[[5, 1]], views[[5, 1]])


def test_threads_may_read_one_table(tmp_path):
  store, plan = sweeps.make(tmp_path, examples=500, num_views=1, per_shard=90)
  table, failures = RowReader(store, plan), []

  def run(seed):
    rng = np.random.default_rng(seed)
    for _ in range(50):
      ids = rng.choice(plan.rows.ids, 16)
      if not (table.read(ids, np.zeros(16, np.int32))["id"] == ids).all():
        failures.append(ids)

  threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not failures
