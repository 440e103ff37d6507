"""A finished network is tied to its data and to the weights that it read: rows 41, 48, 54."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import small_digits

from distill_jax.jobs import cli
from distill_jax.jobs.cli import main
from distill_jax.jobs.config import ConfigError

QUICK = [
  "--config.teacher_width=0.03125",
  "--config.teacher_training.steps=2",
  "--config.student_training.steps=2",
  "--config.devices=1",
]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  return [f"--config={small_digits.write(tmp_path_factory.mktemp('configs'))}", *QUICK]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, command):
  """The folder of a run without its report, which takes most of the time."""
  folder = tmp_path_factory.mktemp("finished") / "run"
  main([*command, f"--workdir={folder}", "--stages=teacher,student"])
  return folder


@pytest.fixture
def run(finished, tmp_path):
  """A copy of the run, and the function that runs stages in it."""
  folder = shutil.copytree(finished, tmp_path / "run")
  return folder


def change_data(monkeypatch, split, entry, change):
  """Lets configs read other data from now on."""
  load = cli.load_config

  def changed(*arguments):
    config = load(*arguments)
    splits = config.data()
    source = getattr(splits, split)
    arrays = {**source.arrays, entry: change(source.arrays[entry])}
    splits = splits._replace(**{split: dataclasses.replace(source, arrays=arrays)})
    monkeypatch.setattr(type(config), "data", lambda self: splits)
    return config

  monkeypatch.setattr(cli, "load_config", changed)


def relabel_first(label):
  label = label.copy()
  label[0] = (label[0] + 1) % 10
  return label


@pytest.mark.parametrize(
  ("split", "entry", "change", "stages"),
  [
    ("train", "label", relabel_first, "teacher"),
    ("train", "label", relabel_first, "student"),
    ("validation", "image", np.zeros_like, "report"),
  ],
)
def test_changed_data_is_refused_by_the_next_stage(
  run, command, monkeypatch, split, entry, change, stages
):
  change_data(monkeypatch, split, entry, change)
  with pytest.raises(ConfigError, match=f"\n  {split}: "):
    main([*command, f"--workdir={run}", f"--stages={stages}"])


def test_swapped_teacher_is_refused(run, command, tmp_path):
  main([*command, "--config.teacher_seed=1", f"--workdir={tmp_path / 'b'}", "--stages=teacher"])
  shutil.rmtree(run / "teacher")
  shutil.copytree(tmp_path / "b" / "teacher", run / "teacher")
  with pytest.raises(ConfigError, match="student-0: .*\n  teacher: "):
    main([*command, f"--workdir={run}", "--stages=student"])


@pytest.mark.parametrize("stage", ["student", "report"])
def test_edited_result_is_named_and_written_again(run, command, stage):
  path = run / "student-0" / "result.json"
  before = json.loads(path.read_text())
  path.write_text(path.read_text().replace('"accuracy": 0', '"accuracy": 1'))
  with pytest.raises(ConfigError, match="student-0/result.json"):
    main([*command, f"--workdir={run}", f"--stages={stage}"])
  path.unlink()
  main([*command, f"--workdir={run}", "--stages=student"])
  after = json.loads(path.read_text())
  assert after["validation"] == before["validation"]


@pytest.mark.parametrize("given", ["", "teacher"])
def test_teacher_of_another_run_teaches_under_other_settings(run, command, tmp_path, capsys, given):
  other = [*command, "--config.temperature=2"]
  with pytest.raises(ConfigError, match=f"--teacher={run / 'teacher'}"):
    main([*other, f"--workdir={run}"])
  new = tmp_path / "new"
  main([*other, f"--workdir={new}", f"--teacher={run / given}", "--stages=teacher,student"])
  output = capsys.readouterr().out
  assert "temperature: 4.0 -> 2.0" in output and "teacher: complete, skipped" in output
  assert not (new / "teacher").exists()
  results = [json.loads((f / "student-0" / "result.json").read_text()) for f in (run, new)]
  assert results[0]["lineage"] == results[1]["lineage"]


def test_unfinished_teacher_is_refused(run, command, tmp_path):
  (run / "teacher" / "result.json").unlink()
  with pytest.raises(ConfigError, match="--teacher: .*--stages=teacher"):
    main([*command, f"--workdir={tmp_path / 'new'}", f"--teacher={run}"])
  assert not (tmp_path / "new").exists()
