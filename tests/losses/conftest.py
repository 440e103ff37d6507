"""A fixture of several test files."""

import pytest


@pytest.fixture
def small_parts(monkeypatch):
  """Computes small losses by tokens in several parts of the classes, like large ones."""
  monkeypatch.setattr("distill_jax.losses.linear.plan.PART", 128)
