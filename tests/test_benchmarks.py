"""The benchmarks run, and compare only what is equal. No time is asserted."""

import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
  monkeypatch.syspath_prepend(FOLDER)


@pytest.mark.slow
def test_the_command_prints_a_row_for_every_name():
  names = [
    "step-cnn",
    "one-jit-mlp",
    "fit-mlp",
    "cached-mlp",
    "cache-mlp",
    "cache-top64",
    "read-tokens",
    "write",
  ]  # every case, both problems
  command = [sys.executable, FOLDER / "run.py", "--quick", *names]
  environment = {**os.environ, "XLA_FLAGS": ""}  # one device
  done = subprocess.run(command, capture_output=True, text=True, env=environment)
  assert done.returncode == 0, done.stderr
  header, _, *rows = [line.strip("|").split("|") for line in done.stdout.strip().splitlines()]
  assert [row[0].strip() for row in rows] == names
  for row in rows:
    assert len(row) == len(header)
    ratio, _, ours, theirs = map(float, row[1:5])
    assert min(ratio, ours, theirs) > 0


def test_a_step_by_hand_that_computes_something_else_is_refused(monkeypatch):
  import cases
  import handwritten
  import problems

  problem = problems.mlp(quick=True)
  monkeypatch.setattr(handwritten, "TEMPERATURE", 3.0)
  with pytest.raises(AssertionError, match="loss"):
    cases.check_same(
      problem, cases.library_step(problem, problem.teacher), cases.step_by_hand(problem), steps=1
    )


def test_a_ratio_is_of_medians_and_its_spread_of_pairs():
  from timing import Ratio

  ratio = Ratio([2.0, 4.0, 90.0], [1.0, 2.0, 3.0])
  assert ratio.medians == (4.0, 2.0)
  assert ratio.value == 2.0
  assert ratio.middle == (2.0, 16.0)


def test_both_sides_take_turns_and_the_first_alternates():
  from timing import compare

  order = []
  times = compare(lambda calls: order.append("a"), lambda calls: order.append("b"), pairs=3, calls=1)
  assert "".join(order) == "ab" + "baabba"
  assert len(times.ours) == len(times.theirs) == 3


def test_a_loop_is_measured_between_its_reports():
  from timing import Ratio, between

  times, turns = Ratio([], []), []
  assert list(between(iter(range(11)), turns.append, every=2, times=times)) == list(range(11))
  assert len(times.ours) == len(times.theirs) == 4  # after 4, 6, 8 and 10; the first two compile
  assert turns == [2] * 5
