"""Checkpoints that several processes write and read together, on other numbers of devices too."""

import json
from pathlib import Path

import jax
import pytest
from checkpointing import make_state
from spawning import finish, said, spawn

from distill_jax.storage.checkpoint import Checkpoints
from distill_jax.storage.fingerprint import fingerprint

SCRIPT = Path(__file__).with_name("checkpointing.py")

pytestmark = pytest.mark.slow


def run(count, action, *arguments):
  """What the processes said; all but their messages about one folder must agree."""
  outputs = finish(spawn(count, SCRIPT, action, *arguments))
  return [json.loads(line) for line in said("told ", outputs)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A folder that two processes wrote, and what they said."""
  folder, other = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("other")
  return folder, other, run(2, "save", folder, other)


def test_two_processes_save_replace_and_restore(saved):
  folder, other, told = saved
  newest = fingerprint(make_state(6, jax.devices()))
  for each in told:
    assert (each["steps"], each["best"], each["replaced"]) == ([1, 3, 4], 1, True)
    found = each["newest"]
    assert (found["step"], found["fingerprint"], found["spread"]) == (6, newest, True)
    assert found["warnings"] == [] and "missing: average int32[]" in found["refused"]
    assert each["best in memory"]
  assert sorted(path.name for path in folder.iterdir()) == ["1", "4", "6"]
  assert list(other.iterdir()) == []


def test_what_one_process_cannot_read_none_restores(saved):
  for each in saved[2]:
    assert each["damaged on one"]["step"] == 4
    (warning,) = each["damaged on one"]["warnings"]
    assert "6 is damaged and is skipped" in warning and "a bad sector" in warning


def test_a_folder_that_is_not_the_same_for_all_is_refused(saved):
  for each in saved[2]:
    assert (
      "is another folder here than on process 0: choose one that all hosts share"
      in each["not shared"]
    )


@pytest.mark.parametrize("devices", [8, 4, 2, 1])
def test_what_eight_devices_saved_fewer_restore(saved, devices):
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
def test_what_two_processes_saved_four_restore(saved):
  for each in run(4, "restore", saved[0]):
    assert each == saved[2][0]["newest"]


def test_sigterm_while_a_late_step_is_saved_stops_both(tmp_path):
  for each in run(2, "interrupted", tmp_path):
    assert each == {"stopped": 2, "saved": [1000]}
