"""Tables and pictures from a finished run: `write` makes report.md, report.html, results.json and PNGs.

`python -m distill_jax.report` makes tables over several runs.
"""

from distill_jax.report.pages import write
from distill_jax.report.results import BATCH, Entry

__all__ = ["BATCH", "Entry", "write"]
