"""A config of a dozen lines, run from the command line's entry point to its report."""

import json

import pytest

from distill_jax.jobs.cli import main
from distill_jax.jobs.config import ConfigError

CONFIG = """
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax import data, losses, objectives, tasks
from distill_jax.jobs.config import Config, Splits, Training, check
from distill_jax.models import from_apply


def perceptron(width):
  def init(key, x):
    keys = jax.random.split(key)
    return {"a": jax.random.normal(keys[0], (3, width)), "b": jnp.zeros((width, 1))}

  return from_apply(init, lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], inputs="x")


@dataclasses.dataclass
class Line(Config):
  soft_weight: float = 0.5
  teacher_training: Training = dataclasses.field(
    default_factory=lambda: Training(steps=20, batch_size=16, learning_rate=3e-2))
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(steps=20, batch_size=16, learning_rate=3e-2))

  def data(self):
    x = np.random.default_rng(0).normal(size=(160, 3)).astype(np.float32)
    source = data.Source({"x": x, "label": x @ np.float32([1, -2, 0.5])}, name="line")
    train, test = data.split(source, 0.2)
    return Splits(*data.split(train, 0.2, seed=1), test)

  def task(self):
    return tasks.regression(unit="mm")

  def teacher(self):
    return perceptron(16)

  def student(self):
    return perceptron(4)

  def baseline_objective(self):
    return objectives.weighted(hard=(1.0, objectives.labels(optax.squared_error)))

  def objective(self):
    return objectives.weighted(
      hard=(1 - self.soft_weight, objectives.labels(optax.squared_error)),
      soft=(self.soft_weight, objectives.logits(losses.logit_mse)))

  def validate(self):
    super().validate()
    check(self, "soft_weight", least=0, most=1)


def get_config():
  return Line()
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
  """The arguments of the command; `runs` will be its folder."""
  folder = tmp_path_factory.mktemp("job")
  (folder / "line.py").write_text(CONFIG)
  return [f"--config={folder / 'line.py'}", f"--workdir={folder / 'runs'}"], folder / "runs"


@pytest.mark.integration
def test_config_of_a_regression_writes_its_report(job, capsys):
  arguments, folder = job
  main([*arguments, "--config.student_training.steps=15"])
  report = (folder / "report" / "report.md").read_text()
  assert "root mean squared error" in report.lower() and "mm" in report
  assert "soft_weight" in report or "student_training.steps" in report
  results = json.loads((folder / "report" / "results.json").read_text())
  assert results
  assert {p.suffix for p in (folder / "report").iterdir()} >= {".md", ".html", ".json", ".png"}
  capsys.readouterr()
  # The same command again trains nothing.
  times = {p: p.stat().st_mtime_ns for p in folder.rglob("metrics.jsonl")}
  assert len(times) == 3  # teacher, baseline, student
  main([*arguments, "--config.student_training.steps=15", "--stages=teacher,baseline,student"])
  assert {p: p.stat().st_mtime_ns for p in folder.rglob("metrics.jsonl")} == times


@pytest.mark.parametrize(
  "override, field",
  [
    ("--config.soft_weight=2", "soft_weight"),
    ("--config.soft_wieght=0.2", "soft_weight"),
    ("--config.student_training.steps=many", "steps"),
    ("--config.student_training.steps=0", "steps"),
    ("--config.best=acuracy", "best"),
    ("--config.mesh.data=3", "mesh"),
    ("--config.init_from=teacher", "init_from"),
  ],
)
def test_override_errors_name_the_field(job, override, field, tmp_path):
  arguments, _ = job
  with pytest.raises(ConfigError, match=field):
    main([arguments[0], f"--workdir={tmp_path}", override])
  assert not list(tmp_path.rglob("checkpoints"))


def test_dry_run_prints_and_trains_nothing(job, capsys, tmp_path):
  arguments, _ = job
  main([arguments[0], f"--workdir={tmp_path}", "--dry_run"])
  text = capsys.readouterr().out
  assert "teacher" in text and "student" in text
  assert not list(tmp_path.rglob("metrics.jsonl"))


def test_unknown_flags_and_files_are_rejected(job, tmp_path):
  arguments, _ = job
  with pytest.raises(SystemExit):
    main([*arguments, "--no_such_flag"])
  with pytest.raises(ConfigError, match=r"missing\.py"):
    main([f"--config={tmp_path / 'missing.py'}"])
  with pytest.raises((ConfigError, SystemExit), match=r"stages|2"):
    main([*arguments, "--stages=nothing"])
