"""What `--compile_for` prints of a config."""

import pytest
from jax.sharding import PartitionSpec as P

from distill_jax.jobs.compile_ahead import compile_config, describe_cost
from distill_jax.jobs.config import ConfigError
from distill_jax.jobs.overrides import load_config

DIGITS = "configs/digits.py"


@pytest.fixture(scope="module")
def config():
  return load_config(DIGITS, ["student_training.batch_size=64"])


def test_a_config_is_described_without_training(config):
  text = describe_cost(config, "cpu")
  assert text.startswith(
    f"student: {config.student_training.steps:,} steps of 64 rows on cpu: 8 x devices"
  )
  assert "mesh: data 8, fsdp 1, tensor 1; 64 images a step" in text
  assert "teacher forward" not in text and "live teacher" not in text


def test_the_mesh_and_the_rules_are_the_configs(monkeypatch):
  config = load_config(DIGITS, ["student_training.batch_size=64", "mesh.fsdp=4"])
  whole = compile_config("cpu", config, axes={"data": -1})
  monkeypatch.setattr(type(config), "rules", lambda self, role="": [("kernel", P("fsdp"))])
  monkeypatch.setattr(type(config), "teacher_rules", lambda self: [("kernel", P())])
  spread = compile_config("cpu", config, parts=True)
  assert spread.axes == {"data": 2, "fsdp": 4, "tensor": 1} and "teacher forward" in str(spread)
  assert spread.step.memory.aliased < whole.step.memory.aliased == whole.sizes["train state"]
  monkeypatch.setattr(type(config), "teacher_rules", lambda self: [("decoder", P())])
  with pytest.raises(ValueError, match="rules"):
    compile_config("cpu", config)


def test_the_teacher_has_the_dtype_that_it_teaches_with():
  wide, narrow = (
    compile_config(
      "cpu", load_config(DIGITS, ["student_training.batch_size=64", f"teacher_dtype={dtype}"])
    )
    for dtype in ("", "bfloat16")
  )
  assert 2 * narrow.sizes["teacher"] == wide.sizes["teacher"]
  assert narrow.sizes["train state"] == wide.sizes["train state"]


def test_each_network_can_be_asked_for(config):
  teacher, alone = (compile_config("cpu", config, role=role) for role in ("teacher", "baseline"))
  assert teacher.items == (config.teacher_training.batch_size, "images")
  assert alone.items == (64, "images") and alone.parts is None
  with pytest.raises(ValueError, match="role"):
    compile_config("cpu", config, role="pupil")


def test_no_teacher_is_trained_where_there_is_none():
  with pytest.raises(ConfigError, match="teacher"):
    compile_config("cpu", load_config("configs/digits_mutual.py"), role="teacher")


def test_a_student_of_a_cache_needs_no_teacher():
  settings = ["student_training.batch_size=64", "codec=top_k"]
  live = compile_config("cpu", load_config(DIGITS, settings[:1]))
  config = load_config("configs/digits_cached.py", settings)
  cached = compile_config("cpu", config)
  assert cached.sizes["teacher"] == 0 < live.sizes["teacher"]
  # Three of ten classes: 12 and 24 bits, a word each; what is left out, and the label's own.
  assert cached.sizes["batch"] == live.sizes["batch"] + 64 * (4 + 4 + 4 + 4)
  assert cached.step.products < live.step.products
  assert describe_cost(config, "cpu").startswith("student, from the cache: ")
  assert compile_config("cpu", config, role="baseline").sizes["batch"] == live.sizes["batch"]


def test_what_the_student_samples_is_compiled_too(config, monkeypatch):
  recipe, shapes = type(config).recipe, []

  def resampled(variables, key, batch):
    shapes.append(batch["image"].shape)
    return batch

  monkeypatch.setattr(
    type(config),
    "recipe",
    lambda self, variant: recipe(self, variant)._replace(on_policy=resampled),
  )
  compile_config("cpu", config)
  compile_config("cpu", config, role="baseline")
  assert set(shapes) == {(64, 8, 8, 1)}
