"""The command line: stages, resumed and rejected commands, exit codes."""

import contextlib
import io
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import small_digits

from distill_jax import data
from distill_jax.distributed import equality
from distill_jax.jobs import checks, plan, report_stage, stages, stored_report
from distill_jax.jobs import data as jobs_data
from distill_jax.jobs.cli import main, run
from distill_jax.jobs.config import Config, ConfigError, Training
from distill_jax.jobs.flags import parse_arguments
from distill_jax.jobs.overrides import load_config
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.storage.student import load_student

OVERRIDES = [
  "teacher_width=0.03125",
  "teacher_training.steps=4",
  "student_training.steps=6",
  "eval_every=2",
  "devices=1",
]
QUICK = [f"--config.{override}" for override in OVERRIDES]


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
  """A folder with quick_digits.py and configs/digits_transfer.py built on it."""
  folder = tmp_path_factory.mktemp("configs")
  small_digits.write(folder, "digits_transfer.py")
  return folder


@pytest.fixture(scope="module")
def small(configs):
  """A command of a few steps."""
  return [f"--config={configs / 'quick_digits.py'}", *QUICK]


@pytest.fixture(scope="module")
def complete_run(tmp_path_factory, small):
  """The folder of a complete run of two seeds, and what it printed."""
  folder = tmp_path_factory.mktemp("complete")
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    main([*small, f"--workdir={folder}", "--seeds=0,1"])
  return folder, output.getvalue()


@pytest.fixture
def copy_networks(complete_run, tmp_path):
  """Copies trained networks of the complete run into the folder of another one."""

  def copy(*names):
    for name in names:
      shutil.copytree(complete_run[0] / name, tmp_path / name)

  return copy


@pytest.fixture
def fitted(monkeypatch):
  """The arguments and the result of each call of `fit`, by the network's name."""
  calls = {}
  fit = stages.fit

  def record(student, teacher, objective, optimizer, source, **options):
    result = fit(student, teacher, objective, optimizer, source, **options)
    calls[options["run"].title] = student, source, options, result
    return result

  monkeypatch.setattr(stages, "fit", record)
  return calls


class _Fit(Exception):
  """Ends a job at its first call of `fit`, with the call's arguments."""


@pytest.fixture
def stop_at_fit(monkeypatch):
  def stop(student, teacher, objective, optimizer, source, **options):
    raise _Fit(student, source, options)

  monkeypatch.setattr(stages, "fit", stop)

  def arguments(command):
    with pytest.raises(_Fit) as stopped:
      main(command)
    return stopped.value.args

  return arguments


@pytest.fixture
def entries(monkeypatch):
  """The entries of a report, which is not written: its pictures take most of the time."""
  entries = []

  def write(folder, report_entries, **options):
    entries.extend(report_entries)
    return folder

  monkeypatch.setattr("distill_jax.report.write", write)
  return entries


def load(job, folder):
  """Returns the weights of a trained student, and a batch of the validation split."""
  batch = {name: values[:4] for name, values in job.data().validation.arrays.items()}
  return load_student(folder, job.student(), batch), batch


def logits(job, variables, source):
  outputs, _ = job.student().apply(*variables, source.arrays, train=False, key=None)
  return np.asarray(outputs["logits"])


def test_all_stages_write_networks_and_report(complete_run, small):
  folder, output = complete_run
  for name in ("teacher", "student-0", "student-1", "baseline-0", "baseline-1"):
    assert (folder / name / "model.safetensors").exists()
    assert (folder / name / "model.stablehlo").exists()
    assert f"{name}: accuracy" in output
  report = (folder / "report" / "report.md").read_text()
  assert "Baseline" in report and small[0].removeprefix("--config=") in report


def test_balance_of_a_config_is_that_of_the_run(small, tmp_path, stop_at_fit):
  command = [*small, f"--workdir={tmp_path}", "--stages=teacher"]
  _, source, options = stop_at_fit([*command, "--config.balance=label"])
  assert options["run"].balance == "label"
  config = Config(balance="label")
  batch = next(jobs_data.training_batches(config, source.take(source.arrays["label"] < 2), 40))
  assert np.bincount(batch["label"]).min() > 10
  with pytest.raises(ValueError, match=r"^balance: .*'label'.*'labels'"):
    next(jobs_data.training_batches(Config(balance="labels"), source, 40))


