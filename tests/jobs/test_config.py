"""Configs: overrides, types, suggestions, ranges; every refusal names the field, what came and what was expected."""

import textwrap
import warnings
from pathlib import Path

import pytest

from distill_jax.jobs.config import ConfigError, Training
from distill_jax.jobs.overrides import differences, load_config, settings_of

DIGITS = "configs/digits.py"


@pytest.fixture
def job(tmp_path):
  path = tmp_path / "job.py"
  path.write_text(
    textwrap.dedent("""
      import dataclasses
      from distill_jax import losses, objectives
      from distill_jax.jobs.config import Config

      @dataclasses.dataclass
      class Job(Config):
        temperature: float = 4.0
        widths: tuple[int, ...] = (1, 2)
        flag: bool = False
        limit: int | None = None
        name: str = "a"
        weight: float = 0.5

        def objective(self):
          soft = objectives.logits(losses.kl_divergence, temperature=self.temperature)
          return objectives.weighted(soft=(self.weight, soft))

      def get_config():
        return Job()
    """)
  )
  return str(path)


@pytest.mark.parametrize(
  ("override", "field", "value"),
  [
    ("temperature=2", "temperature", 2.0),
    ("temperature=1e-3", "temperature", 0.001),
    ("widths=(3,4,5)", "widths", (3, 4, 5)),
    ("widths=3,4", "widths", (3, 4)),
    ("flag=true", "flag", True),
    ("limit=3", "limit", 3),
    ("name=no", "name", "no"),
    ("best=('nll','min')", "best", ("nll", "min")),
    ("best=nll,min", "best", ("nll", "min")),
    ("best=(nll, min)", "best", ("nll", "min")),
  ],
)
def test_overrides_have_the_type_of_their_field(job, override, field, value):
  got = getattr(load_config(job, [override]), field)
  assert got == value and type(got) is type(value)


def test_nested_overrides_and_fresh_defaults(job):
  assert load_config(job, ["student_training.steps=7"]).student_training.steps == 7
  assert load_config(job).student_training.steps == 1000


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("temprature=3", "'temprature'|temprature.*did you mean 'temperature'"),
    ("steps=3", "did you mean 'teacher_training.steps' or 'student_training.steps'"),
    ("zzz=3", "there are .*temperature"),
    ("student_training=3", "no such field"),
    ("temperature=hot", "temperature=hot.*float"),
    ("student_training.steps=7.5", "steps=7.5.*int"),
    ("flag=yes", "flag=yes.*oolean"),
    ("widths=('a',)", "widths: expected tuple.*got"),
    ("widths=(3.5,)", "widths: expected tuple"),
    ("temperature=0", "objective: temperature .*got 0"),
    ("temperature=-1", "objective: temperature .*got -1"),
    ("temperature=nan", "temperature.*nan"),
    ("weight=-0.1", "weight.*-0.1"),
    (
      "student_training.learning_rate=-1",
      "student_training.learning_rate: expected .* > 0, got -1",
    ),
    ("student_training.learning_rate=nan", "student_training.learning_rate: .* got nan"),
    ("teacher_training.warmup_steps=1000", "teacher_training.warmup_steps: expected 0 to 999"),
    ("student_training.batch_size=0", "batch_size: .*>= 1, got 0"),
    ("log_every=0", "log_every"),
    ("generations=0", "generations: expected .*>= 1, got 0"),
    ("init_from=student", "init_from: expected 'baseline' or nothing, got 'student'"),
    ("best=('accuracy','up')", "best: expected a score and 'max' or 'min'"),
  ],
)
def test_what_cannot_be_run_is_refused(job, override, message):
  with pytest.raises(ConfigError, match=message):
    load_config(job, [override])


def test_training_past_the_end_of_the_schedule_warns():
  with pytest.warns(UserWarning, match="rate is 0 from step 10"):
    Training(steps=20, schedule_steps=10).validate()
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    Training(steps=20, schedule_steps=20).validate()


def test_the_schedule_warms_up_and_decays():
  schedule = Training(steps=100, warmup_steps=10, learning_rate=0.5).schedule()
  assert [float(schedule(s)) for s in (0, 10, 100)] == [0.0, 0.5, 0.0]
  assert float(Training(steps=100, learning_rate=0.5).schedule()(0)) == 0.5


