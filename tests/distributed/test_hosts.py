"""Two processes share results, errors, one lease, and the step after which SIGTERM stops them."""

import json
import os
import signal
from pathlib import Path

import pytest
from spawning import finish, lines_after, read_until, spawn

from distill_jax.distributed import hosts
from distill_jax.distributed.lost_process import LOST_PROCESS_CODE
from distill_jax.storage.checkpoint import Checkpoints

SCRIPT = Path(__file__).with_name("run_hosts.py")


def test_long_error_text_is_cut_to_the_message():
  message = hosts._encode_error(ValueError("ö" * 5000), (OSError, ValueError))
  index, text = json.loads(bytes(message).rstrip(b"\0"))
  assert index == 1 and "ö" * 100 in text


@pytest.mark.parametrize("signaled", [pytest.param(0, marks=pytest.mark.integration), 1])
def test_processes_share_results_errors_and_sigterm(tmp_path, signaled):
  folder = tmp_path / "run"
  processes = spawn(2, SCRIPT, "coordinate", folder)
  lines = read_until("stepping", processes)
  processes[signaled].send_signal(signal.SIGTERM)
  outputs = finish(processes, expected=143, seconds=30)
  steps = [int(step) for step in lines_after("stopped after ", outputs)]
  assert steps[0] == steps[1] > 0
  results = [json.loads(line.partition("results ")[2]) for line in lines if "results " in line]
  check_results(*sorted(results, key=lambda result: result["process"]), processes[0].pid)


def check_results(first, second, pid):
  for result in (first, second):
    assert result["first"] == [pid, 0.1, None]
    assert result["lease"] == pid
    assert result["second lease"][0] in ("LeaseError", "OSError")
    assert f"process {pid} on" in result["second lease"][1]
    assert result["run_on_first 1"] is None
    assert result["equal"] is None
    assert result["files"] == []
    kind, text = result["different"]
    assert kind == "ValueError" and text.startswith("run.long: ")
    assert 'a0" on process 0' in text and 'a1" on process 1' in text
  assert first["different"] == second["different"]
  assert (first["in turn"], second["in turn"]) == ("0", "01")
  assert first["run_on_all 0"] == first["run_on_first 0"] == ["FileNotFoundError", "there is nö 0"]
  assert second["run_on_all 1"] == ["FileNotFoundError", "there is nö 1"]
  assert second["run_on_all 0"] == ["OSError", "process 0: there is nö 0"]
  assert second["run_on_first 0"] == ["OSError", "process 0: there is nö 0"]
  # Of a long text the other processes get the beginning.
  assert second["long"][1].startswith("process 0: " + "ö" * 100)
  assert first["run_on_all 1"] == ["OSError", "process 1: there is nö 1"]


@pytest.mark.parametrize("process", [pytest.param(0, marks=pytest.mark.integration), 1])
def test_error_on_one_process_ends_the_other(tmp_path, process):
  processes = spawn(2, SCRIPT, "fail", tmp_path, process)
  try:
    outputs = [each.communicate(timeout=60)[0] for each in processes]
  finally:
    for each in processes:
      each.kill()
  assert processes[process].returncode == 1 and "only here" in outputs[process]
  assert processes[1 - process].returncode == LOST_PROCESS_CODE
  assert Checkpoints(tmp_path, read_only=True).steps() == [1]


def test_one_process_runs_everything_here(tmp_path):
  for run in (hosts.run_on_first, hosts.run_on_all, hosts.run_in_turn):
    assert run(os.getpid) == os.getpid()
  hosts.make_shared_folder(tmp_path / "a" / "b")
  assert list((tmp_path / "a" / "b").iterdir()) == [] and hosts.is_first()
  with pytest.raises(SystemExit):
    hosts.abort(3)


@pytest.mark.parametrize(
  "arguments, field",
  [
    (("a:1", 2, None), "process_id"),
    ((None, 2, 1), "coordinator_address"),
    (("a:1", 2, 2), "process_id"),
  ],
)
def test_join_arguments_that_do_not_fit_raise(arguments, field):
  with pytest.raises(ValueError, match=rf"^{field}: "):
    hosts.join(*arguments)
