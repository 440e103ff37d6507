"""What a cache is, what of it is there, and that it is whole: with damage, kills, full disks and many writers."""

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


def test_rows_lie_view_by_view():
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
    with pytest.raises(
      ValueError, match=f"example id {ids[-1]} is not in the cache: it holds 50 ids from "
    ):
      rows.numbers(ids, [0] * len(ids))
  for view in (-1, 3, 2**32):
    with pytest.raises(ValueError, match=f"view {view} is not in the cache: .* views 0 to 2"):
      rows.numbers(rows.ids[:2], [0, view])


@pytest.mark.parametrize(
  "ids, views, text",
  [
    ([3, 9, 1, 9, 3], 1, "expected each once, 2 repeat; the first is 3"),
    ([], 1, "expected integers"),
    ([0.5], 1, "expected integers [N], at least one; got float64 [1]"),
    ([[1]], 1, "got int64 [1, 1]"),
    ([1], 0, "num_views: expected at least 1, got 0"),
  ],
)
def test_rows_that_cannot_be_are_refused(ids, views, text):
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


def test_other_names_are_no_shards():
  names = [
    "shard-",
    "shard-0",
    "shard-000000001",
    "shard-00000000.bak",
    "x/shard-00000000",
    "shard-00000001",
  ]
  assert list(ShardPlan(2, 1).shard_numbers(names)) == [1]
  with pytest.raises(ValueError, match="rows_per_shard: expected at least 1, got 0"):
    ShardPlan(10, 0)


def test_processes_share_what_is_missing_whatever_each_of_them_saw():
  missing = [1, 2, 3, 5, 8, 9]
  assert sorted(sum((shards_of_process(missing, index, 4) for index in range(4)), [])) == missing
  later = missing[2:]  # another process has written two by the time this one looks
  assert set(shards_of_process(missing, 0, 2) + shards_of_process(later, 1, 2)) >= set(later)


def test_a_cache_comes_back_from_wherever_it_lies(url):
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


def test_the_first_manifest_stands(url):
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
  with pytest.raises(Mismatch, match="seed: 2 in the cache, 1 wanted"):
    shards.begin(store, mine)
  assert (
    shards.begin(store, mine, same=lambda field, old, new: field == "seed" or old == new).body[
      "identity"
    ]["seed"]
    == 2
  )


def test_another_cache_is_refused_with_every_field_that_differs(tmp_path):
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
  assert str(tmp_path) in first and "name another folder or delete it" in first
  assert [line.strip() for line in lines if not line.strip().startswith("ids:")] == [
    "columns: [['logits', '<f2', [10]], ['top', '|u1', [3]]] in the cache, [['logits', '<f2', [10]]] wanted",
    "examples: 23 in the cache, 24 wanted",
    "come: '(absent)' in the cache, None wanted",
    "data.name: 'digits' in the cache, 'mnist' wanted",
    "data.ratio: 0.1 in the cache, 0.2 wanted",
    "gone: 1 in the cache, '(absent)' wanted",
    "num_views: 2 in the cache, 3 wanted",
  ]
  assert len(lines) == 8


def test_an_identity_that_has_a_name_of_the_plans_hides_nothing(tmp_path):
  store = open_store(tmp_path)
  shards.begin(store, sweeps.manifest(examples=20, **{"rows_per_shard": 5}))
  with pytest.raises(Mismatch, match="rows_per_shard: 5 in the cache, 6 wanted"):
    shards.begin(store, sweeps.manifest(examples=20, **{"rows_per_shard": 6}))


def test_who_comes_first_divides_the_rows_into_shards(tmp_path):
  store = open_store(tmp_path)
  first = shards.begin(store, sweeps.manifest(per_shard=10))
  second = shards.begin(store, sweeps.manifest(per_shard=9))
  assert second.rows_per_shard == 10 and second.digest == first.digest


def test_who_reads_may_say_what_counts_as_equal(tmp_path):
  store, _ = sweeps.make(tmp_path, probe=[1.0, 2.0])
  wanted = {"teacher": "a", "probe": [1.0, 2.0000001]}
  with pytest.raises(
    Mismatch, match=r"probe: \[1.0, 2.0\] in the cache, \[1.0, 2.0000001\] wanted"
  ):
    shards.open_complete(store, wanted)
  seen = {}

  def same(field, old, new):
    seen[field] = (old, new)
    return field == "probe" or old == new

  assert shards.open_complete(store, wanted, same).body["identity"]["probe"] == [1.0, 2.0]
  assert seen["probe"] == ([1.0, 2.0], [1.0, 2.0000001]) and seen["teacher"] == ("a", "a")
  with pytest.raises(Mismatch, match="'a' in the cache, 'b' wanted"):
    shards.open_complete(store, {**wanted, "teacher": "b"}, same)


def test_a_field_that_only_one_side_has_is_never_equal(tmp_path):
  store, _ = sweeps.make(tmp_path, old=1)
  with pytest.raises(Mismatch) as caught:
    shards.open_complete(store, {"teacher": "a", "new": 2}, same=lambda field, old, new: True)
  assert "new: '(absent)' in the cache, 2 wanted" in str(caught.value)
  assert "old: 1 in the cache, '(absent)' wanted" in str(caught.value)


def test_an_emptied_shard_is_refused(tmp_path):
  store, plan = sweeps.make(tmp_path)
  store.path(plan.plan.key(1)).write_bytes(b"")
  with pytest.raises(CorruptCache, match="shard-00000001 is damaged, or no shard of a cache"):
    shards.complete(store, plan)


