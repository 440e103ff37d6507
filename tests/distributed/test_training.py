"""Several processes train the student that one process trains, and resume each other's runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import training
from spawning import finish, lines_after, spawn

SCRIPT = Path(__file__).with_name("training.py")


def train(folder, processes, how="plain", steps=10):
  """Returns the arrays and the outputs of processes that train."""
  folder.mkdir(exist_ok=True)
  outputs = finish(spawn(processes, SCRIPT, how, folder, steps))
  with np.load(folder / "out.npz") as file:
    return dict(file), outputs


def assert_close(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
  """The arrays of one process, this one, which trains on all devices."""
  return training.train("plain", tmp_path_factory.mktemp("expected"), 10)


@pytest.mark.parametrize(
  ("how", "processes"),
  [
    ("plain", 2),
    pytest.param("sharded", 2, marks=pytest.mark.nightly),
    pytest.param("pipeline", 2, marks=pytest.mark.slow),
    pytest.param("plain", 4, marks=pytest.mark.nightly),
  ],
)
def test_several_processes_train_as_one_does(tmp_path, expected, how, processes):
  arrays, outputs = train(tmp_path, processes, how)
  assert_close(arrays, expected)
  # Only the first process reports.
  reports = [sum("10/10" in line for line in output.splitlines()) for output in outputs]
  assert reports == [1] + [0] * (processes - 1)
  metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in metrics] == [5, 5, 10, 10]


@pytest.mark.integration
def test_processes_stop_early_together_and_one_calls_back(tmp_path):
  _, outputs = train(tmp_path, 2, "patience", steps=40)
  assert lines_after("ended after ", outputs) == ["10", "10"]
  calls = [re.findall(r"called at (\d+ \w+)", output) for output in outputs]
  assert calls == [["5 train", "5 validation", "10 train", "10 validation"], []]


@pytest.mark.parametrize(
  "processes", [pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.nightly)]
)
def test_run_of_two_processes_resumes_on_another_number(tmp_path, expected, processes):
  train(tmp_path, 2, steps=5)
  assert_close(train(tmp_path, processes)[0], expected)


@pytest.mark.parametrize(
  "what",
  [
    *(pytest.param(what, marks=pytest.mark.slow) for what in ("teacher", "validation")),
    *(
      pytest.param(what, marks=pytest.mark.nightly)
      for what in ("learning rate", "seed", "evaluation")
    ),
  ],
)
def test_processes_with_different_arguments_raise(tmp_path, what):
  for output in finish(spawn(2, SCRIPT, what, tmp_path, 10), expected=1):
    text = "expected the same on all processes"
    if what == "validation":
      text = "batch: expected the 8"
    elif what == "evaluation":
      text = "run.evaluation: expected the same on all processes"
    assert text in output, output
