"""Checkpoints that several processes write and read together, on other numbers of devices too."""

import json
from pathlib import Path

import jax
import pytest
from sharded_state import make_state
from spawning import finish, lines_after, spawn

from distill_jax.storage.checkpoint import Checkpoints
from distill_jax.storage.fingerprint import fingerprint

SCRIPT = Path(__file__).with_name("checkpointing.py")

pytestmark = pytest.mark.slow


def run(count, action, *arguments):
  """Returns the results of each process."""
  outputs = finish(spawn(count, SCRIPT, action, *arguments))
  return [json.loads(line) for line in lines_after("results ", outputs)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Returns a folder that two processes wrote, another one, and their results."""
  folder, other = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("other")
  return folder, other, run(2, "save", folder, other)


def test_two_processes_save_replace_and_restore(saved):
  folder, other, results = saved
  newest = fingerprint(make_state(6, jax.devices()))
  for each in results:
    assert (each["steps"], each["best"], each["replaced"]) == ([1, 3, 4], 1, True)
    restored = each["newest"]
    assert (restored["step"], restored["fingerprint"], restored["split"]) == (6, newest, True)
    assert restored["warnings"] == [] and "missing: average int32[]" in restored["misfit"]
    assert each["best in memory"]
  assert sorted(path.name for path in folder.iterdir()) == ["1", "4", "6"]
  assert list(other.iterdir()) == []


def test_checkpoint_corrupt_on_one_process_is_skipped_on_all(saved):
  for each in saved[2]:
    assert each["corrupt on one"]["step"] == 4
    (warning,) = each["corrupt on one"]["warnings"]
    assert f"{saved[0] / '6'}: " in warning and "a bad sector" in warning


def test_folder_that_is_not_shared_raises(saved):
  for each in saved[2]:
    assert "folder: " in each["not shared"] and str(saved[1]) in each["not shared"]


@pytest.mark.parametrize("devices", [8, 4, 2, 1])
def test_fewer_devices_restore_what_eight_saved(saved, devices):
  like = make_state(0, jax.devices()[:devices])
  state = Checkpoints(saved[0], read_only=True).restore(like)
  assert (
    fingerprint(state)
    == saved[2][0]["newest"]["fingerprint"]
    == fingerprint(make_state(6, jax.devices()))
  )
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(like)):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.slow
def test_four_processes_restore_what_two_saved(saved):
  for each in run(4, "restore", saved[0]):
    assert each == saved[2][0]["newest"]


def test_sigterm_during_a_late_save_stops_both(tmp_path):
  for each in run(2, "interrupted", tmp_path):
    assert each == {"stopped": 2, "saved": [1000]}
