"""Turns a config's epochs into steps, for which its data must be there."""

import copy

from distill_jax.jobs.config import Config, Splits, Training, check_config, error_prefix
from distill_jax.jobs.plan import select_train_data


def has_epochs(config: Config) -> bool:
  """Returns whether a training of the config has epochs in place of steps."""
  return bool(_with_epochs(config))


def with_steps(config: Config, splits: Splits | None = None) -> Config:
  """Returns the config with steps in place of epochs, checked; the same one if it has no epochs.

  An epoch of `teacher_training` is one of the teacher's examples, and one of any other training is
  one of the student's. The baseline has as many steps as the student.

  Args:
    config: from `load_config`.
    splits: from `config.data()`; None: they are read where they are needed.

  Raises:
    ConfigError: the config cannot be run with this number of steps, or a batch has more rows than
      there are examples.
  """
  trainings = _with_epochs(config)
  if not trainings:
    return config
  train = (splits or config.data()).train
  counted = copy.copy(config)
  for name, training in trainings.items():
    role = "teacher" if name == "teacher_training" else "student"
    with error_prefix(name):
      steps = training.count_steps(len(select_train_data(config, role, train)))
    setattr(counted, name, steps)
  check_config(counted)
  return counted


def _with_epochs(config: Config) -> dict[str, Training]:
  """Returns the trainings that have epochs in place of steps, by field."""
  fields = {name: value for name, value in vars(config).items() if isinstance(value, Training)}
  return {name: value for name, value in fields.items() if value.epochs > 0 and not value.steps}