def test_report_of_the_same_networks_is_not_written_again(
  complete_run, small, tmp_path, monkeypatch, capsys
):
  folder = tmp_path / "run"
  shutil.copytree(complete_run[0], folder)
  written = []
  monkeypatch.setattr(report_stage, "write_report", lambda job: written.append(job) or "new")

  def writes(*flags):
    """Returns whether a call writes the report, and what it says of the outcome."""
    written.clear()
    main([*small, f"--workdir={folder}", "--seeds=0,1", *flags])
    return bool(written), "Over 2 seeds" in capsys.readouterr().out

  outcome = folder / "report" / "outcome.json"
  text = outcome.read_text()
  assert writes() == (False, True)
  outcome.write_text(text.replace("Over 2 seeds", "Over 9 seeds"))
  assert writes() == (True, False)
  outcome.write_text(text)
  assert writes("--stages=report") == (True, False)
  outcome.write_text(text)
  with (folder / "student-0" / "metrics.jsonl").open("a") as file:
    file.write("{")
  assert writes() == (True, False) and writes() == (False, False)


def test_network_without_progress_stops_early(small, tmp_path, capsys):
  frozen = ["teacher_training.learning_rate=1e-30", "teacher_training.steps=8", "patience=1"]
  options = [f"--config.{option}" for option in frozen]
  main([*small, *options, f"--workdir={tmp_path}", "--stages=teacher"])
  result = json.loads((tmp_path / "teacher" / "result.json").read_text())
  assert result["steps"] == 4 and "accuracy" in result["stopped"]
  assert f"teacher: stopped after step 4: {result['stopped']}" in capsys.readouterr().out


def test_callbacks_of_a_config_reach_fit(small, tmp_path, stop_at_fit, monkeypatch):
  loggers = {"teacher": lambda step, scores: None}
  monkeypatch.setattr(Config, "callbacks", lambda self, network: [loggers[network]])
  _, _, options = stop_at_fit([*small, f"--workdir={tmp_path}", "--stages=teacher"])
  assert options["run"].callbacks == [loggers["teacher"]]


def test_log_has_the_schedule_of_the_optimizer_only():
  training = Training(steps=100, warmup_steps=10, learning_rate=0.5)
  schedule = training.logged_schedule()
  assert [float(schedule(step)) for step in (0, 5, 10)] == [0.0, 0.25, 0.5]

  class Constant(Training):
    def optimizer(self):
      return optax.sgd(0.1)

  assert Constant().logged_schedule() is None


def test_run_file_identifies_the_run(complete_run):
  stored = json.loads((complete_run[0] / "run.json").read_text())
  assert stored["settings"]["student_training"]["steps"] == 6
  assert {"jax", "flax", "optax"} <= set(stored["versions"])
  assert "--config.student_training.steps=6" in stored["command"]
  assert stored["overrides"] == OVERRIDES


def test_same_command_skips_complete_networks(complete_run, capsys, small):
  command = [*small, f"--workdir={complete_run[0]}", "--seeds=0,1"]
  main([*command, "--stages=teacher,baseline,student"])
  assert capsys.readouterr().out.count("complete, skipped") == 5
  with pytest.raises(ConfigError, match=r"\n  temperature: 4.0 -> 2.0"):
    main([*command, "--config.temperature=2"])


def test_complete_run_loads_no_library_of_training_or_reports(complete_run, small):
  command = [*small, f"--workdir={complete_run[0]}", "--seeds=0,1"]
  script = (
    f"import sys; from distill_jax.jobs.cli import main; main({command})\n"
    "unused = 'keras matplotlib pandas tensorboardX tensorflow torch transformers'.split()\n"
    "print('loaded', [name for name in unused if name in sys.modules])\n"
  )
  command = [sys.executable, "-c", script]
  result = subprocess.run(command, check=True, capture_output=True, text=True)
  assert "report: complete, skipped" in result.stdout
  assert result.stdout.splitlines()[-1] == "loaded []"


