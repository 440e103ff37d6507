"""Ahead of time: does it fit on chips that are not here, and what will a step cost?

Train steps are compiled by libtpu's own compiler on a machine that needs no TPU, and read: memory of a chip, FLOPs,
communication between chips, and the time that a step takes at least.

    print(describe(config, "v5e:4x4"))                      # a config's distillation step
    compile_for("v5e:4x4", student, teacher, objective, optimizer, batch).fits

A floor is what no program of so many FLOPs can beat: real steps take longer.
"""

from distill_jax.ahead.analysis import Analysis, Parts
from distill_jax.ahead.chips import CHIPS, Chip
from distill_jax.ahead.compiling import Compiled, Memory
from distill_jax.ahead.describe import compile_config, describe
from distill_jax.ahead.hlo import Collective, Loop
from distill_jax.ahead.steps import compile_for

__all__ = [
  "CHIPS",
  "Analysis",
  "Chip",
  "Collective",
  "Compiled",
  "Loop",
  "Memory",
  "Parts",
  "compile_config",
  "compile_for",
  "describe",
]
