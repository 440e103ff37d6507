"""Computes the cost of a train step on chips that this machine may not have, and of a model here.

libtpu's own compiler compiles train steps on a machine that needs no TPU. The compiled programs
show the memory of a chip, FLOPs, communication between chips, and a lower bound of a step's time.

    compile_for("v5e:4x4", student, teacher, objective, optimizer, batch).fits

No program of so many FLOPs is faster than its lower bound: real steps take longer. `runtime.py`
measures models on the device that is there.
"""

from distill_jax.errors import naming_extras

with naming_extras():
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
