"""The command line: stages, skipping, refusing, reporting."""

import json
import sys

import jax
import numpy as np
import pytest
import small_digits

from distill_jax import data
from distill_jax.jobs import checks, plan, stages
from distill_jax.jobs import data as job_data
from distill_jax.jobs.cli import main, run
from distill_jax.jobs.overrides import load_config
from distill_jax.storage.student import load_student
from distill_jax.storage.fingerprint import fingerprint

DIGITS = [
  "--config=configs/digits.py",
  "--config.teacher_width=0.03125",
  "--config.teacher_training.steps=4",
  "--config.student_training.steps=6",
  "--config.eval_every=2",
  "--config.devices=1",
]
QUICK = DIGITS[2:]  # for the configs that build on it


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
  """A folder with quick_digits.py and configs/digits_transfer.py built on it."""
  folder = tmp_path_factory.mktemp("configs")
  small_digits.write(folder, "digits_transfer.py")
  return folder


@pytest.fixture
def small(configs):
  """A command of a few steps."""
  return [f"--config={configs / 'quick_digits.py'}", *DIGITS[1:]]


def test_all_stages_then_nothing_left_to_do(tmp_path, capsys, small):
  command = [*small, f"--workdir={tmp_path}", "--seeds=0,1"]
  main(command)
  first = capsys.readouterr().out
  for name in ("teacher", "student-0", "student-1", "baseline-0", "baseline-1"):
    assert (tmp_path / name / "model.safetensors").exists()
    assert (tmp_path / name / "model.stablehlo").exists()
    assert f"{name}: accuracy" in first
  report = (tmp_path / "report" / "report.md").read_text()
  assert "Student alone" in report and small[0].removeprefix("--config=") in report
  main(command)
  assert capsys.readouterr().out.count("complete, skipped") == 5
  written = json.loads((tmp_path / "run.json").read_text())
  assert written["settings"]["student_training"]["steps"] == 6
  assert {"jax", "flax", "optax"} <= set(written["versions"])
  assert "--config.student_training.steps=6" in written["command"]
  assert written["overrides"] == [o.removeprefix("--config.") for o in DIGITS[1:]]
  with pytest.raises(ValueError, match="other settings.*\n  temperature: 4.0 -> 2.0"):
    main([*command, "--config.temperature=2"])


def test_dry_run_describes_and_writes_nothing(tmp_path, capsys):
  main([*DIGITS, f"--workdir={tmp_path / 'run'}", "--dry_run"])
  out = capsys.readouterr().out
  assert "student: 2,410 parameters, 9,640 bytes" in out
  assert "logits: ('batch', 10) float32" in out and "temporaries" in out
  assert not (tmp_path / "run").exists()


def test_a_run_of_an_older_version_goes_on(tmp_path, small):
  main([*small, f"--workdir={tmp_path}", "--stages=teacher"])
  path = tmp_path / "run.json"
  run = json.loads(path.read_text())
  del run["settings"]["cache_batch_size"], run["settings"]["student_training"]["microbatches"]
  path.write_text(json.dumps(run))
  with pytest.raises(ValueError, match="student_training.microbatches: 1 -> 2"):
    main(
      [
        *small,
        f"--workdir={tmp_path}",
        "--stages=teacher",
        "--config.student_training.microbatches=2",
      ]
    )
  main([*small, f"--workdir={tmp_path}", "--stages=teacher"])
  assert json.loads(path.read_text())["settings"]["cache_batch_size"] == 256


def test_what_a_step_costs_is_said_ahead_of_time(tmp_path, capsys):
  main([*DIGITS, f"--workdir={tmp_path / 'run'}", "--compile_for=cpu"])
  out = capsys.readouterr().out
  assert "student: 6 steps of 64 rows on" in out and "FLOPs" in out
  assert not (tmp_path / "run").exists()


def test_the_student_needs_its_teacher(tmp_path, small):
  with pytest.raises(ValueError, match="needs its teacher"):
    main([*small, f"--workdir={tmp_path}", "--stages=student"])
  with pytest.raises(ValueError, match="nothing to report"):
    main([*small, f"--workdir={tmp_path}", "--stages=report"])


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--stages=techer", "no stage 'techer'; did you mean 'teacher'"),
    ("--seeds=0,x", "--seeds: expected integers"),
    ("--seeds=0,0", "different integers"),
    ("--config.temprature=3", "did you mean 'temperature'"),
    ("--config.temperature=0", "temperature"),
    ("--config.devices=99", "devices: expected 1 to 8"),
  ],
)
def test_bad_commands_exit_with_2_and_say_what_is_wrong(tmp_path, capsys, argument, message, small):
  with pytest.raises(SystemExit) as exit_:
    run([*small, f"--workdir={tmp_path / 'run'}", argument])
  assert exit_.value.code == 2
  assert message in capsys.readouterr().err


