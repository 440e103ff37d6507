"""Several processes write one cache together, each its share, and train from it as one process does."""

import pathlib

import pytest

from distill_jax.cache import writer

FOLDER = pathlib.Path(__file__).parent


@pytest.mark.slow
def test_two_processes_write_and_read_what_one_does(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(FOLDER.parent / "hosts")
  import on_hosts
  from spawning import finish, lines_after, spawn

  processes = spawn(2, FOLDER / "on_hosts.py", tmp_path / "two")
  for name, owner in (("SHARD_BATCHES", writer), ("write_shard", writer.shards)):
    monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterward
  every, expected = on_hosts.main(tmp_path / "one")
  outputs = finish(processes, seconds=200)
  assert every == list(range(8))  # 120 rows in batches of 16
  wrote = [set(map(int, line.split())) for line in lines_after("wrote ", outputs)]
  assert set.union(*wrote) == set(every)
  assert len(wrote[0]) + len(wrote[1]) < 16  # each helped with a few of the other's at most
  for number in every:
    name = f"shard-{number:08d}"
    assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
  learned = [float(line) for line in lines_after("learned ", outputs)]
  assert learned[0] == learned[1] == pytest.approx(expected, rel=1e-5)
