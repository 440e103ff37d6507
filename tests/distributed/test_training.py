"""Several processes train the student that one process trains, and go on with each other's runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from spawning import finish, spawn

SCRIPT = Path(__file__).with_name("training.py")


def train(folder, processes, how="plain", steps=20):
  folder.mkdir(exist_ok=True)
  outputs = finish(spawn(processes, SCRIPT, how, folder, steps))
  with np.load(folder / "out.npz") as file:
    return dict(file), outputs


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  return train(tmp_path_factory.mktemp("alone"), 1)[0]


@pytest.mark.parametrize(
  ("how", "processes"),
  [
    ("plain", 2),
    ("spread", 2),
    pytest.param("pipeline", 2, marks=pytest.mark.slow),
    pytest.param("plain", 4, marks=pytest.mark.slow),
  ],
)
def test_several_processes_train_what_one_does(tmp_path, alone, how, processes):
  found, outputs = train(tmp_path, processes, how)
  assert_same(found, alone)
  told = [sum("20/20" in line for line in output.splitlines()) for output in outputs]
  assert told == [1] + [0] * (processes - 1)  # only the first one tells
  steps = [
    json.loads(line)["step"]
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  ]
  assert steps == [5, 5, 10, 10, 15, 15, 20, 20]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_a_run_of_two_processes_goes_on_with_another_number(tmp_path, alone, processes):
  train(tmp_path, 2, steps=10)
  assert_same(train(tmp_path, processes)[0], alone)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["learning rate", "teacher", "seed", "validation"])
def test_processes_that_were_not_given_the_same_are_refused(tmp_path, what):
  for output in finish(spawn(2, SCRIPT, what, tmp_path, 10), expected=1):
    message = "this process gives 8" if what == "validation" else "the processes have not the same"
    assert message in output, output
