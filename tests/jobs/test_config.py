"""Configs: overrides, types, suggestions, ranges; every error names the field and the value."""

import textwrap
import warnings
from pathlib import Path

import pytest

from distill_jax.jobs.config import Config, ConfigError, Training
from distill_jax.jobs.overrides import load_config

DIGITS = "configs/digits.py"


@pytest.fixture
def job(tmp_path):
  path = tmp_path / "job.py"
  path.write_text(
    textwrap.dedent("""
      from __future__ import annotations

      import dataclasses
      from typing import Literal

      from distill_jax import losses, objectives
      from distill_jax.jobs.config import Config, Training

      SHARED = Training(steps=1000)

      @dataclasses.dataclass(frozen=True)
      class Pruning:
        sparsity: float = 0.5

      @dataclasses.dataclass
      class Job(Config):
        temperature: float = 4.0
        widths: tuple[int, ...] = (1, 2)
        rates: tuple[float, float] = (1.0, 2.0)
        blocks: tuple[tuple[int, int], ...] = ((1, 2),)
        methods: tuple[str, ...] = ()
        flag: bool = False
        limit: int | None = None
        name: str = "a"
        kind: Literal["a", "b"] = "a"
        weight: float = 0.5
        pruning: Pruning = dataclasses.field(default_factory=Pruning)
        teacher_training: Training = dataclasses.field(default_factory=lambda: SHARED)
        student_training: Training = dataclasses.field(default_factory=lambda: SHARED)

        def objective(self):
          soft = objectives.logits(losses.kl_divergence, temperature=self.temperature)
          return objectives.weighted(soft=(self.weight, soft))

      def get_config():
        return Job()
    """)
  )
  return str(path)


@pytest.mark.parametrize(
  ("override", "value"),
  [
    ("temperature=2", 2.0),
    ("temperature=1e-3", 0.001),
    ("temperature=1e3", 1000.0),
    ("widths=(3,4,5)", (3, 4, 5)),
    ("widths=3,4", (3, 4)),
    ("widths=3", (3,)),
    ("widths=()", ()),
    ("rates=1,2.5", (1.0, 2.5)),
    ("blocks=((3,4),(5,6))", ((3, 4), (5, 6))),
    ("methods=a,b-c", ("a", "b-c")),
    ("methods=(a, 1e3)", ("a", "1e3")),
    ("methods=('a','b, c')", ("a", "b, c")),
    ("methods=", ()),
    ("flag=true", True),
    ("flag=0", False),
    ("limit=3", 3),
    ("limit=None", None),
    ("name=no", "no"),
    ("name=None", "None"),
    ("name=a=b", "a=b"),
    ("kind=b", "b"),
  ],
)
def test_overrides_have_the_type_of_their_field(job, override, value):
  got = getattr(load_config(job, [override]), override.partition("=")[0])
  assert got == value
  assert repr(got) == repr(value)


def test_later_overrides_win(job):
  assert load_config(job, ["flag=true", "limit=3", "limit=4"]).limit == 4


@pytest.mark.parametrize("field", ["student_training.batch_size", "student-training.batch-size"])
def test_nested_overrides_change_one_field(job, field):
  config = load_config(job, [f"{field}=7"])
  assert config.student_training.batch_size == 7
  assert config.teacher_training.batch_size == 64
  assert load_config(job).student_training.batch_size == 64


