"""Checks the books of a cache through corruption, kills, full disks and many writers."""

import concurrent.futures
import json
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import sweeps

from distill_jax.cache.store import manifest as manifests
from distill_jax.cache.store import shards
from distill_jax.cache.store.backend import StoreError, open_store
from distill_jax.cache.store.manifest import Mismatch
from distill_jax.cache.store.records import CorruptCache
from distill_jax.cache.store.rows import RowIndex, ShardPlan, shards_of_process
from distill_jax.cache.store.shards import Incomplete


def test_rows_are_ordered_by_view():
  rows = RowIndex([7, 3, 5], num_views=2)
  assert len(rows) == 6
  ids, views = rows.ids_and_views(1, 5)
  np.testing.assert_array_equal(ids, [3, 5, 7, 3])
  np.testing.assert_array_equal(views, [0, 0, 1, 1])
  np.testing.assert_array_equal(rows.numbers([5, 5, 3], [1, 0, 1]), [5, 2, 4])


@pytest.mark.parametrize("spread", [1, 3, 10**9])
def test_every_row_is_found_by_its_id_and_view(rng, spread):
  rows = RowIndex(rng.permutation(50) * spread - 5 * (spread == 3), num_views=3)
  np.testing.assert_array_equal(rows.numbers(*rows.ids_and_views(0, 150)), np.arange(150))
  for ids in ([rows.ids.max() + 1], [rows.ids.min() - 1], [rows.ids[0], -1000], [2**40 + 1]):
    with pytest.raises(ValueError, match=rf"example id {ids[-1]}\b.*50 ids"):
      rows.numbers(ids, [0] * len(ids))
  for view in (-1, 3, 2**32):
    with pytest.raises(ValueError, match=rf"view {view}\b.* 0 to 2"):
      rows.numbers(rows.ids[:2], [0, view])


@pytest.mark.parametrize(
  "ids, views, text",
  [
    ([3, 9, 1, 9, 3], 1, "ids: expected unique ids, got 2 repeats; the first is 3"),
    ([], 1, "ids: expected integers"),
    ([0.5], 1, "got float64 [1]"),
    ([[1]], 1, "got int64 [1, 1]"),
    ([1], 0, "num_views: expected at least 1, got 0"),
  ],
)
def test_invalid_rows_are_rejected(ids, views, text):
  with pytest.raises(ValueError) as caught:
    RowIndex(ids, views)
  assert text in str(caught.value)


@pytest.mark.parametrize("rows, per_shard", [(1, 1), (10, 3), (9, 3), (5, 100)])
def test_every_row_is_in_one_shard(rows, per_shard):
  plan = ShardPlan(rows, per_shard)
  spans = [plan.span(shard) for shard in range(len(plan))]
  assert np.concatenate([np.arange(*span) for span in spans]).tolist() == list(range(rows))
  assert max(last - first for first, last in spans) <= per_shard
  assert list(plan.shard_numbers(map(plan.key, range(len(plan) + 2)))) == list(range(len(plan)))


def test_other_keys_are_no_shards():
  names = [
    "shard-",
    "shard-0",
    "shard-000000001",
    "shard-00000000.bak",
    "x/shard-00000000",
    "shard-00000001",
  ]
  assert list(ShardPlan(2, 1).shard_numbers(names)) == [1]
  with pytest.raises(ValueError, match="rows_per_shard"):
    ShardPlan(10, 0)


def test_processes_divide_whatever_each_found_missing():
  missing = [1, 2, 3, 5, 8, 9]
  assert sorted(sum((shards_of_process(missing, index, 4) for index in range(4)), [])) == missing
  later = missing[2:]  # another process has written two by the time this one looks
  assert set(shards_of_process(missing, 0, 2) + shards_of_process(later, 1, 2)) >= set(later)


def test_a_cache_is_read_back_from_every_location(url):
  store, plan = sweeps.make(url)
  sweeps.read_all(store)
  found = shards.open_complete(open_store(url), {"teacher": "a"})
  assert found.digest == plan.digest and found.columns == plan.columns
  np.testing.assert_array_equal(found.rows.ids, plan.rows.ids)
  record = shards.complete(store, plan)
  data = [store.read(key) for key in store.keys("shard-")]
  assert record["bytes"] == sum(map(len, data)) and record["rows"] == 46 and len(data) == 5


