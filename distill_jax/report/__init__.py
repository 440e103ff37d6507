"""Tables and pictures from a finished run: `write` makes report.md, report.html, results.json and PNGs."""

from distill_jax.report.pages import write
from distill_jax.report.results import Entry

__all__ = ["Entry", "write"]
