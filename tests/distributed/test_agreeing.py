"""Two processes agree: on what the first did, on who failed, on one lease, and on the step after which they stop."""

import json
import signal
from pathlib import Path

import pytest
from spawning import finish, said, spawn

from distill_jax.storage.checkpoint import Checkpoints

SCRIPT = Path(__file__).with_name("agreeing.py")


def test_what_one_process_finds_all_are_told(tmp_path):
  processes = spawn(2, SCRIPT, "agree", tmp_path)
  first, second = map(json.loads, said("told ", finish(processes)))
  pid = processes[0].pid
  for told in (first, second):
    assert told["first"] == [pid, 0.1, None]
    assert told["lease"] == pid
    assert f"belongs to process {pid}" in told["second"]
    assert told["first 1"] is None  # only the first one acts
    assert told["left"] == []
  assert first["every 0"] == first["first 0"] == ["FileNotFoundError", "there is nö 0"]
  assert second["every 1"] == ["FileNotFoundError", "there is nö 1"]
  assert second["every 0"] == second["first 0"] == ["OSError", "process 0: there is nö 0"]
  assert first["every 1"] == ["OSError", "process 1: there is nö 1"]


@pytest.mark.parametrize("signaled", [0, 1])
def test_sigterm_on_one_stops_all_after_the_same_step(tmp_path, signaled):
  processes = spawn(2, SCRIPT, "interrupted", tmp_path)
  for process in processes:
    while "stepping" not in process.stdout.readline():
      assert process.poll() is None
  processes[signaled].send_signal(signal.SIGTERM)
  steps = [
    int(step) for step in said("stopped after ", finish(processes, expected=143, seconds=30))
  ]
  assert steps[0] == steps[1] > 0


@pytest.mark.parametrize("process", [0, 1])
def test_where_one_process_fails_the_others_end_too(tmp_path, process):
  processes = spawn(2, SCRIPT, "failing", tmp_path, process)
  try:
    outputs = [each.communicate(timeout=60)[0] for each in processes]
  finally:
    for each in processes:
      each.kill()
  assert processes[process].returncode == 1 and "only here" in outputs[process]
  assert processes[1 - process].returncode != 0
  assert Checkpoints(tmp_path, read_only=True).steps() == [1]