def test_the_digest_is_that_of_all_shards_in_order(tmp_path):
  store, plan = sweeps.make(tmp_path)
  tool = shutil.which("sha256sum") or pytest.skip("no sha256sum")
  command = f"cat {tmp_path}/shard-* | {tool}"
  printed = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
  assert printed.split()[0] == shards.complete(store, plan)["sha256"]


def test_source_checksums_are_kept(tmp_path):
  store, plan = sweeps.make(tmp_path)
  crcs = np.concatenate([shards.open_shard(store, plan, n).records["source_crc"] for n in range(5)])
  np.testing.assert_array_equal(crcs, 7 * np.arange(46))


def test_the_first_manifest_remains(url):
  store = open_store(url)
  first = sweeps.manifest()
  assert shards.begin(store, first) is first
  other = manifests.Manifest(
    {"teacher": "a"}, first.columns, first.rows, first.rows_per_shard, provenance={"date": "later"}
  )
  assert shards.begin(store, other).provenance == {}
  assert json.loads(store.read("manifest.json"))["body"]["identity"] == {"teacher": "a"}


def test_of_two_that_begin_at_once_the_second_follows(tmp_path, monkeypatch):
  """Both find nothing; one creates the manifest first."""
  store, mine = open_store(tmp_path), sweeps.manifest(seed=1)
  load, looks = manifests.load, []

  def late(store):
    looks.append(store)
    if len(looks) == 1:
      shards.begin(store, sweeps.manifest(seed=2))
      return None
    return load(store)

  monkeypatch.setattr(manifests, "load", late)
  with pytest.raises(Mismatch, match="seed: expected 1, got 2"):
    shards.begin(store, mine)
  assert (
    shards.begin(store, mine, same=lambda field, old, new: field == "seed" or old == new).body[
      "identity"
    ]["seed"]
    == 2
  )


def test_each_field_that_differs_is_named(tmp_path):
  store = open_store(tmp_path)
  shards.begin(
    store,
    sweeps.manifest(data={"name": "digits", "num_views": 2, "ratio": 0.1, "size": (8, 8)}, gone=1),
  )
  other = sweeps.manifest(
    examples=24,
    num_views=3,
    per_shard=11,
    columns=sweeps.COLUMNS[:1],
    data={"name": "mnist", "num_views": 2, "ratio": 0.2, "size": (8, 8)},
    come=None,
  )
  with pytest.raises(Mismatch) as caught:
    shards.begin(store, other)
  first, *lines = str(caught.value).splitlines()
  assert str(tmp_path) in first
  assert [line.strip().partition(":")[0] for line in lines if "ids:" not in line] == [
    "columns",
    "examples",
    "come",
    "data.name",
    "data.ratio",
    "gone",
    "num_views",
  ]
  assert len(lines) == 8


def test_rows_per_shard_in_an_identity_is_compared(tmp_path):
  store = open_store(tmp_path)
  shards.begin(store, sweeps.manifest(examples=20, **{"rows_per_shard": 5}))
  with pytest.raises(Mismatch, match="rows_per_shard: expected 6, got 5"):
    shards.begin(store, sweeps.manifest(examples=20, **{"rows_per_shard": 6}))


def test_the_first_writer_divides_the_rows(tmp_path):
  store = open_store(tmp_path)
  first = shards.begin(store, sweeps.manifest(per_shard=10))
  second = shards.begin(store, sweeps.manifest(per_shard=9))
  assert second.rows_per_shard == 10 and second.digest == first.digest