def test_frozen_nested_dataclasses_can_be_overridden(job):
  assert load_config(job, ["pruning.sparsity=0.9"]).pruning.sparsity == 0.9


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("temprature=3", "temprature.*did you mean 'temperature'"),
    ("steps=3", "did you mean 'teacher_training.steps' or 'student_training.steps'"),
    ("batchsize=3", "did you mean 'teacher_training.batch_size' or 'student_training.batch_size'"),
    ("student_training.lr=3", r"did you mean 'student_training.learning_rate'\?$"),
    ("student_training.num_steps=3", r"did you mean 'student_training.steps'\?$"),
    ("num_steps=3", "did you mean 'teacher_training.steps' or 'student_training.steps'"),
    ("zzz=3", "zzz.* there are .*temperature"),
    ("student_training=3", "student_training: "),
    ("temperature", "temperature=VALUE"),
    ("temperature=hot", "temperature: expected float, got 'hot'"),
    ("student_training.steps=7.5", r"student_training\.steps: expected int, got '7.5'"),
    ("flag=yes", "flag: expected bool, got 'yes'"),
    ("limit=x", r"limit: expected int \| None, got 'x'"),
    ("kind=c", "kind: expected .*'a', 'b'.* got 'c'"),
    ("widths=('a',)", "widths: expected tuple.* got .*'a'"),
    ("widths=(3.5,)", "widths: expected tuple.* got .*3.5"),
    ("rates=1", "rates: expected tuple.* got .*1"),
    ("blocks=((1,2,3),)", "blocks: expected tuple.* got .*3"),
    ("pruning.sparsity=x", r"pruning\.sparsity: expected float, got 'x'"),
    ("weight=-0.1", "objective: .*-0.1"),
    ("student_training.learning_rate=-1", r"student_training\.learning_rate: .*-1"),
    ("student_training.learning_rate=nan", r"student_training\.learning_rate: .*nan"),
    ("teacher_training.warmup_steps=1000", r"teacher_training\.warmup_steps: .*999"),
    ("student_training.batch_size=0", r"student_training\.batch_size: .*0"),
    ("log_every=0", "log_every: .*0"),
    ("generations=0", "generations: .*0"),
    ("init_from=student", "init_from: .*'student'"),
  ],
)
def test_invalid_overrides_name_field_and_value(job, override, message):
  with pytest.raises(ConfigError, match=message):
    load_config(job, [override])


@pytest.mark.parametrize(
  ("default", "message"),
  [
    ("weight: float = '1'", "weight: expected float, got '1'"),
    ("limit: int | None = 2.5", r"limit: expected int \| None, got 2.5"),
    ("widths: tuple[int, ...] = (1, '2')", "widths: expected tuple.*'2'"),
    ("log_every: int = True", "log_every: expected int, got True"),
    (
      "student_training: Training = field(default_factory=lambda: Training(steps='7'))",
      r"student_training\.steps: expected int, got '7'",
    ),
  ],
)
def test_defaults_of_another_type_raise(job, tmp_path, default, message):
  with pytest.raises(ConfigError, match=message):
    load_config(_write_class(tmp_path, f"@dataclass\nclass Mine(Job):\n  {default}"))


def test_training_past_the_end_of_the_schedule_warns():
  with pytest.warns(UserWarning, match="schedule_steps"):
    Training(steps=20, schedule_steps=10).validate()
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    Training(steps=20, schedule_steps=20).validate()


def test_schedule_warms_up_and_decays():
  schedule = Training(steps=100, warmup_steps=10, learning_rate=0.5).schedule()
  assert [float(schedule(s)) for s in (0, 10, 100)] == [0.0, 0.5, 0.0]
  assert float(Training(steps=100, learning_rate=0.5).schedule()(0)) == 0.5


def test_bundled_config_is_found_by_its_name_in_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert type(load_config("digits")).__name__ == "Digits"
  with pytest.raises(ConfigError, match="^--config: .*no file digit; did you mean 'digits'"):
    load_config("digit")
  Path("digits").mkdir()  # such as a folder of images
  assert type(load_config("digits")).__name__ == "Digits"


def test_missing_file_suggests_its_neighbor(job):
  with pytest.raises(ConfigError, match=r"--config: .*jbo\.py; did you mean .*job\.py"):
    load_config(job.replace("job.py", "jbo.py"))


@pytest.mark.parametrize("text", ["def get_config():\n  return {}\n", "x = 1\n"])
def test_file_without_a_config_raises(tmp_path, text):
  path = tmp_path / "other.py"
  path.write_text(text)
  with pytest.raises(ConfigError, match=r"--config: .*other\.py.* get_config"):
    load_config(str(path))


def test_config_may_import_its_neighbor(job, tmp_path):
  path = tmp_path / "colder.py"
  path.write_text("from job import Job\n\ndef get_config():\n  return Job(temperature=1.0)\n")
  config = load_config(str(path), ["weight=0.25"])
  assert (config.temperature, config.weight) == (1.0, 0.25)


