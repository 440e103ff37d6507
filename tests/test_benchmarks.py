"""Checks that the benchmarks run and compare equal programs. No time is asserted."""

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


CHEAP = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
REST = (
  "one-jit-mlp fit-mlp cached-mlp cache-mlp cache-top64 cache-maps-4 map-counts read-tokens write "
  "windows step-detector box-scores step-encoder cached-encoder fill-host "
  "step-seq2seq cached-seq2seq"
).split()


@pytest.mark.slow
# Every case, both problems. The times mean nothing; only step-cnn compares two programs' rounding.
@pytest.mark.parametrize(("names", "flags"), [(["step-cnn"], ""), (REST, CHEAP)])
def test_command_prints_a_row_for_every_name(names, flags):
  command = [sys.executable, FOLDER / "run.py", "--quick", *names]
  environment = {**os.environ, "XLA_FLAGS": flags}  # one device
  process = subprocess.run(command, capture_output=True, text=True, env=environment)
  assert process.returncode == 0, process.stderr
  header, _, *rows = [line.strip("|").split("|") for line in process.stdout.strip().splitlines()]
  assert [row[0].strip() for row in rows] == names
  for row in rows:
    assert len(row) == len(header)
    ratio, _, ours, theirs = map(float, row[1:5])
    assert min(ratio, ours, theirs) > 0


def test_different_step_by_hand_raises(monkeypatch):
  import cases
  import handwritten
  import problems

  problem = problems.mlp(quick=True)
  monkeypatch.setattr(handwritten, "TEMPERATURE", 3.0)
  step = cases.library_step(problem, problem.teacher)
  with pytest.raises(AssertionError, match="loss"):
    cases.check_same(problem, step, cases.step_by_hand(problem), steps=1)
  monkeypatch.undo()
  cases.check_same(problem, step, cases.step_by_hand(problem), steps=1)


def test_ratio_is_of_medians_and_its_spread_of_pairs():
  from timing import Ratio

  ratio = Ratio([2.0, 4.0, 90.0], [1.0, 2.0, 3.0])
  assert ratio.medians == (4.0, 2.0)
  assert ratio.value == 2.0
  assert ratio.middle == (2.0, 16.0)


def test_both_sides_alternate():
  from timing import compare

  order = []
  times = compare(
    lambda calls: order.append("a"), lambda calls: order.append("b"), pairs=3, calls=1
  )
  assert "".join(order) == "ab" + "baabba"
  assert len(times.ours) == len(times.theirs) == 3


def test_loop_is_timed_between_its_reports():
  from timing import Ratio, between

  times, turns = Ratio([], []), []
  assert list(between(iter(range(11)), turns.append, every=2, times=times)) == list(range(11))
  # After 4, 6, 8 and 10: the first turn compiles.
  assert len(times.ours) == len(times.theirs) == 4
  assert turns == [2] * 5


def cells(printed):
  """Returns the rows of a table without its header."""
  return [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in printed.strip().splitlines()[2:]
  ]


@pytest.mark.parametrize("teacher", [[], ["--teacher"]])
def test_fused_losses_are_compared_with_the_unfused_one(capsys, teacher):
  import linear

  linear.main(["--quick", "--pairs", "2", *teacher])
  ((tokens, classes, *numbers),) = cells(capsys.readouterr().out)
  assert (tokens, classes) == ("128", "640")
  _, _, class_time, _, token_time = (float(number.split()[0]) for number in numbers)
  assert min(class_time, token_time) > 0


def test_different_fused_loss_raises(monkeypatch):
  import linear

  monkeypatch.setattr(
    linear, "unfused_cached", lambda *arrays: 2 * linear.losses.linear_sparse_kl(*arrays)
  )
  with pytest.raises(AssertionError, match="Not equal to tolerance"):
    linear.main(["--quick", "--pairs", "2"])


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: `tpu`"
)
@pytest.mark.nightly
def test_fused_losses_fit_on_a_chip(capsys):
  import linear

  linear.main(["--compile_for", "v5e:1x1"])
  for name, _, by_classes, class_flops, by_tokens, token_flops in cells(capsys.readouterr().out):
    assert float(by_classes.replace(",", "")) <= 2000
    assert float(by_tokens.replace(",", "")) <= linear.FAST / linear.MIB
    assert float(class_flops) <= (1.51 if name == "live teacher" else 1.35)
    assert float(token_flops) <= 1.02


def test_sizes_are_parsed(capsys):
  import linear

  linear.main(["--sizes", "32x256", "48x384", "--most", "0"])
  assert [row[:2] for row in cells(capsys.readouterr().out)] == [["32", "256"], ["48", "384"]]