def test_a_reader_chooses_what_counts_as_equal(tmp_path):
  store, _ = sweeps.make(tmp_path, probe=[1.0, 2.0])
  wanted = {"teacher": "a", "probe": [1.0, 2.0000001]}
  with pytest.raises(Mismatch, match=r"probe: .*1\.0, 2\.0000001"):
    shards.open_complete(store, wanted)
  seen = {}

  def same(field, old, new):
    seen[field] = (old, new)
    return field == "probe" or old == new

  assert shards.open_complete(store, wanted, same).body["identity"]["probe"] == [1.0, 2.0]
  assert seen["probe"] == ([1.0, 2.0], [1.0, 2.0000001]) and seen["teacher"] == ("a", "a")
  with pytest.raises(Mismatch, match="teacher: expected 'b', got 'a'"):
    shards.open_complete(store, {**wanted, "teacher": "b"}, same)


def test_a_field_that_only_one_side_has_is_never_equal(tmp_path):
  store, _ = sweeps.make(tmp_path, old=1)
  with pytest.raises(Mismatch) as caught:
    shards.open_complete(store, {"teacher": "a", "new": 2}, same=lambda field, old, new: True)
  assert "new: expected 2, got '(absent)'" in str(caught.value)
  assert "old: expected '(absent)', got 1" in str(caught.value)


def test_an_empty_shard_is_rejected(tmp_path):
  store, plan = sweeps.make(tmp_path)
  store.path(plan.plan.key(1)).write_bytes(b"")
  with pytest.raises(CorruptCache, match="shard-00000001"):
    shards.complete(store, plan)


def test_missing_shards_are_named(tmp_path):
  with pytest.raises(Incomplete, match=f"cache: .*{tmp_path}/none"):
    shards.open_complete(open_store(tmp_path / "none"))
  store, plan = sweeps.make(tmp_path / "some", per_shard=4)
  for shard in (1, 5, 6, 7, 8, 11):
    store.path(plan.plan.key(shard)).unlink()
  text = r"6 of 12 .*1, 5, 6, 7, 8, \.\.\."
  for attempt in (lambda: shards.open_complete(store), lambda: shards.complete(store, plan)):
    with pytest.raises(Incomplete, match=text):
      attempt()
  with pytest.raises(Incomplete, match="shard 5"):
    shards.open_shard(store, plan, 5)
  sweeps.write(store, plan, shards.missing_shards(store, plan))
  sweeps.read_all(store)


def test_a_cache_that_was_never_read_back_is_rejected(tmp_path):
  store, plan = sweeps.make(tmp_path)
  store.path("complete.json").unlink()
  with pytest.raises(Incomplete, match=r"complete\.json is missing"):
    shards.open_complete(store)
  shards.complete(store, plan)
  assert shards.open_complete(store).digest == plan.digest


def test_a_corrupt_shard_prevents_completion(tmp_path):
  store, plan = sweeps.make(tmp_path)
  store.path("complete.json").unlink()
  path = store.path(plan.plan.key(2))
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(data)
  with pytest.raises(CorruptCache, match=r"shard-00000002 .*row 9 \(example id "):
    shards.complete(store, plan)
  assert store.read("complete.json") is None
  path.unlink()
  sweeps.write(store, plan, shards.missing_shards(store, plan))
  assert shards.complete(store, plan)["rows"] == 46


def test_a_valid_shard_must_agree_with_the_record(tmp_path):
  """A second, slightly different teacher cannot replace a shard, only write a missing one."""
  store, plan = sweeps.make(tmp_path)
  rows, path = np.arange(*plan.plan.span(0)), store.path(plan.plan.key(0))
  before = path.read_bytes()
  shards.write_shard(store, plan, 0, rows * 7 + 1, sweeps.values(rows))
  assert path.read_bytes() == before
  path.unlink()
  shards.write_shard(store, plan, 0, rows * 7 + 1, sweeps.values(rows))
  with pytest.raises(CorruptCache, match=r"complete\.json"):
    shards.complete(store, plan)


def test_the_record_of_another_cache_is_rejected(tmp_path):
  store, _ = sweeps.make(tmp_path / "a")
  other, _ = sweeps.make(tmp_path / "b", teacher="b")
  store.put("complete.json", other.read("complete.json"))
  with pytest.raises(CorruptCache, match=r"complete\.json"):
    shards.open_complete(store)


