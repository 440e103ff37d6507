"""Checks that two processes write one cache together and train from it as one does."""

import pathlib

import pytest

from distill_jax.cache import writer
from distill_jax.cache.store import shards

FOLDER = pathlib.Path(__file__).parent


@pytest.mark.slow
def test_two_processes_write_and_read_what_one_does(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(FOLDER.parent / "distributed")
  import on_hosts
  from spawning import finish, lines_after, spawn

  processes = spawn(2, FOLDER / "on_hosts.py", tmp_path / "two")
  for name, owner in (("SHARD_BATCHES", writer), ("write_shard", shards)):
    monkeypatch.setattr(owner, name, getattr(owner, name))  # restored afterward
  numbers, expected = on_hosts.main(tmp_path / "one")
  outputs = finish(processes, seconds=200)
  assert numbers == list(range(8))  # 120 rows in batches of 16
  wrote = [set(map(int, line.split())) for line in lines_after("wrote ", outputs)]
  assert set.union(*wrote) == set(numbers)
  assert len(wrote[0]) + len(wrote[1]) < 16  # each helps with a few of the other's at most
  for number in numbers:
    name = f"shard-{number:08d}"
    assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
  learned = [float(line) for line in lines_after("learned ", outputs)]
  assert learned[0] == learned[1] == pytest.approx(expected, rel=1e-5)
