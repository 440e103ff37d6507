"""The command line: stages, skipping, refusing, reporting."""

import json
import sys

import pytest

from distill_jax.main import main, run

SMALL = [
  "--config=configs/digits.py",
  "--config.teacher_width=0.03125",
  "--config.teacher_training.steps=4",
  "--config.student_training.steps=6",
  "--config.eval_every=2",
  "--config.devices=1",
]


def test_all_stages_then_nothing_left_to_do(tmp_path, capsys):
  command = [*SMALL, f"--workdir={tmp_path}", "--seeds=0,1"]
  main(command)
  first = capsys.readouterr().out
  for name in ("teacher", "student-0", "student-1", "baseline-0", "baseline-1"):
    assert (tmp_path / name / "model.safetensors").exists()
    assert f"{name}: accuracy" in first
  report = (tmp_path / "report" / "report.md").read_text()
  assert "Student alone" in report and "configs/digits.py" in report
  main(command)
  assert capsys.readouterr().out.count("complete, skipped") == 5
  written = json.loads((tmp_path / "run.json").read_text())
  assert written["settings"]["student_training"]["steps"] == 6
  assert {"jax", "flax", "optax"} <= set(written["versions"])
  assert "--config.student_training.steps=6" in written["command"]
  assert written["overrides"] == [o.removeprefix("--config.") for o in SMALL[1:]]
  with pytest.raises(ValueError, match="other settings.*\n  temperature: 4.0 -> 2.0"):
    main([*command, "--config.temperature=2"])


def test_dry_run_describes_and_writes_nothing(tmp_path, capsys):
  main([*SMALL, f"--workdir={tmp_path / 'run'}", "--dry_run"])
  out = capsys.readouterr().out
  assert "student: 1,210 parameters, 4,840 bytes" in out
  assert "logits: ('batch', 10) float32" in out and "temporaries" in out
  assert not (tmp_path / "run").exists()


def test_the_student_needs_its_teacher(tmp_path):
  with pytest.raises(ValueError, match="needs its teacher"):
    main([*SMALL, f"--workdir={tmp_path}", "--stages=student"])
  with pytest.raises(ValueError, match="nothing to report"):
    main([*SMALL, f"--workdir={tmp_path}", "--stages=report"])


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
def test_bad_commands_exit_with_2_and_say_what_is_wrong(tmp_path, capsys, argument, message):
  with pytest.raises(SystemExit) as exit_:
    run([*SMALL, f"--workdir={tmp_path / 'run'}", argument])
  assert exit_.value.code == 2
  assert message in capsys.readouterr().err


def test_a_value_may_stand_apart_from_its_field(tmp_path, capsys):
  main([*SMALL, "--config.student_widths", "(8,)", f"--workdir={tmp_path}", "--dry_run"])
  assert "student: 610 parameters" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="--workdir: .*file/run cannot be written"):
    main([*SMALL, f"--workdir={tmp_path / 'file' / 'run'}"])


def test_a_missing_data_set_is_said_before_anything_is_compiled(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
  with pytest.raises((ImportError, ValueError), match="train"):
    main([*SMALL, f"--workdir={tmp_path / 'run'}"])
  assert not (tmp_path / "run").exists()