def test_job_builds_its_networks_once(tmp_path, monkeypatch):
  config, calls = load_config("configs/digits.py"), []
  for name in ("teacher", "student", "recipe"):
    build = getattr(config, name)
    monkeypatch.setattr(
      config, name, lambda *args, name=name, build=build: calls.append(name) or build(*args)
    )
  job = plan.Job(config, tmp_path, (0, 1), config.data(), {"settings": {}})
  checks.check(job, plan.STAGES)
  stored_report.report_digest(job)
  assert len(plan.networks(job, "student")) == 2
  assert sorted(calls) == ["recipe", "student", "student", "teacher"]  # The recipe's student.


def test_report_alone_keeps_the_command_that_trained(tmp_path, monkeypatch, small):
  monkeypatch.setattr("distill_jax.jobs.cli.run_stages", lambda job, stages: None)
  for selection in ("--stages=teacher,student", "--stages=report"):
    main([*small, f"--workdir={tmp_path}", selection])
  assert "--stages=teacher,student" in json.loads((tmp_path / "run.json").read_text())["command"]


def test_lost_files_of_a_network_are_restored(copy_networks, tmp_path, capsys, small):
  copy_networks("teacher")
  folder = tmp_path / "teacher"
  weights = (folder / "model.safetensors").read_bytes()
  (folder / "model.json").unlink()
  (folder / "result.json").unlink()
  main([*small, f"--workdir={tmp_path}", "--stages=teacher"])
  assert "skipped" not in capsys.readouterr().out
  assert (folder / "model.safetensors").read_bytes() == weights


def test_dry_run_prints_sizes_and_writes_nothing(tmp_path, capsys, small):
  main([*small, f"--workdir={tmp_path / 'run'}", "--dry_run"])
  output = capsys.readouterr().out
  assert "student: 2,410 parameters, 9,640 bytes" in output
  assert "logits: ('batch', 10) float32" in output and "temporaries" in output
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--stages=teacher", "--seeds=0,1", "--profile_steps=1:2"])
def test_processes_compare_flags_and_data_before_training(tmp_path, monkeypatch, small, flag):
  def compare(name, value):
    compared[-1][name] = value
    if name == "run":
      raise InterruptedError

  compared = []
  monkeypatch.setattr(equality, "assert_equal", compare)
  for flags in ([], [flag]):
    compared.append({})
    with pytest.raises(InterruptedError):
      main([*small, f"--workdir={tmp_path}", *flags])
  first, second = compared
  assert first["command"] != second["command"] and first["run"] == second["run"]
  assert set(first["run"]["data"]) == {"train", "validation", "test"}
  assert len(set(first["run"]["data"].values())) == 3


def test_compile_for_prints_cost_and_writes_nothing(tmp_path, capsys, small):
  main([*small, f"--workdir={tmp_path / 'run'}", "--compile_for=cpu"])
  output = capsys.readouterr().out
  assert "student: 6 steps of 64 rows on" in output and "FLOPs" in output
  assert not (tmp_path / "run").exists()


def test_stages_need_earlier_ones(tmp_path, small):
  with pytest.raises(ConfigError, match="--stages: student-0 .* teacher"):
    main([*small, f"--workdir={tmp_path}", "--stages=student"])
  with pytest.raises(ConfigError, match="--stages"):
    main([*small, f"--workdir={tmp_path}", "--stages=report"])


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--stages=techer", "argument --stages: there is no stage 'techer'; did you mean 'teacher'"),
    ("--seeds=0,x", "argument --seeds: expected different integers"),
    ("--seeds=0,0", "argument --seeds: expected different integers"),
    ("--profile_steps=7", "argument --profile_steps: "),
    ("--config.temprature=3", "did you mean 'temperature'"),
    ("--config.lr=3", "'teacher_training.learning_rate' or 'student_training.learning_rate'"),
    ("--lr=3", "--config.student_training.learning_rate=3"),
    ("--tempratur=3", "--config.temperature=3"),
    ("--stage=report", "--stages=report"),
    ("extra", "no extra; lists have commas"),
    ("--config.temperature=0", "temperature"),
    ("--config.temperature", "--config.temperature=VALUE"),
    ("--config.devices=99", "devices: expected 1 to 8"),
    ("--num_processes=2", "--distributed: coordinator_address"),
  ],
)
def test_bad_commands_exit_with_2_and_name_the_flag(tmp_path, capsys, argument, message, small):
  with pytest.raises(SystemExit) as stop:
    run([*small, f"--workdir={tmp_path / 'run'}", argument])
  assert stop.value.code == 2
  assert message in capsys.readouterr().err


