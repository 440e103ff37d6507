"""Runs five cases of each sweep; `run.py` runs all."""

import random

import checkpoints
import disturbed
import pytest
from test_checkpoint import orbax_gives_up, settled  # noqa: F401


@pytest.fixture
def seed():
  seed = random.randrange(2**32)
  # pytest shows it where the test fails.
  print(f"seed {seed}")
  return seed


@pytest.mark.parametrize(
  ("sweep", "times"),
  [
    pytest.param(disturbed.sweep_kills, 1, marks=pytest.mark.slow),
    *(
      pytest.param(sweep, times, marks=pytest.mark.nightly)
      for sweep in (disturbed.sweep_kills, disturbed.sweep_sigterms, disturbed.sweep_losses)
      for times in (1, 5)
      if (sweep, times) != (disturbed.sweep_kills, 1)
    ),
  ],
)
def test_disturbed_training_ends_with_the_same_bits(tmp_path, seed, sweep, times):
  sweep(tmp_path, times, seed)


@orbax_gives_up
@pytest.mark.integration
def test_flipped_bits_are_detected_or_harmless(tmp_path, seed):
  checkpoints.sweep_flips(tmp_path, 5, seed)


@pytest.mark.parametrize(
  "fault",
  [
    pytest.param("kill", marks=pytest.mark.slow),
    *(pytest.param(fault, marks=pytest.mark.nightly) for fault in ("EIO", "ENOSPC")),
  ],
)
def test_save_whose_calls_fail_leaves_a_checkpoint(tmp_path, seed, fault):
  if checkpoints.build(tmp_path) is None:
    pytest.skip("needs a C compiler on Linux")
  assert checkpoints.sweep_calls(tmp_path, fault, 5, seed)[0] == 5