def test_a_missing_file_names_its_neighbor(job):
  with pytest.raises(ConfigError, match="no file .*jbo.py; did you mean .*job.py"):
    load_config(job.replace("job.py", "jbo.py"))


def test_a_file_that_gives_something_else_is_refused(tmp_path):
  path = tmp_path / "other.py"
  path.write_text("def get_config():\n  return {}\n")
  with pytest.raises(ConfigError, match="must return a distill_jax.jobs.config.Config, got dict"):
    load_config(str(path))


def test_a_config_may_build_on_one_beside_it(job, tmp_path):
  path = tmp_path / "colder.py"
  path.write_text("from job import Job\n\ndef get_config():\n  return Job(temperature=1.0)\n")
  assert load_config(str(path), ["weight=0.25"]).temperature == 1.0


@pytest.mark.parametrize(
  ("mine", "message"),
  [
    (
      "@dataclass\nclass Mine(Job):\n  temperature = 2.0",
      "Mine.temperature: Mine sets it, without its type: write `temperature: ",
    ),
    ("class Mine(Job):\n  temperature: float = 2.0", "sets it, but is no dataclass"),
    (
      "@dataclass\nclass Mine(Same, Colder):\n  pass",
      "Mine.temperature: Colder sets it, but of several bases",
    ),
    ("@dataclass\nclass Mine(Colder, Same):\n  pass", None),
    ("@dataclass\nclass Mine(Colder):\n  flag: bool = True", None),
    ("@dataclass(slots=True)\nclass Mine(Colder):\n  flag: bool = True", None),
    ("class Hot:\n  temperature: float\n\n@dataclass\nclass Mine(Hot, Colder):\n  pass", None),
    ("class Mine(Colder):\n  def shown(self):\n    return 2", None),
    (
      "class Long(Training):\n  steps: int = 7\n\n@dataclass\nclass Mine(Job):\n"
      "  student_training: Training = field(default_factory=Long)",
      "Long.steps: Long sets it, but is no dataclass",
    ),
  ],
)
def test_a_default_that_would_be_left_out_is_refused(job, tmp_path, mine, message):
  path = tmp_path / "mine.py"
  path.write_text(
    textwrap.dedent("""
      from dataclasses import dataclass, field
      from distill_jax.jobs.config import Training
      from job import Job

      @dataclass
      class Colder(Job):
        temperature: float = 1.0

      @dataclass
      class Same(Job):
        pass

    """)
    + f"{mine}\n\ndef get_config():\n  return Mine()\n"
  )
  if message is None:
    assert load_config(str(path)).temperature == 1.0
  else:
    with pytest.raises(ConfigError, match=message):
      load_config(str(path))


def test_configs_of_two_folders_may_build_on_files_of_one_name(job, tmp_path):
  for folder, temperature in (("a", 1.0), ("b", 2.0)):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "shared.py").write_text(
      f"{Path(job).read_text()}\nTEMPERATURE = {temperature}\n"
    )
    (tmp_path / folder / "mine.py").write_text(
      "from shared import Job\n\nclass Mine(Job):\n  def student(self):\n    from shared import TEMPERATURE\n"
      "    return TEMPERATURE\n\ndef get_config():\n  return Mine()\n"
    )
  for folder, temperature in (("a", 1.0), ("b", 2.0), ("a", 1.0)):
    assert load_config(str(tmp_path / folder / "mine.py")).student() == temperature


def test_differences_name_fields_old_and_new():
  old, new = {"a": 1, "b": {"c": 2, "d": [3]}}, {"a": 1, "b": {"c": 4, "d": [3]}, "e": 5}
  assert differences(old, new) == ["b.c: 2 -> 4", "e: None -> 5"]


def test_settings_are_plain_values(job):
  plain = settings_of(load_config(job))
  assert plain["widths"] == [1, 2] and plain["student_training"]["steps"] == 1000


def test_the_digits_config_builds_everything_after_the_overrides():
  job = load_config(DIGITS, ["temperature=2", "label_fraction=0.1"])
  train, validation, test = job.data()
  ids = [set(s.arrays["id"].tolist()) for s in (train, validation, test)]
  assert sum(map(len, ids)) == len(set.union(*ids)) == 1797
  labels = job.student_train(train).arrays["label"]
  assert 0.05 < (labels >= 0).mean() < 0.15