def test_hyphens_and_underscores_are_the_same(tmp_path):
  flags, _ = parse_arguments(["--config=a-b.py", "--dry-run", "--compile-for=v5e:4x4"])
  assert (flags.config, flags.dry_run, flags.compile_for) == ("a-b.py", True, "v5e:4x4")


def test_help_lists_the_fields_of_the_config(capsys, small):
  with pytest.raises(SystemExit) as stop:
    run([small[0], "--help"])
  assert stop.value.code == 0
  output = capsys.readouterr().out
  assert "--config.student_training.steps=2000\n" in output and "--workdir" in output


@pytest.mark.parametrize("seeds, says", [("3", True), ("0,1", False), ("0", False)])
def test_one_number_is_a_seed_and_that_is_said(tmp_path, capsys, small, seeds, says):
  main([*small, f"--workdir={tmp_path / 'run'}", f"--seeds={seeds}", "--dry_run"])
  assert ("--seeds=0,1,2" in capsys.readouterr().out) == says


def test_override_may_follow_its_field_after_a_space():
  arguments = ["--config=f.py", "--config.widths", "(8,)", "--config.a.b=c=d", "--dry_run"]
  flags, overrides = parse_arguments(arguments)
  assert flags.config == "f.py" and flags.dry_run
  assert overrides == ["widths=(8,)", "a.b=c=d"]


def test_folder_that_cannot_be_created_is_named(tmp_path, small):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match=r"folder: .*file/run"):
    main([*small, f"--workdir={tmp_path / 'file' / 'run'}"])


def test_missing_data_set_raises_before_compiling(tmp_path, monkeypatch, small):
  monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
  with pytest.raises((ImportError, ValueError), match="train"):
    main([*small, f"--workdir={tmp_path / 'run'}"])
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("argument", "field"),
  [
    ("--config.student_training.batch_size=5000", r"student_training\.batch_size: "),
    ("--config.student_training.microbatches=5", "student_training: batch_size: "),
    ("--config.best=acc", "best: .*'acc'.*accuracy"),
    ("--config.teacher_dtype=bf16", "teacher_dtype: .*'bf16'"),
  ],
)
def test_errors_of_later_stages_are_raised_at_once(tmp_path, small, argument, field):
  with pytest.raises(ConfigError, match=field):
    main([*small, f"--workdir={tmp_path / 'run'}", argument, "--dry_run"])
  with pytest.raises(ConfigError, match=field):
    main([*small, f"--workdir={tmp_path / 'run'}", argument])
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("method", "stage"),
  [("student_train", "baseline"), ("baseline_train", "baseline"), ("teacher_train", "teacher")],
)
def test_missing_labels_raise_before_training(tmp_path, method, stage):
  config = load_config("configs/digits.py")
  setattr(config, method, data.unlabeled)
  job = plan.Job(config, tmp_path, (0,), config.data(), {})
  with pytest.raises(ConfigError, match=f"{stage}_train: "):
    checks.check(job, plan.STAGES)
  assert not list(tmp_path.iterdir())


def test_hyperparameters_out_of_range_raise_before_training(tmp_path):
  config = load_config("configs/digits.py")
  config.temperature = 0.0
  job = plan.Job(config, tmp_path, (0,), config.data(), {})
  with pytest.raises(ConfigError, match="objective: .*temperature"):
    checks.check(job, plan.STAGES)


def test_teacher_dtype_narrows_the_weights(copy_networks, tmp_path, stop_at_fit, small):
  copy_networks("teacher")
  dtype = "--config.teacher_dtype=bfloat16"
  *_, options = stop_at_fit([*small, f"--workdir={tmp_path}", "--stages=student", dtype])
  leaves = jax.tree.leaves(options["teacher_variables"].params)
  assert {str(leaf.dtype) for leaf in leaves} == {"bfloat16"}


def test_student_may_start_from_its_baseline(copy_networks, tmp_path, stop_at_fit, small):
  command = [*small, f"--workdir={tmp_path}", "--config.init_from=baseline", "--stages=student"]
  copy_networks("teacher")
  with pytest.raises(ConfigError, match="--stages: student-0 .* baseline"):
    main(command)
  copy_networks("baseline-0")
  model, *_ = stop_at_fit(command)
  baseline, batch = load(load_config("configs/digits.py"), tmp_path / "baseline-0")
  assert fingerprint(model.init(jax.random.key(1), batch)) == fingerprint(baseline)