@pytest.mark.parametrize("key", ["manifest.json", "complete.json", "ids"])
def test_flipped_bits_outside_the_shards_are_noticed(tmp_path, key):
  store, _ = sweeps.make(tmp_path)
  path = store.path(store.keys(key)[0])
  whole = path.read_bytes()
  for bit in range(0, 8 * len(whole), 7):
    data = bytearray(whole)
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)
    with pytest.raises(CorruptCache, match=path.name):
      shards.open_complete(store)
  path.unlink()
  with pytest.raises(OSError):
    shards.open_complete(store)


def test_another_version_is_named(tmp_path):
  store, plan = sweeps.make(tmp_path)
  store.put("manifest.json", manifests.seal({**plan.body, "format": 3}, {}))
  with pytest.raises(Mismatch, match="format: expected version 2, got 3"):
    shards.open_complete(store)


def test_an_identity_is_plain_json():
  with pytest.raises((ValueError, TypeError)):
    sweeps.manifest(x=float("nan"))
  with pytest.raises((ValueError, TypeError)):
    sweeps.manifest(x=object())


@pytest.mark.parametrize("kind", [sweeps.flip, sweeps.overwrite, sweeps.cut])
def test_corruption_is_noticed(tmp_path, kind):
  sweeps.sweep(tmp_path, kind, count=5, seed=0)


def test_swapped_and_foreign_shards_are_noticed(tmp_path):
  sweeps.sweep_mixed_up(tmp_path, limit=5)


def test_three_threads_at_once_lose_nothing(tmp_path):
  """Two of them take the same half, so that they write the same shards at the same moment."""
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    write = lambda index: sweeps.writer_main(tmp_path / "together", index, 2)  # noqa: E731
    list(pool.map(write, (0, 0, 1)))
  sweeps.make(tmp_path / "single", **sweeps.BIG)
  assert sweeps.contents(tmp_path / "together") == sweeps.contents(tmp_path / "single")


@pytest.mark.integration
def test_three_processes_at_once_lose_nothing(tmp_path):
  together = [sweeps.writer(tmp_path / "together", index, 2) for index in (0, 0, 1)]
  for process in together:
    process.communicate()
    assert process.returncode == 0
  sweeps.make(tmp_path / "single", **sweeps.BIG)
  assert sweeps.contents(tmp_path / "together") == sweeps.contents(tmp_path / "single")


@pytest.mark.integration
def test_killed_writers_leave_the_bytes_of_an_undisturbed_one(tmp_path):
  sweeps.sweep_kills(tmp_path, count=5, seed=0)


@pytest.mark.nightly
def test_all_sweeps():
  subprocess.run([sys.executable, sweeps.__file__], check=True)


def test_a_writer_resumes_after_a_full_disk(tmp_path):
  store = open_store(tmp_path)
  plan = shards.begin(store, sweeps.manifest(per_shard=12))
  sweeps.write(store, plan, [0])
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (store.path(plan.plan.key(0)).stat().st_size - 1, hard))
  try:
    with pytest.raises(StoreError, match="shard-00000001"):
      sweeps.write(store, plan, [1])
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert shards.missing_shards(store, plan) == [1, 2, 3]
  shards.open_shard(store, plan, 0).check(*plan.rows.ids_and_views(0, 12))
  sweeps.write(store, plan, shards.missing_shards(store, plan))
  shards.complete(store, plan)
  sweeps.read_all(store)


@pytest.mark.integration
def test_a_full_tmpfs(tmp_path):
  """The disk is a tmpfs of 1 MB in a mount namespace of its own, where the system permits it."""
  mounted = f"mount -t tmpfs -o size=1m none {tmp_path} && exec"
  if subprocess.run(
    ["unshare", "-m", "sh", "-c", f"{mounted} true"], capture_output=True
  ).returncode:
    pytest.skip("mounting is not permitted here")
  command = f"{mounted} {sys.executable} {sweeps.__file__} full-disk {tmp_path}"
  done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  error, missing = done.stdout.splitlines()
  assert error.startswith("cannot write 'shard-") and error.endswith(
    f"to {tmp_path}: No space left on device"
  )
  assert 0 < int(missing.split()[0]) < int(missing.split()[2])
