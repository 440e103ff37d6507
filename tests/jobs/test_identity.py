"""The identity of a run: what makes it another one, and what run.json stores of it."""

import json

import pytest
import small_digits

from distill_jax.jobs.config import ConfigError
from distill_jax.jobs.identity import differences, hash_code, identify, settings_of, write_run_file
from distill_jax.jobs.overrides import load_config
from distill_jax.storage import sealed_json


@pytest.fixture
def path(tmp_path):
  return small_digits.write(tmp_path)


@pytest.fixture
def write(path, tmp_path):
  """Writes run.json as a command with these overrides would, and returns its content."""

  def write(*overrides, command="train", report_only=False, **changes):
    config = load_config(str(path), overrides)
    identity = identify(config, path, overrides, [command]) | changes
    write_run_file(tmp_path / "run", identity, type(config), report_only=report_only)
    return json.loads((tmp_path / "run" / "run.json").read_text())

  return write


def test_differences_name_fields_old_and_new():
  old = {"a": 1, "b": {"c": 2, "d": [3]}}
  new = {"a": 1, "b": {"c": 4, "d": [3]}, "e": 5}
  assert differences(old, new) == ["b.c: 2 -> 4", "e: None -> 5"]


def test_settings_are_values_that_json_can_hold():
  settings = settings_of(load_config("configs/digits.py"))
  assert settings["student_widths"] == [32] and settings["student_training"]["steps"] == 2000
  assert json.loads(json.dumps(settings)) == settings


def test_other_settings_raise_and_are_listed(write):
  write("temperature=2")
  with pytest.raises(ConfigError, match=r"\n  student_training.steps: 2000 -> 7\n  temperature: 2"):
    write("temperature=3", "student_training.steps=7")


def test_cache_and_devices_may_change(write):
  write()
  assert write("devices=1", "mesh.fsdp=1", "cache_batch_size=8")["settings"]["devices"] == 1


def test_another_device_is_reported(write, capsys):
  write(device="8 x cpu")
  capsys.readouterr()
  write(device="2 x cpu")
  output = capsys.readouterr().out
  assert "2 x cpu" in output and "8 x cpu" in output
  write(device="2 x cpu")
  assert capsys.readouterr().out == ""


def test_report_keeps_the_command_that_trained(write):
  write(command="train")
  assert "report" not in write(command="report", report_only=True)["command"]
  assert "again" in write(command="again")["command"]


def test_code_that_changed_is_another_run(write, path):
  write()
  text = path.read_text()
  docstring = text.replace("a small VGG teaches", "a VGG teaches")
  assert docstring != text
  path.write_text(docstring + "# A comment.\n")
  write()
  path.write_text(text.replace("1 - self.hard_weight", "2 - self.hard_weight"))
  with pytest.raises(ConfigError, match="code: "):
    write()


def test_code_of_imported_neighbors_counts(path):
  importer = path.parent / "job.py"
  importer.write_text("def get_config():\n  from quick_digits import Digits\n  return Digits()\n")
  before = hash_code(importer)
  path.write_text(path.read_text() + "\nMORE = 1\n")
  assert hash_code(importer) != before


def test_fields_of_a_newer_version_have_their_defaults(write, tmp_path):
  settings = write()["settings"]
  del settings["cache_batch_size"], settings["student_training"]["microbatches"]
  file = tmp_path / "run" / "run.json"
  file.write_text(sealed_json.dumps(sealed_json.read(file) | {"settings": settings}))
  with pytest.raises(ConfigError, match=r"student_training\.microbatches: 1 -> 2"):
    write("student_training.microbatches=2")
  assert write()["settings"]["cache_batch_size"] == 256


@pytest.mark.parametrize("text", ["{}", "[1]", "{"])
def test_corrupt_run_file_raises(write, tmp_path, text):
  write()
  (tmp_path / "run" / "run.json").write_text(text)
  with pytest.raises(ConfigError, match=r"--workdir: .*run\.json"):
    write()


def test_folder_that_cannot_be_written_raises(write, tmp_path):
  (tmp_path / "run").write_text("a file")
  with pytest.raises(ConfigError, match="--workdir: "):
    write()
