"""One run that distills several students, each with its own objective."""

import json
import textwrap

import numpy as np
import pytest
import small_digits

from distill_jax.jobs import plan, stages, step_times, trained
from distill_jax.jobs.cli import main
from distill_jax.jobs.config import ConfigError
from distill_jax.jobs.overrides import load_config
from distill_jax.storage.fingerprint import fingerprint

JOB = textwrap.dedent("""
  import dataclasses
  from quick_digits import Digits
  from distill_jax import losses, objectives

  SEEN = {}
  LOSSES = {"kd": losses.kl_divergence, "reverse": losses.reverse_kl, "mse": losses.logit_mse}

  @dataclasses.dataclass
  class Job(Digits):
    names: tuple[str, ...] = ("kd", "reverse", "mse")
    weight: float = 1.0
    layer: str = "logits"
    reference: str = "kd"

    def variants(self):
      return self.names

    def variant_objective(self, variant, trained_teacher=None):
      SEEN.setdefault(variant, []).append(trained_teacher)
      weight = self.weight if variant == "mse" else 1.0
      layer = self.layer if variant == "mse" else "logits"
      return objectives.weighted(soft=(weight, objectives.logits(LOSSES[variant], output=layer)))

  def get_config():
    return Job()
""")
SMALL = [
  "--config.teacher_width=0.03125",
  "--config.teacher_training.steps=2",
  "--config.student_training.steps=2",
  "--config.eval_every=2",
  "--config.devices=1",
]


@pytest.fixture
def job(tmp_path):
  """The path of a config with three variants."""
  small_digits.write(tmp_path)
  (tmp_path / "job.py").write_text(JOB)
  return str(tmp_path / "job.py")


def test_each_variant_is_trained_reported_and_resumed(job, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(step_times, "REPEATS", 2)
  monkeypatch.setattr(step_times, "SECONDS", 0.0)
  fitted, fit = {}, stages.fit

  def recorded(student, teacher, objective, *rest, **options):
    fitted[options["run"].title] = options, fit(student, teacher, objective, *rest, **options)
    return fitted[options["run"].title][1]

  monkeypatch.setattr(stages, "fit", recorded)
  command = [f"--config={job}", *SMALL, f"--workdir={tmp_path / 'run'}"]
  main(command)
  names = ["student-kd-0", "student-reverse-0", "student-mse-0"]
  assert list(fitted) == ["teacher", "baseline-0", *names]
  assert {options["seed"] for options, _ in fitted.values()} == {0}
  assert len({fingerprint(result.variables) for _, result in fitted.values()}) == 5
  description = json.loads((tmp_path / "run" / names[1] / "model.json").read_text())["description"]
  assert description["variant"] == "reverse"
  results = json.loads((tmp_path / "run" / "report" / "results.json").read_text())
  ratios = {(e["role"], e["variant"]): e["scores"].get("step_ratio") for e in results["entries"]}
  assert list(ratios) == [
    ("teacher", ""),
    ("baseline", ""),
    *(("student", n) for n in ("kd", "reverse", "mse")),
  ]
  assert ratios.pop(("teacher", "")) is None and ratios["student", "kd"] == 1.0
  assert all(0 < ratio < 100 for ratio in ratios.values())
  assert "| mse |" in (tmp_path / "run" / "report" / "report.md").read_text()

  (tmp_path / "run" / "student-reverse-0" / "result.json").unlink()
  fitted.clear()
  main([*command, "--stages=teacher,baseline,student"])
  assert list(fitted) == ["student-reverse-0"]
  assert capsys.readouterr().out.count("complete, skipped") == 4


def test_objective_gets_the_trained_teacher_and_its_data(job, tmp_path):
  config = load_config(job, ["names=kd", "label_fraction=0.5"])
  splits = config.data()
  seen = []
  monkey = type(
    "Watched", (type(config),), {"variant_objective": lambda self, *args: seen.append(args)}
  )
  config.__class__ = monkey
  job_ = plan.Job(config, tmp_path, (3,), splits, {})
  (network,) = plan.networks(job_, "student")
  assert network.name == "student-kd-3" and network.variant == "kd"
  variables = object()
  train = plan.train_data(job_, "student")
  network.objective(trained.trained_teacher_of(network, variables, train))
  ((variant, trained_teacher),) = seen
  assert (
    variant == "kd"
    and trained_teacher.variables is variables
    and trained_teacher.teacher is network.teacher
  )
  np.testing.assert_array_equal(trained_teacher.train.ids, splits.train.ids)


def test_networks_of_all_seeds_and_variants(job, tmp_path):
  config = load_config(job)
  job_ = plan.Job(config, tmp_path, (0, 7), config.data(), {})
  assert [n.name for n in plan.networks(job_, "student")] == [
    *(f"student-{name}-0" for name in config.names),
    *(f"student-{name}-7" for name in config.names),
  ]
  assert [n.name for n in plan.one_per_variant(job_, "student")] == [
    f"student-{name}-0" for name in config.names
  ]


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    (["weight=-1"], "objective of 'mse'"),
    (["generations=2"], "generations"),
    (["reference=kdd"], "reference"),
    (["names=kd,kd"], "variants"),
    (["names=()"], "variants"),
    (["names=kd,a/b"], "variants"),
    (["names=kd," + 25 * "x"], "variants"),
  ],
)
def test_impossible_variants_are_rejected_on_reading(job, overrides, message):
  with pytest.raises(ConfigError, match=message):
    load_config(job, overrides)


def test_objective_that_does_not_fit_is_rejected_first(job, tmp_path):
  with pytest.raises(ConfigError, match="objective of 'mse'"):
    main([f"--config={job}", *SMALL, f"--workdir={tmp_path / 'run'}", "--config.layer=embeding"])
  assert not (tmp_path / "run").exists()


def test_the_dry_run_describes_a_step_of_each_variant(job, tmp_path, capsys):
  main(
    [
      f"--config={job}",
      *SMALL,
      f"--workdir={tmp_path / 'run'}",
      "--dry_run",
      "--config.names=kd,mse",
    ]
  )
  out = capsys.readouterr().out
  assert out.count("student: 2,410 parameters") == 1
  assert "one step with kd of batch 64" in out and "one step with mse of batch 64" in out


def test_the_ratio_is_of_medians_by_turns(monkeypatch):
  order = []

  def side(name, times):
    def run():
      order.append(name)
      return times[order.count(name) - 1]

    return run

  monkeypatch.setattr(step_times, "REPEATS", 3)
  assert step_times.ratio(side("a", [9.0, 3.0, 1.0]), side("b", [2.0, 1.5, 50.0])) == 1.5
  assert order == ["b", "a", "a", "b", "b", "a"]