def test_transfer_set_is_unlabeled_and_not_the_teachers(
  configs, copy_networks, tmp_path, stop_at_fit
):
  command = [f"--config={configs / 'digits_transfer.py'}", *QUICK, f"--workdir={tmp_path}"]
  sources = {}
  for stage in ("teacher", "baseline", "student"):
    if stage == "student":
      copy_networks("teacher")
    _, sources[stage], _ = stop_at_fit([*command, f"--stages={stage}"])
  assert not set(sources["teacher"].ids) & set(sources["student"].ids)
  np.testing.assert_array_equal(sources["teacher"].ids, sources["baseline"].ids)
  assert (sources["student"].arrays["label"] == data.UNLABELED).all()
  assert (sources["baseline"].arrays["label"] >= 0).all()


@pytest.mark.nightly
def test_transfer_config_runs_to_its_report(configs, tmp_path):
  main([f"--config={configs / 'digits_transfer.py'}", *QUICK, f"--workdir={tmp_path}"])
  assert "Baseline" in (tmp_path / "report" / "report.md").read_text()


def test_each_generation_has_the_one_before_as_teacher(tmp_path, fitted, entries):
  overrides = ["widths=(2,)", "generations=2"]
  command = ["--config=configs/digits_born_again.py", *QUICK, *[f"--config.{o}" for o in overrides]]
  main([*command, f"--workdir={tmp_path}", "--stages=teacher,student,report"])
  config = load_config("configs/digits_born_again.py", overrides)
  for teacher, student in (("teacher", "student-0"), ("student-0", "student-0-gen2")):
    variables = fitted[student][2]["teacher_variables"]
    assert fingerprint(variables) == fingerprint(load(config, tmp_path / teacher)[0]), student
  assert len({options["seed"] for _, _, options, _ in fitted.values()}) == 3
  scores = {entry.variant: entry.scores for entry in entries if entry.role == "student"}
  assert list(scores) == ["generation 1", "generation 2"]
  test = config.data().test
  last = load(config, tmp_path / "student-0-gen2")[0]
  log_probabilities = np.asarray(jax.nn.log_softmax(logits(config, last, test)))
  nll = -log_probabilities[np.arange(len(test)), test.arrays["label"]].mean()
  assert scores["generation 2"]["nll"] == pytest.approx(nll, rel=1e-5)


def test_generations_of_several_seeds_do_not_mix(tmp_path):
  config = load_config("configs/digits_born_again.py", ["generations=3"])
  job = plan.Job(config, tmp_path, (0, 7), config.data(), {})
  networks = plan.networks(job, "student")
  assert {n.name: (n.seed, n.teacher_folder.name) for n in networks} == {
    "student-0": (0, "teacher"),
    "student-7": (7, "teacher"),
    "student-0-gen2": (0, "student-0"),
    "student-7-gen2": (7, "student-7"),
    "student-0-gen3": (0, "student-0-gen2"),
    "student-7-gen3": (7, "student-7-gen2"),
  }
  assert len({n.train_seed for n in networks}) == 6
  assert [n.train_seed for n in networks[:2]] == [0, 7]  # As the baselines they are paired with.


def test_one_student_of_a_mutual_cohort_is_exported(tmp_path, fitted, entries):
  command = ["--config=configs/digits_mutual.py", *QUICK, f"--workdir={tmp_path}"]
  main([*command, "--stages=teacher,student,report"])
  assert not (tmp_path / "teacher").exists()
  config = load_config("configs/digits_mutual.py")
  variables = load(config, tmp_path / "student-0")[0]
  cohort = fitted["student-0"][3].variables
  assert set(cohort.params) == {"0", "1"}
  assert fingerprint(variables) == fingerprint(config.recipe("").export_fn(cohort))
  validation = config.data().validation
  classes = logits(config, variables, validation).argmax(-1)
  result = json.loads((tmp_path / "student-0" / "result.json").read_text())
  accuracy = (classes == validation.arrays["label"]).mean()
  assert result["validation"]["accuracy"] == pytest.approx(accuracy)
  assert {entry.role: entry.cost["parameters"] for entry in entries} == {"student": 2410}
