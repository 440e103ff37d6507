"""Ahead of time: does it fit on chips that are not here, and what will a step cost?

Train steps are compiled by libtpu's own compiler on a machine that needs no TPU, and read: memory of a chip, FLOPs,
communication between chips, and the time that a step takes at least.

    compile_for("v5e:4x4", student, teacher, objective, optimizer, batch).fits

A floor is what no program of so many FLOPs can beat: real steps take longer.
"""

from distill_jax.cost.analysis import Analysis, Parts
from distill_jax.cost.chips import CHIPS, Chip
from distill_jax.cost.compiling import Compiled, Memory
from distill_jax.cost.hlo import Collective, Loop
from distill_jax.cost.steps import compile_for

__all__ = [
  "CHIPS",
  "Analysis",
  "Chip",
  "Collective",
  "Compiled",
  "Loop",
  "Memory",
  "Parts",
  "compile_for",
]
