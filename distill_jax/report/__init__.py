"""Writes tables and pictures of a finished run.

`write` makes report.md, report.html, results.json and PNGs. It knows no kind of problem: a `Task`
names the metrics and adds its own blocks (`Task.figures`). `outcome` returns its first table as
text.
`python -m distill_jax.report` makes tables over several runs.
"""

from distill_jax.errors import naming_extras

with naming_extras():
  from distill_jax.report.entries import BATCH, Entry
  from distill_jax.report.pages import write
  from distill_jax.report.terminal import outcome

__all__ = ["BATCH", "Entry", "outcome", "write"]