def test_a_teacher_may_teach_with_narrower_weights(tmp_path, monkeypatch, small):
  seen = []

  def fit(student, teacher, *arguments, **settings):
    if settings["teacher_variables"] is not None:
      seen.extend(str(leaf.dtype) for leaf in jax.tree.leaves(settings["teacher_variables"].params))
    return real(student, teacher, *arguments, **settings)

  real = stages.fit
  monkeypatch.setattr(stages, "fit", fit)
  command = [*small, f"--workdir={tmp_path}", "--stages=teacher,student"]
  main([*command, "--config.teacher_dtype=bfloat16"])
  assert set(seen) == {"bfloat16"}
  with pytest.raises(ValueError, match="teacher_dtype: expected 'bfloat16'.*got 'bf16'"):
    main([*command, "--config.teacher_dtype=bf16"])


def test_a_value_may_stand_apart_from_its_field(tmp_path, monkeypatch, small):
  found = []
  monkeypatch.setattr(
    "distill_jax.jobs.cli.print_plan", lambda job: found.append(job.config.student_widths)
  )
  main([*small, "--config.student_widths", "(8,)", f"--workdir={tmp_path}", "--dry_run"])
  assert found == [(8,)]


def test_a_folder_that_cannot_be_made_is_named(tmp_path, small):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match=r"folder: .*file/run"):
    main([*small, f"--workdir={tmp_path / 'file' / 'run'}"])


def test_a_missing_data_set_is_said_before_anything_is_compiled(tmp_path, monkeypatch, small):
  monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
  with pytest.raises((ImportError, ValueError), match="train"):
    main([*small, f"--workdir={tmp_path / 'run'}"])
  assert not (tmp_path / "run").exists()


@pytest.fixture
def fitted(monkeypatch):
  """What `fit` was called with and what it gave, by the network's name."""
  calls, fit = {}, stages.fit

  def recorded(student, teacher, objective, optimizer, source, **options):
    found = fit(student, teacher, objective, optimizer, source, **options)
    calls[options["title"]] = student, source, options, found
    return found

  monkeypatch.setattr(stages, "fit", recorded)
  return calls


def load(job, folder):
  """The weights of a trained student, and a batch of the validation split."""
  validation = job.data().validation
  batch = {name: values[:4] for name, values in validation.arrays.items()}
  return load_student(folder, job.student(), batch), validation, batch


def test_a_student_may_start_from_its_baseline(tmp_path, fitted, small):
  command = [*small, f"--workdir={tmp_path}", "--config.init_from=baseline"]
  with pytest.raises(
    ValueError, match="student-0 needs its baseline, and .*baseline-0 holds .*add 'baseline'"
  ):
    main([*command, "--stages=teacher,student"])
  main([*command, "--stages=baseline,student"])
  model = fitted["student-0"][0]
  baseline, _, batch = load(load_config("configs/digits.py"), tmp_path / "baseline-0")
  assert fingerprint(model.init(jax.random.key(1), batch)) == fingerprint(baseline)


def test_each_generation_is_taught_by_the_one_before(tmp_path, fitted):
  overrides = ["widths=(2,)", "generations=2"]
  command = ["--config=configs/digits_born_again.py", *QUICK, *[f"--config.{o}" for o in overrides]]
  main([*command, f"--workdir={tmp_path}", "--stages=teacher,student,report"])
  job = load_config("configs/digits_born_again.py", overrides)
  for before, after in (("teacher", "student-0"), ("student-0", "student-0-gen2")):
    taught_by = fitted[after][2]["teacher_variables"]
    assert fingerprint(taught_by) == fingerprint(load(job, tmp_path / before)[0]), after
  assert len({options["seed"] for _, _, options, _ in fitted.values()}) == 3
  entries = json.loads((tmp_path / "report" / "results.json").read_text())["entries"]
  students = {entry["variant"]: entry["scores"] for entry in entries if entry["role"] == "student"}
  assert list(students) == ["generation 1", "generation 2"]
  test = job.data().test
  logits = job_data.predict(job.student(), load(job, tmp_path / "student-0-gen2")[0], test)
  chosen = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(test)), test.arrays["label"]]
  assert students["generation 2"]["nll"] == pytest.approx(-chosen.mean(), rel=1e-5)


def test_generations_of_several_seeds_do_not_mix(tmp_path):
  settings = load_config("configs/digits_born_again.py", ["generations=3"])
  job = plan.Job(settings, tmp_path, (0, 7), settings.data(), {})
  networks = plan.networks(job, "student")
  students = {n.name: (n.seed, n.teacher_folder.name) for n in networks}
  assert students == {
    "student-0": (0, "teacher"),
    "student-7": (7, "teacher"),
    "student-0-gen2": (0, "student-0"),
    "student-7-gen2": (7, "student-7"),
    "student-0-gen3": (0, "student-0-gen2"),
    "student-7-gen3": (7, "student-7-gen2"),
  }
  assert len({n.own_seed for n in networks}) == 6
  assert [n.own_seed for n in networks[:2]] == [0, 7]  # the baselines', with which these are paired


