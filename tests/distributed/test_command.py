"""Two processes run the command as one: they write once, stop at SIGTERM together, and resume."""

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from spawning import finish, spawn

SCRIPT, ROOT = Path(__file__).with_name("command.py"), Path(__file__).parents[2]
SMALL = [
  "--config=configs/digits.py",
  "--config.teacher_width=0.03125",
  "--config.teacher_training.steps=20",
  "--config.student_training.steps=20",
  "--config.eval_every=10",
  "--config.log_every=1",
]


def command(count, folder, *more):
  return spawn(count, SCRIPT, *SMALL, f"--workdir={folder}", *more)


def first_losses(folder):
  lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  return [line["loss"] for line in lines if line["phase"] == "train"][:2]


@pytest.mark.slow
def test_two_processes_run_a_config_as_one_does(tmp_path):
  outputs = finish(command(2, tmp_path / "two"))
  assert [output.count("report.html") for output in outputs] == [1, 0]
  assert [output.count("student-0: accuracy") for output in outputs] == [1, 0]
  finish(command(1, tmp_path / "one", "--stages=teacher"))
  one, two = (first_losses(tmp_path / run / "teacher") for run in ("one", "two"))
  # Later losses differ: batch norm of two channels amplifies rounding.
  np.testing.assert_allclose(one, two, rtol=1e-4)
  for name in ("teacher", "student-0", "baseline-0"):
    assert (tmp_path / "two" / name / "model.safetensors").exists()
  run = json.loads((tmp_path / "two" / "run.json").read_text())
  assert re.fullmatch(r"8 x cpu \(.+\) of 2 processes", run["device"])
  assert not list((tmp_path / "two").rglob(".lease*"))
  again = finish(command(2, tmp_path / "two"))
  assert again[0].count("complete, skipped") == 4  # three networks and the report
  assert "complete" not in again[1]


@pytest.mark.slow
def test_an_error_on_one_process_ends_both(tmp_path):
  config = tmp_path / "broken.py"
  config.write_text(
    "import jax\n"
    "from digits import Digits\n"
    "class Broken(Digits):\n"
    "  def teacher(self):\n"
    "    if jax.process_index() == 1:\n"
    "      raise ValueError('only here')\n"
    "    return super().teacher()\n"
    "def get_config():\n"
    "  return Broken()\n"
  )
  (tmp_path / "digits.py").write_text((ROOT / "configs" / "digits.py").read_text())
  processes = spawn(2, SCRIPT, f"--config={config}", f"--workdir={tmp_path / 'run'}")
  try:
    outputs = [each.communicate(timeout=150)[0] for each in processes]
  finally:
    for each in processes:
      each.kill()
  assert processes[1].returncode == 2 and "only here" in outputs[1], outputs
  assert processes[0].returncode != 0, outputs[0]


@pytest.mark.slow
def test_sigterm_to_one_process_ends_both_and_the_run_resumes(tmp_path):
  long = ["--config.teacher_training.steps=100000", "--config.eval_every=50000", "--stages=teacher"]
  processes = command(2, tmp_path / "run", *long)
  timings = tmp_path / "run" / "teacher" / "timings.jsonl"
  while not timings.exists() or len(timings.read_text().splitlines()) < 3:
    assert [process.poll() for process in processes] == [None, None]
  processes[1].send_signal(signal.SIGTERM)
  for output in finish(processes, expected=143, seconds=180):
    assert re.search("SIGTERM: .*after step", output), output
  [step] = [
    int(path.name) for path in (tmp_path / "run" / "teacher" / "checkpoints").glob("[0-9]*")
  ]
  processes = command(2, tmp_path / "run", *long)
  while timings.read_text().count('"starts": 2') < 3:
    assert [process.poll() for process in processes] == [None, None]
  processes[0].send_signal(signal.SIGTERM)
  finish(processes, expected=143, seconds=180)
  lines = [json.loads(line) for line in timings.read_text().splitlines()]
  assert [line["step"] for line in lines if line["starts"] == 2][0] == step
