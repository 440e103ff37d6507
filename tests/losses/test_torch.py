"""Values and gradients equal PyTorch's; skipped without PyTorch.

Without it golden.json still has the values.
"""

import pathlib

import jax
import pytest
from peer_cases import CASES, Inputs

pytest.importorskip("torchdistill")


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_sides_agree(case, monkeypatch):
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parent.parent / "benchmarks")
  import losses as benchmark

  with jax.enable_x64(True):
    benchmark.check_same(case, case.make(Inputs(real=False)))