def test_of_students_that_teach_one_another_one_is_exported(tmp_path, fitted):
  main(["--config=configs/digits_mutual.py", *QUICK, f"--workdir={tmp_path}"])
  assert not (tmp_path / "teacher").exists()
  job = load_config("configs/digits_mutual.py")
  variables, validation, _ = load(job, tmp_path / "student-0")
  both = fitted["student-0"][3].variables
  assert fingerprint(variables) == fingerprint(job.recipe("").exported(both)) and set(
    both.params
  ) == {
    "0",
    "1",
  }
  accuracy = (
    job_data.predict(job.student(), variables, validation).argmax(-1) == validation.arrays["label"]
  ).mean()
  written = json.loads((tmp_path / "student-0" / "result.json").read_text())["validation"]
  assert written["accuracy"] == pytest.approx(accuracy)
  results = json.loads((tmp_path / "report" / "results.json").read_text())
  costs = {e["role"]: e["scores"]["parameters"] for e in results["entries"]}
  assert costs == {"baseline": 2410, "student": 2410}


def test_a_transfer_set_is_not_the_teachers_and_needs_no_labels(configs, tmp_path, fitted):
  command = [f"--config={configs / 'digits_transfer.py'}", *DIGITS[1:], f"--workdir={tmp_path}"]
  main(command)
  teacher, baseline, student = (fitted[name][1] for name in ("teacher", "baseline-0", "student-0"))
  assert not set(teacher.ids) & set(student.ids)
  np.testing.assert_array_equal(teacher.ids, baseline.ids)
  assert (student.arrays["label"] == data.UNLABELED).all() and (baseline.arrays["label"] >= 0).all()
  assert "Student alone" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
  ("method", "stage"),
  [("student_train", "baseline"), ("baseline_train", "baseline"), ("teacher_train", "teacher")],
)
def test_labels_that_are_not_there_are_missed_before_anything_is_trained(tmp_path, method, stage):
  settings = load_config("configs/digits.py")
  setattr(settings, method, data.unlabeled)
  job = plan.Job(settings, tmp_path, (0,), settings.data(), {})
  with pytest.raises(
    ValueError, match=f"{stage}_train: no example has a label.* leave '{stage}' out of"
  ):
    checks.check(job, plan.STAGES)
  assert not list(tmp_path.iterdir())
  with pytest.raises(ValueError, match="student-0 needs its teacher"):
    stages.run_stages(job, ["student"])


def test_what_would_fail_in_a_later_stage_is_refused_at_once(tmp_path, small):
  for argument, message in (
    ("--config.student_training.batch_size=5000", "student_training.batch_size: expected at most"),
    ("--config.student_training.microbatches=5", "student_training: batch_size 64 does not divide"),
    ("--config.best=('acc','max')", "best: there is no score 'acc'; there are .*accuracy"),
  ):
    for more in ([], ["--dry_run"]):
      with pytest.raises(ValueError, match=message):
        main([*small, f"--workdir={tmp_path}", argument, *more])


def test_a_config_whose_code_changed_is_another_run(tmp_path):
  path = small_digits.write(tmp_path)
  text = path.read_text()
  command = [f"--config={path}", *DIGITS[1:], f"--workdir={tmp_path / 'run'}", "--stages=teacher"]
  main(command)
  path.write_text(text.replace("a small VGG teaches", "a VGG teaches") + "# a comment\n")
  main(command)
  path.write_text(text.replace("1 - self.hard_weight", "2 - self.hard_weight"))
  with pytest.raises(ValueError, match="code: "):
    main(command)
  (tmp_path / "run" / "run.json").write_text("{}")
  with pytest.raises(ValueError, match="run.json is damaged.*delete it"):
    main(command)


def test_lost_files_of_a_finished_network_are_written_again(tmp_path, capsys, small):
  command = [*small, f"--workdir={tmp_path}", "--stages=teacher"]
  main(command)
  weights = (tmp_path / "teacher" / "model.safetensors").read_bytes()
  (tmp_path / "teacher" / "model.json").unlink()
  (tmp_path / "teacher" / "result.json").unlink()
  capsys.readouterr()
  main(command)
  assert "skipped" not in capsys.readouterr().out
  assert (tmp_path / "teacher" / "model.safetensors").read_bytes() == weights


def test_a_report_is_told_with_the_command_that_trained(tmp_path):
  main([*DIGITS, f"--workdir={tmp_path}", "--stages=teacher,student"])
  main([*DIGITS, f"--workdir={tmp_path}", "--stages=report"])
  command = json.loads((tmp_path / "run.json").read_text())["command"]
  assert "--stages=teacher,student" in command
