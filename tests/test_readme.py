"""Runs the README's Python as it is written, but for the number of steps."""

import pathlib
import re

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
QUICKSTART, LOSSES, LANGUAGE = BLOCKS


def lines(block):
  return [line for line in block.splitlines() if line.strip()]


def run(block, steps=4):
  names = {}
  exec(re.sub(r"steps=[\d_]+", f"steps={steps}", block), names)
  return names


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def test_readme_is_short():
  assert len(README.splitlines()) <= 150
  assert len(lines(QUICKSTART)) <= 15
  assert len(lines(LANGUAGE)) <= 13


@pytest.mark.filterwarnings("ignore:best:UserWarning")
def test_quickstart_runs(capsys):
  names = run(QUICKSTART)
  assert (names["student"].history[-1]["step"], names["teacher"].history[-1]["step"]) == (4, 4)
  assert 0 <= float(capsys.readouterr().out.splitlines()[-1]) <= 1


def test_losses_run_in_a_loop_of_your_own(capsys):
  names = run(LOSSES)
  assert capsys.readouterr().out == "(64, 10)\n"
  gradient = names["jax"].grad(names["loss_fn"])(np.zeros((64, 10)))
  assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_language_model_learns_from_a_cached_top_k():
  names = run(LANGUAGE, steps=2)
  assert pathlib.Path("outputs").exists() and len(names["outputs"]) == len(names["train"])
  history = [line["tokens"] for line in names["result"].history if line["phase"] == "train"]
  assert np.isfinite(history).all() and history[0] > 0


def test_links_point_at_files():
  for link in re.findall(r"\]\(([^)#]+)\)", README):
    assert link.startswith("http") or (ROOT / link).exists(), link