def _write_class(folder, text):
  """Writes a config file whose class `Mine` builds on job.py, and returns its path."""
  path = folder / "mine.py"
  path.write_text(
    textwrap.dedent("""
      from dataclasses import dataclass, field
      from distill_jax.jobs.config import Training
      from job import Job

      @dataclass
      class Colder(Job):
        temperature: float = 1.0
        pruning: object = field(default_factory=int)

      @dataclass
      class Same(Job):
        pass

    """)
    + f"{text}\n\ndef get_config():\n  return Mine()\n"
  )
  return str(path)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("@dataclass\nclass Mine(Job):\n  temperature = 2.0", r"Mine\.temperature: .* in Mine"),
    ("class Mine(Job):\n  temperature: float = 2.0", r"Mine\.temperature: .* in Mine"),
    (
      "class Mine(Job):\n  pruning: object = field(default_factory=int)",
      r"Mine\.pruning: .* in Mine",
    ),
    ("@dataclass\nclass Mine(Same, Colder):\n  pass", r"Mine\.temperature: .* in Colder"),
    (
      "@dataclass\nclass Mine(Same, Colder):\n  temperature: float = 1.0",
      r"Mine\.pruning: .* in Colder",
    ),
    (
      "class Long(Training):\n  steps: int = 7\n\n@dataclass\nclass Mine(Job):\n"
      "  student_training: Training = field(default_factory=Long)",
      r"Long\.steps: .* in Long",
    ),
  ],
)
def test_default_without_effect_raises(job, tmp_path, text, message):
  with pytest.raises(ConfigError, match=message):
    load_config(_write_class(tmp_path, text))


@pytest.mark.parametrize(
  "text",
  [
    "@dataclass\nclass Mine(Colder, Same):\n  pass",
    "@dataclass\nclass Mine(Colder):\n  flag: bool = True",
    "@dataclass(slots=True)\nclass Mine(Colder):\n  flag: bool = True",
    "class Hot:\n  temperature: float\n\n@dataclass\nclass Mine(Hot, Colder):\n  pass",
    "class Mine(Colder):\n  def report_text(self, model, variables):\n    return 'text'",
  ],
)
def test_defaults_that_a_subclass_sets_are_used(job, tmp_path, text):
  assert load_config(_write_class(tmp_path, text)).temperature == 1.0


def test_configs_of_two_folders_may_import_one_name(job, tmp_path):
  for folder, temperature in (("a", 1.0), ("b", 2.0)):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "shared.py").write_text(
      f"{Path(job).read_text()}\nTEMPERATURE = {temperature}\n"
    )
    (tmp_path / folder / "mine.py").write_text(
      "from shared import Job\n\nclass Mine(Job):\n  def student(self):\n"
      "    from shared import TEMPERATURE\n    return TEMPERATURE\n\n"
      "def get_config():\n  return Mine()\n"
    )
  for folder, temperature in (("a", 1.0), ("b", 2.0), ("a", 1.0)):
    assert load_config(str(tmp_path / folder / "mine.py")).student() == temperature


def test_methods_of_a_config_see_the_overrides():
  config = load_config(DIGITS, ["temperature=2", "label_fraction=0.2"])
  splits = config.data()
  ids = [set(split.arrays["id"].tolist()) for split in splits]
  assert sum(map(len, ids)) == len(set.union(*ids)) == 1797
  labels = config.student_train(splits.train).arrays["label"]
  assert 0.15 < (labels >= 0).mean() < 0.25


@pytest.mark.parametrize("path", ["README.md", "pyproject.toml"])
def test_config_that_is_no_python_file_is_rejected(path):
  with pytest.raises(ConfigError, match=r"^--config: expected a Python file"):
    load_config(path)


@pytest.mark.parametrize("method", ["data", "teacher", "student", "objective"])
def test_config_without_a_method_is_rejected_by_its_name(method):
  with pytest.raises(ConfigError, match=f"^{method}: expected Config to define it"):
    getattr(Config(), method)()


def test_config_file_without_an_objective_is_rejected(tmp_path):
  path = tmp_path / "job.py"
  path.write_text(
    "from distill_jax.jobs.config import Config\n\ndef get_config():\n  return Config()\n"
  )
  with pytest.raises(ConfigError, match="objective: expected Config to define it"):
    load_config(str(path))
