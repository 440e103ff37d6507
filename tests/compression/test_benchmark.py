"""The benchmark of shrinking runs. No time is asserted."""

import pathlib
import subprocess
import sys

import pytest

FILE = pathlib.Path(__file__).parents[1] / "benchmarks" / "shrink.py"


@pytest.mark.slow
def test_the_command_prints_a_row_for_each_batch():
  done = subprocess.run([sys.executable, FILE, "--quick"], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  rows = [line.strip("|").split("|") for line in done.stdout.strip().splitlines()]
  assert [row[1].strip() for row in rows[2:]] == ["1", "4"]
  assert all(len(row) == len(rows[0]) for row in rows)
