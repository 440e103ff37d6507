"""What `--compile_for` prints of a config."""

import pytest

from distill_jax import loading
from distill_jax.ahead import compile_config, describe
from distill_jax.config import ConfigError

DIGITS = "configs/digits.py"


@pytest.fixture(scope="module")
def config():
  return loading.load(DIGITS, ["student_training.batch_size=64"])


def test_a_config_is_described_without_training(config):
  text = describe(config, "cpu")
  assert text.startswith(f"student: {config.student_training.steps:,} steps of 64 rows on cpu: 8 x devices")
  assert "64 images a step" in text and "teacher forward" in text and "live teacher" not in text


def test_each_network_can_be_asked_for(config):
  teacher, alone = (compile_config("cpu", config, role=role) for role in ("teacher", "baseline"))
  assert teacher.items == (config.teacher_training.batch_size, "images")
  assert alone.items == (64, "images") and alone.parts is None
  with pytest.raises(ValueError, match="role: expected one of .*got 'pupil'"):
    compile_config("cpu", config, role="pupil")


def test_no_teacher_is_trained_where_there_is_none():
  with pytest.raises(ConfigError, match="this config trains none"):
    compile_config("cpu", loading.load("configs/digits_mutual.py"), role="teacher")
