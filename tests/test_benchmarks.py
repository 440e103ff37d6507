"""The benchmarks run, and compare only what is equal. No time is asserted."""

import importlib.util
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
  times = compare(
    lambda calls: order.append("a"), lambda calls: order.append("b"), pairs=3, calls=1
  )
  assert "".join(order) == "ab" + "baabba"
  assert len(times.ours) == len(times.theirs) == 3


def test_a_loop_is_measured_between_its_reports():
  from timing import Ratio, between

  times, turns = Ratio([], []), []
  assert list(between(iter(range(11)), turns.append, every=2, times=times)) == list(range(11))
  assert len(times.ours) == len(times.theirs) == 4  # after 4, 6, 8 and 10; the first two compile
  assert turns == [2] * 5


def cells(printed):
  """The rows of a table, without its header."""
  return [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in printed.strip().splitlines()[2:]
  ]


@pytest.mark.parametrize("teacher", [[], ["--teacher"]])
def test_the_fused_losses_are_compared_with_the_unfused_one(capsys, teacher):
  import linear

  linear.main(["--quick", "--pairs", "2", *teacher])
  ((tokens, classes, *numbers),) = cells(capsys.readouterr().out)
  assert (tokens, classes) == ("128", "640")
  assert (
    all(float(number.split()[0].replace(",", "")) >= 0 for number in numbers) and len(numbers) == 5
  )


def test_a_fused_loss_that_is_another_one_is_refused(monkeypatch):
  import linear

  monkeypatch.setattr(
    linear, "unfused_cached", lambda *arrays: 2 * linear.losses.linear_sparse_kl(*arrays)
  )
  with pytest.raises(AssertionError, match="Not equal to tolerance"):
    linear.main(["--quick", "--pairs", "2"])


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: `tpu`"
)
@pytest.mark.slow
def test_what_the_fused_losses_hold_on_a_chip(capsys):
  import linear

  linear.main(["--compile_for", "v5e:1x1"])
  for name, _, held, work, most, fast in cells(capsys.readouterr().out):
    assert (
      float(held.replace(",", "")) <= 2000
      and float(most.replace(",", "")) <= linear.FAST / linear.MIB
    )
    assert float(work) <= (1.51 if name == "live teacher" else 1.35) and float(fast) <= 1.02


def test_sizes_are_told_by_name(capsys):
  import linear

  linear.main(["--sizes", "32x256", "48x384", "--most", "0"])
  assert [row[:2] for row in cells(capsys.readouterr().out)] == [["32", "256"], ["48", "384"]]
