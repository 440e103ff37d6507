"""Epochs in place of steps: of the teacher, the students, and trainings of a config's own."""

import json

import pytest

from distill_jax.jobs.cli import main
from distill_jax.jobs.compile_ahead import describe_cost
from distill_jax.jobs.config import ConfigError, Training
from distill_jax.jobs.epochs import with_steps
from distill_jax.jobs.overrides import field_paths, load_config

DIGITS = "configs/digits.py"
NUM_TRAIN = 1290  # without a tenth for validation


@pytest.fixture(scope="module")
def splits():
  splits = load_config(DIGITS).data()
  assert len(splits.train) == NUM_TRAIN
  return splits


def test_epochs_become_steps_of_each_networks_examples(splits, monkeypatch):
  overrides = ["teacher_training.epochs=2", "student-training.epochs=3", "temperature=2"]
  config = load_config(DIGITS, overrides)
  monkeypatch.setattr(type(config), "student_train", lambda self, train: train.take(slice(640)))
  counted = with_steps(config, splits)
  assert counted.teacher_training.steps == 2 * (NUM_TRAIN // 64)
  assert counted.student_training.steps == 3 * 10
  assert counted.temperature == 2 and with_steps(counted) is counted
  assert config.teacher_training.epochs == 2 and config.teacher_training.steps == 0


def test_schedule_ends_with_the_last_epoch(splits):
  config = with_steps(load_config(DIGITS, ["student_training.epochs=3"]), splits)
  schedule = config.student_training.schedule()
  assert [float(schedule(step)) > 0 for step in (59, 60)] == [True, False]


@pytest.mark.parametrize("field, other", [("epochs", "steps"), ("steps", "epochs")])
def test_override_of_one_length_replaces_the_other(field, other):
  config = load_config("fashion_mnist_prune", [f"channels.{field}=7"])
  assert (getattr(config.channels, field), getattr(config.channels, other)) == (7, 0)
  assert config.student_training.steps > 0


@pytest.mark.parametrize(
  ("overrides", "field"),
  [
    (["student_training.epochs=2", "student_training.steps=5"], r"student_training\.epochs: "),
    (["student_training.epochs=0"], r"student_training\.steps: "),
    (["student_training.epochs=-1"], r"student_training\.epochs: "),
    (["teacher_training.epochs=1.5"], r"teacher_training\.epochs: "),
    (["student_training.epochs=1", "student_training.warmup_steps=20"], r"\.warmup_steps: "),
    (["student_training.epochs=1", "student_training.batch_size=1291"], r"\.batch_size: "),
    (["student_training.epochs=1", "student_training.batch_size=0"], r"\.batch_size: "),
    (["student_training.epochs=1", "temperature=0"], "temperature: "),
  ],
)
def test_lengths_that_cannot_be_run_are_refused(splits, overrides, field):
  with pytest.raises(ConfigError, match=field):
    with_steps(load_config(DIGITS, overrides), splits)


def test_epochs_of_a_training_that_is_no_field_are_refused(monkeypatch):
  config = load_config(DIGITS)
  recipe = config.recipe("")
  recipe = recipe._replace(training=Training(epochs=2))
  monkeypatch.setattr(type(config), "recipe", lambda self, variant: recipe)
  with pytest.raises(ConfigError, match=r"recipe\.training\.epochs: "):
    config.recipes()


def test_commands_count_epochs_and_keep_them_in_the_settings(tmp_path, monkeypatch):
  jobs = []
  monkeypatch.setattr("distill_jax.jobs.cli.run_stages", lambda job, stages: jobs.append(job))
  main(["--config=digits", "--config.student_training.epochs=5", f"--workdir={tmp_path}"])
  assert jobs[0].config.student_training.steps == 5 * (NUM_TRAIN // 64)
  settings = json.loads((tmp_path / "run.json").read_text())["settings"]
  assert settings["student_training"]["epochs"] == 5
  assert "student_training.epochs" in field_paths(jobs[0].config)


def test_cost_is_that_of_the_counted_steps(monkeypatch):
  monkeypatch.setattr("distill_jax.jobs.compile_ahead.compile_config", lambda *_, **__: _Analysis())
  text = describe_cost(load_config(DIGITS, ["student_training.epochs=5"]), "cpu")
  assert text.startswith("student: 100 steps")


class _Analysis:
  fits = True

  def hours(self, steps):
    return None
