"""The main job, killed at random moments and resumed, ends as an undisturbed run does."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill_jax.storage import sealed_json

COMMAND = [
  sys.executable,
  "-m",
  "distill_jax",
  "--config=configs/digits.py",
  "--config.teacher_training.steps=200",
  "--config.student_training.steps=600",
  "--config.checkpoint_every=20",
  "--config.devices=1",
]
NETWORKS = ("teacher", "student-0", "baseline-0")


def start(folder):
  root = Path(__file__).parents[2]
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  with open(f"{folder}.log", "a") as log:
    return subprocess.Popen(
      [*COMMAND, f"--workdir={folder}"], cwd=root, env=environment, stdout=log, stderr=log
    )


def logged(folder):
  """Returns the metrics of a run without the times."""
  lines = sealed_json.read_lines(folder / "metrics.jsonl")
  return [{k: v for k, v in line.items() if k != "examples_per_second"} for line in lines]


@pytest.mark.slow
def test_job_killed_again_and_again_ends_with_the_same_bits(tmp_path):
  undisturbed = tmp_path / "undisturbed"
  killed = tmp_path / "killed"
  start_time = time.time()
  assert start(undisturbed).wait() == 0, (tmp_path / "undisturbed.log").read_text()
  duration = time.time() - start_time
  seed = random.randrange(2**32)
  print(f"random moments of seed {seed}")  # pytest shows it where the test fails
  moments = random.Random(seed)
  kills = 0
  for _ in range(3):
    process = start(killed)
    try:
      process.wait(timeout=moments.uniform(0.08, 0.25) * duration)
      break  # It ended: the machine was busier while the undisturbed run took its time.
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
      assert process.wait() == -signal.SIGKILL
      kills += 1
  assert kills
  assert start(killed).wait() == 0, (tmp_path / "killed.log").read_text()
  for name in NETWORKS:
    a, b = undisturbed / name, killed / name
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes(), name
    assert logged(a) == logged(b), name