def test_a_missing_shard_is_named_and_never_zeros(tmp_path):
  with pytest.raises(Incomplete, match=f"there is no cache in {tmp_path}/none"):
    shards.open_complete(open_store(tmp_path / "none"))
  store, plan = sweeps.make(tmp_path / "some", per_shard=4)
  for shard in (1, 5, 6, 7, 8, 11):
    store.path(plan.plan.key(shard)).unlink()
  text = r"not complete: 6 of 12 shards are missing: 1, 5, 6, 7, 8, \.\.\."
  for attempt in (lambda: shards.open_complete(store), lambda: shards.complete(store, plan)):
    with pytest.raises(Incomplete, match=text):
      attempt()
  with pytest.raises(Incomplete, match="shard 5 of the cache in .* is missing"):
    shards.open_shard(store, plan, 5)
  sweeps.write(store, plan, shards.missing_shards(store, plan))
  sweeps.read_all(store)


def test_a_cache_that_was_never_read_back_is_refused(tmp_path):
  store, plan = sweeps.make(tmp_path)
  store.path("complete.json").unlink()
  with pytest.raises(Incomplete, match="was never read back"):
    shards.open_complete(store)
  shards.complete(store, plan)
  assert shards.open_complete(store).digest == plan.digest


def test_no_record_of_completion_is_written_over_a_damaged_shard(tmp_path):
  store, plan = sweeps.make(tmp_path)
  store.path("complete.json").unlink()
  path = store.path(plan.plan.key(2))
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(data)
  with pytest.raises(CorruptCache, match=r"shard-00000002 is damaged: row 9 \(example id "):
    shards.complete(store, plan)
  assert store.read("complete.json") is None
  path.unlink()
  sweeps.write(store, plan, shards.missing_shards(store, plan))
  assert shards.complete(store, plan)["rows"] == 46


def test_shards_that_agree_with_their_checksums_and_not_with_the_record_are_refused(tmp_path):
  """As after a second, slightly different teacher wrote one of them; it cannot while the first one's is there."""
  store, plan = sweeps.make(tmp_path)
  rows, path = np.arange(*plan.plan.span(0)), store.path(plan.plan.key(0))
  before = path.read_bytes()
  shards.write_shard(store, plan, 0, rows * 7 + 1, sweeps.values(rows))
  assert path.read_bytes() == before
  path.unlink()
  shards.write_shard(store, plan, 0, rows * 7 + 1, sweeps.values(rows))
  with pytest.raises(CorruptCache, match="complete.json does not agree with the shards"):
    shards.complete(store, plan)


def test_the_record_of_another_cache_is_refused(tmp_path):
  store, _ = sweeps.make(tmp_path / "a")
  other, _ = sweeps.make(tmp_path / "b", teacher="b")
  store.put("complete.json", other.read("complete.json"))
  with pytest.raises(CorruptCache, match="complete.json is of another cache"):
    shards.open_complete(store)


@pytest.mark.parametrize("key", ["manifest.json", "complete.json", "ids"])
def test_every_flipped_bit_outside_the_shards_is_noticed(tmp_path, key):
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
  store.put("manifest.json", manifests.seal({**plan.body, "format": 2}, {}))
  with pytest.raises(Mismatch, match="format version 2, expected 1"):
    shards.open_complete(store)


def test_what_json_cannot_hold_is_no_identity():
  with pytest.raises((ValueError, TypeError)):
    sweeps.manifest(x=float("nan"))
  with pytest.raises((ValueError, TypeError)):
    sweeps.manifest(x=object())


@pytest.mark.parametrize("kind", [sweeps.flip, sweeps.overwrite, sweeps.cut])
def test_damage_is_noticed(tmp_path, kind):
  sweeps.sweep(tmp_path, kind, count=5, seed=0)


def test_swapped_and_foreign_shards_are_noticed(tmp_path):
  sweeps.sweep_mixed_up(tmp_path, limit=5)


def test_killed_five_times_the_bytes_are_those_of_an_undisturbed_writer(tmp_path):
  sweeps.sweep_kills(tmp_path, count=5, seed=0)


def test_four_writers_at_once_lose_nothing(tmp_path):
  """Two of them take the same third, so that they write the same shards at the same moment."""
  together = [sweeps.writer(tmp_path / "together", index, 3) for index in (0, 0, 1, 2)]
  for process in together:
    process.communicate()
    assert process.returncode == 0
  sweeps.make(tmp_path / "alone", **sweeps.BIG)
  assert sweeps.contents(tmp_path / "together") == sweeps.contents(tmp_path / "alone")


@pytest.mark.slow
def test_the_sweeps_whole():
  subprocess.run([sys.executable, sweeps.__file__], check=True)


def test_a_full_disk_stops_the_writer_and_room_lets_it_go_on(tmp_path):
  store = open_store(tmp_path)
  plan = shards.begin(store, sweeps.manifest(per_shard=12))
  sweeps.write(store, plan, [0])
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (store.path(plan.plan.key(0)).stat().st_size - 1, hard))
  try:
    with pytest.raises(StoreError, match="cannot write 'shard-00000001' to .*: File too large"):
      sweeps.write(store, plan, [1])
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert shards.missing_shards(store, plan) == [1, 2, 3]
  shards.open_shard(store, plan, 0).check(*plan.rows.ids_and_views(0, 12))
  sweeps.write(store, plan, shards.missing_shards(store, plan))
  shards.complete(store, plan)
  sweeps.read_all(store)


def test_a_disk_that_is_really_full(tmp_path):
  """A tmpfs of 1 MB in a mount namespace of its own, where the system lets us."""
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
