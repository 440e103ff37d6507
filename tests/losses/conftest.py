"""What several files of tests share."""

import pytest


@pytest.fixture
def parts_by_tokens_too(monkeypatch):
  """Small losses by tokens come in several parts, as large ones do."""
  monkeypatch.setattr("distill_jax.losses.linear.PART", 128)
